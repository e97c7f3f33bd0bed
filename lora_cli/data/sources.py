"""Reading rows from data files, with errors that name file and line.

JSON, CSV and text are read as they stand, by the standard library: type guessing (of pandas and pyarrow, inside
`datasets`) turns a completion "42" of a CSV file into a number and "2024-01-01" of a JSON file into a date. Parquet has
types of its own and is read by `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; the csv module stops at 131,072 on its own


@dataclass(frozen=True)
class Row:
    """One row of a data file. number: counted from 1, in the file's order."""

    file: str
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}: row {self.number}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a data file; a .txt file is one row, `text`.

    Raises LoraError for a file that is missing, empty, of an unknown kind, not UTF-8, or broken (with the line).
    """
    if not path.is_file():
        raise LoraError(
            "no such data file" if not path.exists() else "this is a folder, not a data file",
            where=str(path),
            fix=_nearby(path),
        )
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise LoraError(
            f"unknown kind of data file {path.suffix or '(no ending)'}",
            where=str(path),
            fix=f"use {', '.join(ENDINGS)}",
        )
    if path.stat().st_size == 0:
        raise LoraError("the data file is empty", where=str(path), fix="check what wrote it")
    if ending != ".parquet":
        _require_utf8(path)
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _text}[ending]
    rows = [Row(str(path), number, values) for number, values in enumerate(read(path), 1)]
    if not rows:
        raise LoraError("the data file has no rows", where=str(path), fix="check what wrote it")
    return rows


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:  # as bytes, which are split at line feeds alone: JSON may hold U+2028
        for number, line in enumerate(stream, 1):
            text = line.decode("utf-8-sig").strip()
            if text:
                yield _json_row(text, path, number)


def _json_row(text: str, path: Path, line: int) -> dict[str, Any]:
    try:
        row = _parsed(text)
    except json.JSONDecodeError as broken:
        place = f"{path}:{line}:{broken.pos + 1}"
        raise LoraError(f"broken JSON: {broken.msg}", where=place, fix="mend or remove this line") from None
    except (ValueError, RecursionError) as broken:
        raise LoraError(f"broken JSON: {broken}", where=f"{path}:{line}", fix="mend or remove this line") from None
    return _checked_row(row, f"{path}:{line}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """A list of objects, or one object; JSON Lines under this ending are read as such."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        parsed = _parsed(text)
    except json.JSONDecodeError as broken:
        if broken.msg == "Extra data" and text[: broken.pos].endswith("\n"):
            yield from _json_lines(path)
            return
        place = f"{path}:{broken.lineno}:{broken.colno}"
        raise LoraError(f"broken JSON: {broken.msg}", where=place, fix="mend the file") from None
    except (ValueError, RecursionError) as broken:
        raise LoraError(f"broken JSON: {broken}", where=str(path), fix="mend the file") from None
    for number, row in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
        yield _checked_row(row, f"{path}: row {number}")


def _parsed(text: str) -> Any:
    """JSON, with what the standard library lets pass refused (ValueError): repeated keys, halves of characters."""
    value = json.loads(text, object_pairs_hook=_without_repeats)
    if "\\ud" in text.lower():  # the only way for half of a surrogate pair to come in
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _checked_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        shown = json.dumps(row, ensure_ascii=False)[:40]
        raise LoraError(f"a row must be a JSON object, this is {shown}", where=where, fix='write {"column": …}')
    return row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Every value is text, also one that looks like a number; an empty one is empty text."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    begin = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise csv.Error("two columns have the same name")
            begin = reader.line_num + 1
            for values in reader:
                if len(values) not in (0, len(header)):  # an empty line has none
                    raise csv.Error(f"{len(values)} values, but the header has {len(header)} columns")
                if values:
                    yield dict(zip(header, values, strict=True))
                begin = reader.line_num + 1
    except csv.Error as error:
        fix = 'put values that hold commas, quotes or line ends into quotes, and double the quotes inside: "a ""b"""'
        raise LoraError(f"broken CSV: {error}", where=f"{path}:{begin}", fix=fix) from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Streamed, so that `datasets` fills no cache."""
    from datasets import load_dataset

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log is in the exception
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True, batch_size=1000)
        yield from map(dict, rows)
    except Exception as error:  # pyarrow and datasets each raise their own
        reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
        raise LoraError(f"cannot be read as Parquet: {reason}", where=str(path), fix="write or copy it again") from None


def _text(path: Path) -> Iterator[dict[str, Any]]:
    yield {"text": path.read_text(encoding="utf-8-sig")}


def _require_utf8(path: Path) -> None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise LoraError(
                    f"not UTF-8 text: byte {line[error.start]:#04x}",
                    where=f"{path}:{number}",
                    fix="convert it, for example with iconv -t UTF-8",
                ) from None


def _nearby(path: Path) -> str:
    import difflib

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "check the path; relative paths start at the recipe's folder"
