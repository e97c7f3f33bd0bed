"""Data files of strangers: a few bytes that hold any number of rows, or one of any length."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Said
from pyarrow import parquet

from lora_cli import limits
from lora_cli.data.files.readers import read_file
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached

LONG = "a" * 2_000_000


def zst(path: Path, pieces: int, piece: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        for _ in range(pieces):
            stream.write(piece)


def gz(path: Path, pieces: int, piece: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(pieces):
            stream.write(piece)


def dictionary_table() -> pa.Table:
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([LONG]))
    return pa.table({"text": repeated})


def arrow(path: Path, table: pa.Table, compression: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


def numbers(megabytes: int) -> pa.Table:
    """Lists of equal numbers, of which a dictionary holds one."""
    rows = pa.array([[1] * (megabytes << 15)] * 4, pa.list_(pa.int64()))
    return pa.table({"text": ["a"] * 4, "numbers": rows})


def wide_page(path: Path, **options: Any) -> None:
    parquet.write_table(pa.table({"text": ["a" * 1_000_000] * 400}), path, compression="zstd", **options)


WIDE = ["a" * (1 << 20)] * 300
PACKED_TABLES: dict[str, Callable[[], pa.Array]] = {
    "text": lambda: pa.array(WIDE),
    "nested": lambda: pa.array([{"turns": [{"content": text}]} for text in WIDE]),
    "dictionary": lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 5, pa.int32()), pa.array(["a" * (300 << 20)])),
    "binary": lambda: pa.array(WIDE, pa.large_binary()),
}


def packed_batch(kind: str, form: str, path: Path) -> None:
    """Some thousand bytes, in one compressed batch of 300 MB."""
    table = pa.table({"text": PACKED_TABLES[kind]()})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table)


BOMBS: dict[str, Callable[[Path], None]] = {
    "one.txt.zst": lambda path: zst(path, 600, b"a" * 2**20),
    "objects.json.zst": lambda path: zst(path, 150, b"[{}," + b"{}," * (2**20 // 3)),
    "values.json.gz": lambda path: gz(path, 150, b"[1.5," + b"1.5," * 2**18),
    "one.json.zst": lambda path: zst(path, 600, b" " * 2**20),
    "line.jsonl.gz": lambda path: gz(path, 300, b"a" * 2**20),
    "lines.jsonl.zst": lambda path: zst(path, 300, b"\n" * 2**20),
    "field.csv.gz": lambda path: gz(path, 200, b'"' + b"a," * 2**19),
    "rows.csv.zst": lambda path: zst(path, 300, b"text\n" * 2**18),
    "line.jsonl": lambda path: path.write_bytes(b'{"text": "' + b"a" * (limits.ROW_BYTES + 9)) and None,
    "dictionary.parquet": lambda path: parquet.write_table(dictionary_table(), path, compression="zstd"),
    "nulls.parquet": lambda path: parquet.write_table(pa.table({"text": pa.nulls(3_000_000, pa.string())}), path),
    "dictionary.arrow": lambda path: arrow(path, dictionary_table()),
    "packed.arrow": lambda path: arrow(path, pa.table({"text": ["a" * 100_000] * 2_000}), "zstd"),
    **{
        f"{kind}.{form}.arrow": partial(packed_batch, kind, form)
        for kind in PACKED_TABLES
        for form in ("file", "stream")
    },
    "page.parquet": lambda path: wide_page(path, use_dictionary=False, data_page_size=2**31 - 1),
    "prefixes.parquet": lambda path: wide_page(path, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY"),
    "numbers.parquet": lambda path: parquet.write_table(numbers(100), path, compression="zstd"),
}


POOLS: list[Any] = []


@contextmanager
def largest_allocation() -> Iterator[Callable[[], int]]:
    """What Arrow held at most, in bytes, while this lasts."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)  # it has to live longer than all that it holds
    pa.set_memory_pool(pool)
    try:
        yield lambda: pool.max_memory() or 0
    finally:
        pa.set_memory_pool(before)


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_holds_far_more_than_it_is_ends_in_words(tmp_path: Path, name: str) -> None:
    BOMBS[name](tmp_path / name)
    began = time.thread_time()
    with largest_allocation() as largest, pytest.raises(LoraError) as caught:
        for _ in read_file(tmp_path / name):
            pass
    assert time.thread_time() - began < 10
    assert largest() < 300 << 20
    assert isinstance(caught.value, LimitReached) or "field" in caught.value.what
    assert caught.value.fix
    assert (caught.value.where or "").startswith(str(tmp_path / name))


def test_a_table_without_columns_has_no_rows(tmp_path: Path) -> None:
    table = pa.table({"a": [1] * 10}).select([])
    parquet.write_table(table, tmp_path / "none.parquet")
    with pytest.raises(LoraError, match=r"has no columns|has no rows"):
        list(read_file(tmp_path / "none.parquet"))


def test_check_says_so_and_the_fix_works(
    lora: Callable[..., Said], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    row = json.dumps({"prompt": "What?", "completion": "Nothing."}) + "\n"
    zst(tmp_path / "packed.jsonl.zst", 10, row.encode() * 100_000)
    recipe = recipe_file(data={"train": str(tmp_path / "packed.jsonl.zst")})
    said = lora("check", recipe)
    assert said.code == 2
    assert "200 times its own size" in said.error
    (tmp_path / "rows.jsonl").write_text(row * 20)
    assert lora("check", recipe, "--set", f"data.train={tmp_path / 'rows.jsonl'}").code == 0


def packed_stream(table: pa.Table, path: Path) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=700)


HONEST: dict[str, Callable[[pa.Table, Path], Any]] = {
    "plain.parquet": parquet.write_table,
    "v2.parquet": partial(parquet.write_table, data_page_version="2.0", version="2.6"),
    "prefixes.parquet": partial(
        parquet.write_table, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    ),
    "lengths.parquet": partial(
        parquet.write_table, use_dictionary=False, column_encoding={"text": "DELTA_LENGTH_BYTE_ARRAY"}
    ),
    "plain.arrow": lambda table, path: arrow(path, table),
    "zstd.arrow": lambda table, path: arrow(path, table, "zstd"),
    "lz4-stream.arrow": packed_stream,
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_tables_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": f"x{n}" * 50}, {"role": "assistant", "content": "yes"}],
            "tags": ["a", None, "b"] if n % 2 else None,
            "number": n,
            "share": n / 2,
            "kept": bool(n % 3),
            "text": None if n % 5 == 0 else "same long system prompt " * 20,
        }
        for n in range(3000)
    ]
    path = tmp_path / name
    HONEST[name](pa.Table.from_pylist(rows), path)
    assert [row.values for row in read_file(path)] == rows


@pytest.mark.parametrize("name", ["json", "csv", "./rows", "/etc", "~/x", "a/b/c"])
def test_what_reads_local_files_is_not_a_data_set_of_the_hub(
    lora: Callable[..., Said], recipe_file: Callable[..., Path], name: str
) -> None:
    assert f"{name} is not a data set of the hub" in lora("check", recipe_file(data={"train": {"hub": name}})).error
