"""Prepared data on disk: opened when nothing changed, made anew when anything did, never half, read back as written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, family_tokenizer
from conftest import ROOT, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_cli.data import cache as cache_module
from lora_cli.data import prepare as module
from lora_cli.data.cache import cache_folder
from lora_cli.data.encode import Encoder
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.formats import detect_format
from lora_cli.data.order import hold_out
from lora_cli.data.prepare import Preparation, prepare
from lora_cli.data.store import PARTS, Examples, ExampleStore, ExampleWriter, PreparedData, open_prepared
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe

ROWS = [{"prompt": f"{n} plus {n % 7} is ", "completion": f"{n + n % 7}{'!' * (n % 5)}"} for n in range(40)]


def recipe_of(path: Path, output: Path, *, train: dict[str, Any] | None = None, **data: Any) -> Recipe:
    values = {"base_model": "none", "data": {"train": str(path), **data}, "output": str(output)}
    return Recipe.model_validate(values | {"train": train or {}})


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def recipe(rows, tmp_path):
    return recipe_of(rows, tmp_path / "run", validation=0.2)


@pytest.fixture
def no_building(monkeypatch):
    """From the call on, preparing anew fails the test."""

    def forbid() -> None:
        def build(*_: Any) -> None:
            raise AssertionError("prepared again")

        monkeypatch.setattr(Preparation, "build", build)

    return forbid


def content(data: PreparedData) -> list[Any]:
    """Everything that a run reads."""
    examples = [
        [(list(map(int, each.ids)), list(each.spans), each.file, each.row) for each in part]
        for part in (data.train, data.validation)
    ]
    groups = [data.rows[at] for at in range(len(data.rows))]
    return [*examples, groups, data.fingerprint, data.findings.as_list(), data.summary.formats, data.summary.train]


def whole(folder: Path) -> bool:
    return open_prepared(folder) is not None


# ── opened again ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_recipe_opens_what_was_prepared(recipe, tokenizer, no_building):
    first = prepare(recipe, tokenizer, keep=True)
    no_building()
    again = prepare(recipe, tokenizer, keep=True)
    assert content(again) == content(first)
    assert again.folder == first.folder == cache_folder(recipe) / Preparation.of(recipe, tokenizer).key
    assert {path.name for path in first.folder.iterdir()} == {*PARTS, "summary.json"}
    assert content(prepare(recipe, tokenizer)) == content(first)
    assert content(prepare(recipe, make_tokenizer(), inspect=True)) == content(first)


def test_what_is_not_to_be_kept_is_nowhere_and_goes_away(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    data = prepare(recipe, tokenizer)
    assert whole(data.folder)
    assert data.folder.parent.parent == tmp_path / "temporary"
    assert not Path(recipe.output).exists()
    kept = data.train
    del data
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert kept[0].targets  # what was read is still there
    assert content(prepare(recipe, tokenizer, keep=True)) == content(prepare(recipe, tokenizer))


@pytest.mark.parametrize("where", ["gate", "reading"])
def test_nothing_stays_of_what_was_not_to_be_kept_and_failed(rows, tokenizer, tmp_path, monkeypatch, where):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_rows(rows, [*ROWS, {"prompt": 3}] if where == "gate" else [{"text": "a"}, {"other": "b"}])
    with rows.open("a") as stream:
        stream.write("{\n" if where == "reading" else "")
    with pytest.raises(LoraError):
        prepare(recipe_of(rows, tmp_path / "run"), tokenizer)
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_prepared_folder_can_be_moved(recipe, tokenizer, tmp_path):
    data = prepare(recipe, tokenizer, keep=True)
    expected = content(data)
    shutil.move(data.folder, tmp_path / "elsewhere")
    opened = open_prepared(tmp_path / "elsewhere")
    assert opened is not None
    assert content(opened) == expected


# ── the key ─────────────────────────────────────────────────────────────────────────────────────────────────────


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}], "by": n % 9}
    for n in range(40)
]


def key(recipe: Recipe, tokenizer: Any) -> str:
    return Preparation.of(recipe, tokenizer).key


CHANGES: dict[str, dict[str, Any]] = {
    "max_seq_len": {"max_seq_len": 512},
    "packing": {"packing": False},
    "train_on": {"train_on": "last_assistant"},
    "format": {"format": "chat"},
    "columns": {"columns": {"tools": "by"}},
    "too_long": {"too_long": "drop"},
    "drop": {"drop": ["duplicate"]},
    "template": {"template": "plain"},
    "validation": {"validation": 0.3},
    "no validation": {"validation": None, "group_by": None},
    "group_by": {"group_by": "by"},
}


def test_what_the_result_depends_on_makes_a_new_key(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", CHATS)
    base = {"validation": 0.2}
    keys = {"": key(recipe_of(path, tmp_path / "run", **base), tokenizer)}
    for name, change in CHANGES.items():
        keys[name] = key(recipe_of(path, tmp_path / "run", **base | change), tokenizer)
    for seed in (1, 2):
        keys[f"seed {seed}"] = key(recipe_of(path, tmp_path / "run", train={"seed": seed}, **base), tokenizer)
    for weight in (2, 0.5):
        train = [{"path": str(path), "weight": weight}]
        values = {"base_model": "none", "data": base | {"train": train}, "output": str(tmp_path / "run")}
        keys[f"weight {weight}"] = key(Recipe.model_validate(values), tokenizer)
    held = write_rows(tmp_path / "held.jsonl", CHATS[:3])
    keys["file held out"] = key(recipe_of(path, tmp_path / "run", validation=str(held)), tokenizer)
    longer = write_rows(tmp_path / "longer.jsonl", CHATS[:4])
    keys["another held out"] = key(recipe_of(path, tmp_path / "run", validation=str(longer)), tokenizer)
    assert len(set(keys.values())) == len(keys)


def test_of_held_out_rows_and_training_rows_it_matters_which_are_which(tmp_path, tokenizer):
    a, b = (write_rows(tmp_path / f"{name}.jsonl", CHATS[:5]) for name in "ab")
    keys = {key(recipe_of(one, tmp_path / "run", validation=str(other)), tokenizer) for one, other in ((a, b), (b, a))}
    both = Recipe.model_validate(
        {"base_model": "none", "data": {"train": [str(a), str(b)]}, "output": str(tmp_path / "run")}
    )
    assert len(keys | {key(both, tokenizer)}) == 3


@settings(deadline=None, max_examples=15)
@given(at=st.integers(0, 10**6))
def test_any_changed_byte_of_the_data_makes_a_new_key(tmp_path_factory, tokenizer, at):
    folder = tmp_path_factory.mktemp("key")
    path = write_rows(folder / "a.jsonl", ROWS)
    before = key(recipe_of(path, folder), tokenizer)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)
    assert key(recipe_of(path, folder), tokenizer) != before
    data[at % len(data)] ^= 1
    path.write_bytes(data)
    assert key(recipe_of(path, folder), tokenizer) == before


def tokenizers() -> dict[str, Any]:
    made = {name: make_tokenizer() for name in ("same", "end", "padding", "template", "merges", "normalizer", "added")}
    made["end"].eos_token = "<|im_end|>"
    made["template"].chat_template += " "
    made["merges"] = make_tokenizer(500)
    backend = Tokenizer.from_str(made["normalizer"].backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    made["normalizer"] = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    made["normalizer"].chat_template = make_tokenizer().chat_template
    made["added"].add_tokens(["<new>"])
    made["bos"] = make_tokenizer()
    made["bos"].bos_token = "<|im_start|>"
    made["family"] = family_tokenizer(FAMILIES["qwen2.5"])
    del made["padding"]
    return made


def test_any_change_of_the_tokenizer_makes_a_new_key(recipe, tokenizer):
    keys = {name: key(recipe, each) for name, each in tokenizers().items()}
    assert keys.pop("same") == key(recipe, tokenizer)
    assert len({*keys.values(), key(recipe, tokenizer)}) == len(keys) + 1


def test_a_template_counts_by_its_text_and_not_by_its_name(rows, tmp_path, tokenizer):
    file = tmp_path / "a.jinja"
    keys = []
    for text in ("{{ messages[0].content }}", "{{ messages[1].content }}", "{{ messages[0].content }}"):
        file.write_text(text)
        keys.append(key(recipe_of(rows, tmp_path, template=str(file)), tokenizer))
    assert keys[0] == keys[2] != keys[1]


def test_the_code_and_its_libraries_make_a_new_key(recipe, tokenizer, monkeypatch):
    before = key(recipe, tokenizer)
    real = Path.read_bytes
    changed: list[str] = []

    def read(path: Path) -> bytes:
        return real(path) + (b"#" if path.name in changed else b"")

    monkeypatch.setattr(Path, "read_bytes", read)
    assert key(recipe, tokenizer) == before
    folder = Path(module.__file__).parent
    for path in [*folder.rglob("*.py"), *folder.glob("templates/*.jinja")]:
        changed[:] = [path.name]
        assert key(recipe, tokenizer) != before, path
    changed.clear()
    for library in ("tokenizers", "transformers", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "version", lambda name, own=library: "0" if name == own else real_version(name))
            assert key(recipe, tokenizer) != before, library


def real_version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


@pytest.mark.parametrize(
    "change",
    [
        {"output": "/elsewhere"},
        {"data": {"cache": "/shared"}},
        {"data": {"allow": ["overlap", "too_long"]}},
        {"train": {"learning_rate": 0.5}},
        {"train": {"epochs": 9}},
        {"train": {"micro_batch_size": 2}},
        {"train": {"gradient_accumulation_steps": 9}},
        {"adapter": {"rank": 3}},
        {"base_model": "another"},
        {"dtype": "fp32"},
    ],
    ids=str,
)
def test_what_the_result_does_not_depend_on_keeps_the_key(recipe, tokenizer, change):
    values = recipe.model_dump(mode="json")
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    values["train"] |= {"tokens_per_micro_batch": None}
    changed = Recipe.model_validate(values)
    assert changed != recipe
    assert key(changed, tokenizer) == key(recipe, tokenizer)


def test_without_packing_the_budget_of_micro_batches_counts(rows, tmp_path, tokenizer):
    """Then it says which examples share one; packed rows are the same for any number of them."""
    for packing, kinds in ((False, 3), (True, 1)):
        sizes: list[dict[str, Any]] = [{}, {"tokens_per_micro_batch": 4096}, {"tokens_per_micro_batch": 8192}]
        keys = {key(recipe_of(rows, tmp_path, train=size, packing=packing), tokenizer) for size in sizes}
        assert len(keys) == kinds


def test_a_new_key_leaves_nothing_of_the_old_in_the_run_folder_but_all_in_a_shared_cache(rows, tmp_path, tokenizer):
    for cache in (None, str(tmp_path / "cache")):
        found = []
        for length in (512, 256):
            recipe = recipe_of(rows, tmp_path / "run", max_seq_len=length, cache=cache)
            found.append(prepare(recipe, tokenizer, keep=True).folder)
        left = {path for path in cache_folder(recipe).iterdir()}
        assert left == ({found[1]} if cache is None else set(found))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"prepared"}


def test_what_was_allowed_once_is_not_allowed_for_ever(rows, tmp_path, tokenizer):
    """`allow` is no part of the key: who opens what another run prepared has the gate of their own recipe."""
    held = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    open_gate, closed = (
        recipe_of(rows, tmp_path / "run", validation=str(held), allow=allow, cache=str(tmp_path / "cache"))
        for allow in (["overlap"], [])
    )
    assert prepare(open_gate, tokenizer, keep=True).findings.counts["overlap"] == 2
    for keep in (True, False):
        with pytest.raises(LoraError, match=r"overlap|training rows too"):
            prepare(closed, tokenizer, keep=keep)
    inspected = prepare(closed, tokenizer, inspect=True).findings
    assert inspected.stopping(closed.data.allow) == ["overlap"]
    assert prepare(open_gate, tokenizer, keep=True).findings.stopping(open_gate.data.allow) == []


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("damage")
    recipe = recipe_of(write_rows(folder / "rows.jsonl", ROWS), folder / "run", validation=0.2)
    data = prepare(recipe, tokenizer, keep=True)
    return recipe, content(data), data.folder


@pytest.fixture
def good(prepared_once, tmp_path):
    """A recipe, what a run reads, and the folder it is in, for a test to damage."""
    recipe, expected, folder = prepared_once
    copy = tmp_path / "cache" / folder.name
    shutil.copytree(folder, copy)
    values = recipe.model_dump(mode="json")
    values["data"] |= {"cache": str(copy.parent)}
    values["train"] |= {"tokens_per_micro_batch": None}
    return Recipe.model_validate(values), expected, copy


def repaired(good: Any, tokenizer: Any) -> bool:
    """Whether what is in the folder was found damaged; what preparing then makes of it must be what it was."""
    recipe, expected, folder = good
    found = open_prepared(folder) is None
    assert content(prepare(recipe, tokenizer, keep=True)) == expected
    assert whole(folder)
    assert [path for path in folder.parent.iterdir() if path != folder] == []
    return found


@pytest.mark.parametrize("name", [*PARTS, "summary.json"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_damaged_byte_is_found_and_repaired(good, tokenizer, name, place, flip):
    path = good[2] / name
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= flip
    path.write_bytes(data)
    same = name == "summary.json" and says_the_same(data, good[2])
    assert repaired(good, tokenizer) != same


def says_the_same(data: bytes, folder: Path) -> bool:
    """JSON may be written in more than one way: a space that became a line end is no damage."""
    try:
        stored = json.loads(data)
        opened = open_prepared(folder)
        return opened is not None and stored["checksums"].keys() == {*PARTS, "summary"}
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*PARTS, "summary.json"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "longer", "folder", "zeros", "another's"])
def test_a_damaged_file_is_found_and_repaired(good, tokenizer, name, how):
    path = good[2] / name
    data = path.read_bytes()
    if how in ("deleted", "folder"):
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "deleted":
        other = good[2] / ("train.arrow" if name != "train.arrow" else "validation.arrow")
        path.write_bytes(
            {"emptied": b"", "cut": data[:-1], "longer": data + b"\0", "zeros": bytes(len(data))}.get(
                how, other.read_bytes()
            )
        )
    assert repaired(good, tokenizer)


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored["summary"].__setitem__("fingerprint", "0" * 64),
        lambda stored: stored["summary"]["findings"]["counts"].__setitem__("overlap", 1),
        lambda stored: stored["summary"]["names"].reverse() or stored["summary"]["names"].append("b"),
        lambda stored: stored["summary"].__setitem__("largest_id", 1),
        lambda stored: stored["summary"].__setitem__("new", 1),
        lambda stored: stored["summary"].pop("files"),
        lambda stored: stored["checksums"].pop("rows.arrow"),
        lambda stored: stored["checksums"].__setitem__("rows.arrow", stored["checksums"]["train.arrow"]),
        lambda stored: stored["checksums"].pop("summary"),
        lambda stored: stored.pop("summary"),
        lambda stored: stored.pop("checksums"),
        lambda stored: stored.__setitem__("checksums", []),
        lambda stored: stored.__setitem__("summary", None),
        lambda stored: stored.__setitem__("checksums", None),
    ],
    ids=range(14),
)
def test_an_edited_summary_is_found_and_repaired(good, tokenizer, edit):
    path = good[2] / "summary.json"
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))
    assert repaired(good, tokenizer)


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '"a"', "{", "{}", "\0", "[" * 100_000])
def test_a_summary_that_is_something_else_is_found_and_repaired(good, tokenizer, text):
    (good[2] / "summary.json").write_text(text)
    assert repaired(good, tokenizer)


def test_an_empty_or_missing_folder_or_a_file_in_its_place_is_filled(good, tokenizer):
    folder = good[2]
    shutil.rmtree(folder)
    assert repaired(good, tokenizer)
    shutil.rmtree(folder)
    folder.mkdir()
    assert repaired(good, tokenizer)
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert repaired(good, tokenizer)


KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path[:0] = [{scripts!r}]
from tiny_model import make_tokenizer
from lora_cli.data import prepare as module
from lora_cli.recipe import Recipe
def die(*_, **__):
    os._exit(9)
build, opening = module.Preparation.build, module.open_prepared
def built(preparation, folder):
    build(preparation, folder)
    if sys.argv[1] == "while building":
        die()
    if sys.argv[1] == "while removing":
        os.unlink = Path.unlink = die
def opened(folder):
    found = opening(folder)
    if sys.argv[1] == "before taking the place" and found is not None:
        die()
    return found
module.Preparation.build, module.open_prepared = built, opened
module.prepare(Recipe.model_validate_json(Path({recipe!r}).read_text()), make_tokenizer(), keep=True)
"""


@pytest.mark.parametrize("when", ["while building", "before taking the place", "while removing"])
def test_what_a_killed_run_left_behind_does_no_harm_and_goes(good, tokenizer, tmp_path, when):
    recipe, expected, folder = good
    (folder / "train.arrow").unlink()
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    code = KILLED.format(scripts=str(ROOT / "scripts"), recipe=str(tmp_path / "recipe.json"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, when], env=environment, capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr
    assert [path for path in folder.parent.iterdir() if path != folder], "nothing was left behind"
    assert not whole(folder)
    assert content(prepare(recipe, tokenizer, keep=True)) == expected
    assert whole(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_not_its_own_stays_in_a_shared_cache(rows, tmp_path, tokenizer):
    """A person may name any folder as the cache; no name of theirs says that a folder can go."""
    cache = tmp_path / "cache"
    mine = [cache / name / "photo" for name in (".photos-4194305", "photos-4194305", ".a.b-4194305.c", "0" * 20, ".x")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    for length in (64, 32):
        prepare(recipe_of(rows, tmp_path / "run", cache=str(cache), max_seq_len=length), tokenizer, keep=True)
    assert [path for path in mine if not path.exists()] == []


# ── several at once ─────────────────────────────────────────────────────────────────────────────────────────────

PREPARE = """
import sys, time
from pathlib import Path
sys.path[:0] = [{scripts!r}]
from tiny_model import make_tokenizer
from lora_cli.data import prepare as module
from lora_cli.recipe import Recipe
recipe = Recipe.model_validate_json(Path({recipe!r}).read_text())
tokenizer = make_tokenizer()
build = module.Preparation.build
def meet(preparation, folder):
    Path({folder!r}, sys.argv[1]).touch()
    build(preparation, folder)
    for _ in range(600):
        if len(list(Path({folder!r}).iterdir())) == {count}:
            return
        time.sleep(0.05)
    sys.exit("alone")
module.Preparation.build = meet
data = module.prepare(recipe, tokenizer, keep=True)
print(data.fingerprint, sum(int(id) for example in data.train for id in example.ids))
"""


@pytest.mark.parametrize("shared", [True, False])
def test_processes_that_prepare_the_same_at_once_all_end_well_and_leave_one_folder(rows, tmp_path, tokenizer, shared):
    """They wait for each other until all have built theirs, and then all want the same place."""
    recipe = recipe_of(rows, tmp_path / "run", validation=0.2, cache=str(tmp_path / "cache") if shared else None)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "met").mkdir()
    words = {"recipe": str(tmp_path / "recipe.json"), "folder": str(tmp_path / "met"), "count": 3}
    code = textwrap.dedent(PREPARE).format(scripts=str(ROOT / "scripts"), **words)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for number in range(3)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, said
    expected = prepare(recipe, tokenizer)
    total = sum(int(id) for example in expected.train for id in example.ids)
    assert {out.decode().strip() for out, _ in said} == {f"{expected.fingerprint} {total}"}
    assert [path.name for path in cache_folder(recipe).iterdir()] == [expected.folder.name]


def other_process(monkeypatch: Any, recipe: Recipe, tokenizer: Any) -> PreparedData:
    """What another process would do, in this one: only its number is another."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", os.getppid)
        return prepare(recipe, tokenizer, keep=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("when", ["before building", "while building", "before taking the place"])
@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_another_process_may_be_faster_at_any_moment(rows, tmp_path, tokenizer, monkeypatch, shared, when, state):
    recipe = recipe_of(rows, tmp_path / "run", cache=str(tmp_path / "cache") if shared else None)
    expected = content(prepare(recipe, tokenizer))
    if state == "damaged":
        (prepare(recipe, tokenizer, keep=True).folder / "train.arrow").unlink()
    others: list[PreparedData] = []
    build, opening = Preparation.build, module.open_prepared

    def another() -> None:
        monkeypatch.setattr(Preparation, "build", build)
        monkeypatch.setattr(module, "open_prepared", opening)
        others.append(other_process(monkeypatch, recipe, tokenizer))

    def building(preparation: Preparation, folder: Path) -> None:
        if when == "before building":
            another()
        build(preparation, folder)
        if when == "while building":
            another()

    def opened(folder: Path) -> PreparedData | None:
        found = opening(folder)
        if when == "before taking the place" and ".building-" in folder.name and not others:
            another()
        return found

    monkeypatch.setattr(Preparation, "build", building)
    monkeypatch.setattr(module, "open_prepared", opened)
    mine = prepare(recipe, tokenizer, keep=True)
    assert len(others) == 1
    assert content(mine) == content(others[0]) == expected
    assert [path.name for path in cache_folder(recipe).iterdir()] == [mine.folder.name]
    assert whole(mine.folder)


@pytest.mark.parametrize("other", ["has mended it", "is about to"])
def test_two_that_find_the_same_damage_both_mend_it(rows, tmp_path, tokenizer, monkeypatch, other):
    """The other takes the damaged folder away after this process has looked at it, and before it does so itself."""
    recipe = recipe_of(rows, tmp_path / "run", cache=str(tmp_path / "cache"))
    place = prepare(recipe, tokenizer, keep=True).folder
    expected = content(prepare(recipe, tokenizer, keep=True))
    (place / "train.arrow").unlink()
    opening, looked = module.open_prepared, []

    def opened(folder: Path) -> PreparedData | None:
        found = opening(folder)
        if folder == place:
            looked.append(found)
            if len(looked) == 2:
                monkeypatch.setattr(module, "open_prepared", opening)
                shutil.rmtree(place)
                if other == "has mended it":
                    other_process(monkeypatch, recipe, tokenizer)
        return found

    monkeypatch.setattr(module, "open_prepared", opened)
    assert content(prepare(recipe, tokenizer, keep=True)) == expected
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert whole(place)


def test_end_tokens_of_the_model_that_change_are_noticed(tmp_path, tokenizer):
    """A finding of the gate leans on the model's generation settings: who mends these must not be told the old one."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", CHATS), tmp_path / "run")
    counts = []
    for end in (0, 2):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        loaded = AutoTokenizer.from_pretrained(folder)
        counts.append(prepare(recipe, loaded, keep=True).findings.counts.get("stop_not_end"))
    assert counts == [1, None]


# ── a gate that stops ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("wrong", ["row", "line", "group"])
def test_a_gate_that_stops_leaves_the_output_as_it_was(tmp_path, tokenizer, there, wrong):
    bad = {"row": [{"prompt": 3, "completion": "a"}], "line": [], "group": []}[wrong]
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, *bad])
    if wrong == "line":
        path.write_bytes(path.read_bytes() + b"{\n")
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    more = {"validation": 0.2, "group_by": "nothing"} if wrong == "group" else {}
    with pytest.raises(LoraError):
        prepare(recipe_of(path, tmp_path / "run", **more), tokenizer, keep=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "run").exists() == there
    assert not (tmp_path / "run" / "prepared").exists()


def test_a_gate_that_stops_leaves_what_was_prepared_before(rows, tmp_path, tokenizer):
    recipe = recipe_of(rows, tmp_path / "run")
    first = prepare(recipe, tokenizer, keep=True)
    expected, good = content(first), rows.read_bytes()
    write_rows(rows, [*ROWS, {"prompt": 3}])
    with pytest.raises(LoraError):
        prepare(recipe, tokenizer, keep=True)
    rows.write_bytes(good)
    assert whole(first.folder)
    assert content(prepare(recipe, tokenizer, keep=True)) == expected


# ── the split ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(st.integers(0, 30), min_size=2, max_size=120),
    fraction=st.floats(0.02, 0.9),
    seed=st.integers(0, 99),
)
def test_whole_groups_are_held_out_until_they_are_the_fraction(groups, fraction, seed):
    numbers = np.array(groups, np.uint64)
    count = round(len(groups) * fraction)
    try:
        held = hold_out(numbers, fraction, seed)
    except LoraError:
        sizes = [groups.count(group) for group in set(groups)]
        assert count == 0 or len(sizes) == 1 or count > len(groups) - max(sizes)
        return
    assert held.tolist() == sorted(set(held.tolist()))
    inside = {groups[at] for at in held}
    assert inside
    assert inside != set(groups)
    assert len(held) == sum(groups.count(group) for group in inside)
    assert len(held) >= count
    assert len(held) - max(groups.count(group) for group in inside) < count
    assert held.tolist() == hold_out(numbers, fraction, seed).tolist()
    renamed = (1000 - 7 * numbers.astype(np.int64)).astype(np.uint64)
    assert held.tolist() == hold_out(renamed, fraction, seed).tolist()  # which groups there are, not their numbers


def test_the_seed_chooses_who_is_held_out():
    numbers = np.arange(60).astype(np.uint64)
    chosen = {tuple(hold_out(numbers, 0.2, seed)) for seed in range(20)}
    assert len(chosen) == 20
    assert {at for each in chosen for at in each} == set(range(60))


def parts(data: PreparedData, tokenizer: Any) -> tuple[list[str], list[str]]:
    train, held = ([tokenizer.decode(example.ids) for example in part] for part in (data.train, data.validation))
    return train, held


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_are_never_on_both_sides(tmp_path, tokenizer, seed):
    rows = [{"text": f"row {n % 13}", "id": n} for n in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = prepare(recipe_of(path, tmp_path / "run", validation=0.3, train={"seed": seed}), tokenizer, keep=True)
    train, held = parts(data, tokenizer)
    assert len(train) + len(held) == 60
    assert 18 <= len(held) <= 22
    assert not set(train) & set(held)


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_are_never_on_both_sides_whatever_their_weight(tmp_path, tokenizer, seed):
    rows = [{"text": f"row {n % 13}", "weight": 1 + n % 3} for n in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = prepare(recipe_of(path, tmp_path / "run", validation=0.3, train={"seed": seed}), tokenizer, keep=True)
    train, held = parts(data, tokenizer)
    assert not set(train) & set(held)


@pytest.mark.parametrize(
    "values", [range(10), [f"id {n}" for n in range(10)], [[n, {"a": n}] for n in range(10)]], ids=str
)
def test_rows_of_a_group_are_never_on_both_sides(tmp_path, tokenizer, values):
    rows = [{"text": f"row {n}", "id": values[n % 10]} for n in range(50)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = prepare(recipe_of(path, tmp_path / "run", validation=0.2, group_by="id"), tokenizer, keep=True)
    train, held = ({(example.row - 1) % 10 for example in part} for part in (data.train, data.validation))
    assert (len(train), len(held), len(data.validation)) == (8, 2, 10)
    assert not train & held


def test_equal_rows_of_different_groups_are_not_on_both_sides_untold(tmp_path, tokenizer):
    """Either they stay together too, or the overlap is found: what is trained on is no measure of anything."""
    rows = [{"text": f"row {n % 7}", "id": n} for n in range(49)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = prepare(recipe_of(path, tmp_path / "run", validation=0.2, group_by="id"), tokenizer, inspect=True)
    train, held = parts(data, tokenizer)
    assert not set(train) & set(held) or data.findings.counts.get("overlap")


def test_pieces_of_a_row_stay_together(tmp_path, tokenizer):
    rows = [{"text": f"row {n} " + "and so on " * (n % 4 * 6)} for n in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = recipe_of(path, tmp_path / "run", validation=0.3, max_seq_len=16, too_long="split")
    data = prepare(recipe, tokenizer, keep=True)
    train, held = ({example.row for example in part} for part in (data.train, data.validation))
    assert not train & held
    assert train | held == set(range(1, 31))
    assert len(data.train) > len(train)


# ── fingerprint and examples ────────────────────────────────────────────────────────────────────────────────────


def test_the_fingerprint_is_that_of_the_content(rows, tmp_path, tokenizer):
    """Equal for equal tokens, masks and split, wherever they come from; another for any other."""
    one = prepare(recipe_of(rows, tmp_path / "one", validation=0.2), tokenizer, keep=True)
    shutil.rmtree(tmp_path / "one")
    again = prepare(recipe_of(rows, tmp_path / "one", validation=0.2), tokenizer, keep=True)
    (tmp_path / "elsewhere").mkdir()
    moved = write_rows(tmp_path / "elsewhere" / "other.jsonl", [row | {"id": 7} for row in ROWS])
    other = prepare(recipe_of(moved, tmp_path / "two", validation=0.2), tokenizer, keep=True)
    assert one.fingerprint == again.fingerprint == other.fingerprint
    assert other.folder.name != one.folder.name
    changed = [
        {"validation": 0.3},
        {"validation": None},
        {"validation": 0.2, "train_on": "all"},
        {"validation": 0.2, "train": {"seed": 1}},
    ]
    found = [
        prepare(recipe_of(rows, tmp_path / "three", **words), tokenizer, keep=True).fingerprint for words in changed
    ]
    weighted = write_rows(tmp_path / "weighted.jsonl", [ROWS[0] | {"weight": 0.5}, *ROWS[1:]])
    found.append(prepare(recipe_of(weighted, tmp_path / "three", validation=0.2), tokenizer, keep=True).fingerprint)
    swapped = write_rows(tmp_path / "swapped.jsonl", [ROWS[1], ROWS[0], *ROWS[2:]])
    found.append(prepare(recipe_of(swapped, tmp_path / "three", validation=0.2), tokenizer, keep=True).fingerprint)
    assert len({one.fingerprint, *found}) == len(found) + 1


def test_a_border_that_moves_between_rows_changes_the_fingerprint(tmp_path):
    shapes = [([1, 2], [3]), ([1], [2, 3])]
    prints = []
    for number, shape in enumerate(shapes):
        with ExampleWriter(tmp_path / f"{number}.arrow") as writer:
            for ids in shape:
                writer.add(Example(ids, [(0, len(ids), 1.0)], "a", 1), 0)
        prints.append(writer.fingerprint)
    assert prints[0] != prints[1]


spans = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1.0, 0.5, 2.0, 0.1])), max_size=4)


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), spans, st.integers(0, 2)),
        min_size=1,
        max_size=30,
    ),
    times=st.sampled_from([1, 1, 120]),
)
def test_examples_read_back_are_those_that_were_written(tmp_path_factory, shapes, times):
    path = tmp_path_factory.mktemp("store") / "examples.arrow"
    names = ["a.jsonl", "ß b", "c"]
    examples = []
    for number, (ids, gaps, file) in enumerate(shapes * times):
        at, runs = 0, []
        for gap, length, weight in gaps:
            if at + gap + length <= len(ids):
                runs.append((at + gap, at + gap + length, weight))
                at += gap + length
        examples.append(Example(ids, runs, names[file], number + 2**40))
    with ExampleWriter(path) as writer:
        for example in examples:
            writer.add(example, names.index(example.file))
    store = ExampleStore(path, names)
    back = Examples(store, np.arange(len(examples)))
    assert writer.count == len(back) == len(examples)
    for one, other in zip(examples, back, strict=True):
        assert (list(one.ids), one.file, one.row, one.source) == (list(other.ids), other.file, other.row, other.source)
        assert [span[:2] for span in one.spans] == [span[:2] for span in other.spans]
        assert np.array_equal(one.weights, other.weights)
        assert one.targets == other.targets
    assert back.lengths.tolist() == writer.facts["tokens"].tolist() == [len(example.ids) for example in examples]
    assert writer.facts["targets"].tolist() == [example.targets for example in examples]
    assert writer.largest_id == max(max(example.ids) for example in examples)
    longest = max(len(example.ids) for example in examples)
    assert writer.longest == (longest, next(each.source for each in examples if len(each.ids) == longest))
    shuffled = Examples(store, np.random.default_rng(0).permutation(len(examples)))
    assert [example.row - 2**40 for example in shuffled] == shuffled.indices.tolist()
    assert shuffled.lengths.tolist() == [len(examples[at].ids) for at in shuffled.indices]
    assert [example.row for example in shuffled[1:3]] == [example.row for example in list(shuffled)[1:3]]
    assert shuffled[-1].row == list(shuffled)[-1].row


def test_what_is_prepared_is_what_was_encoded(tmp_path, tokenizer):
    """Row for row against the encoder alone, over more rows than go to disk at once."""
    values = [{"prompt": f"{n} plus ", "completion": f"{n} " * (n % 9 + 1), "weight": 1 + n % 3} for n in range(2500)]
    path = write_rows(tmp_path / "rows.jsonl", values)
    data = prepare(recipe_of(path, tmp_path / "run"), tokenizer, keep=True)
    rows = [Row(str(path), number, each) for number, each in enumerate(values, 1)]
    encoder = Encoder(detect_format(rows), tokenizer)
    encoded = encoder.encode(encoder.tokenize([encoder.prepare(row) for row in rows]))
    assert len(data.train) == len(encoded) == 2500
    for one, other in zip(data.train, encoded, strict=True):
        assert other.example is not None
        assert (one.ids.tolist(), list(one.spans), one.source) == (
            other.example.ids,
            other.example.spans,
            other.row.where,
        )


def test_the_order_of_a_run_is_the_order_of_its_rows(rows, tmp_path, tokenizer):
    recipe = recipe_of(rows, tmp_path / "run", max_seq_len=64, train={"micro_batch_size": 2, "seed": 5})
    data = prepare(recipe, tokenizer, keep=True)
    order = data.order(recipe)
    assert (order.rows_per_micro_batch, order.gradient_accumulation_steps, order.seed) == (2, 4, 5)
    seen = [index for step in range(1, order.steps_per_epoch + 1) for batch in order.step(step) for index in batch]
    assert sorted(seen) == list(range(len(ROWS)))
    by_tokens = recipe_of(rows, tmp_path / "run", max_seq_len=64, train={"tokens_per_micro_batch": 200})
    assert data.order(by_tokens).rows_per_micro_batch == 3
    loose = recipe_of(rows, tmp_path / "run", packing=False, train={"tokens_per_micro_batch": 64}, max_seq_len=64)
    batches = prepare(loose, tokenizer, keep=True)
    assert batches.order(loose).rows_per_micro_batch == 1
    lengths = batches.train.lengths
    for group in (batches.rows[at] for at in range(len(batches.rows))):
        assert max(lengths[group]) * len(group) <= 64


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [{"micro_batch_size": 3}, {"tokens_per_micro_batch": 70}], ids=str)
def test_a_step_sees_each_row_once_however_it_is_laid_out(rows, tmp_path, tokenizer, packing, size):
    recipe = recipe_of(rows, tmp_path / "run", max_seq_len=64, packing=packing, train=size)
    data = prepare(recipe, tokenizer, keep=True)
    order = data.order(recipe)
    seen = [index for step in range(1, order.steps_per_epoch + 1) for batch in order.step(step) for index in batch]
    assert sorted(seen) == list(range(len(ROWS)))
    for batch in order.step(1):
        if "micro_batch_size" in size:
            assert len(batch) == 3 or packing
        else:
            lengths = data.train.lengths[batch]
            assert (lengths.sum() if packing else lengths.max() * len(batch)) <= 70
