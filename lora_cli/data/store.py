"""Prepared data on disk: memory-mapped Arrow, written once, every byte checked when opened, read by index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import TypeAdapter

from lora_cli.base.text import positions, vocabulary
from lora_cli.data.example import Example
from lora_cli.data.gate import Findings, Lengths, Share, Weights, facts_of
from lora_cli.data.order import Groups, Order
from lora_cli.errors import LoraError
from lora_cli.foreign import kind, parse_json, read_bytes
from lora_cli.recipe import Recipe

_EXAMPLES_A_BATCH = 1024
_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())  # spans: first, last of each
_SCHEMA = pa.schema({"ids": _INTS, "spans": _INTS, "weights": _FLOATS, "file": pa.int32(), "row": pa.int64()})


class ExampleWriter:
    """Writes examples one by one; memory does not grow with their number beyond a few bytes each."""

    def __init__(self, path: Path):
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._digest = hashlib.sha256()
        self._waiting: list[tuple[Example, int]] = []
        self._facts = [facts_of([])]
        self.count = 0
        self.largest_id = 0
        self.longest: tuple[int, str] = (0, "")

    def add(self, example: Example, file: int) -> None:
        self._waiting.append((example, file))
        self.count += 1
        if len(example.ids) > self.longest[0]:
            self.longest = (len(example.ids), example.source)
        if len(self._waiting) == _EXAMPLES_A_BATCH:
            self._flush()

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *_error: Any) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.close()

    @property
    def fingerprint(self) -> str:
        """Hash of every token and mask, in order."""
        return self._digest.hexdigest()

    @property
    def facts(self) -> np.ndarray:
        """As facts_of gives them, of the examples that are in the file."""
        return np.concatenate(self._facts)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        examples = [example for example, _ in waiting]
        columns = {
            "ids": [each.ids for each in examples],
            "spans": [[edge for first, last, _ in each.spans for edge in (first, last)] for each in examples],
            "weights": [[weight for _, _, weight in each.spans] for each in examples],
            "file": [file for _, file in waiting],
            "row": [each.row for each in examples],
        }
        batch = pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
        self._writer.write_batch(batch)
        for buffer in (buffer for column in batch.columns[:3] for buffer in column.buffers() if buffer is not None):
            self._digest.update(buffer)
        self._facts.append(facts_of(examples))
        self.largest_id = max(self.largest_id, *(int(np.max(each.ids)) for each in examples))


class ExampleStore:
    """The examples of a file, by index. files: names for the numbers in its column `file`."""

    def __init__(self, path: Path, files: list[str]):
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._files = files
        self._batch = lru_cache(maxsize=256)(self._reader.get_batch)

    def __getitem__(self, index: int) -> Example:
        batch, at = divmod(int(index), _EXAMPLES_A_BATCH)
        ids, edges, weights, file, row = (column[at] for column in self._batch(batch).columns)
        edges = edges.as_py()
        spans = list(zip(edges[::2], edges[1::2], weights.as_py(), strict=True))
        return Example(ids.values.to_numpy(), spans, self._files[file.as_py()], row.as_py())

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the examples at these indices: (examples,) int64."""
        found = np.empty(len(indices), np.int64)
        batches = indices // _EXAMPLES_A_BATCH
        for batch in np.unique(batches):
            chosen = batches == batch
            lengths = self._batch(int(batch)).column(0).value_lengths().to_numpy()
            found[chosen] = lengths[indices[chosen] % _EXAMPLES_A_BATCH]
        return found


class Examples(Sequence[Example]):
    """Some examples of a store, in the order of `indices`."""

    def __init__(self, store: ExampleStore, indices: np.ndarray):
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Examples: ...
    def __getitem__(self, at: int | slice) -> Example | Examples:
        if isinstance(at, slice):
            return Examples(self.store, self.indices[at])
        return self.store[self.indices[at]]

    @property
    def lengths(self) -> np.ndarray:
        return self.store.lengths(self.indices)


# ── index lists ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One list each, so that arrays of different length share a file."""
    ends = {name: pa.array([0, len(array)], pa.int64()) for name, array in arrays.items()}
    batch = pa.record_batch({name: pa.LargeListArray.from_arrays(ends[name], arrays[name]) for name in arrays})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: batch.column(name).values.to_numpy() for name in batch.schema.names}


def checksum(path: Path) -> str:
    """XXH3 of a file's bytes: it finds damage, not malice."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


# ── prepared data as a whole ──────────────────────────────────────────────────────────────────────────────────────────


PARTS = ("examples.arrow", "train.arrow", "rows.arrow", "validation.arrow")


@dataclass(frozen=True)
class Summary:
    """What a person should know of prepared data, and what a run needs to know before it loads the model."""

    formats: dict[str, str]  # source → format, with the reason it was taken
    files: dict[str, str]  # file or hub data set → what tells this version from others
    names: list[str]  # files, by the number that the examples carry
    findings: Findings
    train: Lengths
    validation: Lengths
    fingerprint: str
    largest_id: int
    longest: tuple[int, str]  # tokens, and where it is
    template: str | None = None  # its name
    own_template: str | None = None  # its text, where it is not the model's own
    stop_tokens: list[str] = field(default_factory=list)
    weights: Weights | None = None  # of the loss, of what is trained on; None: all are 1
    # of a folder or a pattern → files: the rows of each; left: others, and why they are not read
    listing: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)  # of the sources to train on
    system: str | None = None  # the system prompt that generation begins with, as training did

    @property
    def prompting(self) -> str:
        """`template` if any source goes through a chat template, else `raw`."""
        return "raw" if self.template is None else "template"


SUMMARY = TypeAdapter(Summary)  # to JSON and back


@dataclass(frozen=True)
class PreparedData:
    """Examples to train on and to evaluate on, memory-mapped. rows: what the order shuffles, of indices into train."""

    folder: Path
    summary: Summary
    train: Examples
    validation: Examples
    rows: Groups

    @property
    def fingerprint(self) -> str:
        """Hash of every token and mask in order: the same exactly when the run sees the same data."""
        return self.summary.fingerprint

    @property
    def findings(self) -> Findings:
        return self.summary.findings

    def require_fit(self, config: Any, model: str) -> None:
        """Raises LoraError for an example that the model has no embeddings or no positions for."""
        if self.summary.largest_id >= vocabulary(config):
            fix = "use the model's own tokenizer"
            raise LoraError("the tokenizer has tokens that the model does not", where=model, fix=fix)
        (longest, where), seen = self.summary.longest, positions(config)
        if seen and longest > seen:
            fix = f"write data.max_seq_len: {seen}, with data.too_long: drop, truncate or split"
            raise LoraError(f"{longest} tokens, but {model} sees {seen} at most", where=where, fix=fix)

    def order(self, recipe: Recipe) -> Order:
        return Order(self.rows, rows_per_micro_batch(recipe), micro_batches_per_step(recipe), recipe.train.seed)


def write_summary(folder: Path, summary: Summary) -> None:
    """Written last: with it, and with the checksums of all else, prepared data are whole."""
    values = SUMMARY.dump_python(summary, mode="json")
    stored = {"summary": values, "checksums": _checksums(folder, values), "stamps": stamps(folder)}
    (folder / "summary.json").write_text(json.dumps(stored), encoding="utf-8")


def _checksums(folder: Path, summary: Any) -> dict[str, str]:
    own = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
    return {name: checksum(folder / name) for name in PARTS} | {"summary": own}


def stamps(folder: Path) -> dict[str, str]:
    """What the file system says of the files alone: their numbers, and when they were last touched.

    Both are new wherever they are copied or unpacked to, and nobody can choose them.
    """
    found = {name: os.lstat(folder / name) for name in PARTS}
    return {name: f"{each.st_ino} {each.st_ctime_ns}" for name, each in found.items()}


def open_prepared(folder: Path) -> PreparedData | None:
    """What is in the folder, or None if it is missing or damaged in any byte."""
    try:
        if any(kind(folder / name) != "file" for name in (*PARTS, "summary.json")):
            return None
        stored = parse_json(read_bytes(folder / "summary.json"))
        if _checksums(folder, stored["summary"]) != stored["checksums"]:
            return None
        summary = SUMMARY.validate_python(stored["summary"])
        examples = ExampleStore(folder / "examples.arrow", summary.names)
        held, rows = (read_arrays(folder / f"{name}.arrow") for name in ("validation", "rows"))
        train = read_arrays(folder / "train.arrow")["indices"]
        validation = Examples(examples, held["indices"])
        return PreparedData(folder, summary, Examples(examples, train), validation, Groups(**rows))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LoraError):  # whatever damage makes of it
        return None


def rows_per_micro_batch(recipe: Recipe) -> int:
    """Rows of the order in a micro-batch: packed rows, or examples, or one group that fills the budget of tokens."""
    tokens = recipe.train.tokens_per_micro_batch
    if tokens is None:
        rows = recipe.train.batch_size or recipe.train.micro_batch_size  # with auto, the loop cuts the whole step
        assert isinstance(rows, int)
        return rows
    return tokens // recipe.data.max_seq_len if recipe.data.packing else 1


def by_length(recipe: Recipe) -> bool:
    """Whether the examples of a step are split into micro-batches by their length: without packing, by count."""
    return not recipe.data.packing and recipe.train.tokens_per_micro_batch is None


def micro_batches_per_step(recipe: Recipe) -> int:
    return 1 if recipe.train.batch_size is not None else recipe.train.gradient_accumulation_steps
