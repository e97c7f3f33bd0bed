"""Folders: which files are rows, which split their names say, and that all of it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_rows
from tiny_model import make_tokenizer

from lora_cli.data.files.folders import find_files, split_of
from lora_cli.data.prepare import prepare
from lora_cli.data.report import data_lines
from lora_cli.errors import LoraError
from lora_cli.planning.check import check
from lora_cli.recipe import Recipe, load_recipe


def fill(folder: Path, *names: str) -> Path:
    """Files of one row each, whose text is their name."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pa.table({"text": [name]}), path)
        elif path.suffix in (".txt", ".md"):
            path.write_text(name)
        else:
            write_rows(path, [{"text": name}])
    return folder


def names(folder: Path, *, held_out: bool = False) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(str(folder), held_out=held_out).paths]


def prepared(train: Any, **data: Any) -> Any:
    values = {"base_model": "none", "output": "run", "data": {"train": train, **data}}
    recipe = Recipe.model_validate(values)
    return prepare(recipe, make_tokenizer()), recipe


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[("train.jsonl", "train"), ("train-00000-of-00002.parquet", "train"), ("training_set.csv", "train")],
        *[("train_sft-00000-of-00001.parquet", "train"), ("my-train.json.gz", "train"), ("trainData.jsonl", "train")],
        *[
            ("validation-00000-of-00001.parquet", "validation"),
            ("valid.csv", "validation"),
            ("val_2.tsv", "validation"),
        ],
        *[("dev.jsonl", "validation"), ("eval.jsonl", "validation"), ("evaluation.jsonl", "validation")],
        *[("held-out.jsonl", "validation"), ("holdout.jsonl", "validation")],
        *[("test.jsonl", "test"), ("test-00000-of-00001.parquet", "test"), ("sums-test.arrow", "test")],
        *[("test/a.jsonl", "test"), ("data/dev/a.jsonl", "validation"), ("train/test_cases.jsonl", "train")],
        *[("latest.jsonl", None), ("constraint.jsonl", None), ("a.jsonl", None), ("device.jsonl", None)],
        *[("contest.jsonl", None), ("train_and_test.jsonl", None), ("0.parquet", None)],
    ],
)
def test_the_split_is_what_a_name_says(name, split):
    assert split_of(Path(name)) == split


@pytest.mark.parametrize("other", ["test", "validation", "valid", "val", "dev", "eval"])
@pytest.mark.parametrize("form", ["{}-00000-of-00001.parquet", "{}.jsonl", "data/{}-00000.parquet", "{}/rows.jsonl"])
def test_of_a_folder_with_splits_training_takes_train_and_the_rest_is_told(form, other, tmp_path):
    folder = fill(tmp_path / "set", form.format("train"), form.format(other))
    assert names(folder) == [form.format("train")]
    data, recipe = prepared(str(folder))
    assert len(data.train) == 1
    lines = data_lines(data, recipe)
    split = split_of(Path(form.format(other)))
    assert lines[1:3] == [
        f"  {form.format('train')}: 1 row",
        f"  {form.format(other)}: not read, its name says {split}",
    ]


def test_held_out_data_take_validation_else_test(tmp_path):
    every = fill(tmp_path / "every", "train.jsonl", "validation.jsonl", "test.jsonl")
    assert names(every, held_out=True) == ["validation.jsonl"]
    assert names(fill(tmp_path / "two", "train.jsonl", "test.jsonl"), held_out=True) == ["test.jsonl"]
    assert names(fill(tmp_path / "one", "a.jsonl", "b.jsonl"), held_out=True) == ["a.jsonl", "b.jsonl"]
    data, recipe = prepared(str(every), validation=str(every))
    assert (len(data.train), len(data.validation)) == (1, 1)
    told = "\n".join(data_lines(data, recipe))
    assert f"{every}: text" in told
    assert f"{every} (validation): text" in told


@pytest.mark.parametrize(
    ("files", "to_train"),
    [
        (["test.jsonl"], ["test.jsonl"]),
        (["test.jsonl", "dev.jsonl"], ["dev.jsonl", "test.jsonl"]),
        (["a.jsonl", "test.jsonl"], ["a.jsonl"]),
        (["a.jsonl", "train.jsonl", "val.jsonl"], ["a.jsonl", "train.jsonl"]),
        ([*(f"part-{n:02}.parquet" for n in range(30)), "test.parquet"], [f"part-{n:02}.parquet" for n in range(30)]),
        ([f"it's [{n}].jsonl" for n in range(30)] + ["test.jsonl"], [f"it's [{n}].jsonl" for n in range(30)]),
    ],
)
def test_where_names_leave_open_what_to_train_on_it_is_refused_and_the_fix_says_what_is_left(files, to_train, tmp_path):
    folder = fill(tmp_path / "set", *files)
    with pytest.raises(LoraError, match="by their names") as caught:
        prepared(str(folder))
    assert caught.value.where == str(folder)
    written = str(caught.value.fix).partition("data.train: ")[2]
    data, _ = prepared(yaml.safe_load(written))
    assert sorted(Path(name).name for name in data.summary.names) == sorted(to_train)


def test_train_beside_files_of_no_split_is_all_of_them(tmp_path):
    assert names(fill(tmp_path / "set", "train.jsonl", "more.jsonl")) == ["more.jsonl", "train.jsonl"]


DESCRIBES = {
    "state.json": {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "c0ffee",
        "_split": None,
    },
    "dataset_info.json": {"features": {"text": {"dtype": "string", "_type": "Value"}}, "citation": ""},
    "dataset_infos.json": {"default": {"features": {}}},
    "dataset_dict.json": {"splits": ["train", "test"]},
}
LLAMA_FACTORY = {"mine": {"file_name": "rows.jsonl", "formatting": "sharegpt"}}


@pytest.mark.parametrize("name", [*DESCRIBES, "LLaMA-Factory"])
def test_files_that_describe_data_are_no_rows(name, tmp_path):
    folder = fill(tmp_path / "set", "rows.jsonl", "README.md", "README.txt", "LICENSE.txt")
    called, content = ("dataset_info.json", LLAMA_FACTORY) if name == "LLaMA-Factory" else (name, DESCRIBES[name])
    (folder / called).write_text(json.dumps(content, indent=1))
    assert names(folder) == ["rows.jsonl"]
    data, recipe = prepared(str(folder))
    assert len(data.train) == 1
    assert f"  {called}: not read, describes data and holds no rows" in data_lines(data, recipe)
    assert "  README.txt: not read, is about the data, by its name" in data_lines(data, recipe)
    with pytest.raises(LoraError, match="describes data and holds no rows") as caught:
        prepared(str(folder / called))
    assert str(folder) in str(caught.value.fix)
    assert [path.name for path in find_files(str(folder / "*.json*")).paths] == ["rows.jsonl"]


def test_rows_in_a_file_of_such_a_name_are_rows(tmp_path):
    for name, rows in (("state.json", [{"text": "Ohio"}, {"text": "Iowa"}]), ("dataset_info.json", [{"text": "a"}])):
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "state.json").write_text('{"text": "Utah"}')
    assert len(prepared(str(tmp_path))[0].train) == 4


def test_what_save_to_disk_writes_is_read_without_its_caches(tmp_path):
    import datasets

    def rows(name: str, count: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": f"{name} {n}", "id": n} for n in range(count)])

    rows("one", 3).save_to_disk(str(tmp_path / "one"), num_shards=2)
    saved = datasets.load_from_disk(str(tmp_path / "one"))
    saved.map(lambda row: {"text": row["text"] + " again"})  # type: ignore[union-attr]  # leaves a cache beside them
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    data, recipe = prepared(str(tmp_path / "one"))
    assert len(data.train) == 3
    assert sum("not read, a cache of `datasets`" in line for line in data_lines(data, recipe)) == 1
    both = datasets.DatasetDict({"train": rows("train", 4), "test": rows("test", 2)})
    both.save_to_disk(str(tmp_path / "both"))
    data, _ = prepared(str(tmp_path / "both"), validation=str(tmp_path / "both"))
    assert (len(data.train), len(data.validation)) == (4, 2)


def test_files_of_a_folder_and_of_a_pattern_are_listed_with_their_rows(tmp_path):
    for number in range(30):
        write_rows(tmp_path / f"part-{number:02}.jsonl", [{"text": f"{number} {n}"} for n in range(number % 3 + 1)])
    for source in (tmp_path, tmp_path / "part-*.jsonl"):
        data, recipe = prepared(str(source))
        lines = data_lines(data, recipe)
        assert lines[1:4] == ["  part-00.jsonl: 1 row", "  part-01.jsonl: 2 rows", "  part-02.jsonl: 3 rows"]
        assert lines[21] == "  and 10 more files"
        listing = data.summary.listing[str(source)]
        assert sum(listing["files"].values()) == 60
        assert len(listing["files"]) == 30
    one, recipe = prepared(str(tmp_path / "part-00.jsonl"))
    assert one.summary.listing == {}


def test_check_lists_files_also_of_a_stream(recipe_file, tmp_path):
    folder = fill(tmp_path / "set", "train.jsonl", "test.jsonl")
    for streaming in (False, True):
        path = recipe_file(
            data={"train": str(folder), "validation": None, "streaming": streaming}, train={"max_steps": 1}
        )
        found = check(load_recipe(path)).as_dict(0)["listing"][str(folder)]
        assert found["left"] == {str(folder / "test.jsonl"): "its name says test"}
        assert list(found["files"]) == [str(folder / "train.jsonl")]


def test_a_folder_without_data_says_what_lies_there(tmp_path):
    fill(tmp_path / "notes", "a.rst", "b.rst")
    with pytest.raises(LoraError, match=r"no data files in this folder; the files there end in \.rst"):
        find_files(str(tmp_path / "notes"))


def test_markdown_is_read_where_nothing_else_is(tmp_path):
    folder = fill(tmp_path / "notes", "a.md", "b.md", "README.md")
    assert [path.name for path in find_files(str(folder)).paths] == ["a.md", "b.md"]
    fill(folder, "rows.jsonl")
    found = find_files(str(folder))
    assert [path.name for path in found.paths] == ["rows.jsonl"]
    assert found.left[str(folder / "a.md")] == "Markdown beside other data files"
    assert find_files(str(folder / "a.md")).paths == (folder / "a.md",)
