"""Turns of a conversation and the tools that it may call, as chat templates want them, however they were written."""

from __future__ import annotations

import json
import math
from typing import Any

from lora_cli.errors import LoraError

_SMALLEST, _LARGEST = 1e-6, 1e6  # weights of the loss that float32 sums well
_SPEAKERS = {  # ShareGPT's names and OpenAI's
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "assistant",
}


def read_turn(columns: dict[str, str | None], message: Any, called: str, where: str) -> tuple[dict[str, Any], float]:
    given: dict[str, Any] = message if isinstance(message, dict) else {}
    given = {key: value for key, value in given.items() if value is not None}
    role_key, content_key = columns.get("role") or "role", columns.get("content") or "content"
    mapped = "role" in columns or "content" in columns
    if not mapped and "from" in given and (role_key not in given or "value" in given):  # ShareGPT
        role_key, content_key = "from", "value"
    role, content = given.pop(role_key, None), given.pop(content_key, None)
    if not isinstance(role, str):
        raise LoraError(f"{called} has no {role_key}", where=where, fix="every turn needs one: system, user, assistant")
    speaker = _SPEAKERS.get(role.lower())
    if speaker is None:
        known = ", ".join(_SPEAKERS)
        raise LoraError(f"{called} is by {role!r}, which is no known role", where=where, fix=f"use one of {known}")
    weight = said_weight(given, "train", "weight", where)
    for key in ("train", "weight"):
        given.pop(key, None)
    if role.lower() == "function_call":
        given["tool_calls"], content = decoded(content), ""
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
        arguments = decoded(function.get("arguments")) if isinstance(function, dict) else None
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


def read_tools(given: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions of a row, as a list or as its JSON text; None if there are none."""
    tools = decoded(given)
    if not tools:
        return None
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}, …]'
            raise LoraError("tools is not a list of functions", where=where, fix=fix)
    return tools


def decoded(value: Any) -> Any:
    """A value that may have been stored as JSON text, as tables without nested columns do."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
            if "\\ud" in value.lower():  # a half of a character is no text
                json.dumps(found, ensure_ascii=False).encode()
            return found
        except (ValueError, RecursionError):
            return value
    return value


def said_weight(values: dict[str, Any], train: str | None, weight: str | None, where: str) -> float:
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
    return bounded(number, where)


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
