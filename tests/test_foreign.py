"""Reading, copying and removing what a stranger may have put into a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lora_cli import foreign
from lora_cli.errors import LoraError
from lora_cli.foreign import NotOurs

INNER: foreign.Shape = {"c": None}
SHAPE: foreign.Shape = {"a": None, "b": None, "inner": INNER}


class Numbers(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    count: int = 0
    loss: float = 0.0
    name: str = ""


def replaced_by(path: Path, what: str, outside: Path) -> Path:
    """Something at `path` that is not a regular file of its own."""
    if what == "link":
        path.symlink_to(outside)
    elif what == "dangling link":
        path.symlink_to(outside / "nowhere")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "folder", "device"])
def test_whatever_is_not_a_file_of_its_own_is_neither_read_nor_written_nor_waited_for(tmp_path, what):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    path = replaced_by(tmp_path / "status.json", what, outside)
    for touch in (foreign.read_bytes, foreign.open_to_append, foreign.is_real_file):
        with pytest.raises(NotOurs, match=r"link|pipe|folder"):
            touch(path)
    with pytest.raises(NotOurs):
        foreign.read_json(path, Numbers, fix="x")
    with pytest.raises((NotOurs, FileExistsError)):
        foreign.copy_file(outside, path)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSON"),
        (b"[1, 2]", "valid object|object"),
        (b'{"count": "x"}', "count: "),
        (b'{"count": 1.5}', "count: "),
        (b'{"count": true}', "count: "),
        (b'{"loss": NaN}', "loss: .*finite"),
        (b'{"loss": 1e999}', "loss: .*finite"),
        (b'{"loss": 1' + b"0" * 400 + b"}", "loss: .*finite"),
        (b'{"count": 1' + b"0" * 5000 + b"}", "number out of range"),
        (b'{"name": "\\ud800"}', "JSON"),
        (b'{"name": "\xff"}', "JSON"),
        (b'{"name": ' + b"[" * 100_000, "recursion"),
        (b" " * 2000, "larger than"),
    ],
)
def test_what_is_read_is_what_its_schema_says_or_an_error_in_words(tmp_path, content, why):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(LoraError, match=why) as raised:
        foreign.read_json(tmp_path / "x.json", Numbers, fix="start again", at_most=1000 if b"  " in content else 10**6)
    assert raised.value.fix == "start again"
    assert "x.json" in str(raised.value)
    assert raised.value.render().isprintable() or "\n" in raised.value.render()


def test_a_missing_file_is_an_error_in_words_too(tmp_path):
    with pytest.raises(LoraError, match="No such file"):
        foreign.read_json(tmp_path / "x.json", Numbers, fix="start again")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"NaN",
        b"[-Infinity]",
        b"1e400",
        b"1" * 30,
        b"1" * 5000,
        b'"\\ud800"',
        b'"\\udfff"',
        b"\xff",
        b"",
    ],
)
def test_json_that_some_program_cannot_read_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        foreign.parse_json(content)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ü 😀"]}, 2**53, -1e300, "\\ud800"])
def test_json_is_read_as_python_reads_it(value):
    assert foreign.parse_json(json.dumps(value).encode()) == value
    assert foreign.parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def filled(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (folder / name).write_text(name)
    return folder


def test_files_of_ours_are_copied_and_nothing_else(tmp_path):
    source, target = filled(tmp_path / "source"), tmp_path / "target"
    (source / ".cache").symlink_to(tmp_path)
    (source / "inner" / "notes").write_text("mine")
    target.mkdir()
    foreign.copy_files(source, target, SHAPE)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == ["a", "b", "inner", "inner/c"]
    assert (target / "inner" / "c").read_text() == "inner/c"


@pytest.mark.parametrize("name", ["a", "inner/c", "inner"])
def test_a_link_with_a_name_of_ours_is_not_copied(tmp_path, name):
    source, outside = filled(tmp_path / "source"), filled(tmp_path / "outside")
    (source / name).rename(tmp_path / "away")
    (source / name).symlink_to(outside / name)
    (tmp_path / "target").mkdir()
    with pytest.raises(NotOurs, match="link"):
        foreign.copy_files(source, tmp_path / "target", SHAPE)
    with pytest.raises(NotOurs, match="link"):
        foreign.files_of(source, SHAPE)


def test_removing_takes_what_is_ours_and_leaves_the_rest(tmp_path):
    folder, outside = filled(tmp_path / "folder"), filled(tmp_path / "outside")
    (folder / "inner" / "notes").write_text("mine")
    (folder / "a").unlink()
    (folder / "a").symlink_to(outside / "a")
    assert not foreign.remove_ours(folder, SHAPE)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == ["a", "inner", "inner/notes"]
    assert len(list(outside.rglob("*"))) == 4
    (tmp_path / "link").symlink_to(outside)
    assert not foreign.remove_ours(tmp_path / "link", SHAPE)
    assert len(list(outside.rglob("*"))) == 4
    assert foreign.remove_ours(outside, SHAPE)
    assert not outside.exists()
    assert foreign.remove_ours(outside, SHAPE), "nothing to remove is no failure"


def test_a_file_that_does_not_belong_is_found(tmp_path):
    folder = filled(tmp_path / "folder")
    assert [str(p.relative_to(folder)) for p in foreign.files_of(folder, SHAPE)] == ["a", "b", "inner/c"]
    (folder / "inner" / ".cache").mkdir()
    with pytest.raises(NotOurs, match="does not belong"):
        foreign.files_of(folder, SHAPE)
