"""Turns of a conversation and the tools that it may call, as chat templates want them, however they were written.

Of the keys of turns: which of them a template reads, found by watching it, and which mean something elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.errors import LoraError

if TYPE_CHECKING:
    from lora_cli.data.chat.template import ChatTemplate

Columns = Mapping[str, str | None]  # what a row means → its column; None: not used
_AS_TEXT = "write it as text, in quotes"
_SMALLEST, _LARGEST = 1e-6, 1e6  # weights of the loss that float32 sums well
_SPEAKERS = {  # ShareGPT's names and OpenAI's
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "assistant",
}


class Reader:
    """Reads the turns and tools of one row. notes: kinds of findings of the gate, for what was changed.

    columns: what the recipe says of names. filled: the row comes from a table, where a struct has null for every member
    that only others have; in calls and tools such a null would be trained.
    """

    def __init__(self, columns: Columns, where: str, *, filled: bool = False):
        self._columns, self._where, self._filled = columns, where, filled
        self.notes: set[str] = set()

    def turn(self, message: Any, called: str) -> tuple[dict[str, Any], float]:
        """A turn and the weight of its loss. Raises LoraError for one that cannot be read. called: for messages."""
        message = decoded(message)
        given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        role_key, content_key = self._keys(given)
        role, content = given.pop(role_key, None), given.pop(content_key, None)
        if not isinstance(role, str):
            raise self._error(f"{called} has no {role_key}", "every turn needs one: system, user, assistant")
        speaker = _SPEAKERS.get(role.lower())
        if speaker is None:
            fix = f"use one of {', '.join(_SPEAKERS)}"
            raise self._error(f"{called} is by {role!r}, which is not a known role", fix)
        weight = self._weight(given)
        require_no_other_meaning(given, called, self._where)
        if role.lower() == "function_call":
            given["tool_calls"], content = decoded(content), ""
        calls = self._calls(given, called)
        if speaker == "tool":
            content = self._result(content, called)
        if isinstance(content, list):
            content = self._joined_parts(content, called)
        if content is None and (calls or given.get("reasoning_content")):
            content = ""
        if not isinstance(content, str):
            fix = "every turn needs its text" if content is None else "write it as text, in quotes"
            raise self._error(f"{called} has no {content_key}", fix)
        for key in ("reasoning_content", "reasoning", "thinking"):
            if not isinstance(given.get(key, ""), str):
                raise self._error(f"{key} of {called} is not text", _AS_TEXT)
        rest = {key: value for key, value in given.items() if key not in ("role", "content")}
        turn = {"role": speaker, "content": content, **rest}
        return (turn | {"tool_calls": calls} if calls else turn), weight

    def tools(self, given: Any, older: Any = None) -> list[dict[str, Any]] | None:
        """The functions of a row, as a list or as its JSON text; None if there are none. older: `functions`."""
        if given and older:
            raise self._error("the row has both tools and functions", "remove one of them")
        tools = decoded(self._without_nulls(given or older))
        if not tools:
            return None
        found = []
        for tool in tools if isinstance(tools, list) else [None]:
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                fix = 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}, …]'
                raise self._error("tools is not a list of functions", fix)
            found.append({"type": "function", "function": function} if function is tool else tool)
        return found

    def _keys(self, given: dict[str, Any]) -> tuple[str, str]:
        """The keys of the speaker and of the text: OpenAI's, ShareGPT's, or those that the recipe names."""
        role, content = self._columns.get("role") or "role", self._columns.get("content") or "content"
        mapped = "role" in self._columns or "content" in self._columns
        if not mapped and "from" in given and (role not in given or "value" in given):
            return "from", "value"
        return role, content

    def _weight(self, given: dict[str, Any]) -> float:
        """The weight that train and weight, or the keys that the recipe names for them, give; they are removed."""
        weight = 1.0
        names = [(self._columns.get("train"), self._columns.get("weight")), ("train", "weight")]
        for train, scale in dict.fromkeys(names):
            weight *= said_weight(given, train, scale, self._where, inside=True)
            for key in (train, scale):
                given.pop(key, None)
        return weight

    def _calls(self, given: dict[str, Any], called: str) -> list[dict[str, Any]]:
        """The calls of a turn, removed from it: those of tool_calls, or the one of OpenAI's older function_call."""
        calls, older = (self._without_nulls(decoded(given.pop(key, None))) for key in ("tool_calls", "function_call"))
        if calls and older:
            raise self._error(f"{called} has both tool_calls and function_call", "remove one of them")
        if older is not None and not (self._filled and older == {}):
            calls = older
        return self._with_values(calls, called)

    def _with_values(self, calls: Any, called: str) -> list[dict[str, Any]]:
        """Calls as templates want them: arguments as values, which OpenAI's API gives as text.

        A table has null in the place of arguments that are {}.
        """
        if calls is None:
            return []
        found = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, dict) else None
            own: dict[str, Any] = function if isinstance(function, dict) else {}
            name, arguments = own.get("name"), decoded(own.get("arguments", {} if self._filled else None))
            if not isinstance(name, str) or not isinstance(arguments, dict):
                fix = 'write it as {"function": {"name": "…", "arguments": {…}}}'
                raise self._error(f"{called} has a malformed tool call", fix)
            rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
            own = own if "function" in call else {"name": name}
            found.append({"type": "function", **rest, "function": {**own, "arguments": arguments}})
        return found

    def _result(self, content: Any, called: str) -> Any:
        """The result of a tool as text: an object, a number or a list of them as JSON, as programs hand it on."""
        parts = isinstance(content, list) and bool(content) and all(map(_is_part, content))
        if content is None or parts or isinstance(content, str):
            return content
        try:
            text = json.dumps(self._without_nulls(content), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise self._error(f"the result of {called} cannot be written as JSON", _AS_TEXT) from None
        self.notes.add("result_as_json")
        return text

    def _without_nulls(self, value: Any) -> Any:
        """The value without null members of its objects, if they come from a table."""
        if not self._filled:
            return value
        if isinstance(value, dict):
            kept = {key: self._without_nulls(each) for key, each in value.items() if each is not None}
            if len(kept) < len(value):
                self.notes.add("null_members")
            return kept
        return [self._without_nulls(each) for each in value] if isinstance(value, list) else value

    def _joined_parts(self, parts: list[Any], called: str) -> str:
        """OpenAI's list of parts; this program trains on text alone."""
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
            raise self._error(f"{called} has a part that is not text", "only text can be trained on")
        return "".join(texts)  # type: ignore[arg-type]

    def _error(self, what: str, fix: str) -> LoraError:
        return LoraError(what, where=self._where, fix=fix)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and (isinstance(part.get("type"), str) or set(part) == {"text"})


def decoded(value: Any) -> Any:
    """A value that may have been stored as JSON text, as tables without nested columns do."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
            if "\\ud" in value.lower():  # half of a character is not text
                json.dumps(found, ensure_ascii=False).encode()
            return found
        except (ValueError, RecursionError):
            return value
    return value


def said_weight(
    values: dict[str, Any], train: str | None, weight: str | None, where: str, *, inside: bool = False
) -> float:
    """What `train` and `weight` say: 0 for train: false, else the weight, else 1. inside: of a turn, not of a row."""
    unused = "for a column that means something else, write data.columns: {{{}: null}}"
    unused = "rename a key that means something else" if inside else unused
    flag = None if train is None else values.get(train)
    if isinstance(flag, str):
        flag = {"true": True, "false": False, "": None}.get(flag.strip().lower(), flag)
    if flag is not None and not isinstance(flag, bool):
        fix = f"write true or false; {unused.format('train')}"
        raise LoraError(f"{train} is {flag!r}, neither true nor false", where=where, fix=fix)
    if flag is False:
        return 0.0
    given = None if weight is None else values.get(weight)
    if given is None or given == "":
        return 1.0
    number = _number(given)
    if not (math.isfinite(number) and number >= 0):
        fix = f"write a number from 0 on; {unused.format('weight')}"
        raise LoraError(f"{weight} is {_short(given)}, which is not a weight", where=where, fix=fix)
    return bounded(number, where)


def _number(value: Any) -> float:
    """What a value is as a number; NaN if it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a whole number of thousands of digits
        return "a number"


def bounded(weight: float, where: str) -> float:
    if weight and not _SMALLEST <= weight <= _LARGEST:
        fix = f"write 0, or a number from {_SMALLEST:g} to {_LARGEST:g}"
        raise LoraError(f"a weight of {weight:g} is more than the loss can hold", where=where, fix=fix)
    return weight


# ── keys of turns ────────────────────────────────────────────────────────────────────────────────────────────────

_OURS = ("role", "content", "tool_calls")
_LOOKS = 20  # renderings for a key that no template has read so far: some look only at the last turn, or after a tool
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ABOUT_LOSS = {"loss", "mask", "masked", "train", "trained", "training", "trainable", "learn", "weight", "weights"}


def require_no_other_meaning(given: Mapping[str, Any], called: str, where: str) -> None:
    """Raises LoraError for a key that says elsewhere whether a turn is trained, such as ms-swift's loss: false."""
    for key, value in given.items():
        if not {word.lower() for word in _WORD.findall(key)} & _ABOUT_LOSS:
            continue
        flag = str(value).strip().lower() in ("true", "false")
        if isinstance(value, str) and not flag and math.isnan(_number(value)):
            continue  # text does not say whether a turn is trained
        meaning = "train" if flag else "weight"
        by_hand = f"write train: false on the turns that are not to be trained, and remove {key}"
        mapped = f"write data.columns: {{{meaning}: {key}}} if it says which turns are trained; else {by_hand}"
        fix = by_hand if isinstance(value, list | dict) or "mask" in key.lower() else mapped  # a mask is inverted
        what = f"{called} has the key {key}, which other programs read as whether a turn is trained"
        raise LoraError(f"{what}; it would be ignored", where=where, fix=fix)


class TurnKeys:
    """Keys of the turns of one source. template: what renders them, if anything does."""

    def __init__(self) -> None:
        self.template: ChatTemplate | None = None
        self._unread: Counter[str] = Counter()  # key → how often a rendering did not read it
        self._read: set[str] = set()

    def look(self, turns: list[dict[str, Any]], tools: Any, where: str) -> None:
        """Renders a conversation with keys that are not known to be read, and watches."""
        new = {key for turn in turns if len(turn) > 2 for key in turn} - self._read - {*_OURS}
        if not new or self.template is None or all(self._unread[key] >= _LOOKS for key in new):
            return
        try:
            self.template.render([_Watched(turn, self._read) for turn in turns], where, tools)
        except LoraError:
            return  # the row will be refused
        self._unread.update(new)

    def unread(self) -> list[str]:
        """Keys that the template did not read."""
        return sorted(self._unread.keys() - self._read)


class _Watched(dict[str, Any]):
    """A turn that notes which of its keys are read."""

    def __init__(self, turn: dict[str, Any], read: set[str]):
        super().__init__(turn)
        self._noted = read

    def __or__(self, other: Any) -> Any:
        return _Watched(dict(dict.items(self)) | other, self._noted)


def _noting(name: str) -> Callable[..., Any]:
    """A method of dict that notes the key it is asked for; one that is asked for none goes through all of them."""
    method = getattr(dict, name)

    def noted(turn: _Watched, *args: Any) -> Any:
        turn._noted.update(args[:1] or dict.keys(turn))
        return method(turn, *args)

    return noted


for _name in ("__getitem__", "get", "__contains__", "__iter__", "items", "values"):
    setattr(_Watched, _name, _noting(_name))
