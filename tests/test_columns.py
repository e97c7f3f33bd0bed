"""Columns and keys that would count or vanish without a word: each is read, told, or refused with a fix that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import conftest
import pyarrow
import pytest
import yaml
from conftest import write_rows
from pyarrow import parquet
from tiny_model import make_tokenizer

from lora_cli.data.files.readers import Row, read_file
from lora_cli.data.formats import Completion, Conversation, Document, detect_format
from lora_cli.data.gate import Findings
from lora_cli.data.prepare import prepare
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.errors import LoraError
from lora_cli.planning.reading import choose_reading
from lora_cli.recipe import DataRecipe, Recipe

ASKED, ANSWERED = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}
TURNS = [ASKED, ANSWERED]
CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": "x"}}}


def rows_of(*values: dict[str, Any], filled: bool = False) -> list[Row]:
    return [Row("rows.jsonl", number, each, filled) for number, each in enumerate(values, 1)]


def read(values: dict[str, Any], columns: dict[str, Any] | None = None, *, filled: bool = False) -> Document | None:
    (row,) = rows_of(values, filled=filled)
    return detect_format([row], "auto", columns).read(row)


def conversation(values: dict[str, Any], columns: dict[str, Any] | None = None, **how: Any) -> Conversation:
    document = read(values, columns, **how)
    assert isinstance(document, Conversation)
    return document


def refusal(values: dict[str, Any], columns: dict[str, Any] | None = None) -> LoraError:
    return conftest.refusal(lambda: read(values, columns))


def suggested(error: LoraError) -> dict[str, Any]:
    """The data.columns that a fix says to write, as YAML reads them."""
    text = str(error.fix)
    start = text.index("data.columns: ") + len("data.columns: ")
    return yaml.safe_load(text[start : text.index("}", start) + 1])


def encoder(rows: list[Row], tokenizer: Any = None, **data: Any) -> RowEncoder:
    recipe = DataRecipe.model_validate({"train": "rows.jsonl", **data})
    return RowEncoder(recipe, tokenizer or make_tokenizer(), rows)


def trained(values: dict[str, Any], **data: Any) -> list[str]:
    """What is trained of a row, span by span."""
    rows, tokenizer = rows_of(values), make_tokenizer()
    (encoded,) = encoder(rows, tokenizer, **data).encode(iter(rows), Findings())
    assert encoded.example is not None, encoded.findings
    return [tokenizer.decode(encoded.example.ids[first:last]) for first, last, _ in encoded.example.spans]


def said(rows: list[Row], head: int | None = None, **data: Any) -> str:
    """What is told of the format when all rows are read, of which the first `head` showed it."""
    reader = encoder(rows[:head], **data)
    list(reader.encode(iter(rows), Findings()))
    return reader.said


# ── members that a table fills in ───────────────────────────────────────────────────────────────────────────────


def table_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> list[Row]:
    table, path = pyarrow.Table.from_pylist(rows), folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return list(read_file(path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_null_members_that_a_table_fills_in_are_left_out_of_calls_and_said(kind, key, tmp_path):
    def row(**arguments: Any) -> dict[str, Any]:
        function = {"name": "weather", "arguments": arguments}
        called = {"tool_calls": [{"type": "function", "function": function}]}
        return {
            "messages": [
                ASKED,
                {"role": "assistant", "content": "", **(called if key == "tool_calls" else {key: function})},
            ]
        }

    rows = table_rows(tmp_path, kind, [row(city="Rome"), row(tz="UTC", deep={"a": 1}), {"messages": TURNS}])
    documents = [detect_format(rows).read(row) for row in rows]
    assert all(isinstance(document, Conversation) for document in documents)
    arguments = [each.turns[1]["tool_calls"][0]["function"]["arguments"] for each in documents[:2]]  # type: ignore[union-attr]
    assert arguments == [{"city": "Rome"}, {"tz": "UTC", "deep": {"a": 1}}]
    assert [document.notes for document in documents] == [("null_members",)] * 2 + [()]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_null_members_that_a_table_fills_in_are_left_out_of_tools(kind, tmp_path):
    def tool(**properties: Any) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": properties}},
        }

    given = [[tool(city={"type": "string"})], [tool(days={"type": "integer", "minimum": 1})]]
    rows = table_rows(tmp_path, kind, [{"messages": TURNS, "tools": tools} for tools in given])
    documents = [detect_format(rows).read(row) for row in rows]
    assert [document.tools for document in documents] == given  # type: ignore[union-attr]
    assert all(document.notes == ("null_members",) for document in documents)  # type: ignore[union-attr]


def test_arguments_that_a_table_keeps_as_text_and_those_of_json_lines_keep_their_nulls(tmp_path):
    arguments = {"city": "Rome", "tz": None}
    for how, filled in ((json.dumps, True), (dict, False)):
        call = {"function": {"name": "f", "arguments": how(arguments)}}
        turn = {"role": "assistant", "tool_calls": [call]}
        document = conversation({"messages": [ASKED, turn]}, filled=filled)
        assert document.turns[1]["tool_calls"][0]["function"]["arguments"] == arguments
        assert document.notes == ()


def test_a_call_without_arguments_of_a_table_has_none():
    call = {"function": {"name": "now", "arguments": None}}
    document = conversation({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]}, filled=True)
    assert document.turns[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


# ── calls, tools and results of other programs ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [{"of": "x"}, '{"of": "x"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_openais_older_function_call_is_one_call(arguments, content):
    turn = {"role": "assistant", "function_call": {"name": "count", "arguments": arguments}, **content}
    result = {"role": "function", "name": "count", "content": "4"}
    turns = conversation({"messages": [ASKED, turn, result, ANSWERED]}).turns
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert turns[2] == {"role": "tool", "content": "4", "name": "count"}


def test_a_turn_with_calls_of_both_kinds_or_a_malformed_older_one_is_refused():
    both = {"role": "assistant", "tool_calls": [CALL], "function_call": CALL["function"]}
    assert refusal({"messages": [ASKED, both]}).what == "turn 2 of messages has both tool_calls and function_call"
    for call in ({"name": "f"}, "f", {}, 7):
        error = refusal({"messages": [ASKED, {"role": "assistant", "content": "x", "function_call": call}]})
        assert error.what == "turn 2 of messages has a malformed tool call"


def test_openais_older_functions_and_plain_ones_are_tools():
    function = {"name": "count", "description": "Counts.", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    for given in (
        {"functions": [function]},
        {"tools": [function]},
        {"tools": json.dumps([function])},
        {"tools": tools},
    ):
        assert conversation({"messages": TURNS, **given}).tools == tools
    assert detect_format(rows_of({"messages": TURNS, "functions": [function]})).unused == ()
    assert refusal({"messages": TURNS, "tools": tools, "functions": [function]}).what.endswith("tools and functions")


@pytest.mark.parametrize("result", [{"city": "Köln", "at": [1, None]}, [1, 2], [{"id": 1}], 42, 1.5, True, []])
@pytest.mark.parametrize(
    "role", [("role", "tool", "content"), ("role", "function", "content"), ("from", "observation", "value")]
)
def test_a_tool_result_that_is_not_text_is_its_json_and_said(result, role):
    said_by, speaker, said_in = role
    document = conversation({"messages": [ASKED, {said_by: speaker, said_in: result}, ANSWERED]})
    assert json.loads(document.turns[1]["content"]) == result
    assert "\\u" not in document.turns[1]["content"]
    assert document.notes == ("result_as_json",)


def test_a_tool_result_in_parts_is_text_and_one_that_json_cannot_hold_is_refused():
    parts = [{"type": "text", "text": "4"}]
    document = conversation({"messages": [ASKED, {"role": "tool", "content": parts}, ANSWERED]})
    assert (document.turns[1]["content"], document.notes) == ("4", ())
    for value in (float("nan"), {"a": b"x"}):
        error = refusal({"messages": [ASKED, {"role": "tool", "content": value}, ANSWERED]})
        assert error.what == "the result of turn 2 of messages cannot be written as JSON"


def test_turns_and_calls_may_be_json_text_one_by_one():
    turn = {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}
    document = conversation({"messages": [json.dumps(ASKED), json.dumps(turn)]})
    assert document.turns == [ASKED, turn | {"tool_calls": [CALL]}]


# ── keys of turns ───────────────────────────────────────────────────────────────────────────────────────────────

NAMES_ROLES = (  # a template that reads `name` of users, and of all turns only what has a role
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'user' and m.name %} {{ m.name }}{% endif %}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_keys_of_turns_that_the_template_does_not_read_are_told(tmp_path):
    (tmp_path / "names.jinja").write_text(NAMES_ROLES)
    rows = rows_of(
        {"messages": TURNS},
        *[{"messages": [ASKED | {"name": "Ann", "id": n}, ANSWERED | {"emotion": "calm"}]} for n in range(30)],
    )
    told = said(rows, template=str(tmp_path / "names.jinja"))
    assert "keys of turns that the template does not read: emotion, id)" in told
    assert "keys of turns" not in said(rows[:1])
    assert "does not read: emotion, id, name)" in said(rows)  # ChatML has no place for names


def test_a_key_that_a_template_reads_late_or_as_a_whole_is_not_told(tmp_path):
    last = NAMES_ROLES.replace("m.role == 'user' and m.name", "loop.last and m.name")
    (tmp_path / "last.jinja").write_text(last)
    (tmp_path / "json.jinja").write_text(NAMES_ROLES.replace("{{ m['content'] }}", "{{ m | tojson }}"))
    rows = rows_of({"messages": [ASKED | {"name": "Ann"}, ANSWERED]}, {"messages": [ASKED, ANSWERED | {"name": "Bob"}]})
    assert "keys of turns" not in said(rows, template=str(tmp_path / "last.jinja"))
    assert "keys of turns" not in said(rows, template=str(tmp_path / "json.jinja"))


@pytest.mark.parametrize("value", [False, True, "false"])
@pytest.mark.parametrize("key", ["loss", "trainable", "is_trained", "shouldTrain"])
def test_a_key_that_elsewhere_says_whether_a_turn_is_trained_stops_and_its_fix_works(key, value):
    values = {"messages": [ASKED, ANSWERED | {key: value}, ASKED, ANSWERED | {"content": "Five."}]}
    error = refusal(values)
    assert error.what.startswith(f"turn 2 of messages has the key {key}")
    assert error.where == "rows.jsonl: row 1"
    columns = suggested(error)
    assert columns == {"train": key}
    assert trained(values, columns=columns) == (["Four.<|im_end|>"] if value is True else []) + ["Five.<|im_end|>"]


@pytest.mark.parametrize(("key", "value"), [("loss_scale", 0.5), ("loss_weight", "0.5"), ("loss", 0)])
def test_a_key_that_elsewhere_weighs_a_turn_stops_and_its_fix_works(key, value):
    values = {"messages": [ASKED, ANSWERED | {key: value}]}
    columns = suggested(refusal(values))
    assert columns == {"weight": key}
    assert conversation(values, columns).weights == [1, float(value)]


@pytest.mark.parametrize(
    ("key", "value"), [("mask", True), ("masked", False), ("loss_mask", [0, 1]), ("train_detail", [])]
)
def test_a_key_that_elsewhere_leaves_out_what_is_marked_is_to_be_written_as_train(key, value):
    error = refusal({"messages": [ASKED, ANSWERED | {key: value}]})
    assert str(error.fix) == f"write train: false on the turns that are not to be trained, and remove {key}"


def test_a_key_that_only_sounds_like_loss_is_a_key_like_any():
    for key, value in (("masked", "Mr. ***"), ("training_data", "web"), ("glossary", True), ("restrain", 1)):
        document = conversation({"messages": [ASKED, ANSWERED | {key: value}]})
        assert document.weights == conversation({"messages": [ASKED, ANSWERED]}).weights, key


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_that_are_used_late_are_not_called_unused():
    rows = rows_of(*[{"messages": TURNS, "id": 1}] * 3, *[{"messages": None, "conversations": TURNS, "id": 1}] * 3)
    for head in (1, 3, 4, 6):
        assert said(rows, head).endswith("columns not used: id)")
    assert "columns not used: conversations, id" in said(rows_of({"messages": TURNS, "conversations": TURNS, "id": 1}))


def test_columns_that_come_late_and_are_not_used_are_told():
    rows = rows_of({"text": "a"}, {"text": "b", "late": 1})
    assert "columns not used: late" in said(rows, 1)


def test_the_column_that_rows_are_grouped_by_is_used():
    assert "not used" not in said(rows_of({"text": "a", "document": 1}), group_by="document", validation=0.5)


@pytest.mark.parametrize(
    ("values", "columns", "lost"),
    [
        (
            {"question": "?", "context": "c", "answer": "!"},
            {"prompt": "question", "completion": "answer", "input": "context"},
            "input",
        ),
        ({"prompt": "?", "completion": "!", "rules": "s"}, {"system": "rules"}, "system"),
        ({"text": "a", "b": "b"}, {"input": "b"}, "input"),
        ({"messages": TURNS, "b": "b"}, {"input": "b"}, "input"),
        ({"instruction": "a", "output": "b", "t": []}, {"tools": "t"}, "tools"),
    ],
)
def test_a_column_that_is_named_for_what_the_format_does_not_read_is_refused(values, columns, lost):
    error = refusal(values, columns)
    assert f"is {lost}, which the format" in error.what
    if "prompt" in values or "question" in values:
        document = conversation(values, suggested(error))
        given = values[columns[lost]]
        assert any(given in turn["content"] for turn in document.turns)
        assert document.turns[-1]["content"] == "!"
    else:
        assert f"remove {lost} from data.columns" in str(error.fix)
        read(values)


def test_a_column_has_one_meaning():
    """Mapped to something, it is not read under its own name a second time."""
    document = conversation({"input": "Add.", "output": "3"}, {"instruction": "input"})
    assert document.turns[0]["content"] == "Add."
    assert detect_format(rows_of({"text": "a", "completion": "b"}), "auto", {"prompt": "text"}).name == "completion"


USUAL = {
    "question and answer": ({"question": "?", "answer": "!"}, ["!"]),
    "question, context and answer": ({"question": "?", "context": "c", "answer": "!"}, ["?\n\nc", "!"]),
    "instruction and response": ({"instruction": "?", "response": "!"}, ["?", "!"]),
    "instruction, context and response": ({"instruction": "?", "context": "c", "response": "!"}, ["?\n\nc", "!"]),
    "instruction and answer": ({"instruction": "?", "answer": "!"}, ["?", "!"]),
    "input and output": ({"input": "?", "output": "!"}, ["!"]),
    "user and assistant": ({"user": "?", "assistant": "!"}, ["!"]),
    "problem and solution": ({"problem": "?", "solution": "!"}, ["!"]),
    "capitals": ({"Question": "?", "Answer": "!"}, ["!"]),
    "capitals with a context": ({"Question": "?", "Context": "c", "Answer": "!"}, ["?\n\nc", "!"]),
    "one letter": ({"Q": "?", "A": "!"}, ["!"]),
    "a conversation": ({"conversation": TURNS}, ["How many?", "Four."]),
    "chosen": ({"prompt": "?", "chosen": "!", "rejected": "no"}, ["!"]),
    "chosen without a prompt": ({"chosen": "Human: ? Assistant: !", "rejected": "no"}, ["Human: ? Assistant: !"]),
    "chosen conversations": ({"chosen": TURNS, "rejected": TURNS}, ["How many?", "Four."]),
    "chosen conversations beside a prompt": (
        {"prompt": "How many?", "chosen": TURNS, "rejected": TURNS},
        ["How many?", "Four."],
    ),
    "chosen turns": ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED]}, ["How many?", "Four."]),
    "a name that YAML reads as a number": ({"question": "?", "1": "x", "Answer ": "!"}, ["!"]),
    "a name with a colon": ({"instruction": "?", "response": "!", "a: b": 1}, ["?", "!"]),
}


@pytest.mark.parametrize("case", USUAL)
def test_the_fix_for_columns_of_other_programs_reads_all_that_they_say(case):
    values, texts = USUAL[case]
    error = refusal(values)
    assert "fit no format" in error.what
    document = read(values, suggested(error))
    if isinstance(document, Conversation):
        assert [turn["content"] for turn in document.turns] == texts
    else:
        assert isinstance(document, Completion)
        assert [document.completion] == texts
    reading = choose_reading(rows_of(values))  # `lora init` reads it the same way
    assert dict(reading.columns) == suggested(error)


def test_preference_data_are_said_not_to_be_supported_once_and_which_part_is_used():
    values = {"prompt": "?", "chosen": "!", "rejected": "no"}
    error = refusal(values)
    assert sum("preference data are not supported" in line for line in error.render().splitlines()) == 1
    told = said(rows_of(values), columns=suggested(error))
    assert told.count("preference data") == 1
    assert "columns not used: rejected" in told
    assert "preference data" in choose_reading(rows_of(values)).why


@pytest.mark.parametrize("value", [False, "False"])
def test_an_answer_that_is_labelled_bad_is_not_trained_silently(value):
    values = {"prompt": "?", "completion": "!", "label": value}
    error = refusal(values)
    assert "label is false" in error.what
    assert read(values, suggested(error)) is None
    assert read(values | {"label": True}, suggested(error)) is not None


# ── prompt and completion as lists of turns ─────────────────────────────────────────────────────────────────────

CONTEXT = [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED, ASKED]
PAIR = {"prompt": CONTEXT, "completion": [{"role": "assistant", "content": "Five."}]}


@pytest.mark.parametrize("written", [list, json.dumps])
def test_trls_conversational_prompt_and_completion_train_the_completion(written):
    values = {name: written(turns) for name, turns in PAIR.items()}
    document = conversation(values)
    assert document.turns == [*CONTEXT, *PAIR["completion"]]
    assert document.weights == [0, 0, 0, 0, 1]
    for data in ({}, {"train_on": "completion"}, {"format": "completion"}, {"format": "chat"}):
        assert trained(values, **data) == ["Five.<|im_end|>"]
    assert trained(values, train_on="last_assistant") == ["Five.<|im_end|>"]
    assert trained(values, train_on="assistant") == ["Four.<|im_end|>", "Five.<|im_end|>"]
    assert "How many?" in trained(values, train_on="all")[0]
    assert said(rows_of(values)).startswith(
        "chat (the rows have prompt and completion; prompt and completion are lists"
    )


def test_all_turns_of_a_completion_are_trained():
    calls = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"}, ANSWERED]
    assert trained({"prompt": [ASKED], "completion": calls}) == ["One.<|im_end|>", "Four.<|im_end|>"]


def test_a_prompt_that_is_a_list_beside_a_completion_that_is_text_is_refused():
    assert refusal({"prompt": CONTEXT, "completion": "Five."}).what == "prompt is list, not text"


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios", "Images"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"], [{"bytes": b"\x89PNG", "path": None}], {"path": "a.png"}])
def test_pictures_and_sound_that_the_text_speaks_of_are_refused(column, value):
    shown = {"text": f"<{column.lower().rstrip('s')}> What is it?", column: value}
    turns = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, ANSWERED], column: value}
    for values in (shown, turns):
        error = refusal(values)
        assert "only text can be trained" in error.what
        assert error.where == "rows.jsonl: row 1"


def test_a_list_of_pictures_is_refused_even_if_the_text_does_not_speak_of_it():
    assert "only text" in refusal({"messages": TURNS, "images": ["a.png"]}).what


def test_rows_without_pictures_beside_others_are_text():
    for value in ([], None, ""):
        assert isinstance(read({"text": "<image> is a tag of HTML", "images": value}), Completion)
    assert isinstance(read({"text": "An article.", "image": "https://example.com/a.png"}), Completion)


# ── several sources ─────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_apply_to_the_sources_that_have_them(tmp_path):
    (tmp_path / "faq.csv").write_text("Question,Answer\nHow many?,Four.\nHow much?,Five.\n")
    write_rows(tmp_path / "chats.jsonl", [{"messages": [ASKED, ANSWERED | {"content": "Six."}]}])

    def prepared(**columns: str) -> Any:
        sources = [str(tmp_path / "faq.csv"), str(tmp_path / "chats.jsonl")]
        data = {"train": sources, "columns": columns}
        recipe = Recipe.model_validate({"base_model": "none", "output": str(tmp_path / "run"), "data": data})
        return prepare(recipe, make_tokenizer())

    data = prepared(instruction="Question", output="Answer")
    assert len(data.train) == 3
    assert [form.split()[0] for form in data.summary.formats.values()] == ["instruction", "chat"]
    with pytest.raises(LoraError, match="names Qestion, but the sources have no such column") as caught:
        prepared(instruction="Qestion", output="Answer")
    assert caught.value.fix == "did you mean Question?"
