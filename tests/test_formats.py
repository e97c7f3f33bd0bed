"""Formats: what a row means, by its columns, and what is said of a row that means nothing."""

from __future__ import annotations

import json
import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import conftest
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.files.readers import Row
from lora_cli.data.formats import NEEDED, Completion, Conversation, Document, Format, detect_format
from lora_cli.data.gate import Findings
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.errors import LoraError
from lora_cli.recipe import FIELDS, DataRecipe

TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
SHARED = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}]
TOOL = {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": {}}}
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "completion": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "output": "b"},
    "messages": {"messages": TURNS},
    "conversations": {"conversations": SHARED},
}
NAMES = {"messages": "chat", "conversations": "chat"}


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row("rows.jsonl", number, each) for number, each in enumerate(values, 1)]


def read(values: dict[str, Any], form: str = "auto", columns: dict[str, str | None] | None = None) -> Document | None:
    (row,) = rows_of(values)
    return detect_format([row], form, columns).read(row)


def conversation(values: dict[str, Any], *words: Any) -> Conversation:
    document = read(values, *words)
    assert isinstance(document, Conversation)
    assert len(document.turns) == len(document.weights)
    return document


def refusal(values: dict[str, Any], *words: Any) -> LoraError:
    error = conftest.refusal(lambda: read(values, *words))
    assert error.where == "rows.jsonl: row 1"
    return error


# ── which format ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ROWS)
def test_the_columns_say_the_format_and_the_reason_names_them(shape):
    found = detect_format(rows_of(ROWS[shape] | {"id": 7, "by": "me"}))
    assert found.name == NAMES.get(shape, shape)
    assert found.reason == "the rows have " + " and ".join(ROWS[shape])
    assert found.unused == ("by", "id")


@pytest.mark.parametrize("shape", ROWS)
def test_a_named_format_is_taken_and_said_to_be_named(shape):
    found = detect_format(rows_of(ROWS[shape] | {"note": 1}), NAMES.get(shape, shape))
    assert (found.name, found.reason, found.unused) == (NAMES.get(shape, shape), "named in the recipe", ("note",))


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ("text", ()),
        ("completion", ()),
        ("instruction", ("input", "system", "history")),
        ("messages", ("tools", "system")),
        ("conversations", ("tools", "system")),
    ],
)
def test_columns_that_are_read_are_not_called_unused(shape, more):
    extra = dict.fromkeys((*more, "train", "weight"))
    assert detect_format(rows_of(ROWS[shape] | extra)).unused == ()
    others = {"input", "history", "tools", "system"} - set(more)
    assert set(detect_format(rows_of(ROWS[shape] | extra | dict.fromkeys(others))).unused) == others


def test_columns_of_any_row_count():
    assert detect_format(rows_of({"id": 1}, {"text": "a"})).name == "text"
    assert detect_format(rows_of({"text": "a", "id": 1}, {"text": "a", "mark": 1})).unused == ("id", "mark")


@pytest.mark.parametrize("one", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_columns_of_two_formats_are_refused_until_one_is_named(one, other):
    names = [NAMES.get(shape, shape) for shape in (one, other)]
    both = ROWS[one] | ROWS[other]
    if names[0] == names[1]:
        assert detect_format(rows_of(both)).name == names[0]
        return
    with pytest.raises(LoraError, match="fit more than one format") as caught:
        detect_format(rows_of(both))
    assert ", ".join(sorted(both)) in caught.value.what
    assert caught.value.fix in [f"write data.format: {name}, or remove a column" for name in names]
    assert detect_format(rows_of(both), names[1]).name == names[1]


def test_of_messages_and_conversations_the_one_that_is_read_is_the_one_that_is_named():
    both = {"messages": TURNS, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    found = detect_format(rows_of(both))
    document = found.read(rows_of(both)[0])
    assert isinstance(document, Conversation)
    taken = "messages" if document.turns[1]["content"] == "Four." else "conversations"
    (other,) = set(both) - {taken}
    assert found.reason == f"the rows have {taken}"
    assert found.unused == (other,)


@pytest.mark.parametrize(
    ("row", "suggested"),
    [
        ({"question": "?", "answer": "!"}, {"prompt": "question", "completion": "answer"}),
        ({"query": "?", "response": "!", "id": 1}, {"prompt": "query", "completion": "response"}),
        ({"dialogue": TURNS}, {"messages": "dialogue"}),
        ({"article": "a"}, {"text": "article"}),
        ({"prompt": "?", "answer": "!"}, {"completion": "answer"}),
        ({"instruction": "?", "response": "!"}, None),
    ],
)
def test_unknown_columns_bring_a_suggestion_that_works(row, suggested):
    with pytest.raises(LoraError, match="fit no format") as caught:
        detect_format(rows_of(row))
    assert caught.value.where == "rows.jsonl: row 1"
    assert all(name in caught.value.what for name in row)
    assert all(name in caught.value.details[0] for name in NEEDED)
    if suggested is not None:
        assert str(caught.value.fix).startswith("write data.columns: {")
        assert (
            yaml.safe_load(str(caught.value.fix).removeprefix("write ").partition("; or")[0])["data.columns"]
            == suggested
        )
        assert read(row, "auto", suggested) is not None


def test_columns_that_mean_nothing_known_bring_no_suggestion():
    with pytest.raises(LoraError, match="the columns a, b fit no format") as caught:
        detect_format(rows_of({"a": 1, "b": 2}))
    assert "say what they mean in data.columns" in str(caught.value.fix)
    with pytest.raises(LoraError, match=r"the columns \(none\) fit no format"):
        detect_format(rows_of({}))


# ── text and completion ─────────────────────────────────────────────────────────────────────────────────────────


@given(st.text(max_size=20), st.text(max_size=20))
def test_texts_are_taken_as_they_stand(one, other):
    text, completion = read({"text": one}), read({"prompt": one, "completion": other})
    assert isinstance(text, Completion)
    assert isinstance(completion, Completion)
    assert (text.prompt, text.completion, text.weight) == (None, one, 1)
    assert (completion.prompt, completion.completion, completion.weight) == (one, other, 1)


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        (ROWS["text"], "text"),
        (ROWS["completion"], "prompt"),
        (ROWS["completion"], "completion"),
        (ROWS["instruction"], "instruction"),
        (ROWS["instruction"], "output"),
        (ROWS["instruction"], "input"),
        (ROWS["instruction"], "system"),
        (ROWS["messages"], "system"),
    ],
)
def test_what_is_no_text_is_refused(row, column, value):
    assert refusal(row | {column: value}).what == f"{column} is {type(value).__name__}, not text"


@pytest.mark.parametrize("shape", ROWS)
def test_a_missing_or_null_column_is_refused_and_the_present_ones_are_named(shape):
    for column in ROWS[shape]:
        found = detect_format(rows_of(ROWS[shape]))
        for values in ({"id": 3}, {column: None, "id": 3}):
            with pytest.raises(LoraError) as caught:
                found.read(Row("rows.jsonl", 9, ROWS[shape] | {column: None} | values))
            assert caught.value.where == "rows.jsonl: row 9"
            assert f"the row has no {'messages' if shape == 'conversations' else column}" == caught.value.what
            assert "id" in str(caught.value.fix)


# ── instruction ─────────────────────────────────────────────────────────────────────────────────────────────────


def said(document: Conversation) -> list[tuple[str, str, float]]:
    return [
        (turn["role"], turn["content"], weight)
        for turn, weight in zip(document.turns, document.weights, strict=True)
        if set(turn) == {"role", "content"}
    ]


@pytest.mark.parametrize(
    ("more", "turns"),
    [
        ({}, [("user", "Add.", 0), ("assistant", "3", 1)]),
        ({"input": ""}, [("user", "Add.", 0), ("assistant", "3", 1)]),
        ({"input": None, "system": None, "history": None}, [("user", "Add.", 0), ("assistant", "3", 1)]),
        ({"input": "1 and 2"}, [("user", "Add.\n\n1 and 2", 0), ("assistant", "3", 1)]),
        ({"system": "Be brief."}, [("system", "Be brief.", 0), ("user", "Add.", 0), ("assistant", "3", 1)]),
        ({"system": ""}, [("user", "Add.", 0), ("assistant", "3", 1)]),
        ({"history": []}, [("user", "Add.", 0), ("assistant", "3", 1)]),
        (
            {"history": [["Hi", "Hello"], ("And?", "So.")], "system": "S", "input": "x", "weight": 0.5},
            [
                *[("system", "S", 0), ("user", "Hi", 0), ("assistant", "Hello", 0.5), ("user", "And?", 0)],
                *[("assistant", "So.", 0.5), ("user", "Add.\n\nx", 0), ("assistant", "3", 0.5)],
            ],
        ),
    ],
)
def test_alpacas_columns_are_a_conversation(more, turns):
    assert said(conversation({"instruction": "Add.", "output": "3"} | more)) == turns


@pytest.mark.parametrize("history", ["[]", {"a": "b"}, ["a", "b"], [["a"]], [["a", "b", "c"]], [["a", None]], [[1, 2]]])
def test_a_history_that_is_no_list_of_pairs_is_refused(history):
    assert refusal(ROWS["instruction"] | {"history": history}).what == "history is not a list of pairs"


# ── chat ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_openai_messages():
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "How many?", "name": "ann"},
        {"role": "assistant", "content": "Four.", "refusal": None},
    ]
    document = conversation({"messages": turns})
    assert document.turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?", "name": "ann"},
        {"role": "assistant", "content": "Four."},
    ]
    assert document.tools is None


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *[("system", "system"), ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("chatgpt", "assistant")],
        *[("bot", "assistant"), ("model", "assistant"), ("assistant", "assistant"), ("observation", "tool")],
        *[("tool", "tool"), ("function_response", "tool"), ("Human", "user"), ("GPT", "assistant")],
    ],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_names_of_sharegpt_and_openai_mean_roles(speaker, role, keys):
    document = conversation({"conversations": [dict(zip(keys, (speaker, "Hi."), strict=True))]})
    assert document.turns == [{"role": role, "content": "Hi."}]


def test_sharegpt_and_openai_mean_the_same():
    calls = json.dumps({"name": "count", "arguments": {"of": "x"}})
    shared = [*SHARED, {"from": "function_call", "value": calls}, {"from": "observation", "value": "4"}]
    call = {"type": "function", "function": {"name": "count", "arguments": {"of": "x"}}}
    messages = [*TURNS, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    assert conversation({"conversations": shared}).turns == conversation({"messages": messages}).turns == messages
    several = [{"from": "function_call", "value": json.dumps([json.loads(calls)] * 2)}]
    assert conversation({"conversations": several}).turns[0]["tool_calls"] == [call, call]


def test_what_a_sharegpt_turn_says_is_its_value_whatever_else_it_has():
    turn = {"from": "gpt", "value": "said", "content": "something else"}
    assert conversation({"conversations": [turn]}).turns[0]["content"] == "said"


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "How "}, {"text": "many?"}]
    assert conversation({"messages": [{"role": "user", "content": parts}]}).turns[0]["content"] == "How many?"
    assert conversation({"messages": [{"role": "user", "content": []}]}).turns[0]["content"] == ""


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {}}, {"type": "text"}, {"type": "text", "text": 3}, "text", None]
)
def test_parts_that_are_not_text_are_refused(part):
    error = refusal({"messages": [*TURNS, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]})
    assert error.what == "turn 3 of messages has a part that is not text"


CALLED = {"of": "Äpfel", "deep": {"list": [1, None]}}
GIVEN_CALLS = {
    "object": {"id": "1", "type": "function", "function": {"name": "count", "arguments": CALLED}},
    "text": {"id": "1", "type": "function", "function": {"name": "count", "arguments": json.dumps(CALLED)}},
    "without a type": {"id": "1", "function": {"name": "count", "arguments": CALLED}},
    "flat": {"id": "1", "name": "count", "arguments": json.dumps(CALLED)},
}


@pytest.mark.parametrize("called", GIVEN_CALLS)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_have_arguments_as_values_however_they_were_written(called, content):
    turn = {"role": "assistant", "tool_calls": [GIVEN_CALLS[called]], **content}
    result = {"role": "tool", "content": "4", "tool_call_id": "1", "name": "count"}
    document = conversation({"messages": [TURNS[0], turn, result]})
    assert document.turns == [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [GIVEN_CALLS["object"]]},
        result,
    ]


@pytest.mark.parametrize(
    "call",
    [
        *[{}, "count", None, 7, {"function": None}, {"function": "count"}, {"function": {"name": "count"}}],
        {"function": {"arguments": {}}},
        {"function": {"name": "count", "arguments": "no JSON"}},
        {"function": {"name": "count", "arguments": [1]}},
        {"function": {"name": "count", "arguments": '{"open": '}},
        {"function": {"name": 3, "arguments": {}}},
    ],
)
def test_malformed_calls_are_refused(call):
    error = refusal({"messages": [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]})
    assert error.what == "turn 2 of messages has a malformed tool call"


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_calls(calls):
    turn = TURNS[1] | {"tool_calls": calls}
    assert conversation({"messages": [TURNS[0], turn]}).turns == TURNS


@pytest.mark.parametrize("written", [list, json.dumps])
def test_tools_are_a_list_or_its_json_text(written):
    assert conversation({"messages": TURNS, "tools": written([TOOL])}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_no_tools_are_no_tools(tools):
    assert conversation({"messages": TURNS, "tools": tools}).tools is None


@pytest.mark.parametrize(
    "tools", ["count", {"name": "count"}, ["count"], [TOOL, None], 7, "[7]", '[{"open": ', [{"function": "f"}]]
)
def test_tools_of_another_shape_are_refused(tools):
    assert refusal({"messages": TURNS, "tools": tools}).what.startswith("tools is not a list of functions")


def test_messages_may_be_json_text_as_tables_keep_them():
    assert conversation({"messages": json.dumps(TURNS)}).turns == TURNS


@pytest.mark.parametrize("messages", [[], "", "hello", {}, 7, "[]", "[7", "{}", True])
def test_messages_that_are_no_list_of_turns_are_refused(messages):
    assert refusal({"messages": messages}, "chat").what == "messages is not a list of turns"


@pytest.mark.parametrize("messages", [json.dumps(TURNS).replace("How", "\\ud83d"), json.dumps([*TURNS, {"\ud83d": 1}])])
def test_json_text_with_half_a_character_is_refused(tokenizer, messages):
    """CSV and the text columns of Parquet can hold such JSON: no tokenizer takes what it means."""
    assert "\\ud83d" in messages
    (row,) = rows_of({"messages": messages})
    (encoded,) = RowEncoder(recipe(), tokenizer, [row]).encode(iter([row]), Findings())
    assert encoded.findings
    assert encoded.findings[0].kind == "malformed"


@pytest.mark.parametrize("depth", [5_000, 200_000])
@pytest.mark.parametrize("row", ["messages", "tools", "arguments", "function_call"])
def test_json_text_that_nests_too_deeply_is_refused(row, depth):
    deep = "[" * depth
    call = {"function": {"name": "count", "arguments": '{"a": ' + deep}}
    values = {
        "messages": {"messages": deep},
        "tools": {"messages": TURNS, "tools": deep},
        "arguments": {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [call]}]},
        "function_call": {"messages": [TURNS[0], {"role": "function_call", "content": deep}]},
    }
    assert {"function_call": "call", "arguments": "malformed tool call"}.get(row, row) in refusal(values[row]).what


def test_the_system_column_opens_the_conversation():
    document = conversation({"conversations": SHARED, "system": "Be brief."})
    assert document.turns == [{"role": "system", "content": "Be brief."}, *TURNS]
    assert (document.weights[0], document.weights[-1]) == (0, 1)
    for nothing in ("", None):
        assert conversation({"conversations": SHARED, "system": nothing}).turns == TURNS


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ("hello", "turn 3 of messages has no role"),
        (None, "turn 3 of messages has no role"),
        ({"content": "a"}, "turn 3 of messages has no role"),
        ({"role": None, "content": "a"}, "turn 3 of messages has no role"),
        ({"role": 3, "content": "a"}, "turn 3 of messages has no role"),
        ({"role": "narrator", "content": "a"}, "turn 3 of messages is by 'narrator', which is not a known role"),
        ({"role": "user"}, "turn 3 of messages has no content"),
        ({"role": "user", "content": None}, "turn 3 of messages has no content"),
        ({"role": "user", "content": 3}, "turn 3 of messages has no content"),
        ({"role": "user", "content": {"text": "a"}}, "turn 3 of messages has no content"),
        ({"from": "human", "content": "a"}, "turn 3 of messages has no value"),
        ({"from": "human", "value": 3}, "turn 3 of messages has no value"),
        ({"role": "user", "content": "a", "train": 3}, "train is 3, neither true nor false"),
        ({"role": "user", "content": "a", "weight": -1}, "weight is -1, which is not a weight"),
    ],
)
def test_malformed_turns_are_refused_by_their_number(turn, what):
    assert refusal({"messages": [*TURNS, turn]}).what == what


@pytest.mark.parametrize(
    "value", [datetime(2024, 1, 1), date(2024, 1, 1), b"bytes", Decimal("0.5"), math.nan, {1: 2}, ("a",)], ids=repr
)
@pytest.mark.parametrize("place", ["row", "turn", "argument", "tool"])
def test_values_that_json_has_not_do_no_harm(tokenizer, value, place):
    """Parquet has dates, bytes and decimals; what nobody reads may be anything, what a template reads is told."""
    turns = [dict(turn) for turn in TURNS]
    values: dict[str, Any] = {"messages": turns}
    if place == "row":
        values["at"] = value
    elif place == "turn":
        turns[0]["at"] = value
    elif place == "argument":
        turns[1]["tool_calls"] = [{"function": {"name": "count", "arguments": {"of": value}}}]
    else:
        values["tools"] = [{"type": "function", "function": {"name": "count", "default": value}}]
    (row,) = rows_of(values)
    (encoded,) = RowEncoder(recipe(template="chatml"), tokenizer, [row]).encode(iter([row]), Findings())
    if place in ("row", "turn"):
        assert encoded.example is not None
        assert not encoded.findings
    elif encoded.findings:
        assert encoded.findings[0].kind == "malformed"
        assert encoded.findings[0].error is not None
        assert encoded.findings[0].error.where == "rows.jsonl: row 1"


def test_turns_of_a_table_have_nulls_for_what_they_lack():
    turns = [turn | {"name": None, "tool_calls": None, "weight": None, "train": None} for turn in TURNS]
    assert conversation({"messages": turns}).turns == TURNS


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "columns", "same_as"),
    [
        ({"body": "a"}, {"text": "body"}, {"text": "a"}),
        ({"q": "a", "a": "b"}, {"prompt": "q", "completion": "a"}, {"prompt": "a", "completion": "b"}),
        ({"completion": "a", "prompt": "b"}, {"prompt": "completion", "completion": "prompt"}, ROWS["completion"]),
        ({"task": "a", "output": "b"}, {"instruction": "task"}, ROWS["instruction"]),
        ({"chat": TURNS}, {"messages": "chat"}, ROWS["messages"]),
        ({"chat": SHARED}, {"conversations": "chat"}, ROWS["messages"]),
        ({"messages": TURNS, "functions": [TOOL]}, {"tools": "functions"}, {"messages": TURNS, "tools": [TOOL]}),
        ({"text": "a", "use": False}, {"train": "use"}, {"text": "a", "train": False}),
        ({"text": "a", "score": 0.25}, {"weight": "score"}, {"text": "a", "weight": 0.25}),
    ],
)
def test_columns_may_have_any_name(values, columns, same_as):
    def meant(document: Document | None) -> Any:
        return document and {name: value for name, value in vars(document).items() if name != "row"}

    assert meant(read(values, "auto", columns)) == meant(read(same_as))
    assert detect_format(rows_of(values), "auto", columns).unused == ()


@pytest.mark.parametrize(("asked", "answered"), [("question", "answer"), ("user", "assistant"), ("input", "output")])
def test_fields_have_other_names_that_are_written_in_canonical_form(asked, answered):
    def resolved(**settings: Any) -> DataRecipe:
        return DataRecipe.model_validate({"train": "rows.jsonl", **settings})

    named = {asked: "Frage", answered: "Antwort"}
    row = {"Frage": "How many?", "Antwort": "Four."}
    for form in ("auto", "completion"):
        columns = resolved(columns=named, format=form).columns
        found = detect_format(rows_of(row), form, columns)
        assert (found.name, found.columns) == ("completion", {"prompt": "Frage", "completion": "Antwort"})
        assert read(row, form, columns) == Completion(rows_of(row)[0], "How many?", "Four.")
        if asked != "input":
            assert columns == found.columns
    more = {"Aufgabe": "Count.", "Frage": "How many?", "Antwort": "Four.", "Rolle": "Be short."}
    if asked == "input":  # of an instruction, which is named, or is a column of the rows
        columns = resolved(columns={**named, "instruction": "Aufgabe"}).columns
        assert conversation(more, "auto", columns).turns[0]["content"] == "Count.\n\nHow many?"
        plain = {"instruction": "Count.", **row}
        assert conversation(plain, "auto", resolved(columns=named).columns).turns[0]["content"] == "Count.\n\nHow many?"
    else:
        for settings in ({"format": "instruction", "columns": named}, {"columns": {**named, "system": "Rolle"}}):
            columns = resolved(**settings).columns
            assert columns["instruction"] == "Frage"
            assert columns["output"] == "Antwort"
            turns = conversation(more, settings.get("format", "auto"), columns).turns
            assert [turn["content"] for turn in turns][-2:] == ["How many?", "Four."]


@pytest.mark.parametrize(
    "turns",
    [
        [{"speaker": "user", "says": "How many?"}, {"speaker": "assistant", "says": "Four."}],
        [{"speaker": turn["role"], "says": turn["content"], "role": "x", "content": "y"} for turn in TURNS],
    ],
)
def test_keys_of_turns_may_have_any_name(turns):
    assert set(FIELDS) >= {"role", "content"}
    columns: dict[str, str | None] = {"role": "speaker", "content": "says"}
    document = conversation({"messages": turns}, "auto", columns)
    assert [(turn["role"], turn["content"]) for turn in document.turns] == [
        ("user", "How many?"),
        ("assistant", "Four."),
    ]


def test_null_says_that_a_column_means_something_else():
    row = ROWS["text"] | {"train": "2024-01-01", "weight": "80 kg"}
    refusal(row)
    document = read(row, "auto", {"train": None, "weight": None})
    assert isinstance(document, Completion)
    assert document.prompt is None
    assert document.weight == 1
    assert detect_format(rows_of(row), "auto", {"train": None, "weight": None}).unused == ("train", "weight")
    both = ROWS["text"] | ROWS["completion"]
    found = detect_format(rows_of(both), "auto", {"text": None})
    assert (found.name, found.unused) == ("completion", ("text",))
    without = conversation(ROWS["instruction"] | {"input": "x"}, "auto", {"input": None})
    assert without.turns[0]["content"] == "a"


def test_null_for_what_a_named_format_needs_is_refused_in_words_that_can_be_understood():
    with pytest.raises(LoraError) as caught:
        read(ROWS["messages"], "chat", {"messages": None})
    assert "None" not in caught.value.what


def test_a_column_that_no_row_has_is_refused_with_what_is_near():
    with pytest.raises(LoraError, match="names quesiton, but the rows have no such column") as caught:
        detect_format(rows_of({"question": "a", "answer": "b"}), "auto", {"prompt": "quesiton", "completion": "answer"})
    assert (caught.value.where, caught.value.fix) == ("rows.jsonl", "did you mean question?")
    with pytest.raises(LoraError) as caught:
        detect_format(rows_of({"question": "a"}), "auto", {"prompt": "zzz"})
    assert caught.value.fix == "their columns: question"


# ── train and weight ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(
    "how", [{"train": False}, {"train": "false"}, {"train": " False "}, {"weight": 0}, {"weight": "0.0"}]
)
def test_rows_that_say_so_are_left_out(shape, how):
    assert read(ROWS[shape] | how) is None
    assert read(ROWS[shape] | how | {"train": False, "weight": 3}) is None


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(
    ("how", "weight"),
    [
        *[({}, 1), ({"train": True}, 1), ({"train": "TRUE"}, 1), ({"train": None, "weight": None}, 1)],
        *[({"train": "", "weight": ""}, 1), ({"weight": 2}, 2), ({"weight": 0.25}, 0.25), ({"weight": "1e-1"}, 0.1)],
        ({"train": True, "weight": 3}, 3),
    ],
)
def test_weights_of_rows(shape, how, weight):
    document = read(ROWS[shape] | how)
    assert document is not None
    weights = document.weights if isinstance(document, Conversation) else [document.weight]
    assert weights[-1] == weight


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("value", [0, 1, "yes", "no", 0.0, [], {}, [False]])
def test_train_is_true_or_false(shape, value):
    error = refusal(ROWS[shape] | {"train": value})
    assert error.what == f"train is {value!r}, neither true nor false"
    assert "data.columns: {train: null}" in str(error.fix)


NO_WEIGHTS = [-1, -1e-9, "-0.5", math.nan, math.inf, -math.inf, "nan", "inf", "heavy", [], {}, [1], 10**400, -(10**400)]


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("value", NO_WEIGHTS, ids=lambda value: repr(value)[:9])
def test_a_weight_is_a_number_from_0_on(shape, value):
    error = refusal(ROWS[shape] | {"weight": value})
    assert f"weight is {value!r}, which is not a weight" == error.what or len(repr(value)) > 60
    assert error.what.endswith("which is not a weight")
    assert len(error.what) < 120
    assert "data.columns: {weight: null}" in str(error.fix)


@pytest.mark.parametrize(
    "values",
    [
        *[ROWS["text"] | {"weight": weight} for weight in (1e300, 1e39, 1e-60)],
        {"messages": [TURNS[0], TURNS[1] | {"weight": 1e30}], "weight": 1e30},
    ],
    ids=["huge", "too large", "too small", "too large together"],
)
def test_a_weight_that_the_loss_cannot_hold_is_refused(tokenizer, values):
    """The loss is weighted in fp32, where such a number is infinite or 0: every loss would be nan, or none trained."""
    (row,) = rows_of(values)
    (encoded,) = RowEncoder(recipe(), tokenizer, [row]).encode(iter([row]), Findings())
    assert encoded.example is None
    assert encoded.findings


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from([None, True, False]), st.sampled_from([None, 0, 0.5, 2])), min_size=1),
    st.sampled_from([None, 0.5, 3]),
)
def test_weights_of_turns_are_times_that_of_their_row(said, of_row):
    turns = [{"role": "assistant", "content": "a", "train": train, "weight": weight} for train, weight in said]
    document = conversation({"messages": turns, "weight": of_row})
    factor = 1 if of_row is None else of_row
    expected = [0 if train is False else factor * (1 if weight is None else weight) for train, weight in said]
    assert document.weights == expected
    assert all(set(turn) == {"role", "content"} for turn in document.turns)


def recipe(**data: Any) -> DataRecipe:
    return DataRecipe.model_validate({"train": "rows.jsonl", **data})


def test_a_column_that_all_rows_need_is_missed_by_row_and_not_by_file(tokenizer):
    rows = rows_of({"text": "a"}, {"other": "b"}, {"text": 3}, {"text": "c", "train": "maybe"})
    findings = Findings()
    encoded = list(RowEncoder(recipe(), tokenizer, rows).encode(iter(rows), findings))
    assert [each.example is not None for each in encoded] == [True, False, False, False]
    assert findings.counts == {"malformed": 3}
    assert [error.where for error in findings.errors["malformed"]] == [f"rows.jsonl: row {row}" for row in (2, 3, 4)]


@pytest.mark.parametrize(
    ("shape", "train_on", "fits"),
    [
        *[("text", "all", True), ("text", "assistant", False), ("text", "completion", False)],
        *[("completion", "completion", True), ("completion", "all", True), ("completion", "assistant", False)],
        *[("instruction", "assistant", True), ("instruction", "completion", True), ("instruction", "all", True)],
        *[("messages", "assistant", True), ("messages", "last_assistant", True), ("messages", "all", True)],
        *[("messages", "completion", False), ("text", "last_assistant", False)],
    ],
)
def test_train_on_has_to_have_a_meaning_for_the_format(tokenizer, shape, train_on, fits):
    rows = rows_of(ROWS[shape])
    if fits:
        RowEncoder(recipe(train_on=train_on), tokenizer, rows)
        return
    with pytest.raises(
        LoraError, match=f"{train_on} has no meaning for the format {NAMES.get(shape, shape)}"
    ) as caught:
        RowEncoder(recipe(train_on=train_on), tokenizer, rows)
    assert caught.value.where == "rows.jsonl"


def test_a_format_can_be_made_by_hand():
    document = Format("text").read(Row("a", 1, {"text": "b"}))
    assert document == Completion(Row("a", 1, {"text": "b"}), None, "b", 1.0)
