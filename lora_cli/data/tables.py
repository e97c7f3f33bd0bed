"""Rows of Parquet and Arrow files, read by pyarrow: they have types of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError

_ROWS_AT_ONCE = 1000
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream (format specification, "IPC streaming format")

Values = dict[str, Any]


def _parquet(path: Path) -> Iterator[Values]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, "Parquet", error) from None


def _arrow(path: Path) -> Iterator[Values]:
    """An Arrow file, or an Arrow stream as `datasets` saves it."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            else:
                file.seek(max(0, file.size() - len(_END_OF_STREAM)))
                if file.read() != _END_OF_STREAM:
                    raise ValueError("the stream has no end; it was cut")
                file.seek(0)
                batches = iter(pyarrow.ipc.open_stream(file))
            for batch in batches:
                batch.validate(full=True)  # offsets that point outside would crash the interpreter
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, "Arrow", error) from None


def _unreadable(path: Path, kind: str, error: Exception) -> LoraError:
    reason = str(error).strip().splitlines()[0][:300]
    return LoraError(f"cannot be read as {kind}: {reason}", where=str(path), fix="write or copy it again")


TABLE_KINDS: dict[str, Callable[[Path], Iterator[Values]]] = {".parquet": _parquet, ".arrow": _arrow}
