"""Data files of strangers: a few bytes that hold any number of rows, or one of any length."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Said
from pyarrow import parquet

from lora_cli import limits
from lora_cli.data.readers import read_file
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


BOMBS: dict[str, Callable[[Path], None]] = {
    "one.txt.zst": lambda path: zst(path, 600, b"a" * 2**20),
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
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_holds_far_more_than_it_is_ends_in_words(tmp_path: Path, name: str) -> None:
    BOMBS[name](tmp_path / name)
    began = time.thread_time()
    with pytest.raises(LoraError) as caught:
        for _ in read_file(tmp_path / name):
            pass
    assert time.thread_time() - began < 10
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


@pytest.mark.parametrize("write", [parquet.write_table, lambda table, path: arrow(Path(path), table)])
def test_honest_tables_are_read_as_before(tmp_path: Path, write: Any) -> None:
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
    path = tmp_path / ("t.parquet" if write is parquet.write_table else "t.arrow")
    write(pa.Table.from_pylist(rows), path)
    assert [row.values for row in read_file(path)] == rows


@pytest.mark.parametrize("name", ["json", "csv", "./rows", "/etc", "~/x", "a/b/c"])
def test_what_reads_local_files_is_not_a_data_set_of_the_hub(
    lora: Callable[..., Said], recipe_file: Callable[..., Path], name: str
) -> None:
    assert f"{name} is not a data set of the hub" in lora("check", recipe_file(data={"train": {"hub": name}})).error
