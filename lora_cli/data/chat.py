"""Conversations through a chat template, and where in the result each assistant turn stands.

Found by rendering, never by looking for strings: the conversation is rendered a second time with a mark before and
after what each turn says. Without the marks both renderings must be the same, so they show where the template put each
turn, and that it left none out. Where marks disturb a template (it looks into the content), the conversation is
rendered up to the turn, with the generation prompt, and up to its end; each must be the beginning of the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.jinja import BoundedTemplate
from lora_cli.errors import LoraError
from lora_cli.files import require_regular
from lora_cli.limits import LimitReached
from lora_cli.recipe import TEMPLATES

Turns = list[dict[str, Any]]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what templates call thoughts beside the content


@dataclass(frozen=True)
class Span:
    """What one turn adds to the rendered text, in characters; its stop token included. turn: counted from 0."""

    start: int
    end: int
    turn: int
    prompted: bool = True  # right before it stands what the template prompts a generation with
    stopped: bool = True  # it ends in a special token


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. spans: the assistant turns that were asked for."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """A chat template and the special tokens that it may write.

    name: for messages. Raises LoraError for a template that is not valid Jinja.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, name: str):
        self.text, self.name = text, name
        tokens = tokenizer.special_tokens_map
        self._variables = {key: value for key, value in tokens.items() if isinstance(value, str)}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        either = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        either = f"(?:{either})" if special else "(?!)"
        self._special = re.compile(either)
        self._stop = re.compile(rf"\s*{either}")
        self._stops_at_end = re.compile(rf"{either}(?:\s*{either})*\s*\Z")
        self._compiled = BoundedTemplate(text, name)

    def render(self, turns: Turns, where: str, tools: Any = None, *, generation_prompt: bool = False) -> str:
        """The conversation as text. Raises LoraError if the template refuses it."""
        variables = {"tools": tools, "documents": None, "add_generation_prompt": generation_prompt, **self._variables}
        try:
            try:
                return self._compiled.render(messages=turns, **variables)
            except TypeError:  # some templates want the arguments of calls as JSON text
                return self._compiled.render(messages=_with_text_arguments(turns), **variables)
        except LimitReached as error:
            raise LimitReached(error.what, where=where, fix=error.fix) from None
        except Exception as error:  # jinja2 errors, and whatever a template raises
            raise LoraError(
                f"the chat template ({self.name}) refuses this conversation: {error}",
                where=where,
                fix="check the roles and their order (many templates want user and assistant in turn)",
            ) from None

    def render_whole(self, turns: Turns, where: str, tools: Any = None) -> str:
        """The conversation as text, in which all that was said to the assistant stands.

        Raises LoraError if the template leaves out a turn or the tools.
        """
        whole = self.render(turns, where, tools)
        self._places(turns, whole, where, tools)
        return whole

    def render_with_spans(self, turns: Turns, wanted: Sequence[int], where: str, tools: Any = None) -> Rendered:
        """The conversation and the spans of the wanted turns, which are the assistant's.

        Raises LoraError where the template does not show a turn as it is.
        """
        whole = self.render(turns, where, tools)
        places = self._places(turns, whole, where, tools)
        found = None if places is None else self._by_marks(turns, whole, places, wanted, where, tools)
        if found is None:
            found = self._by_prefixes(turns, wanted, whole, where, tools)
        return Rendered(whole, [self._whole_turn(whole, turns, found[turn], len(wanted), where) for turn in wanted])

    def special_in_text(self, turns: Turns, tools: Any = None) -> tuple[int, str] | None:
        """The first turn (counted from 1; 0 is the tools) whose text holds a special token, and that token."""
        for number, turn in enumerate(turns, 1):
            text = turn["content"] if len(turn) == 2 else json.dumps(turn, ensure_ascii=False, default=str)
            if found := self._special.search(text):
                return number, found[0]
        found = self._special.search(json.dumps(tools, ensure_ascii=False, default=str)) if tools else None
        return (0, found[0]) if found else None

    @cached_property
    def stop_token(self) -> str | None:
        """What the template ends an assistant turn with; None if that is no special token."""
        turns: Turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
        try:
            text = self.render(turns, self.name)
        except LoraError:
            return None
        stop = self._stop.match(text, text.rfind("Yes.") + len("Yes."))
        return stop[0].lstrip() if stop is not None else None

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds to prompt a generation; empty if it adds nothing."""
        probe: Turns = [{"role": "user", "content": "Hello."}]
        try:
            without, prompted = (self.render(probe, self.name, generation_prompt=on) for on in (False, True))
        except LoraError:
            return ""
        return prompted[len(without) :] if prompted.startswith(without) else ""

    def _places(self, turns: Turns, whole: str, where: str, tools: Any) -> dict[int, tuple[int | None, int]] | None:
        """Where in the text the content of each turn begins and ends; None if marks disturb the template.

        The beginning is None where the template drops the start of a content (as some do with thinking).
        Raises LoraError if it leaves out a turn that is not the assistant's, or the tools.
        """
        if tools and self.render(turns, where) == whole:
            raise LoraError(
                f"the chat template ({self.name}) leaves out the tools",
                where=where,
                fix="use a template that takes tools, such as data.template: chatml",
            )
        spoken = [at for at, turn in enumerate(turns) if turn["content"].strip()]
        first = next((each for each in _PRIVATE if not each.search(whole)), None)
        places = None
        if first is not None and 2 * len(turns) < _MOST_MARKS:
            base = ord(first.pattern[1])
            marked = [
                turn | {"content": _marked(turn["content"], base + 2 * at)} if at in spoken else turn
                for at, turn in enumerate(turns)
            ]
            try:
                text = self.render(marked, where, tools)
            except LoraError:
                text = ""
            if first.sub("", text) == whole:
                marks = {
                    ord(found[0]) - base: found.start() - number for number, found in enumerate(first.finditer(text))
                }
                places = {at: (marks.get(2 * at), marks[2 * at + 1]) for at in spoken if 2 * at + 1 in marks}
        for at in spoken:
            shown = _says(whole, turns[at]["content"]) if places is None else at in places
            if turns[at]["role"] != "assistant" and not shown:
                raise LoraError(
                    f"the chat template ({self.name}) leaves out turn {at + 1}, by {turns[at]['role']}",
                    where=where,
                    fix="use a template that takes such turns, or remove the turn",
                )
        return places

    def _by_marks(
        self,
        turns: Turns,
        whole: str,
        places: dict[int, tuple[int | None, int]],
        wanted: Sequence[int],
        where: str,
        tools: Any,
    ) -> dict[int, Span] | None:
        """Spans of the wanted turns, without stop tokens; None where their contents do not show them."""
        if any("tool_calls" in turns[turn] or turn not in places for turn in wanted):
            return None
        ends = sorted(end for _, end in places.values())
        prompt = self.generation_prompt
        spans = {}
        for turn in wanted:
            start, end = places[turn]
            begin = end if start is None else start
            after = max((each for each in ends if each < (begin if start is not None else end)), default=0)
            prompted = bool(prompt) and start is not None and whole.endswith(prompt, after, begin)
            if not prompted:
                # What stands between the prompt and the content is the model's to say, white space before it too.
                behind = whole.rfind(prompt, after, begin) if prompt else -1
                prompted = behind >= 0 or not prompt
                if behind >= 0:
                    begin = behind + len(prompt)
                else:
                    before = self._prompt_of(turns, turn, where, tools) if not prompt else None
                    fits = before is not None and after <= len(before) <= begin and whole.startswith(before)
                    begin = len(before) if fits and before is not None else after + len(whole[after:begin].rstrip())
            if not _says(whole[begin:end], turns[turn]["content"]):
                return None
            spans[turn] = Span(begin, end, turn, prompted)
        return spans

    def _prompt_of(self, turns: Turns, turn: int, where: str, tools: Any) -> str | None:
        """What comes before a turn; None if the template refuses to stop there."""
        try:
            return self.render(turns[:turn], where, tools, generation_prompt=True) if turn else None
        except LoraError:
            return None

    def _by_prefixes(self, turns: Turns, wanted: Sequence[int], whole: str, where: str, tools: Any) -> dict[int, Span]:
        spans = {}
        for turn in wanted:
            upto = self.render(turns[: turn + 1], where, tools)
            if turn:
                before = self.render(turns[:turn], where, tools, generation_prompt=True)
            else:  # nothing was said before; what the template writes on its own ends with the prompt
                header, prompt, _ = upto.partition(self.generation_prompt or "\0")
                before = header + prompt if prompt else "\0"
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise LoraError(
                    f"turn {turn + 1} cannot be told apart: the template renders it differently in a longer "
                    "conversation",
                    where=where,
                    fix=f"{'write data.train_on: last_assistant, or ' if len(wanted) > 1 else ''}give each assistant "
                    "turn a row of its own, with the turns before it; or use another template",
                )
            spans[turn] = Span(len(before), len(upto.rstrip()), turn)
        return spans

    def _whole_turn(self, whole: str, turns: Turns, span: Span, wanted: int, where: str) -> Span:
        """The span with its stop token, proved to hold all that the turn says."""
        turn = span.turn
        text = whole[span.start : span.end]
        said = [turns[turn]["content"], *(turns[turn].get(key) or "" for key in THOUGHTS)]
        names = [call["function"]["name"] for call in turns[turn].get("tool_calls") or []]
        if not all(_says(text, part) for part in (*said, *names)):
            last = "write data.train_on: last_assistant (templates keep the last turn whole), or "
            raise LoraError(
                f"the template drops a part of turn {turn + 1}, such as its thinking, so it cannot be trained",
                where=where,
                fix=f"{last if wanted > 1 else ''}remove that part, or use another template",
            )
        # Found up to the turn's end, or marked around its content: the stop token stands inside, or comes next.
        inside = self._stops_at_end.search(whole, span.start, span.end)
        stop = self._stop.match(whole, inside.start() if inside is not None else span.end)
        if inside is None and stop is not None and stop[0].lstrip() != self.stop_token:
            stop = None  # it begins the next turn
        end = span.end if stop is None else stop.end()
        return Span(span.start, end, turn, span.prompted, stopped=stop is not None)


def chat_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None, where: str = "data.template") -> ChatTemplate:
    """The template to use: a built-in one by name, a file, or the model's own.

    Raises LoraError if the file cannot be read, or if the model has no template of its own and none is named.
    """
    if wanted in TEMPLATES:
        text = (resources.files("lora_cli.data") / "templates" / f"{wanted}.jinja").read_text(encoding="utf-8")
        return ChatTemplate(text, tokenizer, f"built-in {wanted}")
    if wanted is not None:
        require_regular(Path(wanted))
        try:
            return ChatTemplate(Path(wanted).read_text(encoding="utf-8"), tokenizer, wanted)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            known = ", ".join(TEMPLATES)
            raise LoraError(
                f"the chat template cannot be read: {reason}", where=wanted, fix=f"built-in ones are {known}"
            ) from None
    if not tokenizer.chat_template:
        raise LoraError(
            "the model has no chat template, so messages cannot be rendered",
            where=where,
            fix=f"write data.template: one of {', '.join(TEMPLATES)}, or a .jinja file; or use the model's instruct "
            "version",
        )
    text: Any = tokenizer.chat_template
    return ChatTemplate(text if isinstance(text, str) else tokenizer.get_chat_template(), tokenizer, "the model's own")


def _with_text_arguments(turns: Turns) -> Turns:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        turn | {"tool_calls": [written(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def wants_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS in front of a text."""
    backend: Any = tokenizer.backend_tokenizer
    return tokenizer.bos_token_id is not None and backend.encode("a").ids[:1] == [tokenizer.bos_token_id]


def _says(text: str, content: str) -> bool:
    """Whether all of a turn's content stands in the text; templates may space it in other ways."""
    return content in text or "".join(content.split()) in "".join(text.split())


_MOST_MARKS = 6400
_PRIVATE = [re.compile(f"[{chr(start)}-{chr(start + _MOST_MARKS - 1)}]") for start in (0xE000, 0xF0000, 0x100000)]


def _marked(content: str, first: int) -> str:
    """The content with a mark before and after what it says; white space around it stays outside, to be trimmed."""
    core = content.strip()
    lead = content.index(core[0])
    return f"{content[:lead]}{chr(first)}{core}{chr(first + 1)}{content[lead + len(core) :]}"
