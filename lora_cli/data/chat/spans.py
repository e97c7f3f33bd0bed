"""Where the assistant's turns are in a rendered conversation: from where generation would begin to where it stops.

Found by rendering, never by looking for strings. What comes before a turn, rendered with the generation prompt, must be
the beginning of the whole: that is the text the model will be given, so training begins in a turn exactly where
generation begins. The conversation that ends with the turn shows how it ends, and whether it would look different as
the last one. Marks behind what the others say show that the template left none of them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_cli.data.chat.template import THOUGHTS, CannotRender, ChatTemplate, Turns
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached

_IN_CONTENT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>")
_PRIVATE = [(0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)]
_MOST_RENDERED = 100_000  # turns, over all prompts of one conversation: some hundred turns; of longer ones a sample is
_MOST_ADVISED = 100  # rows for which all other templates are tried, to say which works; then only the last that did
_OWN_ROWS = "give each assistant turn a row of its own, with the turns before it"


class NotPrompted(LoraError):
    """Generation would begin in another place than the turn does."""


@dataclass(frozen=True)
class Span:
    """What one turn adds to the rendered text, in characters; its stop token included. turn: counted from 0.

    Before `start` is, to the letter, what the template prompts this turn with.
    """

    start: int
    end: int
    turn: int
    stopped: bool = True  # it ends in a special token
    empty_thoughts: bool = False  # an empty think block is trained


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. spans: the assistant turns that were asked for.

    two_forms: the error for a turn that would look different as the last one. forgotten: turns that are context
    and whose thoughts the template leaves out.
    """

    text: str
    spans: list[Span]
    two_forms: LoraError | None = None
    forgotten: int = 0


def render_whole(template: ChatTemplate, turns: Turns, where: str, tools: Any = None) -> str:
    """The conversation as text, in which all that was said to the assistant is. Raises LoraError where it is not."""
    return _Conversation(template, turns, range(0), where, tools).whole


def render_with_spans(
    template: ChatTemplate, turns: Turns, wanted: Sequence[int], where: str, tools: Any = None
) -> Rendered:
    """The conversation and the spans of the wanted turns, which are the assistant's.

    Raises LoraError where the template does not show a turn as it is, and NotPrompted where it would prompt a
    generation with another text; the fix is one that was tried on this row, where one was found.
    """
    try:
        conversation = _Conversation(template, turns, wanted, where, tools)
        spans = conversation.spans()
        error = conversation.two_forms
    except LimitReached:  # which trying other ways would not change
        raise
    except LoraError as problem:
        spans, error = [], problem
    if error is not None:
        fix = _what_works(template, turns, wanted, where, tools) or error.fix
        fix = f"{fix}, or data.allow: [two_forms] to train it in this form" if spans else fix
        error = type(error)(error.what, where=error.where, details=error.details, fix=fix)
        if not spans:
            raise error
    return Rendered(conversation.whole, spans, error, conversation.forgotten())


class _Conversation:
    """One conversation being looked at. wanted: turns that are to be trained, in order.

    Raises LoraError if the template leaves out the tools, or a turn that is not the assistant's.
    """

    def __init__(self, template: ChatTemplate, turns: Turns, wanted: Sequence[int], where: str, tools: Any):
        self.template, self.turns, self.wanted, self.where, self.tools = template, turns, wanted, where, tools
        self.whole = template.render(turns, where, tools)
        self.two_forms: LoraError | None = None
        self._require_nothing_left_out()

    def render(self, upto: int, *, prompt: bool = False) -> str:
        return self.template.render(self.turns[:upto], self.where, self.tools, generation_prompt=prompt)

    # ── nothing is left out ─────────────────────────────────────────────────────────────────────────────────────

    def _require_nothing_left_out(self) -> None:
        if self.tools and self.template.render(self.turns, self.where) == self.whole:
            raise self._error("leaves out the tools", "use a template that takes tools, or remove them")
        others = [at for at, turn in enumerate(self.turns) if turn["role"] != "assistant" and turn["content"].strip()]
        places = self.places(others)
        for at in others:
            if not (_says(self.whole, self.turns[at]["content"]) if places is None else at in places):
                fix = "use a template that takes such turns, or remove the turn"
                raise self._error(f"leaves out turn {at + 1}, by {self.turns[at]['role']}", fix)

    def places(self, asked: Sequence[int]) -> dict[int, int] | None:
        """Where in the text the content of each turn that is asked for ends, if it is in it; None if marks disturb."""
        for low, high in _PRIVATE:
            mark = re.compile(f"[{chr(low)}-{chr(high)}]")
            if high - low >= len(self.turns) and not mark.search(self.whole):
                break
        else:
            return None
        marked = list(self.turns)
        for at in asked:
            marked[at] = marked[at] | {"content": _marked(marked[at]["content"], chr(low + at))}
        try:
            text = self.template.render(marked, self.where, self.tools)
        except CannotRender:
            return None
        if mark.sub("", text) != self.whole:
            return None
        return {ord(found[0]) - low: found.start() - number for number, found in enumerate(mark.finditer(text))}

    def forgotten(self) -> int:
        wanted = set(self.wanted)
        thoughts = [_thoughts(turn) for at, turn in enumerate(self.turns) if at not in wanted]
        return sum(bool(each) and each not in self.whole and not _says(self.whole, each) for each in thoughts)

    # ── where turns are ─────────────────────────────────────────────────────────────────────────────────────────

    def spans(self) -> list[Span]:
        if 2 * sum(self.wanted) > _MOST_RENDERED:
            return self._spans_of_many()
        return [self._span(turn) for turn in self.wanted]

    def _span(self, turn: int) -> Span:
        last = turn + 1 == len(self.turns)
        alone = self.whole if last else self.render(turn + 1)
        prompt = self._prompt(turn, alone)
        start = len(prompt)
        if not self.whole.startswith(prompt):
            raise self._other_prompt(turn, prompt, alone)
        end, stop = self._end_alone(alone, start, turn)
        if not self.whole.startswith(alone[:end]):
            before = end
            end, found = self._end_in_longer(start, turn, stop)
            self._require_said(self.whole[start:end], turn)
            if found is not None or not alone.startswith(self.whole[:end]):  # else it lacks but its stop token
                form = self._another_form(turn, alone[start:before], self.whole[start:end])
                self.two_forms = self.two_forms or form
            stop = found
        self._require_said(self.whole[start:end], turn)
        own = _EMPTY_THOUGHTS.search(self.turns[turn]["content"])
        trained = _EMPTY_THOUGHTS.search(self.whole, max(0, start - len("<think>\n\n\n")), end)
        empty = own is None and trained is not None and trained.end() > start
        return Span(start, end, turn, stop is not None, empty)

    def _prompt(self, turn: int, alone: str) -> str:
        """What the template prompts this turn with; of a first turn, what it writes on its own."""
        if turn:
            return self.render(turn, prompt=True)
        try:
            prompt = self.render(0, prompt=True)
        except CannotRender:  # most templates look at the first turn
            prompt = "\0"
        if self.whole.startswith(prompt):
            return prompt
        header, prompt, _ = alone.partition(self.template.generation_prompt or "\0")
        return header + prompt if prompt else "\0"

    def _end_alone(self, alone: str, start: int, turn: int) -> tuple[int, str | None]:
        """Where the turn ends in a conversation that it ends, and the stop token there, if there is one."""
        said, begin = self.turns[turn], start
        core = said["content"].strip()
        if self.template.special.search(core) and (at := alone.find(core, start)) >= 0:
            begin = at + len(core)  # what is said looks like the end of it
        found = self.template.stops_at_end.search(alone, begin)
        whole_said = found is not None and _squeezed(alone[start : found.start()]).endswith(_squeezed(said["content"]))
        if found is None or not ("tool_calls" in said or whole_said):
            return len(alone.rstrip()), None
        return self.template.stop_run(alone, found.start())

    def _end_in_longer(self, start: int, turn: int, stop: str | None) -> tuple[int, str | None]:
        """Where the turn ends in the whole, in which it does not look as it does alone."""
        if "tool_calls" in self.turns[turn]:
            at = self.whole.find(stop, start) if stop else -1
            if at < 0:
                raise self._apart(turn)
            return at + len(stop or ""), stop
        core = self.turns[turn]["content"].strip()
        at = self.whole.find(core, start)
        if at < 0:
            answer = core.rpartition("</think>")[2].strip()
            if _thoughts(self.turns[turn]) and (at := self.whole.find(answer, start)) >= 0:
                self._require_said(self.whole[start : at + len(answer)], turn)
            raise self._apart(turn)
        behind = self.template.stop.match(self.whole, at + len(core)) if stop else None
        if behind is None:
            return at + len(core), None
        return behind.end(), behind[0].lstrip()

    def _spans_of_many(self) -> list[Span]:
        """Of a very long conversation a sample is proved, and the others must be framed as one of the sample is."""
        places = self.places([at for at, turn in enumerate(self.turns) if turn["content"].strip()]) or {}
        count = max(4, _MOST_RENDERED // (2 * len(self.turns)))
        proved = {turn: self._span(turn) for turn in self.wanted[:: -(-len(self.wanted) // count)]}
        proved |= {turn: self._span(turn) for turn in self.wanted[-2:]}
        frames: dict[str, tuple[str, str, Span]] = {}
        for turn, span in proved.items():
            if turn in places and turn - 1 in places:
                lead, ending = self.whole[places[turn - 1] : span.start], self.whole[places[turn] : span.end]
                frames.setdefault(self.turns[turn - 1]["role"], (lead, ending, span))
        spans = []
        for turn in self.wanted:
            lead, ending, like = frames.get(self.turns[turn - 1]["role"], ("\0", "\0", None))
            before, behind = places.get(turn - 1, 0), places.get(turn, 0)
            framed = turn and self.whole.startswith(lead, before) and self.whole.startswith(ending, behind)
            if turn in proved:
                spans.append(proved[turn])
            elif like is not None and framed:
                spans.append(replace(like, start=before + len(lead), end=behind + len(ending), turn=turn))
                self._require_said(self.whole[spans[-1].start : spans[-1].end], turn)
            else:
                what = f"a conversation of {len(self.turns):,} turns is too long to be proved turn by turn"
                raise LoraError(what, where=self.where, fix="divide it into rows of a few hundred turns")
        return spans

    # ── errors ──────────────────────────────────────────────────────────────────────────────────

    def _require_said(self, text: str, turn: int) -> None:
        """Raises LoraError unless the text holds all that the turn says."""
        said = self.turns[turn]
        names = [call["function"]["name"] for call in said.get("tool_calls") or []]
        if not all(name in text for name in names):
            raise self._error(f"has no place for the tool call of turn {turn + 1}", "use a template that has calls")
        if all(_says(text, part) for part in (said["content"], *(said.get(key) or "" for key in THOUGHTS))):
            return
        part = "its thinking" if (thoughts := _thoughts(said)) and not _says(text, thoughts) else "of what it says"
        what = f"drops a part of turn {turn + 1}, {part}, so it cannot be trained"
        raise self._error(what, "remove that part, or use another template")

    def _other_prompt(self, turn: int, prompt: str, alone: str) -> LoraError:
        self._require_said(alone[_same(alone, prompt) :], turn)
        begins = _same(self.render(turn), prompt) if turn else 0
        if not turn or _same(self.whole, prompt) < begins:
            return self._apart(turn, "what comes before it")
        here = self.whole[begins : len(prompt) + 20]
        what = f"prompts a generation with {_short(prompt[begins:])}, but turn {turn + 1} begins with {_short(here)}"
        what += ": generation would begin in another place than training"
        return self._error(what, "use a template whose generation prompt is the beginning of the turn", NotPrompted)

    def _apart(self, turn: int, what: str = "it") -> LoraError:
        what = f"turn {turn + 1} cannot be told apart: the template renders {what} differently in a longer conversation"
        return LoraError(what, where=self.where, fix=f"{_OWN_ROWS}; or use another template")

    def _another_form(self, turn: int, alone: str, here: str) -> LoraError:
        what = f"renders turn {turn + 1} as {_short(here)}, but as the last one, as it is when it is generated, as "
        return self._error(what + _short(alone), _OWN_ROWS)

    def _error(self, what: str, fix: str, kind: type[LoraError] = LoraError) -> LoraError:
        return kind(f"the chat template ({self.template.name}) {what}", where=self.where, fix=fix)


def _what_works(template: ChatTemplate, turns: Turns, wanted: Sequence[int], where: str, tools: Any) -> str | None:
    """A change with which this row is trained, tried on it; None if none is known."""
    last = wanted[-1]

    def works(template: ChatTemplate, turns: Turns, wanted: Sequence[int]) -> bool:
        try:
            conversation = _Conversation(template, turns, wanted, where, tools)
            return all(span.stopped for span in conversation.spans()) and conversation.two_forms is None
        except LoraError:
            return False

    if len(wanted) > 1 and works(template, turns, [last]):
        return "write data.train_on: last_assistant"
    if last + 1 < len(turns) and works(template, turns[: last + 1], wanted):
        return f"remove what comes after turn {last + 1}"
    template.advised += 1
    for setting, other in list(template.others)[: None if template.advised < _MOST_ADVISED else 1]:
        for chosen, also in ((wanted, ""), ([last], ", and data.train_on: last_assistant")):
            if works(other, turns, chosen):
                template.others.remove((setting, other))
                template.others.insert(0, (setting, other))  # and is tried first from now on
                return f"write {setting}{also}"
    return None


def _thoughts(turn: dict[str, Any]) -> str:
    """What the turn thinks before it answers, in a key of its own or in the content; empty if nothing."""
    if turn["role"] != "assistant":
        return ""
    beside = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    found = _IN_CONTENT.search(turn["content"]) if beside is None else None
    return (beside or (found[1] if found is not None else "")).strip()


def _same(one: str, other: str) -> int:
    """The length of the longest common prefix of two texts."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)


def _says(text: str, content: str) -> bool:
    """Whether all of a turn's content is in the text; templates may space it in other ways."""
    return content in text or _squeezed(content) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]} … {text[-30:]}")


def _marked(content: str, mark: str) -> str:
    """The content with a mark behind what it says; white space at its end stays outside, to be trimmed."""
    core = content.rstrip()
    return core + mark + content[len(core) :]
