"""The result of encoding a row, and the problems found in it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_cli.data.chat import ChatTemplate
from lora_cli.data.example import Example
from lora_cli.data.formats import Conversation, Document
from lora_cli.data.readers import Row
from lora_cli.errors import LoraError


@dataclass(frozen=True)
class Finding:
    """A problem of a row, or a note about it. kind: one of those in gate.py. error: the same, for a person."""

    kind: str
    error: LoraError | None = None


@dataclass(frozen=True)
class Encoded:
    """The result of encoding a row: an example, a finding that rejects it, or both, where the recipe can allow it."""

    row: Row
    example: Example | None
    finding: Finding | None = None
    notes: tuple[str, ...] = ()
    proved: bool = False  # the bytes of its tokens are those of its text
    also: tuple[Finding, ...] = ()  # further ones, since a recipe may allow the first and not these

    @property
    def findings(self) -> tuple[Finding, ...]:
        return () if self.finding is None else (self.finding, *self.also)


def unstopped(document: Conversation, template: ChatTemplate | None, turn: int, token: str | None = None) -> Finding:
    name = template.name if template is not None else ""
    how = "without a special token" if token is None else f"in {token!r}, which is not a special token of the tokenizer"
    error = LoraError(
        f"the chat template ({name}) ends turn {turn + 1} {how}: the model would not learn to stop",
        where=document.row.where,
        fix="use a model whose template ends turns with a stop token, or data.template: alpaca or plain, which end "
        "them with the model's end token",
    )
    return Finding("no_stop_token", error)


def special_in_text(document: Conversation, template: ChatTemplate) -> Finding | None:
    found = template.special_in_text(document.turns, document.tools)
    if found is None:
        return None
    turn, token = found
    error = LoraError(
        f"{f'turn {turn} holds' if turn else 'the tools hold'} {token!r}, which the tokenizer reads as a special token",
        where=document.row.where,
        fix="remove or rewrite it",
    )
    return Finding("special_in_text", error)


def refused(document: Document, kind: str, what: str, fix: str) -> Encoded:
    return Encoded(document.row, None, Finding(kind, LoraError(what, where=document.row.where, fix=fix)))


def nothing_trained(document: Document) -> Encoded:
    return refused(
        document,
        "no_target",
        "no target tokens: nothing in this row would be trained",
        "give it a completion, an assistant turn or some text, or remove the row",
    )
