"""Sources: every kind of file gives the same rows, whatever is wrong with one is named, and weights say how often."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import conftest
import pyarrow as pa
import pytest
from conftest import read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_cli.data.files import folders
from lora_cli.data.files.readers import Row, kind_of, read_file
from lora_cli.data.files.sources import FileSource, open_source
from lora_cli.data.prepare import prepare
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, SourceRecipe

TEXTS = [  # all text, since CSV has nothing else
    {"prompt": "plain", "completion": "words"},
    {"prompt": 'a "quoted" one, with commas', "completion": "tab\there"},
    {"prompt": "two\nlines", "completion": "\r\ncarriage\rreturn\n"},
    {"prompt": "", "completion": "  spaces at both ends  "},
    {"prompt": "42", "completion": "2024-01-01"},
    {"prompt": "NA", "completion": "null"},
    {"prompt": "1e5", "completion": "True"},
    {"prompt": "Größe 数 🙂 é", "completion": "a\u2028b\u2029c\x85d\x0be"},
    {"prompt": "#not a comment", "completion": "\\n is two characters"},
]
TYPED = [
    {
        "messages": [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": str(n + 1)}],
        "number": n,
        "share": n / 4,
        "good": n % 2 == 0,
        "nothing": None,
    }
    for n in range(4)
]


def arrow_bytes(rows: list[dict[str, Any]], *, stream: bool, rows_at_once: int = 1000) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        for start in range(0, len(rows), rows_at_once):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + rows_at_once], table.schema))
    return sink.getvalue().to_pybytes()


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def separated(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zst}
WRITE: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "lines.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "unicode.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
    "crlf.jsonl": lambda rows: b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row) for row in rows).encode(),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "commas.csv": lambda rows: separated(rows, ","),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + separated(rows, ","),
    "tabs.tsv": lambda rows: separated(rows, "\t"),
    "SHOUTED.JSONL": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "table.parquet": parquet_bytes,
    "file.arrow": lambda rows: arrow_bytes(rows, stream=False),
    "batches.arrow": lambda rows: arrow_bytes(rows, stream=False, rows_at_once=2),
    "stream.arrow": lambda rows: arrow_bytes(rows, stream=True, rows_at_once=2),
}
FILES = [
    (name, packing) for name in WRITE for packing in PACK if not packing or not name.endswith(("parquet", "arrow"))
]


def write(folder: Path, name: str, packing: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}{packing}"
    path.write_bytes(PACK[packing](WRITE[name](rows)))
    return path


# ── every kind gives the same rows ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "packing"), FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, packing):
    path = write(tmp_path, name, packing, TEXTS)
    rows = read_rows(path)
    assert [row.values for row in rows] == TEXTS
    assert [row.number for row in rows] == list(range(1, len(TEXTS) + 1))
    assert [row.where.partition(" (line ")[0] for row in rows[:2]] == [f"{path}: row 1", f"{path}: row 2"]


@pytest.mark.parametrize(("name", "packing"), [each for each in FILES if not each[0].endswith(("csv", "tsv"))])
def test_kinds_with_types_keep_them(tmp_path, name, packing):
    rows = [row.values for row in read_rows(write(tmp_path, name, packing, TYPED))]
    assert rows == TYPED
    assert [[type(value) for value in row.values()] for row in rows] == [[list, int, float, bool, type(None)]] * 4


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.fixed_dictionaries({"text": st.text(max_size=12), "b": st.text(max_size=6)}), min_size=1, max_size=4)
)
def test_any_text_comes_back_from_any_kind(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    for name, packing in FILES:
        if not packing:
            assert [row.values for row in read_rows(write(folder, name, packing, rows))] == rows, name


@pytest.mark.parametrize("packing", PACK)
def test_a_text_file_is_one_row(tmp_path, packing):
    text = "one\r\n\n  two\u2028\n"
    path = tmp_path / f"book.txt{packing}"
    path.write_bytes(PACK[packing](b"\xef\xbb\xbf" + text.encode()))
    assert [row.values for row in read_rows(path)] == [{"text": text}]


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "a"\n}\n')
    assert [row.values for row in read_rows(tmp_path / "a.json")] == [{"text": "a"}]


def test_archives_of_several_parts_are_read_whole(tmp_path):
    lines = [f'{{"text": "{n}"}}\n'.encode() for n in range(3)]
    for packing in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{packing}"
        path.write_bytes(b"".join(map(PACK[packing], lines)))
        assert [row.values["text"] for row in read_rows(path)] == ["0", "1", "2"]


def test_fields_of_csv_may_be_long_also_in_files_that_are_read_side_by_side(tmp_path):
    long = "x" * 200_000  # the csv module's own limit is 131,072, one setting for the whole process
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text\n" + f"{long}\n" * (2 if name == "a.csv" else 4))
    first, second = read_file(tmp_path / "a.csv"), read_file(tmp_path / "b.csv")
    assert next(first).values == next(second).values == {"text": long}
    assert (len(list(first)), len(list(second))) == (1, 3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b.csv.GZ", ".csv"),
        ("2024.01.tsv.zst", ".tsv"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.arrow.zst", None),
        ("a.gz", None),
        ("a.md", ".md"),
        ("a.md.gz", ".md"),
        ("jsonl", None),
        (".jsonl", None),
    ],
)
def test_kind_is_what_the_ending_says(name, kind):
    assert kind_of(Path(name)) == kind


# ── folders and globs ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    """Files in an order of creation that is not that of their names; each row says the name of its file."""
    place = tmp_path / "data"
    for name in (
        *("z.jsonl", "b.csv", "a.jsonl.gz", "nested/deep/k.tsv", "nested/d.parquet", "c.txt"),  # to be read
        *(".hidden.jsonl", "_SUCCESS.txt", ".git/a.jsonl", "_temporary/a.jsonl", "nested/.x/a.csv", "nested/_a.json"),
        *("notes.md", "a.parquet.gz", "script.py", "LICENSE"),  # no data
    ):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"no data"
        writers = {".jsonl": "lines.jsonl", ".csv": "commas.csv", ".tsv": "tabs.tsv", ".parquet": "table.parquet"}
        if writer := writers.get(kind_of(path) or ""):
            data = WRITE[writer]([{"text": name}])
        if name.endswith("jsonl.gz"):
            data = gzip.compress(data)
        path.write_bytes(name.encode() if name.endswith(".txt") else data)
    return place


def texts(rows: list[Row]) -> list[str]:
    return [row.values["text"] for row in rows]


def test_a_folder_is_its_data_files_by_name_without_hidden_ones(folder):
    assert texts(read_rows(folder)) == [
        "a.jsonl.gz",
        "b.csv",
        "c.txt",
        "nested/d.parquet",
        "nested/deep/k.tsv",
        "z.jsonl",
    ]


def test_a_hidden_folder_may_be_named_itself(tmp_path, folder):
    assert texts(read_rows(folder / ".git")) == [".git/a.jsonl"]
    hidden = folder.rename(tmp_path / ".cache")
    assert len(read_rows(hidden)) == 6


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.csv", ["b.csv"]),
        ("?.*", ["a.jsonl.gz", "b.csv", "c.txt", "z.jsonl"]),
        ("[bz].*", ["b.csv", "z.jsonl"]),
        ("**/*.tsv", ["nested/deep/k.tsv"]),
        ("nested/*", ["nested/d.parquet"]),
    ],
)
def test_a_glob_is_the_files_that_match_by_name_without_hidden_ones(folder, pattern, found):
    for extra in ("a.parquet.gz", "nested/_a.json"):
        (folder / extra).unlink()
    assert texts(read_rows(folder / pattern)) == found


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_rows(tmp_path / "a[1].jsonl", [{"text": "right"}])
    write_rows(tmp_path / "a1.jsonl", [{"text": "wrong"}])
    assert texts(read_rows(tmp_path / "a[1].jsonl")) == ["right"]


def test_rows_of_several_files_are_counted_in_each(folder):
    for name, count in (("a.jsonl", 2), ("b.jsonl", 3)):
        write_rows(folder / "nested" / "deep" / name, [{"text": "x"}] * count)
    source = open_source(SourceRecipe(path=str(folder / "nested" / "deep" / "*.jsonl")))
    assert [(Path(row.file).name, row.number) for row in source.rows()] == [
        *[("a.jsonl", 1), ("a.jsonl", 2)],
        *[("b.jsonl", 1), ("b.jsonl", 2), ("b.jsonl", 3)],
    ]


def test_identity_follows_bytes_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    first = FileSource("a", (path,)).identity
    os.utime(path, ns=(1, 1))
    assert FileSource("a", (path,)).identity == first
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    assert FileSource("a", (path,)).identity != first


# ── what is wrong is named ──────────────────────────────────────────────────────────────────────────────────────


def refusal(path: Path) -> LoraError:
    return conftest.refusal(lambda: read_rows(path))


BROKEN = {  # name → bytes, and where it is broken: line, line:column or row
    "unfinished.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', ":3:13"),
    "number.jsonl": (b'{"text": "a"}\n7\n', ":2"),
    "twice.jsonl": (b'{"text": "a"}\n{"a": {"b": 1, "b": 2}}\n', ":2"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\uD83D"}\n', ":2"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2"),
    "comma.json": (b'[\n{"text": "a"},\n]\n', ":3:1"),
    "late.json": (b'{"text": "a"}\n{"text": b}\n', ":2:10"),
    "row.json": (b'[{"text": "a"}, "b"]', ": row 2"),
    "latin.json": (b'[\n"\xe9"]', ":2"),
    "wide.csv": (b'a,b\n1,"2\n2"\n3,4,5\n', ":4"),
    "narrow.tsv": (b"a\tb\n1\t2\n3\n", ":3"),
    "at once.csv": (b'"a\na",b\n1\n', ":3"),
    "open.csv": (b'a,b\n1,2\n3,"4\n5,6\n', ":3"),
    "inside.csv": (b'a,b\n1,2\n"3"4,5\n', ":3"),
    "same.tsv": (b"a\ta\n1\t2\n", ":1"),
    "latin.csv": (b"a,b\n1,\x81\n", ":2"),
    "latin.txt": (b"a\n\nb \x81\n", ":3"),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_content_is_named_by_file_and_line_also_in_an_archive(tmp_path, name, packing):
    data, place = BROKEN[name]
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACK[packing](data))
    assert refusal(path).where == f"{path}{place}"


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_an_archive_that_was_cut_anywhere_is_refused(tmp_path, packing):
    path = tmp_path / f"a.jsonl{packing}"
    whole = PACK[packing](WRITE["lines.jsonl"](TEXTS * 3))
    path.write_bytes(whole)
    assert len(read_rows(path)) == 3 * len(TEXTS)
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        error = refusal(path)
        assert (error.where, "damaged" in error.what) == (str(path), True), size


def test_a_gzip_archive_with_any_changed_byte_is_refused_or_says_the_same(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(WRITE["lines.jsonl"](TEXTS))
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            same = [row.values for row in read_rows(path)] == TEXTS  # the header's time stamp, for example
        except LoraError as error:
            same, refused = str(error.where).startswith(str(path)), refused + 1
        assert same, at
    assert refused > len(whole) - 12


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_an_archive_with_something_behind_it_is_refused(tmp_path, packing):
    path = tmp_path / f"a.csv{packing}"
    path.write_bytes(PACK[packing](WRITE["commas.csv"](TEXTS)) + b"something")
    assert "damaged" in refusal(path).what


@pytest.mark.parametrize("name", ["table.parquet", "file.arrow", "batches.arrow"])
def test_a_table_that_was_cut_anywhere_is_refused(tmp_path, name):
    path = tmp_path / name
    whole = WRITE[name](TEXTS)
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        error = refusal(path)
        assert error.where == str(path), size
        assert "cannot be read as" in error.what


def test_an_arrow_stream_that_was_cut_within_a_batch_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    whole = arrow_bytes(TEXTS, stream=True)  # one batch
    path.write_bytes(whole)
    assert len(read_rows(path)) == len(TEXTS)
    for size in range(1, len(whole) - 8, 7):  # the last 8 bytes say that nothing follows
        path.write_bytes(whole[:size])
        assert "Arrow" in refusal(path).what, size


def test_an_arrow_stream_that_was_cut_between_batches_is_refused(tmp_path):
    """Its writer ends it with a mark: without that the rows behind would be missing and nobody told."""
    one, two = (arrow_bytes(TEXTS[:count], stream=True, rows_at_once=1) for count in (1, 2))
    cut = two[: len(one) - 8]
    assert one == cut + one[-8:]  # two batches, of which the second is missing
    path = tmp_path / "a.arrow"
    path.write_bytes(cut)
    assert "Arrow" in refusal(path).what


@pytest.mark.parametrize("stream", [True, False])
def test_an_arrow_file_whose_text_has_impossible_borders_is_refused(tmp_path, stream):
    """Read unchecked such borders give bytes of other memory as text, or end the process."""
    whole = arrow_bytes([{"text": "a"}, {"text": "bb"}, {"text": "ccc"}], stream=stream)
    borders = b"".join(at.to_bytes(4, "little") for at in (0, 1, 3, 6))
    assert whole.count(borders) == 1
    for wrong in (b"\0\0\0\0", b"\x40\0\0\0"):  # before the one before; behind the end
        path = tmp_path / "a.arrow"
        path.write_bytes(whole.replace(borders, borders[:8] + wrong + borders[12:]))
        assert "Arrow" in refusal(path).what


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv.gz", "a.json.zst"])
def test_a_file_of_another_kind_than_its_ending_says_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 9)
    assert refusal(tmp_path / name).where == str(tmp_path / name)


@pytest.mark.parametrize(("name", "packing"), FILES)
def test_files_without_rows_are_refused(tmp_path, name, packing):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(b"")
    if kind_of(path) != ".txt":  # there it is an empty row
        assert refusal(path).what == "the data file is empty"
    none = {".jsonl": b"\n\n", ".json": b"[]", ".csv": b"a,b\n", ".tsv": b"a\tb\n"}.get(kind_of(path) or "")
    if none is None:
        table = pa.table({"text": pa.array([], pa.string())})
        sink = pa.BufferOutputStream()
        if name.endswith("parquet"):
            parquet.write_table(table, sink)
        else:
            with (pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file)(sink, table.schema) as writer:
                writer.write_table(table)
        none = sink.getvalue().to_pybytes()
    path.write_bytes(PACK[packing](none))
    assert (refusal(path).what, refusal(path).where) == ("the data file has no rows", str(path))


def test_what_is_not_there_is_named_with_what_is_near(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    assert refusal(tmp_path / "trian.jsonl").fix == f"did you mean {tmp_path / 'train.jsonl'}?"
    assert refusal(tmp_path / "*.csv").what == "no file matches this pattern"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".a.jsonl").write_text('{"text": "a"}')
    assert refusal(tmp_path / "empty").what == "no data files in this folder"
    (tmp_path / "a.rst").write_text("a")
    assert "unknown kind" in refusal(tmp_path / "a.rst").what


def test_the_first_broken_file_of_a_folder_is_named(tmp_path):
    for name, data in (("a.jsonl", b'{"text": "a"}\n'), ("b.jsonl", b'{"text": "b"}\n{\n'), ("c.jsonl", b"{\n")):
        (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path).where == f"{tmp_path / 'b.jsonl'}:2:2"


# ── files that change ───────────────────────────────────────────────────────────────────────────────────────────


def recipe_of(folder: Path, train: Any, *, seed: int = 0, **data: Any) -> Recipe:
    values = {"base_model": "none", "data": {"train": train, **data}, "train": {"seed": seed}}
    return Recipe.model_validate(values | {"output": str(folder / "run")})


@pytest.mark.parametrize("change", ["nothing", "touched", "longer", "gone"])
def test_a_file_that_was_written_to_since_it_was_hashed_is_told_from_one_that_was_not(tmp_path, change):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    source = open_source(SourceRecipe(path=str(path)))
    assert list(source.identity) == [str(path)]
    list(source.rows())
    stat = path.stat()
    if change == "touched":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "longer":
        with path.open("a") as stream:
            stream.write("\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "gone":
        path.unlink()
    if change == "nothing":
        source.require_unchanged()
        return
    with pytest.raises(LoraError, match="changed while it was read") as caught:
        source.require_unchanged()
    assert caught.value.where == str(path)


@pytest.mark.parametrize("change", ["append", "delete"])
@pytest.mark.parametrize("keep", [True, False])
def test_preparing_stops_where_a_file_changes_under_its_hands(tmp_path, monkeypatch, tokenizer, change, keep):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(5)])

    def reading(file: Path) -> Iterator[Row]:
        for row in read_file(file):
            yield row
            if row.number == 2 and change == "append":
                with path.open("a") as stream:
                    stream.write('{"text": "new"}\n')
                os.utime(path, ns=(1, 1))  # whatever the clock's resolution
            elif row.number == 5 and change == "delete":
                path.unlink()

    monkeypatch.setattr(folders, "read_file", reading)
    with pytest.raises(LoraError, match="changed while it was read") as caught:
        prepare(recipe_of(tmp_path, str(path)), tokenizer, keep=keep)
    assert caught.value.where == str(path)
    assert not (tmp_path / "run").exists()


def test_a_file_that_changes_after_it_was_hashed_is_not_taken_for_the_old_one(tmp_path, monkeypatch, tokenizer):
    from lora_cli.data import prepare as module

    path = write_rows(tmp_path / "a.jsonl", [{"text": "old one"}, {"text": "old two"}])
    old, opening = path.read_bytes(), module.open_prepared

    def changing(*words: Any, **named: Any) -> Any:
        monkeypatch.setattr(module, "open_prepared", opening)
        path.write_bytes(old.replace(b"old", b"new"))
        return opening(*words, **named)

    monkeypatch.setattr(module, "open_prepared", changing)
    recipe = recipe_of(tmp_path, str(path), cache=str(tmp_path / "cache"))
    with suppress(LoraError):  # to say so is right too
        prepare(recipe, tokenizer, keep=True)
    path.write_bytes(old)
    data = prepare(recipe, tokenizer, keep=True)
    assert [tokenizer.decode(example.ids[:-1]) for example in data.train] == ["old one", "old two"]


# ── several sources ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(tmp_path):
    """Sources of 10, 20 and 7 rows, with the weights 2, 0.5 and 1.5."""
    weights = {"a": (10, 2), "b": (20, 0.5), "c": (7, 1.5)}
    return [
        {
            "path": str(write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(rows)])),
            "weight": w,
        }
        for name, (rows, w) in weights.items()
    ]


def seen(recipe: Recipe, tokenizer: Any) -> Counter[tuple[str, int]]:
    """How often an epoch sees each row."""
    data = prepare(recipe, tokenizer, keep=True)
    found = Counter((Path(example.file).stem, example.row) for example in data.train)
    for example in data.train:
        assert tokenizer.decode(example.ids[:-1]) == f"{Path(example.file).stem} {example.row - 1}"
    packed = [index for group in range(len(data.rows)) for index in data.rows[group]]
    assert sorted(packed) == list(range(len(data.train)))
    assert data.summary.train.examples == len(data.train) == found.total()
    assert data.summary.train.tokens == sum(len(example.ids) for example in data.train)
    return found


def test_weights_say_how_often_an_epoch_sees_a_row(tmp_path, tokenizer, three):
    counts = seen(recipe_of(tmp_path, three), tokenizer)
    assert [counts["a", row] for row in range(1, 11)] == [2] * 10
    assert sorted(counts["b", row] for row in range(1, 21)) == [0] * 10 + [1] * 10
    assert sorted(counts["c", row] for row in range(1, 8)) in ([1] * 3 + [2] * 4, [1] * 4 + [2] * 3)


def test_what_a_fraction_chooses_is_the_seeds_choice(tmp_path, tokenizer, three):
    chosen = [seen(recipe_of(tmp_path, three, seed=seed), tokenizer) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    of_b = [tuple(row for name, row in each if name == "b") for each in chosen]
    assert len(set(of_b)) == 3
    assert sorted(of_b[0]) != list(range(1, 11))  # not simply the first


def test_sources_of_equal_size_are_not_chosen_from_alike(tmp_path, tokenizer):
    paths = [write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {row}"} for row in range(40)]) for n in "ab"]
    counts = seen(recipe_of(tmp_path, [{"path": str(path), "weight": 0.5} for path in paths]), tokenizer)
    a, b = ({row for name, row in counts if name == which} for which in "ab")
    assert len(a) == len(b) == 20
    assert a != b


def test_rows_held_out_are_never_among_the_repeated_ones(tmp_path, tokenizer, three):
    recipe = recipe_of(tmp_path, three, validation=0.25)
    data = prepare(recipe, tokenizer, keep=True)
    held = {(example.file, example.row) for example in data.validation}
    assert len(held) == len(data.validation) == round(0.25 * 37)
    assert not held & {(example.file, example.row) for example in data.train}


def test_sources_may_be_of_different_formats(tmp_path, tokenizer):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a text"}])
    sums = write_rows(tmp_path / "sums.jsonl", [{"prompt": "1 + 1 = ", "completion": "2", "by": "me"}])
    data = prepare(recipe_of(tmp_path, [str(text), str(sums)]), tokenizer, keep=True)
    assert data.summary.formats == {
        str(text): "text (the rows have text)",
        str(sums): "completion (the rows have prompt and completion; columns not used: by)",
    }
    decoded = [tokenizer.decode(example.ids) for example in data.train]
    assert decoded == ["a text<|endoftext|>", "1 + 1 = 2<|endoftext|>"]


@pytest.mark.parametrize("name", ["", "*", "**"])
def test_a_folder_without_end_is_no_source(tmp_path, monkeypatch, name):
    monkeypatch.setattr(folders, "_MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(LoraError, match="more than 3 files\n  fix: name a folder that holds data alone"):
        read_rows(tmp_path / name)
    monkeypatch.undo()
    assert len(read_rows(tmp_path / "*")) == 4
