"""Prints what the recipes by card (`lora init --list`) need, by the estimator of `lora init`.

    python scripts/cards.py

None of it was measured on a GPU. Shapes are those of the models' published config.json; no network is used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from lora_cli.adapters.targets import find_targets
from lora_cli.base.load import skeleton_of
from lora_cli.base.source import BaseSource
from lora_cli.planning.memory import GIB, Memory, ModelShape, estimate_memory, parse_size, shape_of
from lora_cli.planning.skeleton import BaseModel
from lora_cli.recipe import Recipe, load_recipe

CARDS = Path(__file__).parents[1] / "lora_cli" / "planning" / "by_card"
_ALIKE = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SHAPES: dict[str, dict[str, Any]] = {  # from config.json at https://huggingface.co/<name>
    "Qwen/Qwen3-4B-Instruct-2507": {
        **_ALIKE, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True, "max_position_embeddings": 262144,
    },
    "Qwen/Qwen3-8B": {
        **_ALIKE, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-14B": {
        **_ALIKE, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def shape(recipe: Recipe) -> ModelShape:
    """Of the recipe's model with its adapter, without weights or network."""
    nowhere = BaseSource(recipe.base_model, Path())
    config, tokenizer = Qwen3Config(**SHAPES[recipe.base_model]), Any
    base = BaseModel(nowhere, tokenizer, config, skeleton_of(nowhere, config, False), None, False)  # type: ignore
    adapter = recipe.adapter
    targets = find_targets(base.skeleton, adapter.target_modules, rank=adapter.rank, alpha=adapter.alpha)
    return shape_of(base, {target.name: target.rank for target in targets}, torch.bfloat16)


def needed(recipe: Recipe, of: ModelShape, *, checkpointing: str = "full") -> Memory:
    """At most, with every token of a micro-batch a target."""
    train = recipe.train
    tokens = int(train.micro_batch_size) * recipe.data.max_seq_len
    return estimate_memory(
        of,
        quantization=recipe.quantization,
        tokens=tokens,
        target_tokens=tokens,
        gradient_checkpointing="none" if train.gradient_checkpointing == "none" else checkpointing,
        optimizer_bytes=2 if "8bit" in train.optimizer else 8,
    )


def main() -> None:
    rows = []
    for path in sorted(CARDS.glob("*.yaml"), key=lambda path: parse_size(path.stem)):
        recipe = load_recipe(path)
        of = shape(recipe)
        memory, card = needed(recipe, of), parse_size(path.stem)
        rows.append(
            f"{path.stem:5} {recipe.base_model:28} {of.parameters / 1e9:5.2f} billion  rank {recipe.adapter.rank}: "
            f"{of.adapter / 1e6:.1f} million  {recipe.train.micro_batch_size} × {recipe.data.max_seq_len}  {memory}  "
            f"{memory.total / card:.0%} of the card, without gradient checkpointing "
            f"{needed(recipe, of, checkpointing='none').total / GIB:.1f} GiB"
        )
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
