"""What a row means: a text, a prompt with its completion, or a conversation, whatever its columns are called."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.data.readers import Row
from lora_cli.data.tables import Unreadable
from lora_cli.data.turns import bounded, decoded, read_tools, read_turn, said_weight
from lora_cli.errors import LoraError


@dataclass(frozen=True)
class Text:
    row: Row
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Completion:
    row: Row
    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """turns: as a chat template wants them. weights: of the loss on each. weight: the row's. tools: JSON schemas."""

    row: Row
    turns: list[dict[str, Any]]
    weights: list[float]
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0


Document = Text | Completion | Conversation

NEEDED = {
    "chat": (("messages",), ("conversations",)),
    "instruction": (("instruction", "output"),),
    "completion": (("prompt", "completion"),),
    "text": (("text",),),
}
_OPTIONAL = {"chat": ("tools", "system"), "instruction": ("input", "system", "history"), "completion": (), "text": ()}
_EVERYWHERE = ("train", "weight")
_USUAL = {  # columns of well-known data sets → what they mean here
    **dict.fromkeys(("question", "query", "source"), "prompt"),
    **dict.fromkeys(("answer", "response", "target", "chosen"), "completion"),
    **dict.fromkeys(("dialog", "dialogue", "conversation"), "messages"),
    **dict.fromkeys(("content", "document", "article"), "text"),
    "context": "input",
}


@dataclass(frozen=True)
class Format:
    """How rows of one source are read. unused: columns that nothing reads. reason: why this format was taken."""

    name: str
    columns: dict[str, str | None] = field(default_factory=dict)
    reason: str = "named in the recipe"
    unused: tuple[str, ...] = ()

    def read(self, row: Row) -> Document | None:
        """The document of a row; None if it says `train: false`. Raises LoraError for a malformed one, naming it."""
        weight = said_weight(row.values, self._column("train"), self._column("weight"), row.where)
        if weight == 0:
            return None
        return _READ[self.name](self, row, weight)

    def _column(self, meaning: str) -> str | None:
        return self.columns.get(meaning, meaning)

    def value(self, row: Row, meaning: str) -> Any:
        column = self._column(meaning)
        value = None if column is None else row.values.get(column)
        if value is None:
            present = ", ".join(name for name, value in row.values.items() if value is not None)
            raise LoraError(
                f"the row has no {column}",
                where=row.where,
                fix=f"add it, or remove the row; its columns: {present or 'none'}",
            )
        return value

    def text(self, row: Row, meaning: str) -> str:
        value = self.value(row, meaning)
        if not isinstance(value, str):
            kind = value.why if isinstance(value, Unreadable) else type(value).__name__
            raise LoraError(
                f"{self._column(meaning)} is {kind}, not text",
                where=row.where,
                fix="write it as text: in JSON in quotes, in a table as a column of strings",
            )
        return value

    def optional(self, row: Row, meaning: str) -> Any:
        column = self._column(meaning)
        return None if column is None else row.values.get(column)


def detect_format(rows: Sequence[Row], wanted: str = "auto", columns: dict[str, str | None] | None = None) -> Format:
    """The format of rows, by their columns. Raises LoraError if none or more than one fits."""
    columns = columns or {}
    present = {name for row in rows for name in row.values}
    inside = ("role", "content")  # of turns, not of rows
    named = [column for meaning, column in columns.items() if column is not None and meaning not in inside]
    if missing := [column for column in named if column not in present]:
        near = difflib.get_close_matches(missing[0], sorted(present), n=1)
        raise LoraError(
            f"data.columns names {missing[0]}, but the rows have no such column",
            where=rows[0].file,
            fix=f"did you mean {near[0]}?" if near else f"their columns: {', '.join(sorted(present))}",
        )
    has = {
        meaning
        for alternatives in NEEDED.values()
        for needed in alternatives
        for meaning in needed
        if columns.get(meaning, meaning) in present
    }
    fitting = {
        name: needed
        for name, alternatives in NEEDED.items()
        for needed in reversed(alternatives)  # the first that fits is taken
        if has.issuperset(needed)
    }
    name = wanted if wanted != "auto" else next(iter(fitting)) if len(fitting) == 1 else None
    if name is None:
        raise _no_format(rows, present, list(fitting))
    taken = fitting.get(name, NEEDED[name][0])
    if unnamed := [meaning for meaning in taken if columns.get(meaning, meaning) is None]:
        raise LoraError(
            f"data.columns says that no column is {unnamed[0]}, but the format {name} needs one",
            where=rows[0].file,
            fix=f"name its column, or choose another data.format than {name}",
        )
    known = {columns.get(meaning, meaning) for meaning in (*taken, *_OPTIONAL[name], *_EVERYWHERE)}
    shown = " and ".join(str(columns.get(meaning, meaning)) for meaning in taken)
    reason = f"the rows have {shown}" if wanted == "auto" else "named in the recipe"
    return Format(name, columns, reason, tuple(sorted(present - known)))


def _no_format(rows: Sequence[Row], present: set[str], fitting: list[str]) -> LoraError:
    known = "; ".join(f"{name}: {' or '.join(', '.join(needed) for needed in NEEDED[name])}" for name in NEEDED)
    usual = {_USUAL[column]: column for column in sorted(present) if column in _USUAL}
    mapped = ", ".join(f"{meaning}: {column}" for meaning, column in usual.items())
    fix = f"write data.columns: {{{mapped}}}" if mapped else "rename the columns, or say what they mean in data.columns"
    how_many = "more than one format" if fitting else "no format"
    return LoraError(
        f"the columns {', '.join(sorted(present)) or '(none)'} fit {how_many}",
        where=rows[0].where,
        details=[f"formats and their columns: {known}"],
        fix=f"write data.format: {fitting[0]}, or remove a column" if fitting else fix,
    )


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(form: Format, row: Row, weight: float) -> Document:
    return Text(row, form.text(row, "text"), weight)


def _completion(form: Format, row: Row, weight: float) -> Document:
    return Completion(row, form.text(row, "prompt"), form.text(row, "completion"), weight)


def _instruction(form: Format, row: Row, weight: float) -> Document:
    """Alpaca's columns as a conversation: an input follows its instruction after an empty line."""
    turns: list[dict[str, Any]] = []
    weights: list[float] = []

    def say(role: str, content: str, weight: float) -> None:
        turns.append({"role": role, "content": content})
        weights.append(weight)

    if system := form.optional(row, "system"):
        say("system", form.text(row, "system") if system else "", 0.0)
    history = form.optional(row, "history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in history
    ):
        raise LoraError(
            "history is not a list of pairs", where=row.where, fix='write [["instruction", "output"], …], oldest first'
        )
    for asked, answered in history:
        say("user", asked, 0.0)
        say("assistant", answered, weight)
    instruction, more = form.text(row, "instruction"), form.optional(row, "input")
    if more is not None:
        more = form.text(row, "input")
    say("user", f"{instruction}\n\n{more}" if more else instruction, 0.0)
    say("assistant", form.text(row, "output"), weight)
    return Conversation(row, turns, weights, weight=weight)


def _chat(form: Format, row: Row, weight: float) -> Document:
    name = "messages" if form.optional(row, "messages") is not None else "conversations"
    if form.optional(row, name) is None:
        name = "messages"
    messages = decoded(form.value(row, name))
    if not isinstance(messages, list) or not messages:
        raise LoraError(
            f"{name} is not a list of turns", where=row.where, fix='write [{"role": "user", "content": "…"}, …]'
        )
    turns: list[dict[str, Any]] = []
    weights: list[float] = []
    if (system := form.optional(row, "system")) not in (None, ""):
        turns.append({"role": "system", "content": form.text(row, "system") if system else ""})
        weights.append(0.0)
    for number, message in enumerate(messages, 1):
        turn, own = read_turn(form.columns, message, f"turn {number} of {name}", row.where)
        turns.append(turn)
        weights.append(bounded(weight * own, row.where))
    return Conversation(row, turns, weights, read_tools(form.optional(row, "tools"), row.where), weight)


_READ: dict[str, Callable[[Format, Row, float], Document]] = {
    "text": _text,
    "completion": _completion,
    "instruction": _instruction,
    "chat": _chat,
}
