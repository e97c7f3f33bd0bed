"""What one transformer block costs beside its matrix products: bytes of a token kept for the backward pass.

    python benchmarks/blocks.py [SECTION ...] [--json FILE]

kept   bytes that autograd keeps of a token in one block, for ten architectures and the shape of Llama-3.1-8B's: as it
       was when inputs of adapted layers were saved, as it is now that they are made again, and PEFT's layers as TRL
       trains them (A and B in bf16; what TRL does by itself is outside of the blocks)

Work: random models of two blocks in bf16, rank 16 on every linear layer, 256 tokens, attention by SDPA if there is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf

TOKENS, RANK = 256, 16
IDS: dict[str, Any] = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_hidden_layers": 2,
}
FULL: dict[str, Any] = IDS | {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SMALL: dict[str, Any] = FULL | {"num_key_value_heads": 2}
LLAMA_8B: dict[str, Any] = IDS | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "mistral": lambda: hf.MistralConfig(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=64),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=64),
    "granite": lambda: hf.GraniteConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "cohere": lambda: hf.CohereConfig(**SMALL),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**FULL),
    "gpt2": lambda: hf.GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=512),
    "Llama-3.1-8B": lambda: hf.LlamaConfig(**LLAMA_8B),
}


def base(name: str) -> Any:
    from lora_cli.base.attention import attention_implementation
    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    config = CONFIGS[name]()
    for key in [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]:
        setattr(config, key, 0.0)
    how = attention_implementation(config)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=how)


def ours(name: str) -> tuple[Any, Callable[[], Any]]:
    """(a model ready to train, a call that gives its loss)."""
    from lora_cli.adapters.attach import attach
    from lora_cli.adapters.targets import find_targets
    from lora_cli.adapters.trained import cast_once
    from lora_cli.base.recompute import save_only_inputs
    from lora_cli.data.batches import collate
    from lora_cli.data.example import Example
    from lora_cli.evaluation.loss import summed_loss

    model = base(name)
    layers = attach(model, find_targets(model, "all-linear", rank=RANK, alpha=RANK))
    save_only_inputs(model)
    example = Example(np.arange(TOKENS), [(1, TOKENS, 1.0)])
    batch = collate([example], packed=True, pad_id=0, device=torch.device("cpu"))

    def loss() -> Any:
        with cast_once(layers, model.dtype):
            return summed_loss(model, batch)

    return model.train(), loss


def peft(name: str) -> tuple[Any, Callable[[], Any]]:
    from peft import LoraConfig, get_peft_model

    settings: Any = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = base(name)
    model.set_attn_implementation("sdpa")
    get_peft_model(model, LoraConfig(**settings)).to(torch.bfloat16)
    ids = torch.arange(TOKENS)[None]
    return model.train(), lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


@contextmanager
def as_it_was() -> Iterator[None]:
    """Inputs of adapted layers are saved; of norms and MLPs only RMSNorm and gated MLPs of three layers save less."""
    from lora_cli.adapters import layer
    from lora_cli.base import recompute

    with (
        mock.patch.object(layer, "how_made", lambda x, how=layer.how_made: how(x.detach())),
        mock.patch.object(recompute, "is_elementwise", return_value=False),
        mock.patch.object(recompute, "_GATED", recompute._GATED[:1]),
    ):
        yield


# ── kept ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(made: tuple[Any, Callable[[], Any]]) -> float:
    """Bytes of a token in the last block."""
    from lora_cli.adapters.targets import block_lists
    from lora_cli.base.activations import measured

    model, loss = made
    blocks = [block for name in block_lists(model) for block in model.get_submodule(name)]
    with measured(blocks) as sizes:
        loss()
    return sizes[-1] / TOKENS


def section_kept() -> dict[str, dict[str, float]]:
    result = {}
    print(f"{'bytes of a token':16}{'before':>10}{'now':>10}{'now/before':>12}{'PEFT':>10}{'now/PEFT':>10}")
    for name in CONFIGS:
        with as_it_was():
            before = kept(ours(name))
        now, theirs = kept(ours(name)), kept(peft(name))
        result[name] = {"before": before, "now": now, "peft": theirs}
        print(f"{name:16}{before:10,.0f}{now:10,.0f}{now / before:12.3f}{theirs:10,.0f}{now / theirs:10.3f}")
    return result


SECTIONS = {"kept": section_kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    results = {name: SECTIONS[name]() for name in arguments.sections or SECTIONS}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
