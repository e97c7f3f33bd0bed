"""Prepared data on disk: memory-mapped Arrow, written once, every byte checked when opened, read by index."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash

from lora_cli.base.text import positions, vocabulary
from lora_cli.data.example import Example
from lora_cli.data.gate import Findings, Lengths, Weights, weight_range
from lora_cli.data.order import Groups, Order
from lora_cli.errors import LoraError
from lora_cli.foreign import kind, parse_json, read_bytes
from lora_cli.recipe import Recipe

_EXAMPLES_A_BATCH = 1024
_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # first, last of each
        "weights": pa.list_(pa.float32()),
        "file": pa.int32(),
        "row": pa.int64(),
    }
)


class ExampleWriter:
    """Writes examples one by one; memory does not grow with their number beyond a few bytes each."""

    def __init__(self, path: Path):
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._digest = hashlib.sha256()
        self._waiting: list[tuple[np.ndarray, Example, int]] = []
        self._lengths, self._targets, self._weights = array("i"), array("i"), array("f")
        self.count = 0
        self.largest_id = 0
        self.longest: tuple[int, str] = (0, "")

    def add(self, example: Example, ids: np.ndarray, file: int) -> None:
        """ids: those of the example, (tokens,) int32."""
        self._waiting.append((ids, example, file))
        self.count += 1
        if len(ids) > self.longest[0]:
            self.longest = (len(ids), example.source)
        if len(self._waiting) == _EXAMPLES_A_BATCH:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.close()

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """Hash of every token and mask, in order."""
        return self._digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example so far that was flushed: (examples,) int32."""
        return np.asarray(self._lengths)

    @property
    def targets(self) -> np.ndarray:
        return np.asarray(self._targets)

    @property
    def weights(self) -> np.ndarray:
        """Smallest and largest weight of the loss in each example: (examples, 2) float32."""
        return np.asarray(self._weights).reshape(-1, 2)

    def _flush(self) -> None:
        waiting = self._waiting
        self._waiting = []
        ids = np.concatenate([ids for ids, _, _ in waiting])
        lengths = np.array([len(ids) for ids, _, _ in waiting], np.int32)
        spans = [edge for _, example, _ in waiting for first, last, _ in example.spans for edge in (first, last)]
        counts = np.array([len(example.spans) for _, example, _ in waiting], np.int32)
        columns = [
            pa.ListArray.from_arrays(_offsets(lengths), pa.array(ids)),
            pa.ListArray.from_arrays(_offsets(2 * counts), pa.array(np.array(spans, np.int32))),
            pa.ListArray.from_arrays(
                _offsets(counts),
                pa.array(np.array([weight for _, example, _ in waiting for _, _, weight in example.spans], np.float32)),
            ),
            pa.array(np.array([file for _, _, file in waiting], np.int32)),
            pa.array(np.array([example.row for _, example, _ in waiting], np.int64)),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        for column in columns[:3]:
            for buffer in column.buffers():
                if buffer is not None:
                    self._digest.update(buffer)
        self._lengths.frombytes(lengths.tobytes())
        self._targets.extend(example.targets for _, example, _ in waiting)
        for _, example, _ in waiting:
            self._weights.extend(weight_range(example))
        self.largest_id = max(self.largest_id, int(ids.max()))


class ExampleStore:
    """The examples of a file, by index. files: names for the numbers in its column `file`."""

    def __init__(self, path: Path, files: list[str]):
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._files = files
        self._batch = lru_cache(maxsize=256)(self._columns)

    def __getitem__(self, index: int) -> Example:
        batch, at = divmod(int(index), _EXAMPLES_A_BATCH)
        columns: Any = self._batch(batch)
        (id_ends, ids), (span_ends, edges), (weight_ends, weights), file, row = columns
        edges = edges[span_ends[at] : span_ends[at + 1]].tolist()
        weights = weights[weight_ends[at] : weight_ends[at + 1]].tolist()
        spans = [(edges[2 * n], edges[2 * n + 1], weight) for n, weight in enumerate(weights)]
        return Example(ids[id_ends[at] : id_ends[at + 1]], spans, self._files[int(file[at])], int(row[at]))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the examples at these indices: (examples,) int64."""
        found = np.empty(len(indices), np.int64)
        batches = indices // _EXAMPLES_A_BATCH
        for batch in np.unique(batches):
            (ends, _), *_ = self._batch(int(batch))
            chosen = batches == batch
            found[chosen] = np.diff(ends)[indices[chosen] % _EXAMPLES_A_BATCH]
        return found

    def _columns(self, number: int) -> Any:
        batch = self._reader.get_batch(number)
        lists = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in batch.columns[:3]]
        return (*lists, batch.column(3).to_numpy(), batch.column(4).to_numpy())


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

    def __iter__(self) -> Iterator[Example]:
        return (self.store[index] for index in self.indices)

    @property
    def lengths(self) -> np.ndarray:
        return self.store.lengths(self.indices)


# ── index lists ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One list each, so that arrays of different length share a file."""
    columns = [
        pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), pa.array(array))
        for array in arrays.values()
    ]
    batch = pa.record_batch(columns, names=list(arrays))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: batch.column(name).values.to_numpy() for name in batch.schema.names}


def checksum(path: Path) -> str:
    """XXH3 of a file's bytes: it finds damage, not malice."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _offsets(lengths: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


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

    @property
    def prompting(self) -> str:
        """`template` if any source goes through a chat template, else `raw`."""
        return "raw" if self.template is None else "template"


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
            raise LoraError(
                "the tokenizer has tokens that the model does not", where=model, fix="use the model's own tokenizer"
            )
        longest, where = self.summary.longest
        seen = positions(config)
        if seen and longest > seen:
            raise LoraError(
                f"{longest} tokens, but {model} sees {seen} at most",
                where=where,
                fix=f"write data.max_seq_len: {seen}, with data.too_long: drop, truncate or split",
            )

    def order(self, recipe: Recipe) -> Order:
        return Order(self.rows, rows_per_micro_batch(recipe), micro_batches_per_step(recipe), recipe.train.seed)


def open_prepared(folder: Path) -> PreparedData | None:
    """What is in the folder, or None if it is missing or damaged in any byte."""
    try:
        if any(kind(folder / name) != "file" for name in (*PARTS, "summary.json")):
            return None
        stored = parse_json(read_bytes(folder / "summary.json"))
        if any(checksum(folder / name) != stored["checksums"].get(name) for name in PARTS):
            return None
        if hashlib.sha256(json.dumps(stored["summary"]).encode()).hexdigest() != stored["checksums"]["summary"]:
            return None
        summary = _summary_from(stored["summary"])
        examples = ExampleStore(folder / "examples.arrow", summary.names)
        train, validation = (
            Examples(examples, read_arrays(folder / f"{name}.arrow")["indices"]) for name in ("train", "validation")
        )
        return PreparedData(folder, summary, train, validation, Groups(**read_arrays(folder / "rows.arrow")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LoraError):  # whatever damage makes of it
        return None


def _summary_from(stored: dict[str, Any]) -> Summary:
    findings = stored["findings"]
    errors = {kind: [LoraError(**error) for error in each] for kind, each in findings["errors"].items()}
    places = {kind: [(file, row) for file, row in each] for kind, each in findings["places"].items()}
    return Summary(
        **stored
        | {
            "findings": Findings(findings["counts"], places, errors, set(findings["waived"])),
            "train": Lengths(**stored["train"]),
            "validation": Lengths(**stored["validation"]),
            "longest": tuple(stored["longest"]),
            "weights": stored["weights"] and Weights(**stored["weights"]),
        }
    )


def summary_values(summary: Summary) -> dict[str, Any]:
    """As JSON has it: without tuples, sets, errors and dataclasses."""

    def plain(value: Any) -> Any:
        if isinstance(value, LoraError):
            return {"what": value.what, "where": value.where, "fix": value.fix}
        return sorted(value) if isinstance(value, set) else vars(value)

    return json.loads(json.dumps(summary, default=plain))


def rows_per_micro_batch(recipe: Recipe) -> int:
    """Rows of the order in a micro-batch: packed rows, or examples, or one group that fills the budget of tokens."""
    tokens = recipe.train.tokens_per_micro_batch
    if tokens is None:
        rows = recipe.train.batch_size or recipe.train.micro_batch_size  # with auto, the loop cuts the whole step
        assert isinstance(rows, int)
        return rows
    return tokens // recipe.data.max_seq_len if recipe.data.packing else 1


def split_in_step(recipe: Recipe) -> bool:
    """Whether the examples of a step are split into micro-batches by their length: without packing, by count."""
    return not recipe.data.packing and recipe.train.tokens_per_micro_batch is None


def micro_batches_per_step(recipe: Recipe) -> int:
    return 1 if recipe.train.batch_size is not None else recipe.train.gradient_accumulation_steps
