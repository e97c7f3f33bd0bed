"""Prepared data as it stands on disk: what a run opens, checked in every byte."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.base.text import positions, vocabulary
from lora_cli.data.gate import Findings, Lengths, Weights
from lora_cli.data.order import Order
from lora_cli.data.packing import Groups
from lora_cli.data.store import Examples, ExampleStore, checksum, read_groups, read_indices
from lora_cli.errors import LoraError
from lora_cli.foreign import kind, parse_json, read_bytes
from lora_cli.recipe import Recipe

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
    longest: tuple[int, str]  # tokens, and where it stands
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
    """What stands in the folder, or None if it is missing or damaged in any byte."""
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
        train, validation = (Examples(examples, read_indices(folder / f"{n}.arrow")) for n in ("train", "validation"))
        return PreparedData(folder, summary, train, validation, read_groups(folder / "rows.arrow"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LoraError):  # whatever damage makes of it
        return None


def _summary_from(stored: dict[str, Any]) -> Summary:
    findings = stored["findings"]
    errors = {
        kind: [LoraError(error["what"], where=error["where"], fix=error["fix"]) for error in each]
        for kind, each in findings["errors"].items()
    }
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
    findings = summary.findings
    errors = {
        kind: [{"what": error.what, "where": error.where, "fix": error.fix} for error in each]
        for kind, each in findings.errors.items()
    }
    stored = {"counts": findings.counts, "places": findings.places, "waived": sorted(findings.waived), "errors": errors}
    return {name: getattr(summary, name) for name in Summary.__dataclass_fields__} | {
        "findings": stored,
        "train": asdict(summary.train),
        "validation": asdict(summary.validation),
        "weights": summary.weights and asdict(summary.weights),
    }


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
