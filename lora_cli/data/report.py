"""The lines that describe prepared data, the same before training and in `lora check`."""

from __future__ import annotations

import os
from typing import Any

from lora_cli.data.gate import KINDS, Findings
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
        f"{count:,} {KINDS[kind].title}{f': {findings.rows(kind)}' if findings.places[kind] else ''}"
        for kind, count in ((each, findings.counts.get(each, 0)) for each in KINDS if each != "too_long")
        if count
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
        f"{steps:,} steps",
    ]


def _validation(examples: int) -> str:
    return counted(examples, "validation example") if examples else "no validation data"


def _source_lines(summary: Summary) -> list[str]:
    """Each source's format and why, and the files of those that have several."""
    return [
        line
        for source, form in summary.formats.items()
        for line in (f"{source}: {form}", *listing_lines(source, summary.listing.get(source, {})))
    ]


def _example_lines(summary: Summary) -> list[str]:
    lengths = ", ".join(f"{name} {value:,}" for name, value in summary.train.percentiles.items())
    weights = [] if summary.weights is None else [summary.weights.said()]
    return [*weights, f"tokens of an example: {lengths}"]
