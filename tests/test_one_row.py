"""`lora check --row`: one row as its file has it, what the checks find in it, what it becomes."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
from conftest import write_rows

ROWS = [
    ("How long is\nthe warranty?", "Three years."),
    ("What does it cost?", "N/A"),
    ("", "Nothing was asked."),
    ("How large is it?", ""),
    ("What does it cost?", "N/A"),
]


@pytest.fixture
def sheet(tmp_path) -> Any:
    path = tmp_path / "faq.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *ROWS])
    return path


@pytest.fixture
def row(lora, recipe_file, sheet) -> Any:
    """What is said of a row of the sheet as JSON."""

    def ask(wanted: Any, **data: Any) -> dict[str, Any]:
        recipe = recipe_file(data={"train": str(sheet)} | data)
        return json.loads(lora("check", recipe, "--row", wanted, "--json").out)

    return ask


def kinds(one: dict[str, Any]) -> dict[str, str]:
    return {
        each["kind"]: "left out" if each["dropped"] else "stops" if each["stops"] else "note"
        for each in one["findings"]
    }


def test_values_and_line_are_those_of_the_file(row, sheet):
    lines = sheet.read_text().splitlines()
    for number, (prompt, completion) in enumerate(ROWS, 1):
        one = row(number)
        assert one["values"] == {"prompt": prompt, "completion": completion}
        assert (one["source"], one["row"]) == (str(sheet), number)
        first = (prompt or f",{completion}").splitlines()[0]
        assert lines[one["line"] - 1].strip('"').startswith(first)


def test_findings_are_those_of_this_row_alone(row):
    assert kinds(row(1)) == {}
    assert kinds(row(2)) == {"placeholder": "note"}
    assert kinds(row(3)) == {"empty_question": "note"}
    assert kinds(row(4)) == {"no_target": "stops"}
    assert kinds(row(5)) == {"placeholder": "note", "duplicate": "note"}, "which only comparing rows shows"


def test_a_row_that_is_left_out_is_shown_with_the_reason(row):
    one = row(4, drop=["no_target", "placeholder"])
    assert kinds(one) == {"no_target": "left out"}
    assert one["tokens"] is None
    assert kinds(row(2, drop=["no_target", "placeholder"])) == {"placeholder": "left out"}


@pytest.mark.parametrize("number", [1, 3])
def test_tokens_are_those_that_show_has(lora, recipe_file, row, sheet, number):
    recipe = recipe_file(data={"train": str(sheet), "drop": ["no_target"]})
    shown = json.loads(lora("check", recipe, "--json", "--show", 9).out)["rows"]
    (expected,) = [each["tokens"] for each in shown if each["row"] == number]
    assert row(number)["tokens"] == expected


def test_a_row_that_is_too_long_is_shown_whole(row):
    one = row(1, max_seq_len=4, drop=["no_target"])
    assert "too_long" in kinds(one)
    assert len(one["tokens"]) > 4


def test_it_reads_well_in_a_terminal(lora, recipe_file, sheet, monkeypatch):
    monkeypatch.chdir(sheet.parent)
    said = lora("check", recipe_file(data={"train": str(sheet)}), "--row", 3).out.splitlines()
    assert said[0] == "faq.csv: row 3 (line 5)"
    assert said[1:3] == ["  prompt: ", "  completion: Nothing was asked."]
    assert said[3].startswith("note     ")
    said = lora("check", recipe_file(data={"train": str(sheet)}), "--row", 2).out.splitlines()
    assert "⟦N/A<|endoftext|>⟧" in said[-1]
    said = lora("check", recipe_file(data={"train": str(sheet)}), "--row", 4).out
    assert "stops    " in said
    assert said.endswith("no example is made of it\n")


def test_texts_of_strangers_do_nothing_to_a_terminal(lora, recipe_file, tmp_path):
    evil = write_rows(tmp_path / "e.jsonl", [{"prompt": "\x1b[2J[red]x[/red]", "completion": "y\x07"}])
    said = lora("check", recipe_file(data={"train": str(evil)}), "--row", 1).out
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "[red]x[/red]" in said


def test_a_row_is_named_with_its_file_where_there_are_several(lora, recipe_file, sheet, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(9)])
    recipe = recipe_file(data={"train": [str(sheet), str(other)]})
    said = lora("check", recipe, "--row", 2)
    assert said.code == 2
    assert "2 files have a row 2" in said.error
    assert f"fix: name the file: --row {sheet}:2" in said.error
    for named in (f"{sheet}:2", "faq.csv:2"):
        assert json.loads(lora("check", recipe, "--row", named, "--json").out)["values"]["completion"] == "N/A"
    assert json.loads(lora("check", recipe, "--row", 9, "--json").out)["values"]["completion"] == "c8", (
        "only one has so many"
    )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("6", "there is no row 6"),
        ("no.csv:1", "no file of the data is called no.csv"),
        ("faq.csv:6", "faq.csv: 5 rows"),
        *((each, "names no row") for each in ("0", "-1", "x", "faq.csv", "1.5", "²", "", "9" * 400)),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(lora, recipe_file, sheet, wanted, words):
    said = lora("check", recipe_file(data={"train": str(sheet)}), f"--row={wanted}")
    assert said.code == 2
    assert words in said.error
    assert "fix: " in said.error


def test_it_does_nothing_else(lora, recipe_file, sheet):
    said = lora("check", recipe_file(data={"train": str(sheet)}), "--row", 1, "--prepare")
    assert said.code == 2
    assert "remove the other options" in said.error
