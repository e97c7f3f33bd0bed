"""Columns: what each format needs and may read, and what columns of other programs are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data.files.readers import Row
from lora_cli.data.turns import Columns, decoded
from lora_cli.errors import LoraError

NEEDED = {
    "chat": (("messages",), ("conversations",)),
    "instruction": (("instruction", "output"),),
    "completion": (("prompt", "completion"),),
    "text": (("text",),),
}
OPTIONAL = {"chat": ("tools", "functions", "system"), "instruction": ("input", "system", "history")}
EVERYWHERE = ("train", "weight")
OF_TURNS = ("role", "content")  # keys of turns, not columns
PREFERENCE = (  # what preference data call their answers
    *("chosen", "rejected", "chosen_response", "rejected_response"),
    *("chosen_messages", "rejected_messages", "rejected_completion", "rejected_answer", "rejected_output"),
)
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
_MARK = re.compile(r"<\|?(?:image|img|video|audio)(?:_pad|_\d+)?\|?/?>")
_ASKED = ("instruction", "prompt", "question", "query", "problem", "source", "user", "human", "q")
_ANSWERS = ("output", "completion", "answer", "response", "target", "solution", "assistant", "reply", "chosen", "a")
_TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_TEXTS = ("text", "content", "document", "article", "body")
_TITLES = ("title", "subject", "headline")  # beside a text they may be what is asked, or a part of it


def column_of(columns: Columns, meaning: str) -> str | None:
    """The column of a meaning: the one that is named for it, else its own name unless that means something else."""
    if meaning in columns:
        return columns[meaning]
    return None if meaning in columns.values() else meaning


def canonical(columns: Columns, rows: Sequence[Row], wanted: str) -> Columns:
    """The recipe's columns with input and output as prompt and completion, unless these rows have instructions."""
    pair = {"input": "prompt", "output": "completion"}
    named = not columns.keys().isdisjoint(("system", "history"))
    instruction = named or column_of(columns, "instruction") in {name for row in rows for name in row.values}
    if wanted == "instruction" or (wanted == "auto" and instruction) or not all(map(columns.get, pair)):
        return columns
    if not columns.keys().isdisjoint(pair.values()):
        return columns
    return {pair.get(name, name): column for name, column in columns.items()}


def read_by(name: str, taken: Sequence[str]) -> set[str]:
    """All that a format reads of a row. taken: which of its alternatives."""
    return {*taken, *OPTIONAL.get(name, ()), *EVERYWHERE, *(OF_TURNS if name == "chat" else ())}


def is_turns(value: Any) -> bool:
    """Whether this is a list of turns, or its JSON text."""
    value = decoded(value)
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in turns)


def first_value(rows: Sequence[Row], column: str | None) -> Any:
    """The first value of a column that is not empty; None if there is none, or no column."""
    return next((row.values[column] for row in rows if column is not None and row.values.get(column)), None)


def turn_keys(rows: Sequence[Row]) -> set[str]:
    """Keys of the objects in all lists of these rows."""
    lists = [each for row in rows for value in row.values.values() if isinstance(each := decoded(value), list)]
    return {key for turns in lists for turn in turns if isinstance(turn, dict) for key in turn}


def applicable(columns: Columns, rows: Sequence[Row]) -> dict[str, str | None]:
    """Those of the recipe's columns that these rows have."""
    present = {name for row in rows for name in row.values}
    said_of_turns = {*OF_TURNS, *EVERYWHERE}
    inside = turn_keys(rows) if said_of_turns & columns.keys() else set()

    def is_there(meaning: str, column: str) -> bool:
        return (meaning not in OF_TURNS and column in present) or (meaning in said_of_turns and column in inside)

    return {meaning: column for meaning, column in columns.items() if column is None or is_there(meaning, column)}


# ── columns of other programs ───────────────────────────────────────────────────────────────────────────────────


def guess(rows: Sequence[Row]) -> tuple[str, Columns] | None:
    """A format and where its columns are, by the names that well-known data sets use; None if nothing is known.

    Names are compared without case. The answer that preference data call chosen can be trained; the rejected one not.
    """
    present = dict.fromkeys(name for row in rows for name in row.values)
    known = {name.strip().lower(): name for name in reversed(present)}

    def called(names: Sequence[str]) -> str | None:
        return next((known[name] for name in names if name in known), None)

    asked, answer, more, turns = called(_ASKED), called(_ANSWERS), called(("input", "context")), called(_TURNS)
    chosen = called(("chosen",))
    found: Mapping[str, str | None]
    if turns is not None:
        name, found = "chat", {"conversations" if turns == "conversations" else "messages": turns}
    elif is_turns(first_value(rows, chosen)):
        pair = is_turns(first_value(rows, asked))
        name, found = "chat", {"prompt": asked, "completion": chosen} if pair else {"messages": chosen}
    elif asked and answer and (more or asked.lower() == "instruction"):
        # without its input, a question could not be answered
        name, found = "instruction", {"instruction": asked, "output": answer} | ({"input": more} if more else {})
    elif answer and (asked or "input" in known):
        name, found = "completion", {"prompt": asked or known["input"], "completion": answer}
    elif (text := called(_TEXTS) or chosen) and not called(_TITLES):
        name, found = "text", {"text": text}
    else:
        return None
    return name, {meaning: column for meaning, column in found.items() if column != meaning}


# ── columns that change what a row means ────────────────────────────────────────────────────────────────────────


def require_trainable(row: Row, name: str, columns: Columns) -> None:
    """Raises LoraError for a row with pictures or sound, and for an answer that is marked as a bad one."""
    named = {column for column in columns.values() if column is not None}
    for column in row.values.keys() - named:
        value = row.values[column]
        if column.lower() in _MEDIA and value not in (None, "", [], {}):
            others = {each: text for each, text in row.values.items() if each != column}
            mark = _MARK.search(repr(others))
            if mark is None and not isinstance(value, list | dict | bytes):
                continue  # a number or a name that nothing refers to
            meant = f" ({mark[0]} in its text)" if mark else ""
            what = f"the row has {column}{meant}, but only text can be trained"
            fix = f"remove the rows with {column}, or that column and what the text says of it"
            raise LoraError(what, where=row.where, fix=fix)
        if column == "label" and name in ("completion", "chat") and str(value).strip().lower() == "false":
            what = "label is false, which marks an answer that is not to be learned; preference data are not supported"
            only = "write data.columns: {train: label} to train the good answers alone"
            raise LoraError(what, where=row.where, fix=f"{only}; rename a column that means something else")
