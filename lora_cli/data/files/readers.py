"""Rows of one data file, with errors that name file and line.

JSON, CSV and text are read as they are, by the standard library: type guessing (of pandas and pyarrow, inside
`datasets`) turns a completion "42" of a CSV file into a number and "2024-01-01" of a JSON file into a date. Parquet and
Arrow have types of their own: see tables.py.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli import limits
from lora_cli.data.files.encodings import NAMES, Recoded, is_utf8, is_western, marked
from lora_cli.data.files.tables import TABLE_KINDS, Values
from lora_cli.errors import LoraError, command, refuse_if
from lora_cli.files import require_regular
from lora_cli.limits import LimitReached

_UNPACK = {".gz": "gzip", ".zst": "zstd"}  # what text kinds may be compressed with
_PARSED = {b"{": 72, b"[": 64, b",": 32, b'"': 25}  # bytes in Python for each of these marks in JSON
_LOOKED_AT = 50  # lines that show what the values of a CSV file are separated by
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
Placed = tuple[int | None, Values]  # the line where a row begins, and the row
_QUOTED = re.compile(rb'"[^"]*"')


@dataclass(frozen=True)
class Row:
    """One row of a data file. number: counted from 1, in the file's order.

    filled: it comes from a table, where a struct has null for every member that only other rows have.
    line: of its file where it begins, counted from 1; None where lines are not rows.
    """

    file: str
    number: int
    values: Values
    filled: bool = False
    line: int | None = None

    @property
    def where(self) -> str:
        return f"{self.file}: row {numbered(self.number, self.line)}"


def numbered(row: int, line: int | None) -> str:
    """The number of a row, with its line in the file where that is another, as behind a header or a quoted line end."""
    return str(row) if line in (None, row) else f"{row} (line {line})"


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without what it is compressed with; None for files of other kinds."""
    packed = path.suffix.lower() in _UNPACK
    kind = Path(path.stem if packed else path.name).suffix.lower()
    return kind if kind in (_TEXT_KINDS if packed else _KINDS) else None


def require_kind(path: Path) -> str:
    """How a file is read. Raises LoraError for one of an unknown kind, and for what is not a regular file.

    And for a name that nothing can write down: the run's files say which data it was trained on.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise LoraError("the name of this file is not text in UTF-8", where=str(path), fix="rename it") from None
    kind = kind_of(path)
    if kind is None:
        fix = f"use {', '.join(_KINDS)}; all but the last two also with .gz or .zst"
        if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
            fix = "save the sheet as CSV in UTF-8, and name that file"
        ending = "".join(path.suffixes[-2:]) or "(no ending)"
        raise LoraError(f"unknown kind of data file {ending}", where=str(path), fix=fix)
    require_regular(path)
    return kind


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a data file, one at a time; a .txt file is one row, `text`.

    Raises LoraError for an empty file of another kind, one of an unknown kind, not UTF-8, or broken (with the line).
    """
    kind = require_kind(path)
    empty = path.stat().st_size == 0 and kind not in (".txt", ".md")  # there it is an empty row, which data.drop knows
    refuse_if(empty, "the data file is empty", where=path, fix="check what wrote it")
    if path.suffix.lower() in _UNPACK:
        entry = path.stat()
        _require_modest(path, entry.st_size, entry.st_mtime_ns)
    number = 0
    table = kind in TABLE_KINDS
    rows = ((None, values) for values in TABLE_KINDS[kind](path)) if table else _TEXT_KINDS[kind](path)
    for number, (line, values) in enumerate(rows, 1):
        yield Row(str(path), number, values, table, line)
    refuse_if(number == 0, "the data file has no rows", where=path, fix="check what wrote it")


@lru_cache(maxsize=64)
def _require_modest(path: Path, size: int, _written: int) -> None:
    """Raises LimitReached for a small packed file that holds far too much, before its rows take time one by one."""
    if size <= limits.UNPACKED_FIRST:
        with _opened(path) as stream:
            while stream.read(1 << 20):
                pass


class _Counted(io.RawIOBase):
    """The bytes that come out of a packed file. Raises LimitReached beyond what a file of its size may hold."""

    def __init__(self, stream: Any, path: Path):
        self._stream, self._counted = stream, limits.Unpacked(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._counted.add(count)
        return count


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The text of a file, decompressed, as UTF-8 where its encoding is known."""
    encoding = encoding_of(path)
    with _unpacked(path) as stream:
        yield stream if encoding is None else io.BufferedReader(Recoded(stream, encoding, path), 1 << 20)


def encoding_of(path: Path) -> str | None:
    """The encoding of a text file that is not in UTF-8 and is read all the same; None for any other file."""
    entry = path.stat()
    return _encoding(path, entry.st_size, entry.st_mtime_ns)


@lru_cache(maxsize=1024)
def _encoding(path: Path, _size: int, _written: int) -> str | None:
    def look(at: Callable[[BinaryIO], Any]) -> Any:
        with _unpacked(path) as stream:
            return at(stream)

    guessed = kind_of(path) in _SAVED_BY_PROGRAMS
    return look(marked) or ("cp1252" if guessed and not look(is_utf8) and look(is_western) else None)


def encoding_said(file: str) -> LoraError | None:
    """That a file is not read as UTF-8, and how a word of it reads then; None for what is."""
    path = Path(file)
    encoding = encoding_of(path) if kind_of(path) in _TEXT_KINDS and path.is_file() else None
    if encoding is None:
        return None
    why = "it begins with the mark of that encoding"
    if encoding == "cp1252":
        with _opened(path) as stream:
            text = stream.read(1 << 20).decode(errors="ignore")
        word = re.search(r"\w*[^\W\x00-\x7f]\w*|[^\x00-\x7f]", text)
        why = "it is not UTF-8 and can be this" + (f", such as in {word[0]!r}" if word else "")
    return LoraError(f"the text is read as {NAMES[encoding]}: {why}", where=file)


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. Raises LoraError for a damaged archive, LimitReached if it holds too much."""
    packing = _UNPACK.get(path.suffix.lower())
    if packing is None:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(str(path), packing) as stream:
            yield io.BufferedReader(_Counted(stream, path), 1 << 20)
    except OSError as error:
        if error.errno is not None:  # of the disk; pyarrow gives a damaged archive no number
            raise
        what = f"the compressed file is damaged: {error}"
        raise LoraError(what, where=str(path), fix="write or copy it again") from None


def _text_of(path: Path) -> str:
    packed = path.suffix.lower() in _UNPACK
    with _opened(path) as stream:
        data = stream.read(limits.UNPACKED_WHOLE + 1 if packed else -1)
    if packed:
        parsed = len(data) + sum(bytes_each * data.count(mark) for mark, bytes_each in _PARSED.items())
        if len(data) > limits.UNPACKED_WHOLE or (kind_of(path) == ".json" and parsed > limits.PARSED_BYTES):
            what = "unpacked, this file is too large to be read at once"
            raise LimitReached(what, where=str(path), fix="write it as .jsonl, which is read line by line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, line, data[error.start]) from None


def _not_utf8(path: Path, line: int, byte: int) -> LoraError:
    kind = kind_of(path) or ""
    converted = path.with_name(f"{path.name[: path.name.lower().index(kind)]}-utf8{kind}")
    packing = _UNPACK.get(path.suffix.lower())
    unpack = f"{packing} -dc" if packing else "cat"
    convert = f"{unpack} {command(path)} | iconv -f WINDOWS-1252 -t UTF-8 > {command(converted)}"
    guess = " (Western texts of Windows; another -f if it is something else)"
    what = f"not UTF-8 text: byte {byte:#04x}"
    return LoraError(what, where=f"{path}:{line}", fix=f"convert it with `{convert}`{guess}, and name {converted}")


def _lines(path: Path) -> Iterator[str]:
    """Split as bytes, which are split at line feeds alone: JSON and CSV may hold U+2028.

    Where the first line shows it, they are split at CR too. A mark of the byte order may begin any line, since files
    are put together of several.
    """
    mac, number = False, 0
    with _opened(path) as stream:
        while whole := stream.readline(limits.ROW_BYTES + 1):
            if len(whole) > limits.ROW_BYTES:
                what = f"this line is longer than {limits.ROW_BYTES:,} bytes"
                fix = "write one row a line, and cut very long text"
                raise LimitReached(what, where=f"{path}:{number + 1}", fix=fix)
            if number == 0:
                mac = b"\r" in _QUOTED.sub(b"", whole.rstrip(b"\r\n"))
            for line in whole.splitlines(keepends=True) if mac else (whole,):
                number += 1
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number, line[error.start]) from None
                yield text.removeprefix("\ufeff")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _json_lines(path: Path) -> Iterator[Placed]:
    for number, line in enumerate(_lines(path), 1):
        if text := line.strip():
            try:
                row = _parsed(text)
            except (ValueError, RecursionError) as broken:
                raise _broken(broken, path, "correct or remove this line", number) from None
            yield number, _checked_row(row, f"{path}:{number}")


def _json(path: Path) -> Iterator[Placed]:
    """A list of objects, or one object; JSON Lines under this ending are read as such."""
    text = _text_of(path)
    try:
        parsed = _parsed(text)
    except (ValueError, RecursionError) as broken:
        if isinstance(broken, json.JSONDecodeError) and broken.msg == "Extra data" and text[broken.pos - 1] == "\n":
            yield from _json_lines(path)
            return
        raise _broken(broken, path, "correct the file") from None
    for number, row in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
        yield None, _checked_row(row, f"{path}: row {number}")


def _broken(error: Exception, path: Path, fix: str, line: int | None = None) -> LoraError:
    """What the parser refused. line: where the text is in the file, if it is not the whole one."""
    if isinstance(error, json.JSONDecodeError):
        place = f"{path}:{line or error.lineno}:{error.colno}"
        return LoraError(f"broken JSON: {error.msg}", where=place, fix=fix)
    return LoraError(f"broken JSON: {error}", where=f"{path}:{line}" if line else str(path), fix=fix)


def _parsed(text: str) -> Any:
    """JSON, stricter than the standard library: ValueError for repeated keys and lone surrogates."""
    value = _DECODER.decode(text)
    if "\\ud" in text or "\\uD" in text:  # the only way for half of a surrogate pair to come in
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> Values:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is set twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _checked_row(row: Any, where: str) -> Values:
    if not isinstance(row, dict):
        shown = json.dumps(row, ensure_ascii=False)[:40]
        raise LoraError(f"a row must be a JSON object, this is {shown}", where=where, fix='write {"column": …}')
    return row


# ── CSV and text ─────────────────────────────────────────────────────────────────────────────────────────────


def _separated(path: Path) -> Iterator[Placed]:
    """Rows by the names of the header. Every value is text, also one that looks like a number; an empty one is empty.

    Names lose the blanks around them; a column without a name is called by its place. Values of a .csv may be separated
    by semicolons, tabs or bars, if the header and the first lines show it. Raises LoraError with the line.
    """
    csv.field_size_limit(limits.ROW_BYTES)  # 131,072 on its own. Of the whole process; others may read too, so it stays
    lines = _lines(path)
    before, head = _head(lines)
    tabs = kind_of(path) == ".tsv"
    delimiter = "\t" if tabs else _delimiter(head)
    begin = before + 1
    try:
        first = next(csv.reader(iter(head), delimiter=delimiter), [])
        blanks = len(first) > 1 and all(name.startswith(" ") for name in first[1:])  # quotes behind one are quotes
        reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True, skipinitialspace=blanks)
        names = [name.strip() for name in next(reader, [])]
        header = [name or f"column {number}" for number, name in enumerate(names, 1)]
        if len(set(header)) < len(header):
            raise csv.Error("two columns have the same name")
        begin = before + reader.line_num + 1
        for values in reader:
            if len(header) == 1 < len(values):
                raise csv.Error(f"{len(values)} values, but line {before + 1}, which is to name the columns, has 1")
            if len(values) not in (0, len(header)):  # an empty line has none
                raise csv.Error(f"{len(values)} values, but the header has {len(header)} columns")
            if values:
                yield begin, dict(zip(header, values, strict=True))
            begin = before + reader.line_num + 1
    except csv.Error as error:
        name, kind = _SEPARATORS[delimiter], "TSV" if tabs else "CSV"
        fix = f'put values that hold {name}, quotes or line ends into quotes, and double the quotes inside: "a ""b"""'
        if "which is to name" in str(error):
            fix = f"remove what is above the names of the columns, if line {before + 1} is a title; else {fix}"
        raise LoraError(f"broken {kind}: {error}", where=f"{path}:{begin}", fix=fix) from None


def _head(lines: Iterator[str]) -> tuple[int, list[str]]:
    """How many lines come before the header (empty ones, and Excel's sep=;), and the first lines from it on."""
    before = 0
    for line in lines:
        if line.strip() and not (before == 0 and line.lower().startswith("sep=") and len(line.strip()) <= 5):
            return before, [line, *islice(lines, _LOOKED_AT)]
        before += 1
    return before, []


def _delimiter(head: list[str]) -> str:
    """What separates the values of a .csv: commas, unless only something else makes a table of all, or most, lines."""

    def rank(delimiter: str) -> tuple[int, bool, int]:
        columns, share = _table(head, delimiter)
        enough = (share >= 0.5) + (share == 1) if columns > 1 else 0
        return enough, delimiter == ",", columns

    return max(_SEPARATORS, key=rank)


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


def _text(path: Path) -> Iterator[Placed]:
    yield None, {"text": _text_of(path)}


# What programs save in the encoding of their system; JSON is UTF-8 by its standard.
_SAVED_BY_PROGRAMS = dict.fromkeys((".csv", ".tsv"), _separated) | dict.fromkeys((".txt", ".md"), _text)
_TEXT_KINDS = {".jsonl": _json_lines, ".json": _json} | _SAVED_BY_PROGRAMS
_KINDS = (*_TEXT_KINDS, *TABLE_KINDS)
