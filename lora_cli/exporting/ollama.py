"""A Modelfile: how Ollama prompts a model, with the template that it was trained with in Ollama's own language.

Ollama has Go templates. A chat template of Hugging Face that writes the same text around every turn of a role is
measured by rendering it, written as a Go template, and compared with the original on conversations; others are left
out, and Ollama then looks for a template it knows that resembles the file's (server/model.go, detectChatTemplate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from lora_cli.data.chat.template import ChatTemplate
from lora_cli.errors import LoraError, refuse_if

Turn = dict[str, str]
_TEXTS = ("How many rows?", "Zwei Zeilen:\n\n  `a < b` & {{ c }} <|x|>", "日本語 🙂 1234", "x")
_WORDS = {"system": "⟦the system⟧", "user": "⟦a question⟧", "assistant": "⟦an answer⟧"}


@dataclass(frozen=True)
class Around:
    """What a chat template writes: at the start if no system turn comes first, before and after the content of each
    role, and at the end for the model to go on from."""

    start: str
    before: dict[str, str]
    after: dict[str, str]
    end: str

    def render(self, turns: Sequence[Turn]) -> str:
        start = "" if turns[0]["role"] == "system" else self.start
        told = (self.before[each["role"]] + each["content"] + self.after[each["role"]] for each in turns)
        return start + "".join(told) + self.end

    def in_go(self) -> str:
        def of(role: str) -> str:
            return f'eq .Role "{role}" }}}}{_in_go(self.before[role])}{{{{ .Content }}}}{_in_go(self.after[role])}'

        start = _in_go(self.start)
        first = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{start}{{{{ end }}}}' if start else ""
        roles = f"{{{{ if {of('system')}{{{{ else if {of('user')}{{{{ else if {of('assistant')}{{{{ end }}}}"
        return f"{first}{{{{ range .Messages }}}}{roles}{{{{ end }}}}{_in_go(self.end)}"


def _in_go(text: str) -> str:
    """As a Go template and a Modelfile both read it: marks of theirs, and what Ollama's parser drops, as Go strings."""
    return "".join(f'{{{{ "\\U{ord(each):08x}" }}}}' if each in '{"' or _is_dropped(each) else each for each in text)


def _is_dropped(character: str) -> bool:
    """parser/parser.go keeps spaces, tabs, line ends, and what strconv.IsPrint takes: what Python prints."""
    return not character.isprintable() and character not in "\t\r\n"


def require_stops(stops: Sequence[str]) -> None:
    """Raises LoraError for a stop token that a Modelfile cannot hold, as nothing is escaped in its values."""
    for stop in stops:
        refuse_if(
            '"""' in stop or any(map(_is_dropped, stop)),
            f"a Modelfile of Ollama cannot hold the stop token {stop!a}",
            fix="use --to gguf, and give the token where the file is used",
        )


def around(template: ChatTemplate, bos: str) -> Around | None:
    """The texts around turns, if the template is that regular: measured on one conversation, compared on others.

    bos: what the program that reads the file writes by itself at the start; "" if nothing.
    """
    system, user, answer = ({"role": role, "content": word} for role, word in _WORDS.items())
    try:
        longest = _rendered(template, [system, user, answer, user], bos)
        alone = _rendered(template, [user], bos)
        pieces = _between(longest, [system, user, answer, user])
        first, end = _between(alone, [user])
        if len(pieces) != 5 or pieces[4] != end:
            return None
        ask = _common_end(pieces[1], pieces[3], first)
        before = {"system": pieces[0], "user": ask, "assistant": pieces[2]}
        after = {"system": pieces[1].removesuffix(ask), "user": "", "assistant": pieces[3].removesuffix(ask)}
        found = Around(first.removesuffix(ask), before, after, end)
        same = all(_rendered(template, turns, bos) == found.render(turns) for turns in _conversations())
    except (LoraError, ValueError):  # it refuses a conversation, or changes what is in it
        return None
    return found if same else None


def modelfile(file: str, template: Around | None, *, raw: bool, stops: Sequence[str]) -> str:
    """The text of a Modelfile. raw: the model was trained without a template and is prompted as the text is."""
    lines = [f"FROM ./{file}"]
    if raw:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif template is not None:
        lines += [
            "# The chat template that the model was trained with, compared with the original on conversations.",
            "# Tools and spaces around a message are not handled as the original does.",
            f'TEMPLATE """{template.in_go()}"""',
        ]
    for stop in stops:
        quote = '"""' if '"' in stop or "\n" in stop else '"'  # nothing is escaped between them (parser/parser.go)
        lines.append(f"PARAMETER stop {quote}{stop}{quote}")
    return "\n".join(lines) + "\n"


def _conversations() -> list[list[Turn]]:
    found: list[list[Turn]] = []
    for at in range(len(_TEXTS)):
        words = [_TEXTS[(at + step) % len(_TEXTS)] for step in range(6)]
        roles = ("system", "user", "assistant", "user", "assistant", "user")
        turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        found += [turns, turns[:4], turns[:2], turns[1:], turns[1:2]]
    return found


def _rendered(template: ChatTemplate, turns: list[Turn], bos: str) -> str:
    return template.render(turns, "a conversation", generation_prompt=True).removeprefix(bos)


def _between(text: str, turns: Sequence[Turn]) -> list[str]:
    pieces = []
    for turn in turns:
        before, found, text = text.partition(turn["content"])
        if not found:
            raise ValueError("a turn is not written as it is")
        pieces.append(before)
    return [*pieces, text]


def _common_end(*texts: str) -> str:
    same = takewhile(lambda each: len(set(each)) == 1, zip(*(text[::-1] for text in texts), strict=False))
    return "".join(each[0] for each in same)[::-1]
