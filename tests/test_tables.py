"""Tables: what Parquet and Arrow have and JSON lacks becomes text or a refusal, never a traceback."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import read_rows
from pyarrow import compute, parquet

from lora_cli.data.files.readers import Row, read_file
from lora_cli.data.files.sources import HubSource
from lora_cli.data.files.tables import rows_of
from lora_cli.data.formats import Completion, detect_format
from lora_cli.errors import LoraError

KINDS = ["parquet", "arrow", "stream.arrow", "hub"]


def rows_of_table(table: pa.Table, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is read of a table that was written as a file of some kind, or comes from the hub."""
    if kind == "hub":
        import datasets

        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset(table))
        return [row.values for row in HubSource("owner/name", None, "train", None, streaming=False).rows()]
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        new = pa.ipc.new_stream if kind.startswith("stream") else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return [row.values for row in read_file(path)]


def raw(kind: pa.DataType, value: int) -> pa.Array:
    """A value by its number, which may be one that no calendar has, and a missing one."""
    return pa.array([value, None], pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


ODD = {
    "date32": (raw(pa.date32(), 19_000), "2022-01-08"),
    "date32 out of range": (raw(pa.date32(), 2**30), None),
    "date64": (raw(pa.date64(), 19_000 * 86_400_000), "2022-01-08"),
    "timestamp[s]": (raw(pa.timestamp("s"), 1_700_000_000), "2023-11-14 22:13:20"),
    "timestamp[ns]": (raw(pa.timestamp("ns"), 1_700_000_000_123_456_789), "2023-11-14 22:13:20.123456789"),
    "timestamp[us], Berlin": (raw(pa.timestamp("us", "Europe/Berlin"), 10**15), "2001-09-09 03:46:40+0200"),
    "timestamp[us], no such zone": (raw(pa.timestamp("us", "Mars/Phobos"), 10**15), "2001-09-09 01:46:40Z"),
    "timestamp out of range": (raw(pa.timestamp("us"), 2**61), None),
    "time32": (raw(pa.time32("s"), 3600), "01:00:00"),
    "time64": (raw(pa.time64("ns"), 123_456_789), "00:00:00.123456789"),
    "duration": (raw(pa.duration("s"), 90), "90 s"),
    "duration out of range": (raw(pa.duration("s"), 2**60), f"{2**60} s"),
    "decimal": (pa.array([decimal.Decimal("12.50"), None]), "12.50"),
    "decimal256": (pa.array([decimal.Decimal("1" * 50), None], pa.decimal256(60, 0)), "1" * 50),
    "binary that is text": (pa.array(["Größe".encode(), None], pa.binary()), "Größe"),
    "binary": (pa.array([b"\xff\x00", None], pa.binary()), None),
    "interval": (pa.array([pa.MonthDayNano([1, 2, 3]), None]), None),
}


def nested(odd: pa.Array, kind: str) -> dict[str, pa.Array]:
    places = {
        "plain": odd,
        "in a struct": pa.StructArray.from_arrays([odd, pa.array(["a", "b"])], names=["at", "by"]),
        "in a list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), odd),
    }
    if kind != "hub":  # which has no maps
        places["in a map"] = pa.MapArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array(["a", "b"]), odd)
    return places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ODD)
def test_a_column_of_a_type_that_json_lacks_does_no_harm_where_nothing_reads_it(name, kind, tmp_path, monkeypatch):
    for place, column in nested(ODD[name][0], kind).items():
        table = pa.table({"text": ["one", "two"], "odd": column})
        try:
            rows = rows_of_table(table, kind, tmp_path, monkeypatch)
        except (pa.ArrowNotImplementedError, LoraError):
            assert name == "interval"  # which Parquet and the hub cannot hold
            assert kind in ("parquet", "hub")
            continue
        assert [row["text"] for row in rows] == ["one", "two"], place
        assert list(rows[0]) == ["text", "odd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in ODD if name != "interval"])
def test_a_column_of_a_type_that_json_lacks_is_text_where_it_can_be_written_and_else_refused(
    name, kind, tmp_path, monkeypatch
):
    column, text = ODD[name]
    (path := tmp_path / "x").mkdir()
    values = rows_of_table(pa.table({"text": column}), kind, path, monkeypatch)[0]
    row = Row("t", 1, values)
    form = detect_format([row])
    if text is not None:
        document = form.read(row)
        assert isinstance(document, Completion)
        assert (document.prompt, document.completion) == (None, text)
        return
    with pytest.raises(LoraError, match="not text") as caught:
        form.read(row)
    assert caught.value.where == "t: row 1"
    assert "column of strings" in str(caught.value.fix)


def test_dictionary_and_run_end_encoded_dates_are_dates():
    dates = pa.array([datetime.date(2024, 1, 1), None])
    for column in (dates.dictionary_encode(), compute.run_end_encode(dates)):  # type: ignore[attr-defined]
        assert [row["d"] for row in rows_of(pa.table({"d": column}), "t")] == ["2024-01-01", None]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_two_columns_of_one_name_are_refused(kind, tmp_path, monkeypatch):
    for table, name in (
        (
            pa.Table.from_arrays(
                [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["prompt", "completion", "prompt"]
            ),
            "prompt",
        ),
        (
            pa.table(
                {"text": ["a"], "s": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["k", "k"])}
            ),
            "s.k",
        ),
    ):
        with pytest.raises(LoraError, match=f"two columns are called {name}") as caught:
            rows_of_table(table, kind, tmp_path, monkeypatch)
        assert caught.value.where == str(tmp_path / f"rows.{kind}")
        assert caught.value.fix


@pytest.mark.parametrize("kind", KINDS[:3])
def test_maps_are_objects(kind, tmp_path, monkeypatch):
    table = pa.table({"m": pa.array([[("city", "Rome")]], pa.map_(pa.string(), pa.string()))})
    assert rows_of_table(table, kind, tmp_path, monkeypatch) == [{"m": {"city": "Rome"}}]


def test_rows_of_tables_are_known_as_such(tmp_path):
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert [row.filled for row in read_rows(tmp_path)] == [True, False]
