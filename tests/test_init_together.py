"""`lora init` of files that differ, such as a CSV, a chat export and notes: each source says how it is read."""

from __future__ import annotations

import json
import re
import shutil
from importlib import resources

import pytest
from conftest import write_rows

from lora_cli.recipe import load_recipe

QA = "Question,Answer,Category\n" + "".join(f"How old is part {n}?,It is {n} years old.,a\n" for n in range(30))
CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {n}."}, {"role": "assistant", "content": f"Good day, {n}."}]}
    for n in range(30)
]
IN_GERMAN = {"faq.csv": ("instruction", {"instruction": "Question", "output": "Answer"}), "chats.jsonl": (None, None)}


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faq.csv").write_text(QA, encoding="utf-8")
    write_rows(tmp_path / "data" / "chats.jsonl", CHATS)
    (tmp_path / "notes").mkdir()
    for name in ("water.md", "beans.md"):
        (tmp_path / "notes" / name).write_text(f"# {name}\n\nUse it fresh.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path):
    """Of each source: its file, format and columns."""
    data = load_recipe(path).data
    return {each.path.rpartition("/")[2]: (each.format, each.columns) for each in data.train}, data


@pytest.mark.parametrize("given", [["data"], ["data/faq.csv", "data/chats.jsonl"]])
@pytest.mark.parametrize("notes", [[], ["notes"]])
def test_files_that_differ_become_sources_of_their_own(files, tiny_llama, lora, given, notes):
    said = lora("init", tiny_llama, *given, *notes, "--output", "new.yaml")
    assert said.code == 0, said.text
    sources, data = written(files / "new.yaml")
    assert sources == IN_GERMAN | ({"notes": (None, None)} if notes else {})
    assert data.columns == {}
    assert data.format == "auto"
    checked = lora("check", "new.yaml", "--json")
    assert checked.code == 0, checked.text
    found = {each["source"].rpartition("/")[2]: each for each in json.loads(checked.out)["sources"]}
    assert found.keys() == sources.keys()
    assert all(each["examples"] > 0 for each in found.values())
    assert sum(each["share"] for each in found.values()) == pytest.approx(1)


def test_notes_in_the_same_folder_are_one_pattern(files, tiny_llama, lora):
    for name in "abc":
        (files / "data" / f"{name}.txt").write_text(f"Note {name}: rinse it.")
    assert lora("init", tiny_llama, "data", "--output", "new.yaml").code == 0
    assert written(files / "new.yaml")[0] == IN_GERMAN | {"*.txt": (None, None)}
    assert lora("check", "new.yaml", "--json").code == 0


def test_files_of_a_folder_that_are_read_in_one_way_stay_one_source(files, tiny_llama, lora):
    (files / "data" / "chats.jsonl").unlink()
    (files / "data" / "more.csv").write_text(QA, encoding="utf-8")
    assert lora("init", tiny_llama, "data", "--output", "new.yaml").code == 0
    assert written(files / "new.yaml")[0] == {"data": (None, None)}


def test_columns_are_named_for_the_source_that_has_them(files, tiny_llama, lora):
    (files / "data" / "faq.csv").write_text(QA.replace("Question,Answer", "Frage,Erwiderung"), encoding="utf-8")
    refused = lora("init", tiny_llama, "data", "--output", "new.yaml")
    assert "--columns question=Frage,answer=Erwiderung" in refused.text
    columns = "question=Frage,answer=Erwiderung"
    said = lora("init", tiny_llama, "data", "--columns", columns, "--output", "new.yaml")
    assert said.code == 0, said.text
    assert written(files / "new.yaml")[0]["faq.csv"] == (
        "instruction",
        {"instruction": "Frage", "output": "Erwiderung"},
    )


def test_the_system_prompt_is_written(files, tiny_llama, lora):
    system = 'You answer for "Brio": briefly,\nand # warmly.'
    assert lora("init", tiny_llama, "data", "--system", system, "--output", "new.yaml").code == 0
    assert load_recipe(files / "new.yaml").data.system == system
    refused = lora("init", tiny_llama, "notes", "--system", system, "--output", "text.yaml")
    assert "--system is for conversations, questions and answers, but these rows are read as text" in refused.error


def test_another_template_than_the_models_own_is_named_by_an_option(files, tiny_llama, lora):
    model = files / "model"
    shutil.copytree(tiny_llama, model)
    own = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(own + "{% if add_generation_prompt %}assistant: {% endif %}")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    write_rows(files / "tools.jsonl", [row | {"tools": [tool]} for row in CHATS])
    refused = lora("init", model, "tools.jsonl", "--output", "new.yaml")
    assert "leaves out the tools" in refused.error
    named = re.search(r"fix: add --template (\S+)\n", refused.error)
    assert named
    assert "data.template" not in refused.error
    (files / "sub").mkdir()
    (files / "mine.jinja").write_text(resources.files("lora_cli.data").joinpath("templates/chatml.jinja").read_text())
    for template, written in ((named[1], named[1]), ("mine.jinja", str(files / "mine.jinja"))):
        said = lora("init", model, "tools.jsonl", "--template", template, "--output", f"sub/{template}.yaml")
        assert said.code == 0, said.text
        assert load_recipe(files / "sub" / f"{template}.yaml").data.template == written
        assert lora("check", f"sub/{template}.yaml").code == 0


def test_an_empty_note_is_an_empty_row(files, tiny_llama, lora):
    (files / "notes" / "later.md").write_bytes(b"")
    refused = lora("init", tiny_llama, "notes", "--output", "new.yaml")
    assert "later.md: row 1: the text is empty" in refused.error
    assert lora("init", tiny_llama, "notes", "--drop", "empty", "--output", "new.yaml").code == 0
