"""CSV and TSV as people's programs write them: with semicolons, blanks after commas, or the line ends of an old Mac."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_cli import limits
from lora_cli.errors import LoraError

_LOOKED_AT = 50  # lines that show what values are separated by
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def separated(lines: Iterator[str], path: Path, *, tabs: bool) -> Iterator[dict[str, Any]]:
    """Rows by the names of the header. Every value is text, also one that looks like a number; an empty one is empty.

    Names lose the blanks around them; a column without a name is called by its place. Values of a .csv may be separated
    by semicolons, tabs or bars, if the header and the first lines show it. Raises LoraError with the line.
    """
    csv.field_size_limit(limits.ROW_BYTES)  # 131,072 on its own. Of the whole process; others may read too, so it stays
    before, head = _head(lines)
    delimiter = "\t" if tabs else _delimiter(head)
    begin = before + 1
    try:
        blanks = _blanks_follow(head, delimiter)
        reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True, skipinitialspace=blanks)
        names = [name.strip() for name in next(reader, [])]
        header = [name or f"column {number}" for number, name in enumerate(names, 1)]
        if len(set(header)) < len(header):
            raise csv.Error("two columns have the same name")
        begin = before + reader.line_num + 1
        for values in reader:
            if len(values) not in (0, len(header)):  # an empty line has none
                raise csv.Error(f"{len(values)} values, but the header has {len(header)} columns")
            if values:
                yield dict(zip(header, values, strict=True))
            begin = before + reader.line_num + 1
    except csv.Error as error:
        name, kind = _NAMES[delimiter], "TSV" if tabs else "CSV"
        fix = f'put values that hold {name}, quotes or line ends into quotes, and double the quotes inside: "a ""b"""'
        raise LoraError(f"broken {kind}: {error}", where=f"{path}:{begin}", fix=fix) from None


def _head(lines: Iterator[str]) -> tuple[int, list[str]]:
    """How many lines stand before the header (empty ones, and Excel's sep=;), and the first lines from it on."""
    before = 0
    for line in lines:
        if line.strip() and not (before == 0 and line.lower().startswith("sep=") and len(line.strip()) <= 5):
            return before, [line, *islice(lines, _LOOKED_AT)]
        before += 1
    return before, []


def _delimiter(head: list[str]) -> str:
    """What separates the values of a .csv: commas, unless only something else makes a table of all, or most, lines."""
    found = {delimiter: _table(head, delimiter) for delimiter in _NAMES}
    for enough in (1.0, 0.5):
        good = [delimiter for delimiter, (columns, share) in found.items() if columns > 1 and share >= enough]
        if good:
            return "," if "," in good else max(good, key=lambda delimiter: found[delimiter][0])
    return ","


def _table(head: list[str], delimiter: str) -> tuple[int, float]:
    """How many columns the header has, and which share of the rows has as many."""
    counts = []
    try:
        for values in csv.reader(iter(head), delimiter=delimiter, skipinitialspace=True):
            counts += [len(values)] if values else []
    except csv.Error:
        return 0, 0.0
    rows = counts[1:-1] if len(head) > _LOOKED_AT else counts[1:]  # the last may go on behind these lines
    return (counts or [0])[0], rows.count(counts[0]) / len(rows) if rows else 1.0


def _blanks_follow(head: list[str], delimiter: str) -> bool:
    """Whether the header shows that a blank stands behind each delimiter, in which quotes would not be seen."""
    names = next(csv.reader(iter(head), delimiter=delimiter), [])
    return len(names) > 1 and all(name.startswith(" ") for name in names[1:])
