"""Rows of Parquet and Arrow files, and of anything else that comes as Arrow: they have types of their own.

What JSON has no type for becomes text: dates, times and decimals as they are written, bytes where they are UTF-8. All
of this is done by Arrow on whole columns, so a value that Python has no object for (a year 300,000, nanoseconds, an
unknown time zone) does no harm, least of all in a column that nothing reads.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli import limits
from lora_cli.errors import LoraError, reading, refuse_if
from lora_cli.limits import LimitReached, Unpacked

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 1000
_MAGIC = b"ARROW1"  # at the start and end of an Arrow file
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream (format specification, "IPC streaming format")
_OUT_OF_RANGE = "<value out of range"  # as Arrow's cast to text begins
_LISTS = ("list", "large_list", "fixed_size_list")  # as pyarrow calls them
_BYTES = ("binary", "large_binary", "fixed_size_binary", "binary_view")
_COPY_AGAIN = "write or copy it again"
_NO_FRACTION = re.compile(r"\.0+(?![0-9])")

Values = dict[str, Any]


class Unreadable:
    """A value of a table that cannot be written as text. Harmless where nothing reads it."""

    def __init__(self, why: str):
        self.why = why

    def __repr__(self) -> str:
        return f"({self.why})"


def rows_of(batch: pyarrow.RecordBatch | pyarrow.Table, where: str) -> Iterator[Values]:
    """The rows of a batch of Arrow, as JSON could hold them. Raises LoraError if two columns have one name."""
    require_distinct(batch.schema, where)
    names = batch.schema.names
    columns = [_values(batch.column(at)) for at in range(len(names))]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def require_distinct(fields: Any, where: str, inside: str = "") -> None:
    """Raises LoraError where two columns, or two members of a struct, are called the same: which is meant?"""
    fields = list(fields)
    names = [field.name for field in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        fix = "rename one of them, or write only one"
        raise LoraError(f"two columns are called {inside}{twice[0]}", where=where, fix=fix)
    for field in fields:
        require_distinct(_members(field.type), where, f"{inside}{field.name}.")


def _members(kind: Any) -> list[Any]:
    return [kind.field(at) for at in range(kind.num_fields)]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _values(column: Any) -> list[Any]:
    """The values of a column in Python, those of types that JSON lacks as text, at any depth."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    if isinstance(column, pyarrow.ChunkedArray):
        return list(chain.from_iterable(map(_values, column.chunks)))
    if _is(kind, "run_end_encoded"):
        return _values(compute.run_end_decode(column))  # type: ignore[attr-defined]
    if _is(kind, "dictionary") and _lacked(kind.value_type):
        return _values(column.dictionary_decode())
    if not _lacked(kind):
        return _listed(column)
    if _is(kind, "map"):
        entries = pyarrow.list_(pyarrow.struct([kind.key_field, kind.item_field]))
        return [_without_repeats(each) for each in _values(column.cast(entries))]
    if _is(kind, "struct"):
        members = zip(*map(_values, column.flatten()), strict=True)
        found = [dict(zip(kind.names, each, strict=True)) for each in members]
    elif _is(kind, *_LISTS):
        inner, lengths = iter(_values(column.flatten())), compute.list_value_length(column)  # type: ignore[attr-defined]
        found = [list(islice(inner, length or 0)) for length in lengths.to_pylist()]
    else:
        return _as_text(column)
    return [value if there else None for value, there in zip(found, column.is_valid().to_pylist(), strict=True)]


def _listed(column: Any) -> list[Any]:
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except KeyError:  # a map that has a key twice
        return column.to_pylist()
    except Exception:  # pyarrow, pandas and datetime each raise their own
        return [_one(value) for value in column]


def _one(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception:
        return Unreadable(f"{value.type} out of range")


def _without_repeats(entries: list[dict[str, Any]] | None) -> Any:
    """A map as an object, or as pairs if it has a key twice, or keys that no object can have."""
    pairs = [tuple(each.values()) for each in entries or []]
    with suppress(TypeError):
        pairs = found if len(found := dict(pairs)) == len(pairs) else pairs
    return None if entries is None else pairs


def _lacked(kind: Any) -> bool:
    """Whether JSON has no such type, or none for a part of it."""
    return _is(kind, "temporal", "decimal", *_BYTES) or any(_lacked(field.type) for field in _members(kind))


def _is(kind: Any, *names: str) -> bool:
    """Whether a type of Arrow is one of those that pyarrow calls so."""
    from pyarrow import types

    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _as_text(column: Any) -> list[Any]:
    """Times and decimals as a person would write them, and bytes where they are UTF-8."""
    import pyarrow

    kind = column.type
    if _is(kind, *_BYTES):
        return [_decoded(value) for value in column.to_pylist()]
    zoned = _is(kind, "timestamp") and kind.tz is not None  # in a zone that this machine may not know
    for known in (kind, pyarrow.timestamp(kind.unit, "UTC")) if zoned else (kind,):
        try:
            texts = column.cast(known).cast(pyarrow.string()).to_pylist()
        except Exception:  # an unknown time zone, a type that cannot be cast
            continue
        return texts if _is(kind, "decimal") else [_tidied(text, kind) for text in texts]
    return _listed(column)


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _tidied(text: str | None, kind: Any) -> str | Unreadable | None:
    """A time that was cast to text, without a fraction of zeros and with the unit of a duration."""
    if text is None:
        return None
    if text.startswith(_OUT_OF_RANGE):
        return Unreadable(f"{kind} out of range")
    return f"{text} {kind.unit}" if _is(kind, "duration") else _NO_FRACTION.sub("", text, count=1)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _parquet(path: Path) -> Iterator[Values]:
    from pyarrow import parquet

    with reading("cannot be read as Parquet", path, _COPY_AGAIN):
        with parquet.ParquetFile(path) as plain:
            schema, columns = plain.schema_arrow, [plain.schema.column(at) for at in range(len(plain.schema))]
            require_distinct(schema, str(path))
            require_possible_rows(plain.metadata.num_rows, len(schema), path)
            largest, delta_coded = _require_modest_chunks(plain.metadata, path)
        # Text is read as a dictionary: a long one that is repeated is in memory once, and can be measured there. Texts
        # that are coded by their difference to the one before cannot: each may be as long as the whole chunk, so only
        # a few rows are read at once.
        texts = [each.path for each in columns if each.physical_type == "BYTE_ARRAY" and each.path not in delta_coded]
        at_once = max(1, min(_ROWS_AT_ONCE, _DELTA_BYTES // max(largest, 1))) if delta_coded else _ROWS_AT_ONCE
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            counted = Unpacked(path)
            for batch in file.iter_batches(at_once):
                for part in small_parts(batch, path, counted):
                    yield from rows_of(part.cast(schema), str(path))


_DELTA_BYTES = 64 << 20  # of delta-coded values that are read at once
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8, "INT96": 12}  # bytes of a value


def _require_modest_chunks(metadata: Any, path: Path) -> tuple[int, set[str]]:
    """Bytes of the largest chunk with delta-coded texts, and such columns: Arrow does not read them as dictionaries.

    Raises LimitReached where the chunks, by what the file says of them, hold more than a file of this size may.
    """
    counted, largest, delta_coded = Unpacked(path), 0, set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size = max(chunk.total_uncompressed_size, chunk.num_values * _WIDTHS.get(chunk.physical_type, 1))
            counted.add(size)
            if chunk.physical_type == "BYTE_ARRAY" and any(each.startswith("DELTA") for each in chunk.encodings):
                delta_coded.add(chunk.path_in_schema)
                largest = max(largest, size)
    return largest, delta_coded


def _arrow(path: Path) -> Iterator[Values]:
    """An Arrow stream, as `datasets` saves it, or an Arrow file: the same stream between a mark and an index."""
    import pyarrow
    from pyarrow import ipc

    with reading("cannot be read as Arrow", path, _COPY_AGAIN), pyarrow.OSFile(str(path)) as file:
        start, end = (8, _MAGIC) if file.read(6) == _MAGIC else (0, _END_OF_STREAM)
        file.seek(max(0, file.size() - len(end)))
        if file.read() != end:
            raise ValueError("it has no end; it was cut")
        file.seek(start)
        _require_modest_batches(ipc.MessageReader.open_stream(file), path)
        file.seek(start)
        counted, batches, rows = Unpacked(path), 0, 0
        for batch in ipc.open_stream(file):
            batch.validate(full=True)  # offsets that point outside would crash the interpreter
            batches, rows = batches + 1, rows + batch.num_rows
            require_possible_rows(rows, batch.num_columns, path)
            for part in small_parts(batch, path, counted):
                yield from rows_of(part, str(path))
        if start and ipc.open_file(file).num_record_batches != batches:
            raise ValueError("its index and its batches differ")


def _require_modest_batches(messages: Any, path: Path) -> None:
    """Raises LimitReached for a batch, or all of them, of more bytes than a file of this size may hold.

    pyarrow unpacks a batch whole, and a few compressed bytes can hold gigabytes. Each compressed buffer begins with its
    own length (Arrow format, "Recordbatch body compression"); where the buffers are, the message's metadata say.
    """
    counted, most = Unpacked(path), limits.UNPACKED_WHOLE + limits.UNPACKED_WHOLE_TIMES * path.stat().st_size
    for message in messages:
        unpacked = 0
        for offset, length in _compressed(message.metadata.to_pybytes(), message.type):
            (size,) = struct.unpack("<q", message.body[offset : offset + 8].to_pybytes())
            unpacked += length if size < 0 else size  # -1: the buffer is not compressed
        counted.add(unpacked)
        if unpacked > most:
            what = f"a batch has {unpacked:,} bytes, unpacked; {most:,} is the limit"
            raise LimitReached(what, where=str(path), fix="write it in smaller batches")


def _compressed(data: bytes, kind: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of the buffers of a compressed batch, by its metadata: a FlatBuffer as in Message.fbs."""

    def follow(at: int) -> int:
        return at + struct.unpack_from("<I", data, at)[0]

    def field(table: int, number: int) -> int | None:
        """Where a field of a table is, if it is set."""
        fields, at = table - struct.unpack_from("<i", data, table)[0], 4 + 2 * number
        offset = struct.unpack_from("<H", data, fields + at)[0] if at < struct.unpack_from("<H", data, fields)[0] else 0
        return table + offset if offset else None

    batch = field(follow(0), 2) if kind in ("record batch", "dictionary") else None
    if batch is not None and kind == "dictionary":
        batch = field(follow(batch), 1)
    if batch is None or field(follow(batch), 3) is None:  # not compressed, so no larger than the file
        return
    if (buffers := field(follow(batch), 2)) is not None:
        vector = follow(buffers)
        for at in range(struct.unpack_from("<I", data, vector)[0]):
            offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * at)
            if length > 0:
                yield offset, length


def require_possible_rows(rows: int, columns: int, path: Path) -> None:
    """Raises LoraError for a table without columns, LimitReached for more rows than so few bytes can mean."""
    refuse_if(columns == 0, "the table has no columns", where=path, fix="check what wrote it")
    most = limits.TABLE_ROWS + 100 * path.stat().st_size
    if rows > most:
        what = f"a file of {path.stat().st_size:,} bytes says that it has {rows:,} rows; {most:,} is the limit"
        raise LimitReached(what, where=str(path), fix="check what wrote it")


def small_parts(batch: Any, path: Path, counted: Unpacked) -> Iterator[Any]:
    """A batch in parts that take little memory as Python's values. Raises LimitReached for a row that takes more."""
    size = sum(_written_out(column) for column in batch.columns)
    if batch.num_rows <= 1 or size <= limits.ROW_BYTES:
        counted.add(size)
        if size > limits.ROW_BYTES:
            what = f"a row has {size:,} bytes; {limits.ROW_BYTES:,} is the limit"
            raise LimitReached(what, where=str(path), fix="cut very long text")
        yield batch
        return
    half = batch.num_rows // 2
    yield from small_parts(batch.slice(0, half), path, counted)
    yield from small_parts(batch.slice(half), path, counted)


def _written_out(column: Any) -> int:
    """About how many bytes the values of a column have, one that is repeated as often as it is there."""
    from pyarrow import compute

    kind = column.type
    if _is(kind, "run_end_encoded"):
        return len(column) * max(1, _written_out(column.values))
    if _is(kind, "dictionary"):
        values, count = column.dictionary, len(column)
        if not _is(kind.value_type, "string", "large_string", "binary", "large_binary"):
            return count * max(1, _written_out(values))
        lengths = compute.binary_length(values)  # type: ignore[attr-defined]
        return count + int(compute.sum(compute.take(lengths, column.indices)).as_py() or 0)  # type: ignore[attr-defined]
    if _is(kind, "struct"):
        return len(column) + sum(_written_out(each) for each in column.flatten())
    if _is(kind, *_LISTS):
        return len(column) + 8 * len(column) + _written_out(column.flatten())
    return len(column) + column.nbytes


TABLE_KINDS: dict[str, Callable[[Path], Iterator[Values]]] = {".parquet": _parquet, ".arrow": _arrow}
