"""Every wrong input ends in one message: what happened, where, how to fix it. No traceback, nothing left behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said, read_rows, write_rows

from lora_cli.errors import from_here


@pytest.fixture
def ends(lora: Callable[..., Said], recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The one message with which `lora train` ends a recipe of these settings, having written nothing.

    With `prepared`, what good data was prepared to may be left in the run folder, which still is free for a run.
    """

    def run(code: int, prepared: bool, settings: dict[str, Any]) -> str:
        recipe = recipe_file(**settings)
        output = tmp_path / "run"

        def written() -> list[Path]:
            return [path for path in sorted(tmp_path.rglob("*")) if not prepared or output not in (path, *path.parents)]

        before = written()
        said = lora("train", recipe)
        assert said.code == code, said.text
        assert written() == before, "something was written"
        if prepared and output.exists():
            assert [path.name for path in output.iterdir()] == ["prepared"]
            assert len(list((output / "prepared").iterdir())) == 1
        assert said.error.count("error: ") == 1
        assert "\n  fix: " in said.error
        return said.error

    return run


@pytest.fixture
def refused(ends: Callable[..., str]) -> Callable[..., str]:
    """The message of a mistake that is found before the data is prepared, or in the data: nothing is written."""
    return lambda **settings: ends(2, False, settings)


@pytest.fixture
def refused_later(ends: Callable[..., str]) -> Callable[..., str]:
    """The message of a mistake that may be found after the data was prepared, but before anything else is written."""
    return lambda **settings: ends(2, True, settings)


@pytest.fixture
def stopped(ends: Callable[..., str]) -> Callable[..., str]:
    """The message with which the data gate stops a run (exit code 3); nothing is written."""
    return lambda **settings: ends(3, False, settings)


# ── the recipe (its details are in test_recipe.py) ──────────────────────────────────────────────────────────────


def test_unknown_key(refused: Any):
    message = refused(train={"lerning_rate": 1})
    assert "unknown key train.lerning_rate\n  fix: did you mean train.learning_rate?" in message
    assert "recipe.yaml:" in message


def test_wrong_type(refused: Any):
    assert 'adapter.rank is "four", but must be a whole number' in refused(adapter={"rank": "four"})


def test_contradiction(refused: Any):
    assert "train.eval_every: eval_every is set, but there is no validation data" in refused(train={"eval_every": 1})


def test_several_problems(lora: Any, recipe_file: Any):
    said = lora("train", recipe_file(adapter={"rank": 0}, train={"seed": -1}), "--set", "outptu=x")
    assert (said.code, said.text.count("error: "), said.text.count("  fix: ")) == (2, 3, 3)


def test_no_recipe(lora: Any, tmp_path: Path):
    said = lora("train", tmp_path / "gone.yaml")
    assert said.code == 2
    fix = "check the path; lora init --list shows recipes that come with lora"
    assert said.text == f"error: {tmp_path}/gone.yaml: no such recipe\n  fix: {fix}\n"


# ── data files ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_data_file(refused: Any, sums: Path, tmp_path: Path):
    message = refused(data={"train": str(sums.with_name("sum.jsonl"))})
    assert message == f"error: {tmp_path}/sum.jsonl: no such data file\n  fix: did you mean {sums}?\n"
    assert "held.jsonl: no such data file" in refused(data={"validation": str(tmp_path / "held.jsonl")})
    (tmp_path / "folder" / ".hidden").mkdir(parents=True)
    (tmp_path / "folder" / "notes.rst").write_text("no data")
    (tmp_path / "folder" / ".hidden" / "rows.jsonl").write_text(sums.read_text())
    message = refused(data={"train": str(tmp_path / "folder")})
    assert (
        f"error: {tmp_path}/folder: no data files in this folder; the files there end in .rst\n  fix: name a" in message
    )
    message = refused(data={"train": str(tmp_path / "*.parquet")})
    assert f"error: {tmp_path}/*.parquet: no file matches this pattern\n  fix: check the pattern" in message


BROKEN_FILES = {
    "empty.jsonl": (b"", "empty.jsonl: the data file is empty"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: the data file has no rows"),
    "none.json": (b"[]", "none.json: the data file has no rows"),
    "header.csv": (b"prompt,completion\n", "header.csv: the data file has no rows"),
    "header.tsv": (b"prompt\tcompletion\n", "header.tsv: the data file has no rows"),
    "line.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line.jsonl:3:13: broken JSON: Expecting ',' delimiter"),
    "cut.jsonl": (b'{"text": "a\xe2\x80\xa8b"}\n{"te', "cut.jsonl:2:2: broken JSON: Unterminated string"),  # U+2028
    "two.jsonl": (b'{"text": "a"} {"text": "b"}\n', "two.jsonl:1:15: broken JSON: Extra data"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "list.jsonl:2: a row must be a JSON object, this is [1]"),
    "null.jsonl": (b"null\n", "null.jsonl:1: a row must be a JSON object, this is null"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "twice.jsonl:1: broken JSON: the key 'text' is set twice"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "half.jsonl:1: broken JSON: 'utf-8' codec can't encode"),
    "deep.jsonl": (b"[" * 99999, "deep.jsonl:1: broken JSON: maximum recursion depth"),
    "comma.json": (b'[{"text": "a"},\n {"text": "b"]', "comma.json:2:14: broken JSON: Expecting ',' delimiter"),
    "numbers.json": (b"[1, 2]", "numbers.json: row 1: a row must be a JSON object, this is 1"),
    "quote.csv": (b'prompt,completion\na,b\n"c,d\n', "quote.csv:3: broken CSV: unexpected end of data"),
    "wide.csv": (b"prompt,completion\na,b\nc,d,e\n", "wide.csv:3: broken CSV: 3 values, but the header has 2 columns"),
    "narrow.csv": (b'prompt,completion\n"a\na",b\nc\n', "narrow.csv:4: broken CSV: 1 values, but the header has 2"),
    "same.csv": (b"text,text\na,b\n", "same.csv:1: broken CSV: two columns have the same name"),
    "short.parquet": (b"PAR1", "short.parquet: cannot be read as Parquet: "),
    "noise.parquet": (b"PAR1 and then something else", "noise.parquet: cannot be read as Parquet: "),
    "wide.tsv": (b"prompt\tcompletion\nc\td\te\n", "wide.tsv:2: broken TSV: 3 values, but the header has 2 columns"),
    "noise.arrow": (b"ARROW1 and then something else", "noise.arrow: cannot be read as Arrow: "),
    "stream.arrow": (b"neither file nor stream", "stream.arrow: cannot be read as Arrow: "),
    "noise.jsonl.gz": (b"this is no archive", "noise.jsonl.gz: the compressed file is damaged: "),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cut.jsonl.gz: the compressed file is damaged: "),
    "noise.csv.zst": (b"this is no archive", "noise.csv.zst: the compressed file is damaged: "),
    "line.jsonl.gz": (gzip.compress(b'{"text": "a"}\n{"b\n'), "line.jsonl.gz:2:2: broken JSON: Unterminated string"),
    "greek.txt": ("ok\nκαφές\n".encode("cp1253"), "greek.txt:2: not UTF-8 text: byte 0xea"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl:1: not UTF-8 text: byte 0xe9"),
    "damaged.csv": ("text\nGrüße, süß\n".encode() + b"caf\xe9\n", "damaged.csv:3: not UTF-8 text: byte 0xe9"),
    "half.csv": ("text\nok\n".encode("utf-16")[:-1], "half.csv: damaged UTF-16 text: "),
    "rows.xml": (b"<a/>\n", "rows.xml: unknown kind of data file .xml"),
    "rows.gz": (gzip.compress(b"a\n"), "rows.gz: unknown kind of data file .gz"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "rows.parquet.gz: unknown kind of data file .parquet.gz"),
    "rows": (b"a\n", "rows: unknown kind of data file (no ending)"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_data_file(refused: Any, tmp_path: Path, name: str):
    content, says = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert refused(data={"train": str(tmp_path / name)}).startswith(f"error: {tmp_path}/{says}")


def test_parquet_that_was_cut_or_holds_no_rows(refused: Any, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-9])
    assert "cut.parquet: cannot be read as Parquet: " in refused(data={"train": str(tmp_path / "cut.parquet")})
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    assert "none.parquet: the data file has no rows" in refused(data={"train": str(tmp_path / "none.parquet")})


def test_values_stay_as_they_stand(tmp_path: Path):
    """No guessing of types: a completion that looks like a number or a date is text."""
    (tmp_path / "a.csv").write_text('\ufeffprompt,completion\n1,"2"\n\nNA,null\n"a ""b""\nc",\n', encoding="utf-8")
    assert [(row.number, *row.values.items()) for row in read_rows(tmp_path / "a.csv")] == [
        (1, ("prompt", "1"), ("completion", "2")),
        (2, ("prompt", "NA"), ("completion", "null")),
        (3, ("prompt", 'a "b"\nc'), ("completion", "")),
    ]
    rows = [{"text": "2024-01-01T00:00:00"}, {"text": "a\u2028b"}, {"other": 1}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.jsonl", "a.json", "lines.json"):
        assert [row.values for row in read_rows(tmp_path / name)] == rows


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

SHORT = {"prompt": "one and one\n", "completion": "is two"}
CHAT = [{"role": "user", "content": "one and one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a data section for these rows."""

    def settings(*values: dict[str, Any], **data: Any) -> dict[str, Any]:
        return {"train": str(write_rows(tmp_path / "rows.jsonl", list(values))), **data}

    return settings


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "one"}, "row 2: the row has no completion\n  fix: add it, or remove the row; its columns: prompt"),
        ({"prompt": "one", "completion": None}, "row 2: the row has no completion"),
        ({}, "row 2: the row has no prompt\n  fix: add it, or remove the row; its columns: none"),
        ({"prompt": "one", "completion": 2}, "row 2: completion is int, not text"),
        ({"prompt": ["one"], "completion": "two"}, "row 2: prompt is list, not text"),
    ],
)
def test_broken_row(refused: Any, rows: Any, row: dict[str, Any], says: str):
    assert f"rows.jsonl: {says}" in refused(data=rows(SHORT, row, SHORT))


def test_several_broken_rows_are_reported_together(refused: Any, rows: Any, tmp_path: Path):
    message = refused(data=rows(SHORT, {"prompt": "one"}, SHORT, {"prompt": "one", "completion": 2}))
    assert message.startswith(f"error: {tmp_path}/rows.jsonl: row 2, 4: 2 rows that cannot be read\n")
    assert f"\n  {tmp_path}/rows.jsonl: row 2: the row has no completion\n" in message
    assert f"\n  {tmp_path}/rows.jsonl: row 4: completion is int, not text\n" in message


def test_a_row_without_a_target(stopped: Any, rows: Any):
    message = stopped(data=rows(SHORT, {"prompt": "one", "completion": ""}, SHORT))
    assert "rows.jsonl: row 2: no target tokens: nothing in this row would be trained\n  fix: " in message


def test_columns_that_fit_no_format_or_several(refused: Any, rows: Any):
    message = refused(data=rows({"question": "a", "answer": "b"}))
    assert (
        "rows.jsonl: row 1: the columns answer, question fit no format\n  formats and their columns: chat: " in message
    )
    assert (
        "\n  fix: write data.columns: {prompt: question, completion: answer}; or, to go through the model's" in message
    )
    message = refused(data=rows(SHORT | {"text": "a"}))
    assert "the columns completion, prompt, text fit more than one format" in message
    assert "fix: write data.format: completion, or remove a column" in message
    assert "row 1: the row has no messages" in refused(data=rows(SHORT, format="chat"))


def test_text_without_words(stopped: Any, rows: Any):
    assert "row 2: the text is empty\n  fix: remove the row" in stopped(data=rows({"text": "a"}, {"text": " \n"}))


def test_a_row_that_is_too_long(refused: Any, stopped: Any, rows: Any):
    long = {"prompt": "one " * 40, "completion": "two"}
    message = stopped(data=rows(SHORT, long, max_seq_len=24))
    assert "rows.jsonl: row 2: " in message
    assert "tokens, but max_seq_len is 24\n  fix: raise data.max_seq_len, or choose data.too_long: " in message
    message = stopped(data=rows(long, SHORT, max_seq_len=16, too_long="truncate"))
    assert "rows.jsonl: row 1: no target tokens are left after truncation" in message
    message = refused(data=rows(SHORT, max_seq_len=4, too_long="split"))
    assert "row 1: too_long: split is for text; a conversation cannot be cut\n  fix: choose drop or truncate" in message


def test_no_row_is_left(refused: Any, rows: Any):
    assert (
        "rows.jsonl: no row is left to train on\n  1 row above max_seq_len\n  fix: raise data.max_seq_len"
        in refused(data=rows(SHORT, max_seq_len=4, too_long="drop"))
    )


def test_up_to_one_row_in_a_hundred_may_be_too_long(lora: Any, stopped: Any, recipe_file: Any, rows: Any):
    """Above that, the recipe has to say what shall happen."""
    short = [SHORT | {"completion": f"is {number}"} for number in range(198)]
    long = [{"prompt": "one " * 40, "completion": f"{number}"} for number in range(3)]
    message = stopped(data=rows(*short, *long, max_seq_len=24))
    assert "rows.jsonl: row 199, 200, 201: 3 rows above max_seq_len\n" in message
    said = lora("train", recipe_file(data=rows(*short, *long[:2], max_seq_len=24), train={"max_steps": 1}))
    assert said.code == 0, said.text
    assert "198 examples" in said.text
    assert "2 rows above 24 tokens: left out" in said.text


def test_what_is_allowed_is_still_said(lora: Any, recipe_file: Any, rows: Any):
    data = rows({"text": "one"}, {"text": "one two " * 9}, {"text": "two"}, max_seq_len=12, allow=["too_long"])
    said = lora("train", recipe_file(data=data, train={"max_steps": 1}))
    assert said.code == 0
    assert " 2 examples" in said.text
    assert "1 row above 12 tokens: left out" in said.text


def test_the_fix_for_truncation_is_enough_and_no_less_is(stopped: Any, rows: Any, lora: Any, recipe_file: Any):
    data = rows({"prompt": "one and one and one", "completion": "two"}, too_long="truncate")
    message = stopped(data=data | {"max_seq_len": 4})
    enough = int(message.partition("max_seq_len to ")[2].partition(" or more")[0])
    assert "no target tokens" in stopped(data=data | {"max_seq_len": enough - 1})
    assert lora("train", recipe_file(data=data | {"max_seq_len": enough}, train={"max_steps": 1})).code == 0


@pytest.mark.parametrize(
    ("too_long", "examples", "became"),
    [("drop", 2, "left out"), ("truncate", 3, "cut at the end"), ("split", 4, "cut into pieces")],
    ids=["drop", "truncate", "split"],
)
def test_what_becomes_of_long_rows_is_counted(
    lora: Any, recipe_file: Any, rows: Any, too_long: str, examples: int, became: str
):
    data = rows({"text": "one"}, {"text": "one two " * 3}, {"text": "two"}, max_seq_len=12, too_long=too_long)
    said = lora("train", recipe_file(data=data, train={"max_steps": 1}))
    assert said.code == 0
    assert "rows.jsonl: text (" in said.text
    assert f" {examples} examples" in said.text
    assert f"1 row above 12 tokens: {became}" in said.text


def test_a_row_longer_than_the_model_can_see(refused_later: Any, rows: Any):
    message = refused_later(data=rows(SHORT, {"prompt": "one " * 300, "completion": "two"}, max_seq_len=4096))
    assert "rows.jsonl: row 2: " in message
    assert "sees 256 at most\n  fix: write data.max_seq_len: 256, with data.too_long: " in message


def test_a_held_out_fraction_of_no_rows(refused: Any, rows: Any):
    others = [SHORT | {"prompt": f"{number} and one\n"} for number in range(2)]
    message = refused(data=rows(SHORT, *others, validation=0.01))
    assert "rows.jsonl: data.validation: 0.01 of 3 rows is 0 rows" in message
    message = refused(data=rows(SHORT, SHORT, SHORT, validation=0.5))  # equal rows cannot stand on both sides
    assert "rows.jsonl: data.validation: 0.5 of 3 rows in 1 group" in message


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages is not a list of turns"),
        ([], "messages is not a list of turns"),
        (["hello"], "turn 1 of messages has no role\n"),
        ([{"content": "hello"}], "turn 1 of messages has no role\n"),
        ([{"role": "user"}], "turn 1 of messages has no content\n"),
        ([CHAT[0], {"role": "assistant", "content": None}], "turn 2 of messages has no content\n"),
        ([{"role": "user", "content": ["hello"]}], "turn 1 of messages has a part that is not text\n"),
        (
            [{"role": "narrator", "content": "hello"}, CHAT[1]],
            "turn 1 of messages is by 'narrator', which is not a known role",
        ),
        ([CHAT[0], CHAT[1] | {"train": "maybe"}], "train is 'maybe', neither true nor false\n"),
        ([CHAT[0], CHAT[1] | {"weight": -1}], "weight is -1, which is not a weight\n"),
        ([CHAT[0], CHAT[1] | {"tool_calls": [{"name": 3}]}], "turn 2 of messages has a malformed tool call\n"),
    ],
)
def test_malformed_messages(refused: Any, rows: Any, messages: Any, says: str):
    assert f"rows.jsonl: row 2: {says}" in refused(data=rows({"messages": CHAT}, {"messages": messages}))


def test_messages_that_nobody_answers(stopped: Any, rows: Any):
    assert "rows.jsonl: row 2: no target tokens" in stopped(data=rows({"messages": CHAT}, {"messages": CHAT[:1]}))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "the model has no chat template, so messages cannot be rendered"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}",
            "turn 2 cannot be told apart",
        ),
        ("{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", "leaves out turn 1, by user"),
        ("{{ messages[0].name.first }}", "fails on this conversation: UndefinedError: "),
        ("\n{{ messages[0].content + 1 }}", "line 2 of the template: {{ messages[0].content + 1 }}"),
    ],
    ids=["none", "refuses", "looks ahead", "leaves out", "runs into an error", "says where"],
)
def test_chat_template(refused: Any, rows: Any, model: Any, template: str | None, says: str):
    message = refused(base_model=str(model({"chat_template.jinja": template})), data=rows({"messages": CHAT}))
    assert message.startswith("error: ")
    assert "rows.jsonl: row 1: " in message
    assert says in message


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.role }}<|im_end|>{% endfor %}",
    ],
    ids=["no stop token", "something before it"],
)
def test_chat_template_without_a_stop_token(stopped: Any, rows: Any, model: Any, template: str):
    message = stopped(base_model=str(model({"chat_template.jinja": template})), data=rows({"messages": CHAT}))
    assert "rows.jsonl: row 1: the chat template (the model's own) ends turn 2 without a special token" in message


def test_chat_template_that_is_no_jinja(refused: Any, rows: Any, model: Any, tmp_path: Path):
    broken = "\n{% for m in messages %"
    message = refused(base_model=str(model({"chat_template.jinja": broken})), data=rows({"messages": CHAT}))
    assert message.startswith("error: the model's own:2: the chat template is not valid Jinja: ")
    (tmp_path / "mine.jinja").write_text(broken)
    message = refused(data=rows({"messages": CHAT}, template=str(tmp_path / "mine.jinja")))
    assert message.startswith(f"error: {tmp_path}/mine.jinja:2: the chat template is not valid Jinja: ")


def test_chat_template_that_is_not_there(refused: Any, rows: Any, tmp_path: Path):
    message = refused(data=rows({"messages": CHAT}, template=str(tmp_path / "mine.jinja")))
    assert message.startswith(f"error: {tmp_path}/mine.jinja: the chat template cannot be read: No such file")
    assert "\n  fix: built-in ones are chatml, llama-3, " in message


# ── what to adapt ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"target_modules": ["c_atn"]}, "adapter.target_modules: c_atn matched no layer"),
        ({"target_modules": ["c_attn", "q_proj"]}, "adapter.target_modules: q_proj matched no layer"),
        (
            {"target_modules": "(c_attn"},
            "adapter.target_modules: '(c_attn' is not a valid regular expression: missing )",
        ),
        ({"exclude_modules": ["nothing"]}, "adapter.exclude_modules: nothing matched no layer"),
        ({"exclude_modules": ["c_attn", "c_proj"]}, "no layer is left to adapt"),
        ({"rank_pattern": {"nothing": 2}}, "adapter.rank_pattern: nothing matched no layer"),
    ],
)
def test_layers_that_are_not_there(refused_later: Any, tiny_gpt2: Path, adapter: dict[str, Any], says: str):
    message = refused_later(base_model=str(tiny_gpt2), adapter=adapter)
    assert message.startswith(f"error: {says}")
    assert "\n  linear layers here: c_attn (×2), c_proj (×4), c_fc (×2)\n" in message


def test_blocks_that_are_not_there(refused_later: Any):
    assert "adapter.layers: no adapted layer in block 7\n  fix: blocks with such layers: 0 to 1" in refused_later(
        adapter={"layers": [0, 7]}
    )
    assert "adapter.layers: no adapted layer in block -3" in refused_later(adapter={"layers": [-3]})


def test_rank_above_the_layer(refused_later: Any):
    message = refused_later(adapter={"rank": 64, "projections": ["q", "v"]})
    assert "rank 64 is above the size of model.layers.0.self_attn.v_proj, whose weight has rank 32 at most" in message
    assert "fix: set adapter.rank to 32 or less" in message


def test_the_output_stays_free_for_the_mended_recipe(refused_later: Any, lora: Any, recipe_file: Any, tmp_path: Path):
    refused_later(adapter={"target_modules": ["q_prj"]})
    (prepared,) = (tmp_path / "run" / "prepared").iterdir()
    assert lora("train", recipe_file(adapter={"target_modules": ["q_proj"]}, train={"max_steps": 1})).code == 0
    assert [prepared] == list((tmp_path / "run" / "prepared").iterdir())


# ── the place to write to ───────────────────────────────────────────────────────────────────────────────────────


def test_the_output_is_taken(refused: Any, lora: Any, recipe_file: Any, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("keep me")
    assert f"error: {run}: the output folder already holds other files\n" in refused()
    (run / "recipe.yaml").touch()
    message = refused()
    assert f"error: {run}: the output folder already holds a run\n" in message
    assert "--resume" in message
    assert (run / "mine.txt").read_text() == "keep me"
    assert f"error: {run}/mine.txt: the output is a file, not a folder\n" in refused(output=str(run / "mine.txt"))
    said = lora("train", recipe_file(output=str(run / "mine.txt" / "deeper")))
    assert said.code == 2
    assert f"error: {run}/mine.txt/deeper: there is a file where a folder is needed\n  fix: " in said.text
    assert (run / "mine.txt").read_text() == "keep me"
    assert "there is no run to resume" in lora("train", recipe_file(output=str(tmp_path / "new")), "--resume").error


def test_no_disk_space_at_the_start(refused_later: Any, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    message = refused_later()
    assert "run: no disk space: the run (adapter and checkpoints) needs about 10 MiB, 5 KiB are free" in message


def test_a_folder_that_may_not_be_written(refused: Any, monkeypatch: pytest.MonkeyPatch):
    """The tests may run as root, who may write anywhere: the refusal is imitated."""
    mkdir = Path.mkdir

    def forbidden(path: Path, *args: Any, **options: Any) -> None:
        if path.name == "run":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert "run: this place cannot be written\n  fix: choose another folder, or change its per" in refused()


@pytest.mark.parametrize("wrapped", [False, True], ids=["OSError", "SafetensorError"])
def test_the_disk_fills_while_a_checkpoint_is_written(
    lora: Any, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
):
    """The checkpoint before stays whole, nothing of the new one remains, and the run can be resumed from there."""
    from safetensors import SafetensorError

    from lora_cli.training import checkpoint

    save_file = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if "step_000002" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(path.read_bytes()[:100])
            text = "No space left on device"
            raise SafetensorError(f"I/O error: {text} (os error 28)") if wrapped else OSError(errno.ENOSPC, text)

    monkeypatch.setattr(checkpoint, "save_file", full)
    recipe = recipe_file(train={"checkpoint_every": 1, "max_steps": 3})
    said = lora("train", recipe)
    assert said.code == 2
    assert "checkpoints/step_000002: no space left on the disk\n  the last checkpoint is step_000001\n" in said.error
    assert (
        f"free some space; what was written before is intact; then continue with: lora train {tmp_path}" in said.error
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
    assert checkpoint.verify(tmp_path / "run" / "checkpoints" / "step_000001")["step"] == 1
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert lora("train", recipe, "--resume").code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


# ── base models ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("files", "config", "says"),
    [
        ({"config.json": None}, {}, "model: the model folder has no config.json"),
        ({"config.json": "{"}, {}, "model/config.json: config.json is not valid JSON"),
        ({"config.json": "[]"}, {}, "model/config.json: config.json is not valid JSON"),
        ({"config.json": b"\xff"}, {}, "model/config.json: config.json is not valid JSON"),
        ({"config.json": "{}"}, {}, "model/config.json: model type None is not known to the installed transformers"),
        ({}, {"model_type": "frob"}, "model/config.json: model type 'frob' is not known to the installed transformers"),
        ({}, {"n_layer": 3}, "model: the weights do not fill the model: 12 tensors missing, 0 of another shape"),
        ({}, {"n_embd": 32}, "model: the weights do not fill the model: 0 tensors missing, 28 of another shape"),
        ({}, {"n_head": 5}, "model: the base model cannot be loaded: `embed_dim` must be divisible by num_heads"),
        ({}, {"activation_function": "gElu"}, "model: the base model cannot be loaded: KeyError: 'gElu'"),
        ({"model.safetensors": None}, {}, "model: the model folder holds no safetensors weights\n"),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"pickled"},
            {},
            "model: the model folder holds no safetensors weights (only pytorch_model.bin)",
        ),
        ({"model.safetensors": b""}, {}, "model/model.safetensors: damaged or incomplete safetensors file (0 bytes)"),
        ({"model.safetensors": b"x" * 500}, {}, "model/model.safetensors: damaged or incomplete safetensors file"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": {"a": "part.safetensors"}}'},
            {},
            "model: 1 of 1 weight files are missing, the first is part.safetensors",
        ),
        (
            {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": 3}'},
            {},
            "model/model.safetensors.index.json: the weight index is not readable",
        ),
        ({"tokenizer.json": None}, {}, "model: the tokenizer cannot be loaded: "),
        ({"tokenizer.json": '{"a": 1}'}, {}, "model: the tokenizer cannot be loaded: "),
    ],
)
def test_broken_model_folder(
    refused_later: Any, model: Any, tmp_path: Path, files: dict[str, Any], config: dict[str, Any], says: str
):
    assert refused_later(base_model=str(model(files, **config))).startswith(f"error: {tmp_path}/{says}")


def test_a_model_that_cannot_be_built_to_find_what_stays_unquantized(refused_later: Any, model: Any):
    folder = str(model({}, activation_function="gElu"))
    said = refused_later(base_model=folder, quantization="nf4")
    assert "the base model cannot be loaded: KeyError: 'gElu'" in said


def test_a_tokenizer_that_fails_once_it_is_used(refused_later: Any, model: Any, tiny_gpt2: Path):
    settings = json.loads((tiny_gpt2 / "tokenizer_config.json").read_text()) | {"model_max_length": [512, 512]}
    folder = str(model({"tokenizer_config.json": json.dumps(settings)}))
    assert "the tokenizer cannot be loaded: '>' not supported" in refused_later(base_model=folder)


def test_truncated_weights(refused: Any, model: Any, tiny_gpt2: Path):
    whole = (tiny_gpt2 / "model.safetensors").read_bytes()
    message = refused(base_model=str(model({"model.safetensors": whole[:-100]})))
    assert f"incomplete safetensors file ({len(whole) - 100} bytes)" in message
    assert "file not fully covered" in message


def test_a_model_that_is_no_causal_language_model(refused_later: Any, model: Any):
    config = json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 512})
    message = refused_later(base_model=str(model({"config.json": config})))
    assert "model (T5ForConditionalGeneration) is not a causal language model\n  fix: choose a decoder-only" in message


def test_a_tokenizer_of_another_model(refused_later: Any, model: Any, tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = model({"model.safetensors": None})
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    assert f"error: {folder}: the tokenizer has tokens that the model does not" in refused_later(base_model=str(folder))


def test_a_quantized_checkpoint(refused_later: Any, model: Any):
    message = refused_later(
        base_model=str(model({}, quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}))
    )
    assert "the checkpoint is already quantized (nf4), but was asked for with quantization: none" in message
    assert "fix: write quantization: nf4" in message


def test_no_model_folder(refused: Any, tmp_path: Path, tiny_gpt2: Path):
    assert f"error: {tmp_path}/gone: no such model folder\n" in refused(base_model=str(tmp_path / "gone"))
    assert "revision v1 is for hub models" in refused(base_model=str(tiny_gpt2), revision="v1")


def test_a_device_that_is_not_there(refused: Any):
    kind = "mps" if torch.cuda.is_available() else "cuda"
    message = refused(device=kind)
    assert f"error: device: {kind} was asked for, but torch {torch.__version__} finds none" in message
    assert "fix: write device: auto (devices here: cpu" in message


def test_a_tracker_that_is_not_installed(refused: Any, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.training import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert refused(trackers=["wandb"]) == (
        "error: trackers: wandb is not installed\n  fix: pip install wandb==0.31.0, or remove it from trackers\n"
    )


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """An adapter folder of the tiny Llama, after one step."""
    from conftest import quiet_console

    from lora_cli.recipe import load_recipe
    from lora_cli.training.train import train

    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "rows.jsonl", [SHORT] * 4)
    recipe = f"base_model: {tiny_llama}\ndata: {{train: rows.jsonl}}\noutput: run\n"
    recipe += "quantization: none\ndtype: fp32\ntrain: {max_steps: 1, warmup_ratio: 0}\nadapter: {rank: 2}\n"
    (folder / "recipe.yaml").write_text(recipe)
    train(load_recipe(folder / "recipe.yaml"), quiet_console())
    return folder / "run" / "adapter"


@pytest.fixture
def opening(lora: Any, trained: Path, tmp_path: Path) -> Callable[..., str]:
    """The message with which `lora generate` refuses the trained adapter after some change to its folder."""

    def run(change: Callable[[Path], Any] = lambda _: None, *options: Any) -> str:
        adapter = tmp_path / "adapter"
        shutil.copytree(trained, adapter)
        change(adapter)
        said = lora("generate", "Hello", "--adapter", adapter, "--max-new-tokens", 1, *options)
        assert said.code == 2, said.text
        assert said.error.count("error: ") == 1
        return said.error

    return run


def test_an_adapter_of_another_base(opening: Any, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path):
    message = opening(lambda _: None, "--model", tiny_gpt2)
    assert message.startswith(f"error: {tmp_path}/adapter: the adapter was trained on another base model: ")
    assert f"on {tiny_llama}, not on {from_here(str(tiny_gpt2))}\n  fix: use the base model {tiny_llama}" in message


def test_an_adapter_without_a_fingerprint_that_does_not_fit(opening: Any, tiny_llama: Path, tiny_gpt2: Path):
    """As other programs write them: names and shapes then tell."""
    from safetensors.torch import load_file, save_file

    def strip(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(tensors, adapter / "adapter_model.safetensors")

    message = opening(strip, "--model", tiny_gpt2)
    assert f"the adapter (of {tiny_llama}) does not fit {from_here(str(tiny_gpt2))}: 8 layers differ\n" in message
    assert "model.layers.0.self_attn.q_proj: A (2, 64), B (64, 2), but there is no such linear layer\n" in message
    assert "fix: use the base model that it was trained on" in message


def replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace("adapter_model.safetensors", lambda b: b[:-50]), "damaged or incomplete adapter file: "),
        (replace("adapter_model.safetensors", lambda b: b""), "damaged or incomplete adapter file: "),
        (replace("adapter_model.safetensors", lambda b: b[:8] + b"#" * 99 + b[107:]), "damaged or incomplete adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither a run nor an adapter nor a model"),
        (replace("adapter_config.json", lambda b: b[:-9]), "the adapter's configuration is not valid: Invalid JSON"),
        (replace("adapter_config.json", lambda b: b"[]"), "the adapter's configuration is not valid: Input should be"),
        (replace("adapter_config.json", lambda b: b.replace(b'"LORA"', b'"IA3"')), "this is a IA3 adapter; only LORA"),
        (
            replace("adapter_config.json", lambda b: b.replace(b'"use_dora": false', b'"use_dora": true')),
            "the adapter uses what this program cannot compute\n  use_dora: True",
        ),
    ],
)
def test_damaged_adapter(opening: Any, tmp_path: Path, change: Any, says: str):
    message = opening(change)
    assert message.startswith(f"error: {tmp_path}/adapter")
    assert says in message


def edit_config(**values: Any) -> Callable[[Path], Any]:
    return replace("adapter_config.json", lambda b: json.dumps(json.loads(b) | values).encode())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha_pattern": ["q_proj"]}, "not valid: alpha_pattern: input should be an object"),
        (
            {"target_modules": {"q_proj": 1}},
            "not valid: target_modules: input should be a valid string or a valid array",
        ),
        ({"base_model_name_or_path": 3}, "not valid: base_model_name_or_path: input should be a valid string"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, not a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a finite number"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is not a valid regular expression"),
        ({"alpha_pattern": {"(.|.)*(.|.)*(.|.)*(.|.)*[!#]": 2}}, "takes more than 2 s to match"),
    ],
)
def test_an_adapter_configuration_of_wrong_values(opening: Any, values: dict[str, Any], says: str):
    message = opening(edit_config(**values))
    assert "adapter_config.json: " in message
    assert says in message
    assert "\n  fix: " in message


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_of_what_is_no_number(opening: Any, number: float):
    from safetensors.torch import load_file, save_file

    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = number
        save_file(tensors, adapter / "adapter_model.safetensors")

    assert "holds NaN, infinity or no real numbers\n  fix: copy the adapter again" in opening(spoil)


def test_no_adapter_folder(lora: Any, tmp_path: Path):
    said = lora("generate", "Hello", "--adapter", tmp_path / "gone")
    assert said.code == 2
    assert f"error: {tmp_path}/gone: no such folder\n  fix: " in said.error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_read(refused: Any, refused_later: Any, model: Any, tmp_path: Path):
    """Reading one may never end; the test would hang."""
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "zero.jinja").symlink_to("/dev/zero")
    says = "this is a pipe or a device, not a file\n  fix: save what it holds as a file"
    for name in ("rows.jsonl", "zero.jsonl"):
        assert says in refused(data={"train": str(tmp_path / name)})
    assert says in refused(data={"template": str(tmp_path / "zero.jinja")})
    folder = model({"tokenizer.json": None})
    os.mkfifo(folder / "tokenizer.json")
    assert f"{folder}/tokenizer.json: {says}" in refused(base_model=str(folder))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "generation_config.json is not valid JSON"),
        ("[" * 100_000, "generation_config.json is not valid JSON"),
        ("[1]", "generation_config.json is not valid JSON"),
        ('{"eos_token_id": "end"}', "eos_token_id is not a token's number"),
        ('{"eos_token_id": [1, null]}', "eos_token_id is not a token's number"),
    ],
)
def test_damaged_generation_settings(refused: Any, model: Any, content: str, says: str):
    assert says in refused(base_model=str(model({"generation_config.json": content})))


def test_a_weight_file_with_a_gap(refused_later: Any, model: Any, tiny_gpt2: Path):
    """Its header is readable, but a part of the file belongs to no tensor."""
    data = (tiny_gpt2 / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["transformer.h.0.attn.c_proj.weight"]
    text = json.dumps(header).encode()
    folder = model({"model.safetensors": len(text).to_bytes(8, "little") + text + data[8 + length :]})
    assert "invalid offset for tensor" in refused_later(base_model=str(folder))


@pytest.mark.parametrize(("kind", "per_number"), [("I32", 4), ("U8", 1), ("BOOL", 1), ("C64", 8), ("F4", 0.5)])
def test_a_header_whose_numbers_are_no_real_ones(
    lora: Any, recipe_file: Any, trained: Path, tiny_llama: Path, tmp_path: Path, kind: str, per_number: float
):
    """Of the same bytes: transformers would take whole numbers as weights, without a word."""

    def told(file: Path, last: str) -> None:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        own = next(each for name, each in header.items() if name.endswith(last))
        rows, size = own["shape"][0], own["data_offsets"][1] - own["data_offsets"][0]
        own |= {"dtype": kind, "shape": [rows, int(size / per_number) // rows]}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    base, adapter = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (tiny_llama, trained))
    told(base / "model.safetensors", "q_proj.weight")
    told(adapter / "adapter_model.safetensors", "q_proj.lora_A.weight")
    recipe = recipe_file(base_model=str(base))
    says = "the weights do not fill the model" if kind == "F4" else f"q_proj.weight is stored as {kind}"
    for words in (("check", recipe), ("train", recipe), ("eval", base, "--data", tmp_path / "sums.jsonl")):
        said = lora(*words)
        assert said.code == 2
        assert says in said.error or (kind == "F4" and "cannot be loaded" in said.error)
        assert "fix: " in said.error
    for command in ("inspect", "merge", "resize"):
        options = {
            "inspect": (),
            "merge": ("--output", tmp_path / "m"),
            "resize": ("--rank", "1", "--output", tmp_path / "m"),
        }
        said = lora(command, adapter, *options[command])
        assert said.code == 2
        assert "real numbers" in said.error or "cannot be computed with" in said.error
        assert not (tmp_path / "m").exists()


def test_what_the_file_system_refuses_is_no_traceback(lora: Any):
    said = lora("eval", "--model", "x" * 300, "--data", "rows.jsonl")
    assert said.code == 2
    assert "File name too long" in said.error
    assert "\n  fix: " in said.error


# ── checks that protect the result: exit code 3 ─────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_stops_the_run(lora: Any, recipe_file: Any, tmp_path: Path):
    said = lora("train", recipe_file(train={"learning_rate": 1e30}))
    assert said.code == 3
    assert "at step 2: training has diverged and was stopped\n  last checkpoint: none" in said.error
    assert "fix: lower train.learning_rate" in said.error
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("part", ["loss", "validation loss"])
def test_nan(lora: Any, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    from lora_cli.training import micro_batches, validation

    if part == "loss":
        nan = torch.tensor(torch.nan, requires_grad=True)
        monkeypatch.setattr(micro_batches, "training_loss", lambda *_, **__: (nan, nan))
    else:
        measured = iter([1.0, torch.nan])  # of the base, and after the first step
        scored = lambda *_, **__: (torch.tensor([next(measured)]), torch.tensor([1]))  # noqa: E731
        monkeypatch.setattr(validation, "example_losses", scored)
    said = lora("train", recipe_file(data={"validation": 0.25}, train={"eval_every": 1}))
    assert said.code == 3
    assert f"run: the {part} is nan at step 1: training has diverged and was stopped" in said.error
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_learned_nothing(lora: Any, recipe_file: Any, tmp_path: Path):
    said = lora("train", recipe_file(train={"learning_rate": 1e-60}))
    assert said.code == 3
    assert f"error: {tmp_path}/run: This run learned nothing: the adapter changes nothing\n" in said.error
    assert "  Every B of the adapter is still zero.\n" in said.error
    assert json.loads((tmp_path / "run" / "report.json").read_text())["learned"] is False
