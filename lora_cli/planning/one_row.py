"""One row of the data: as its file has it, what the checks find in it, and what it becomes (`lora check --row`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.files.sources import Source
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Findings
from lora_cli.data.prepare import Opened, sources_of
from lora_cli.data.preview import print_tokens, tokens_as_dicts
from lora_cli.data.row_encoder import ROWS_TO_DETECT, RowEncoder, fit_length
from lora_cli.errors import LoraError, from_here, shortened
from lora_cli.recipe import Recipe, SourceRecipe
from lora_cli.screen import say_on, styled

_MOST_FILES = 5  # that an error names
_LONGEST_VALUE = 1000  # characters of a value on a terminal


@dataclass(frozen=True)
class OneRow:
    """example: all of it, also if it is too long; None where nothing of the row is trained, as `found` says."""

    row: Row
    example: Example | None
    found: list[dict[str, Any]]  # as of Findings.as_list; what comparing rows finds among them

    def as_dict(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokens = None if self.example is None else tokens_as_dicts(self.example, tokenizer)
        found = [{key: each[key] for key in ("kind", "stops", "dropped", "message", "fix")} for each in self.found]
        where = {"source": self.row.file, "row": self.row.number, "line": self.row.line}
        return where | {"values": _plain(self.row.values), "findings": found, "tokens": tokens}


def look_at_row(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, known: Findings, wanted: str) -> OneRow:
    """wanted: `8`, or `faq.csv:8` where several files have a row 8. known: what the checks found in all rows.

    Raises LoraError if there is no such row, or if there are several.
    """
    data, sources = recipe.data, [each for several in sources_of(recipe) for each in several]
    own, source, row = _found(sources, *_parsed(wanted))
    encoder = RowEncoder(data, tokenizer, list(islice(source.rows(), ROWS_TO_DETECT)), own, several=len(sources) > 1)
    findings = Findings(drop=list(data.drop))
    (encoded,) = encoder.encode(iter([row]), findings)
    if encoded.example is not None:
        fit_length(encoded.example, data.max_seq_len, data.too_long, encoder.format.name, findings)
    place = (row.file, row.number, row.line)
    for kind in KINDS:  # repeated rows are found by comparing them
        if kind not in findings.counts and place in known.places.get(kind, ()):
            findings.add(kind, place)
    stops = known.stopping(data.allow)
    found = [each | {"stops": each["kind"] in stops} for each in findings.as_list(data.allow)]
    return OneRow(row, encoded.example, found)


def print_row(one: OneRow, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    say = say_on(console)
    console.print(styled(from_here(one.row.where), "bold"))
    for name, value in _plain(one.row.values).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        say(f"  {name}: {shortened(text, _LONGEST_VALUE)}")
    for each in one.found:
        mark = "left out" if each["dropped"] else "stops" if each["stops"] else "note"
        say(f"{mark:9}{each['message']}")
        say(f"  fix: {each['fix']}")
    if one.example is None:
        say("no example is made of it")
        return
    say(f"{len(one.example.ids):,} tokens, {one.example.targets:,} trained")
    print_tokens(console, one.example, tokenizer)


def _plain(values: Any) -> dict[str, Any]:
    """Values as JSON can hold them: what tables have beside that, such as dates, is text."""
    return json.loads(json.dumps(values, default=str, ensure_ascii=False))


def _parsed(wanted: str) -> tuple[str, int]:
    """(file, "" for any; number)."""
    file, _, number = wanted.rpartition(":")
    if not number.isascii() or not number.isdecimal() or not 0 < int(number[:12]) < 10**11:
        what = f"--row {shortened(wanted, 60)} names no row"
        raise LoraError(what, fix="write its number, such as --row 8, or --row faq.csv:8 where there are several files")
    return file, int(number)


def _found(sources: list[Opened], file: str, number: int) -> tuple[SourceRecipe, Source, Row]:
    found: dict[str, tuple[SourceRecipe, Source, Row]] = {}
    rows: dict[str, int] = {}  # of each file
    for own, source in sources:
        for row in source.rows():
            rows[row.file] = row.number
            if row.number == number and (not file or _is(row.file, file)):
                found.setdefault(row.file, (own, source, row))
    if len(found) == 1:
        return next(iter(found.values()))
    details = [f"{name}: {count:,} rows" for name, count in rows.items() if not file or _is(name, file)]
    if found:
        details = list(found)
        what, fix = f"{len(found)} files have a row {number}", f"name the file: --row {next(iter(found))}:{number}"
    elif details:
        what, fix = f"there is no row {number}", "choose a row that exists; rows are counted from 1"
    else:
        what, fix = f"no file of the data is called {file}", f"name one of its files, such as {next(iter(rows))}"
    more = len(details) - _MOST_FILES
    raise LoraError(what, details=[*details[:_MOST_FILES], *([f"and {more} more"] if more > 0 else [])], fix=fix)


def _is(path: str, file: str) -> bool:
    """Whether a person who writes `file` means this path: its end, or where it is from here."""
    parts = Path(file).parts
    return Path(path).parts[-len(parts) :] == parts or Path(file).absolute() == Path(path).absolute()
