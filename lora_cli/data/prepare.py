"""The whole way from the recipe's data section to training and validation examples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data.examples import Example, detect_format, fit_length, make_examples
from lora_cli.data.sources import Row, file_hash, read_rows
from lora_cli.errors import LoraError
from lora_cli.recipe import DataRecipe


@dataclass(frozen=True)
class PreparedData:
    """Examples to train on and to evaluate on, and what a person should know of them."""

    train: list[Example]
    validation: list[Example]
    format: str
    too_long: int  # training rows above max_seq_len, and what happened to them is the recipe's too_long
    files: dict[str, str]  # path → sha256

    @property
    def fingerprint(self) -> str:
        """Hash of every token and mask in order: the same exactly when the run sees the same data."""
        digest = hashlib.sha256()
        for example in [*self.train, *self.validation]:
            digest.update(np.asarray(example.ids, dtype=np.int64).tobytes())
            digest.update(np.asarray(example.trained, dtype=np.uint8).tobytes() + b"|")
        return digest.hexdigest()


def prepare(recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """Read, hold out, tokenize and mask. Raises LoraError, with file and row, for whatever is wrong with the data."""
    rows = read_rows(Path(recipe.train))
    files = {recipe.train: file_hash(Path(recipe.train))}
    held_out: list[Row] = []
    if isinstance(recipe.validation, str):
        held_out = read_rows(Path(recipe.validation))
        files[recipe.validation] = file_hash(Path(recipe.validation))
    elif recipe.validation is not None:
        rows, held_out = hold_out(rows, recipe.validation, seed)
    data_format = detect_format(rows, recipe.format)
    train, long = fit_length(
        make_examples(rows, tokenizer, data_format), recipe.max_seq_len, recipe.too_long, data_format
    )
    validation = validation_examples(held_out, recipe, tokenizer) if held_out else []
    return PreparedData(train, validation, data_format, long, files)


def validation_examples(rows: list[Row], recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    data_format = detect_format(rows, recipe.format)
    return fit_length(make_examples(rows, tokenizer, data_format), recipe.max_seq_len, recipe.too_long, data_format)[0]


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows by a seeded choice; both parts keep the file's order."""
    count = round(len(rows) * fraction)
    if not 0 < count < len(rows):
        raise LoraError(
            f"validation: {fraction} of {len(rows)} rows is {count} rows",
            where=rows[0].file,
            fix="use another fraction, more data, or a validation file",
        )
    chosen = set(np.random.default_rng([seed, 0x5EED]).permutation(len(rows))[:count].tolist())
    return [row for at, row in enumerate(rows) if at not in chosen], [
        row for at, row in enumerate(rows) if at in chosen
    ]
