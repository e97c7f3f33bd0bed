"""CSV as people's programs write it, and texts that are not UTF-8: read, or refused with a command that works."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from lora_cli.data.files.readers import encoding_said, read_file
from lora_cli.data.prepare import prepare
from lora_cli.data.report import finding_lines
from lora_cli.errors import LoraError
from lora_cli.planning.check import check, print_checked
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.screen import Screen

ROWS = [
    {"Question": "How many, really?", "Answer": "Four; or five."},
    {"Question": 'Say "hello"', "Answer": "two\nlines"},
    {"Question": "", "Answer": " blanks "},
]


def table(rows: list[dict[str, str]], delimiter: str = ",", ends: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if ends == "\r" else csv.QUOTE_MINIMAL  # which would leave line feeds bare
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=ends, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def values(folder: Any, text: str, name: str = "rows.csv") -> list[dict[str, Any]]:
    (folder / name).write_bytes(text.encode())
    return [row.values for row in read_file(folder / name)]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("before", ["", "\ufeff", "sep=?{ends}", "{ends}{ends}", "\ufeffsep=?{ends}"])
def test_values_are_separated_by_what_the_header_shows(delimiter, ends, before, tmp_path):
    before = before.replace("?", delimiter).replace("{ends}", ends)
    assert values(tmp_path, before + table(ROWS, delimiter, ends)) == ROWS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=5),
    st.sampled_from([",", ";", "|", "\t"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_values_come_back_whatever_separates_them(tmp_path_factory, pairs, delimiter, ends):
    rows = [dict(zip(("prompt", "completion"), pair, strict=True)) for pair in pairs]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    assert values(tmp_path_factory.getbasetemp(), text.getvalue()) == rows


def test_a_table_with_commas_stays_one_whatever_else_it_holds(tmp_path):
    rows = [{"a;b": "1;2;3", "c": "x|y"}, {"a;b": "4", "c": "5;6"}]
    assert values(tmp_path, table(rows)) == rows
    assert values(tmp_path, "text\none; two\nthree\n") == [{"text": "one; two"}, {"text": "three"}]
    assert values(tmp_path, "a\tb\n1;2\t3\n", "rows.tsv") == [{"a": "1;2", "b": "3"}]


def test_a_row_that_is_broken_is_named_by_its_line_whatever_stands_before(tmp_path):
    for before, line in (("", 3), ("sep=;\n", 4), ("\n\n", 5)):
        with pytest.raises(LoraError, match="3 values, but the header has 2 columns") as caught:
            values(tmp_path, before + "a;b\n1;2\n1;2;3\n" + "1;2\n" * 60)
        assert caught.value.where == f"{tmp_path / 'rows.csv'}:{line}"


@pytest.mark.parametrize(
    "text",
    [
        "prompt, completion\nHow many?, Four.\n",
        'prompt, completion\n"How many?", "Four."\n',
        " prompt ,completion \nHow many?,Four.\n",
        "prompt ; completion\nHow many?;Four.\n",
    ],
)
def test_blanks_in_a_header_are_not_part_of_its_names(text, tmp_path):
    assert values(tmp_path, text) == [{"prompt": "How many?", "completion": "Four."}]


def test_columns_without_a_name_are_called_by_their_place(tmp_path):
    assert values(tmp_path, ",prompt,completion,,\n0,a,b,,\n") == [
        {"column 1": "0", "prompt": "a", "completion": "b", "column 4": "", "column 5": ""}
    ]


def test_files_with_byte_order_marks_that_were_put_together_are_read(tmp_path):
    assert values(tmp_path, '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n', "rows.jsonl") == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert values(tmp_path, '{"text": "a"}\r{"text": "b"}\r', "rows.jsonl") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the command that the fix names")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize(
    "name",
    ["it's rows.csv", "rows.tsv", "rows.jsonl", "it's rows.json", "rows.txt", "rows.md", "ROWS.CSV.gz", "a.jsonl.gz"],
)
def test_a_text_that_is_not_utf8_is_read_or_refused_with_a_command_that_converts_it(name, encoding, tmp_path):
    import gzip

    text = {"csv": "text\nGrüße\n", "tsv": "text\tid\nGrüße\t1\n", "txt": "Grüße: hello", "md": "Grüße: hello"}.get(
        name.lower().removesuffix(".gz").rpartition(".")[2], '{"text": "Grüße"}\n'
    )
    data = text.encode(encoding)
    data = b"\xfe\xff" + data if encoding == "utf-16-be" else data
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if encoding != "cp1252" or "json" not in name:
        assert [row.values["text"].removesuffix(": hello") for row in read_file(path)] == ["Grüße"]
        said = encoding_said(str(path))
        assert said is not None
        assert said.what.startswith(f"the text is read as {'Windows-1252' if encoding == 'cp1252' else 'UTF-16'}: ")
        assert ("'Grüße'" in said.what) == (encoding == "cp1252")
        return
    with pytest.raises(LoraError, match="UTF-") as caught:
        list(read_file(path))
    assert str(caught.value.where).startswith(f"{path}:")
    found = re.fullmatch(r"convert it with `(.+)`(?: \(.*\))?, and name (.+)", str(caught.value.fix))
    assert found is not None
    subprocess.run(found[1], shell=True, check=True)
    assert [row.values["text"] for row in read_file(Path(found[2]))] == ["Grüße"]


def test_lines_of_utf16_are_those_of_utf8_and_keep_every_character(tmp_path):
    rows = [{"text": "a\u2028b\x85c 😀"}, {"text": "ü" * 5000}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode("utf-16"))
    assert [row.values for row in read_file(tmp_path / "rows.jsonl")] == rows


def test_a_file_that_is_read_as_another_encoding_is_a_note(tmp_path):
    (tmp_path / "faq.csv").write_bytes("instruction;output\nWie viel Öl?;Genügend.\n".encode("cp1252"))
    data = {"train": str(tmp_path / "faq.csv")}
    recipe = Recipe.model_validate({"base_model": "none", "output": str(tmp_path / "run"), "data": data})
    findings = prepare(recipe, make_tokenizer()).summary.findings
    assert findings.counts["not_utf8"] == 1
    (said,) = [line for line in finding_lines(findings) if "UTF-8" in line]
    assert said == (
        f"1 file whose text is not UTF-8: {tmp_path}/faq.csv: the text is read as Windows-1252: it is not UTF-8 "
        "and can be this, such as in 'Öl'"
    )


def test_a_title_without_commas_above_the_header_is_named(tmp_path):
    with pytest.raises(LoraError, match="line 1, which is to name the columns, has 1") as caught:
        values(tmp_path, "Our FAQ\nQuestion,Answer\nWhat?,This.\n")
    assert str(caught.value.fix).startswith("remove what is above the names of the columns")


def test_a_sheet_is_to_be_saved_as_csv(tmp_path):
    (tmp_path / "faq.xlsx").write_bytes(b"PK")
    with pytest.raises(LoraError, match=r"unknown kind of data file \.xlsx") as caught:
        list(read_file(tmp_path / "faq.xlsx"))
    assert "CSV" in str(caught.value.fix)


def test_a_csv_with_semicolons_is_prepared_by_the_names_of_its_header(tmp_path):
    (tmp_path / "faq.csv").write_text(table([{"instruction": "Add.", "output": "3"}], ";"))
    data = {"train": str(tmp_path / "faq.csv")}
    recipe = Recipe.model_validate({"base_model": "none", "output": str(tmp_path / "run"), "data": data})
    (form,) = prepare(recipe, make_tokenizer()).summary.formats.values()
    assert form == "instruction (the rows have instruction and output)"


@pytest.mark.parametrize("column", ["[/b]", "[red]", "a\x1b[31mb", "x\u202ey", "[link=http://a]"])
def test_names_of_columns_do_nothing_to_the_screen(column, recipe_file, tmp_path):
    rows = [{"text": "one", column: 1}, {"text": 3, column: 2}]
    path = recipe_file(data={"train": str(write_rows(tmp_path / "data[train].jsonl", rows)), "validation": None})
    heard = io.StringIO()
    print_checked(check(load_recipe(path)), Screen(file=heard, width=400), 0)
    said = heard.getvalue()
    assert "data[train].jsonl" in said
    assert "\x1b[31m" not in said
    assert "\u202e" not in said
    if column.startswith("["):
        assert f"columns not used: {column}" in said


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl"])
def test_the_line_of_a_row_is_where_it_begins_in_the_file(seed, kind, tmp_path):
    """With quoted line ends, empty lines and a header, as `sed -n` counts."""
    rng = random.Random(seed)
    rows = [{"id": f"row{at}", "text": "\n".join(["a"] * rng.randrange(1, 4))} for at in range(1, 30)]
    path = tmp_path / f"rows{kind}"
    with path.open("w", encoding="utf-8", newline="") as stream:
        if kind != ".jsonl":
            table = csv.DictWriter(stream, ["id", "text"], dialect="excel" if kind == ".csv" else "excel-tab")
            table.writeheader()
        for row in rows:
            stream.write("\n" * rng.choice([0, 0, 0, 1, 2]))
            if kind == ".jsonl":
                stream.write(json.dumps(row) + "\n")
            else:
                table.writerow(row)
    found = list(read_file(path))
    assert [row.values for row in found] == rows
    lines = path.read_text(encoding="utf-8").split("\n")
    for row in found:
        assert row.line is not None
        assert f"row{row.number}" in lines[row.line - 1]
        assert row.where == f"{path}: row {row.number}" + (f" (line {row.line})" if row.line != row.number else "")


def test_findings_name_rows_by_line_as_well(recipe_file, lora, tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,\ne,f\ne,f\ng,h\n', encoding="utf-8")
    stopped = lora("train", recipe_file(data={"train": str(path)}))
    assert f"{path}: row 2 (line 4): no target tokens" in stopped.error
    recipe = recipe_file(data={"train": str(path), "drop": ["no_target", "duplicate"]})
    found = {each["kind"]: each for each in json.loads(lora("check", recipe, "--json").out)["findings"]}
    assert (found["no_target"]["rows"], found["no_target"]["lines"]) == ([2], [4])
    assert (found["duplicate"]["rows"], found["duplicate"]["lines"]) == ([4], [6])
    recipe = recipe_file(data={"train": str(path), "drop": ["no_target"]})
    found = {each["kind"]: each for each in json.loads(lora("check", recipe, "--json").out)["findings"]}
    assert (found["duplicate"]["rows"], found["duplicate"]["lines"]) == ([4], [6])
