"""The lines that describe prepared data, the same before training and in `lora check`."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from typing import Any

from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Findings
from lora_cli.data.order import FEW_STEPS
from lora_cli.data.store import PreparedData, Summary
from lora_cli.recipe import Recipe

_MOST_LISTED = 20
_DONE = {"error": "left out", "drop": "left out", "truncate": "cut at the end", "split": "cut into pieces"}


def counted(count: int, name: str) -> str:
    """Such as 1 row, 2,000 rows."""
    plural = "es" if name.endswith("ch") else "s"
    return f"{count:,} {name}{'' if count == 1 else plural}"


def data_lines(data: PreparedData, recipe: Recipe) -> list[str]:
    """Formats and why, lengths, target tokens, how full the sequences are, and steps."""
    summary, settings = data.summary, recipe.data
    tokens, limit = summary.train.tokens, settings.max_seq_len
    lines = _source_lines(summary)
    if summary.template is not None:
        lines.append(f"chat template: {summary.template}")
    if summary.stop_tokens:
        lines.append(f"trained turns end with {', '.join(summary.stop_tokens)}")
    lines.append(f"{counted(len(data.train), 'example')} an epoch, {_validation(len(data.validation))}")
    if not tokens:
        return lines
    share = summary.train.target_tokens / tokens
    lines.append(f"{tokens:,} tokens an epoch, {summary.train.target_tokens:,} target tokens ({share:.0%})")
    lines += _example_lines(summary)
    order = data.order(recipe)
    if settings.packing:
        full = tokens / len(data.rows) / limit
        lines.append(f"packed into {counted(len(data.rows), 'sequence')} of {limit:,} tokens, {full:.1%} full")
    else:
        lines.append("not packed; the examples of a step are grouped by length")
    total = order.total_steps(recipe.train.epochs, recipe.train.max_steps)
    epochs, a_step = total / order.steps_per_epoch, tokens / order.steps_per_epoch
    lines.append(f"{counted(total, 'step')} ({epochs:.2f} epochs), about {a_step:,.0f} tokens a step")
    if note := few_steps_note(data, recipe):
        lines.append(f"note: {note}")
    over = summary.findings.counts.get("too_long")
    if over and "too_long" not in summary.findings.stopping(settings.allow):
        lines.append(f"{counted(over, 'row')} above {limit:,} tokens: {_DONE[settings.too_long]}")
    return lines


def listing_lines(source: str, listing: dict[str, dict[str, Any]]) -> list[str]:
    """The files of a folder or a pattern: what is read, with its rows, and what is not."""

    folder = source.removesuffix(" (validation)")

    def name(path: str) -> str:
        return os.path.relpath(path, folder) if os.path.isdir(folder) else os.path.basename(path)

    files = listing.get("files", {}).items()
    read = [f"  {name(path)}" + ("" if rows is None else f": {counted(rows, 'row')}") for path, rows in files]
    left = [f"  {name(path)}: not read, {why}" for path, why in listing.get("left", {}).items()]
    return [*_first(read, "more files"), *_first(left, "more files that are not read")]


def _first(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _MOST_LISTED
    return [*lines[:_MOST_LISTED], *([f"  and {more:,} {what}"] if more > 0 else [])]


def finding_lines(findings: Findings) -> list[str]:
    """What the checks found that does not stop this run."""
    return [
        f"{KINDS[kind].counted(findings.counts[kind])}{', left out' if findings.drops(kind) else ''}"
        f"{f': {rows}' if (rows := findings.rows(kind)) else ''}"
        for kind in KINDS
        if kind != "too_long" and findings.counts[kind]
    ]


def stream_lines(summary: Summary, validation: int, steps: int) -> list[str]:
    """What the first window of a stream shows; the rest is checked as it comes."""
    window = summary.train
    return [
        *_source_lines(summary),
        f"streaming; in the first window {window.examples:,} examples, {window.tokens:,} tokens, "
        f"{window.target_tokens:,} target tokens ({window.target_tokens / window.tokens:.0%})",
        *_example_lines(summary),
        _validation(validation),
        counted(steps, "step"),
        *([f"note: {_hardly(steps)}; write train.max_steps: {2 * FEW_STEPS} or more"] if steps < FEW_STEPS else []),
    ]


def few_steps_note(data: PreparedData, recipe: Recipe) -> str | None:
    """What to write where a run would end after so few optimizer steps that it is hardly trained, else None.

    Smaller steps come first, because they cost nothing: fewer micro-batches a step, then smaller ones; then more
    epochs. Each change is the smallest that comes to twice as many steps as are few, counted on these data.
    """
    train, changes = recipe.train, dict[str, Any]()
    total = data.order(recipe).total_steps(train.epochs, train.max_steps)
    if total >= FEW_STEPS or not len(data.rows):
        return None

    def steps(**more: Any) -> int:
        changed = train.model_copy(update=changes | more)
        return data.order(recipe.model_copy(update={"train": changed})).total_steps(changed.epochs, changed.max_steps)

    enough = min(2 * FEW_STEPS, train.max_steps or 2 * FEW_STEPS)
    if enough < FEW_STEPS:
        changes["max_steps"] = enough = 2 * FEW_STEPS
    if train.micro_batch_size == "auto":
        sizes = {"batch_size": train.batch_size}
    else:
        sizes = {"gradient_accumulation_steps": train.gradient_accumulation_steps}
        if train.tokens_per_micro_batch is None:
            sizes["micro_batch_size"] = train.micro_batch_size
    for name, size in sizes.items():
        if isinstance(size, int) and size > 1 and steps() < FEW_STEPS:
            changes[name] = max(1, bisect_left(range(1, size), True, key=lambda each: steps(**{name: each}) < enough))
    if steps() < FEW_STEPS:
        changes["epochs"] = math.ceil(enough / steps(epochs=1.0, max_steps=None))
    written = ", ".join(f"train.{name}: {value}" for name, value in changes.items())
    more = "" if [*changes] == ["max_steps"] else ", or add data"
    return f"{_hardly(total)}; write {written} for {steps()} steps{more}"


def _hardly(steps: int) -> str:
    return f"only {counted(steps, 'optimizer step')}, after which an adapter is hardly trained"


def _validation(examples: int) -> str:
    return counted(examples, "validation example") if examples else "no validation data"


def _source_lines(summary: Summary) -> list[str]:
    """Each source's format and why, the files of those that have several, and beside other sources what it gives."""
    shares = {each.source: each for each in summary.shares if len(summary.shares) > 1}
    lines = []
    for source, form in summary.formats.items():
        lines += [f"{source}: {form}", *listing_lines(source, summary.listing.get(source, {}))]
        if gives := shares.get(source):
            tokens = f"{gives.tokens:,} tokens, {gives.target_tokens:,} target tokens"
            lines.append(f"  {counted(gives.examples, 'example')}, {tokens}: {gives.share:.0%} of the run")
    return lines


def _example_lines(summary: Summary) -> list[str]:
    lengths = ", ".join(f"{name} {value:,}" for name, value in summary.train.percentiles.items())
    weights = [] if summary.weights is None else [summary.weights.said()]
    return [*weights, f"tokens of an example: {lengths}"]
