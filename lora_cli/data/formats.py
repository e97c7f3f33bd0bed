"""What a row means: a text, a prompt with its completion, or a conversation, whatever its columns are called."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.data.readers import Row
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
_SMALLEST, _LARGEST = 1e-6, 1e6  # weights of the loss that float32 sums well
_EVERYWHERE = ("train", "weight")
_SPEAKERS = {  # ShareGPT's names and OpenAI's
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "assistant",
}
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
        weight = _weight(row.values, self._column("train"), self._column("weight"), row.where)
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
            raise LoraError(
                f"{self._column(meaning)} is {type(value).__name__}, not text",
                where=row.where,
                fix="write it as text, in quotes",
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
    messages = _decoded(form.value(row, name))
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
        turn, own = _turn(form, message, f"turn {number} of {name}", row.where)
        turns.append(turn)
        weights.append(_bounded(weight * own, row.where))
    return Conversation(row, turns, weights, _tools(form, row), weight)


def _turn(form: Format, message: Any, called: str, where: str) -> tuple[dict[str, Any], float]:
    given: dict[str, Any] = message if isinstance(message, dict) else {}
    given = {key: value for key, value in given.items() if value is not None}
    role_key, content_key = form.columns.get("role") or "role", form.columns.get("content") or "content"
    mapped = "role" in form.columns or "content" in form.columns
    if not mapped and "from" in given and (role_key not in given or "value" in given):  # ShareGPT
        role_key, content_key = "from", "value"
    role, content = given.pop(role_key, None), given.pop(content_key, None)
    if not isinstance(role, str):
        raise LoraError(f"{called} has no {role_key}", where=where, fix="every turn needs one: system, user, assistant")
    speaker = _SPEAKERS.get(role.lower())
    if speaker is None:
        known = ", ".join(_SPEAKERS)
        raise LoraError(f"{called} is by {role!r}, which is no known role", where=where, fix=f"use one of {known}")
    weight = _weight(given, "train", "weight", where)
    for key in ("train", "weight"):
        given.pop(key, None)
    if role.lower() == "function_call":
        given["tool_calls"], content = _decoded(content), ""
    calls = _tool_calls(given.pop("tool_calls", None), called, where)
    if isinstance(content, list):
        content = _joined_parts(content, called, where)
    if content is None and (calls or given.get("reasoning_content")):
        content = ""
    if not isinstance(content, str):
        raise LoraError(f"{called} has no {content_key}", where=where, fix="every turn needs its text")
    if thoughts := [
        key for key in ("reasoning_content", "reasoning", "thinking") if not isinstance(given.get(key, ""), str)
    ]:
        raise LoraError(f"{thoughts[0]} of {called} is not text", where=where, fix="write it as text, in quotes")
    rest = {key: value for key, value in given.items() if key not in ("role", "content")}
    turn = {"role": speaker, "content": content, **rest}
    return (turn | {"tool_calls": calls} if calls else turn), weight


def _joined_parts(parts: list[Any], called: str, where: str) -> str:
    """OpenAI's list of parts; this program trains on text alone."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type", "text") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise LoraError(f"{called} has a part that is not text", where=where, fix="only text can be trained on")
    return "".join(texts)  # type: ignore[arg-type]


def _tool_calls(calls: Any, called: str, where: str) -> list[dict[str, Any]]:
    """Calls as templates want them: arguments as values, which OpenAI's API gives as text."""
    calls = [calls] if isinstance(calls, dict) else calls
    if calls is None:
        return []
    found = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = _decoded(function.get("arguments")) if isinstance(function, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(arguments, dict)
        ):
            fix = '{"function": {"name": "…", "arguments": {…}}}'
            raise LoraError(f"{called} has a malformed tool call", where=where, fix=f"write it as {fix}")
        rest: dict[str, Any] = {
            key: value for key, value in call.items() if key not in ("function", "name", "arguments")
        }
        own = function if "function" in call else {"name": function["name"]}
        found.append({"type": "function"} | rest | {"function": {**own, "arguments": arguments}})
    return found


def _tools(form: Format, row: Row) -> list[dict[str, Any]] | None:
    tools = _decoded(form.optional(row, "tools"))
    if not tools:
        return None
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}, …]'
            raise LoraError("tools is not a list of functions", where=row.where, fix=fix)
    return tools


def _decoded(value: Any) -> Any:
    """A value that may have been stored as JSON text, as tables without nested columns do."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = json.loads(value)
            if "\\ud" in value.lower():  # a half of a character is no text
                json.dumps(decoded, ensure_ascii=False).encode()
            return decoded
        except (ValueError, RecursionError):
            return value
    return value


def _weight(values: dict[str, Any], train: str | None, weight: str | None, where: str) -> float:
    """What `train` and `weight` say: 0 for train: false, else the weight, else 1."""
    flag = values.get(train) if train is not None else None
    if isinstance(flag, str):
        flag = {"true": True, "false": False, "": None}.get(flag.strip().lower(), flag)
    if flag is not None and not isinstance(flag, bool):
        fix = "write true or false; for a column that means something else, write data.columns: {train: null}"
        raise LoraError(f"{train} is {flag!r}, neither true nor false", where=where, fix=fix)
    if flag is False:
        return 0.0
    number = values.get(weight) if weight is not None else None
    if number is None or number == "":
        return 1.0
    try:
        number = float(number)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        fix = "write a number from 0 on; for a column that means something else, write data.columns: {weight: null}"
        shown = _short(values[weight])  # type: ignore[index]
        raise LoraError(f"{weight} is {shown}, which is no weight", where=where, fix=fix)
    return _bounded(number, where)


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a whole number of thousands of digits
        return "a number"


def _bounded(weight: float, where: str) -> float:
    if weight and not _SMALLEST <= weight <= _LARGEST:
        fix = f"write 0, or a number from {_SMALLEST:g} to {_LARGEST:g}"
        raise LoraError(f"a weight of {weight:g} is more than the loss can hold", where=where, fix=fix)
    return weight


_READ: dict[str, Callable[[Format, Row, float], Document]] = {
    "text": _text,
    "completion": _completion,
    "instruction": _instruction,
    "chat": _chat,
}
