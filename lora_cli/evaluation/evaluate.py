"""`lora eval`: base and adapter, side by side, on the same tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.adapters.layer import adapters_disabled
from lora_cli.adapters.opened import Opened, open_model
from lora_cli.data.batches import collate
from lora_cli.data.examples import Example, detect_format, fit_length, make_examples, target_bytes
from lora_cli.data.prepare import prepare
from lora_cli.data.sources import read_rows
from lora_cli.errors import LoraError
from lora_cli.evaluation.perplexity import Score, score
from lora_cli.recipe import Recipe
from lora_cli.recipe_file import load_recipe

_DEFAULT_LENGTH = 1024  # tokens of context, where nothing says more


def evaluate_run(
    run: Path, data: Path | None, *, stride: int | None = None, device: str | None = None
) -> dict[str, Score]:
    """Scores of a run's base model and adapter, on its validation data or on `data`."""
    if not (run / "recipe.yaml").is_file():
        raise LoraError(
            "this is no run folder: recipe.yaml is missing",
            where=str(run),
            fix="name a run folder, or use --model and --data",
        )
    recipe = load_recipe(run / "recipe.yaml")
    if data is None and recipe.data.validation is None:
        raise LoraError("this run has no validation data", where=str(run), fix="name a file with --data")
    opened = open_model(
        recipe.base_model,
        run,
        quantization=recipe.quantization,
        dtype=recipe.dtype,
        device=device or recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        revision=recipe.revision,
    )
    examples = (
        _own_validation(recipe, opened)
        if data is None
        else _file_examples(data, opened, recipe.data.max_seq_len, stride)
    )
    return compare(opened, *examples)


def evaluate_model(
    model: str | None,
    adapter: Path | None,
    data: Path,
    *,
    max_seq_len: int | None = None,
    stride: int | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Score]:
    """Scores of any base model, and of an adapter on it, on a data file."""
    opened = open_model(
        model, adapter, quantization=quantization, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    longest = getattr(opened.model.config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    if max_seq_len is not None and max_seq_len > longest:
        raise LoraError(
            f"--max-seq-len {max_seq_len} is above what the model can see ({longest})", fix=f"use {longest} or less"
        )
    return compare(opened, *_file_examples(data, opened, max_seq_len or min(longest, _DEFAULT_LENGTH), stride))


def compare(opened: Opened, examples: list[Example], text_bytes: int) -> dict[str, Score]:
    """`base`, and `adapter` if there is one, on the same examples."""
    pad_id: Any = opened.tokenizer.eos_token_id
    lay_out = partial(collate, packed=False, pad_id=pad_id, device=opened.device)
    budget = max(4096, *(len(example.ids) for example in examples))
    measure = partial(score, opened.model, examples, lay_out, budget, text_bytes)
    with adapters_disabled(opened.model):
        scores = {"base": measure()}
    if opened.adapter is not None:
        scores["adapter"] = measure()
    return scores


def _own_validation(recipe: Recipe, opened: Opened) -> tuple[list[Example], int]:
    examples = prepare(recipe.data, opened.tokenizer, recipe.train.seed).validation
    return examples, target_bytes(examples, opened.tokenizer)


def _file_examples(data: Path, opened: Opened, max_seq_len: int, stride: int | None) -> tuple[list[Example], int]:
    """Examples of a file. Text longer than max_seq_len is read through windows that move by `stride` tokens."""
    if stride is not None and not 0 < stride < max_seq_len:
        raise LoraError(f"--stride {stride} must be between 1 and {max_seq_len - 1}", fix="half of the window is usual")
    rows = read_rows(data)
    data_format = detect_format(rows)
    examples = make_examples(rows, opened.tokenizer, data_format)
    text_bytes = target_bytes(examples, opened.tokenizer)
    policy: Any = "split" if data_format == "text" else "error"
    fitting, _ = fit_length(examples, max_seq_len, policy, data_format, stride or max_seq_len // 2)
    return fitting, text_bytes
