"""A chat template: found, completed with what training adds to it, and rendered.

Its text is all there is to it: arguments of the recipe and a BOS that the tokenizer wants are written at its top, so
that the text which is shipped with an adapter prompts other programs exactly as this one was prompted in training.
Where a conversation's turns are in what it renders: spans.py.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat.jinja import BoundedTemplate, Refused
from lora_cli.errors import LoraError, reading, refuse_if
from lora_cli.files import require_regular
from lora_cli.limits import LimitReached
from lora_cli.recipe import TEMPLATES

Turns = list[dict[str, Any]]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what templates call thoughts apart from the content
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")


class CannotRender(LoraError):
    """The template does not accept a conversation: `raise_exception` in it, or an error of its own."""


class ChatTemplate:
    """A chat template and the special tokens that it may write.

    name: for messages. Raises LoraError for a template that is not valid Jinja.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, name: str):
        self.text, self.name, self.tokenizer = text, name, tokenizer
        self.advised = 0  # rows for which the others were tried
        tokens = tokenizer.special_tokens_map
        self._variables = {key: value for key, value in tokens.items() if isinstance(value, str)}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        either = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        either = f"(?:{either})" if special else "(?!)"
        self.special = re.compile(either)
        self.stop = re.compile(rf"\s*{either}")
        self.stops_at_end = re.compile(rf"{either}(?:\s*{either})*\s*\Z")
        self.compiled = BoundedTemplate(text, name)

    def own_text(self, system: str | None) -> str | None:
        """Its text, to keep with the adapter, unless it is the model's own. system: of training, which it is to say."""
        text = (system_first(system) if system else "") + self.text
        return None if text == self.tokenizer.chat_template else text

    def render(self, turns: Turns, where: str, tools: Any = None, *, generation_prompt: bool = False) -> str:
        """The conversation as text. Raises CannotRender, with the template's own words, if it refuses it."""
        variables = {"tools": tools, "documents": None, "add_generation_prompt": generation_prompt, **self._variables}
        turns = [_with_every_name(turn) if len(turn) > 2 else turn for turn in turns]
        try:
            try:
                return self.compiled.render(messages=turns, **variables)
            except TypeError:  # some templates want the arguments of calls as JSON text
                return self.compiled.render(messages=_with_text_arguments(turns), **variables)
        except LimitReached as error:
            raise LimitReached(error.what, where=where, fix=error.fix) from None
        except Refused as error:
            what, fix = f"refuses this conversation: {error}", "change the row so that the template takes it"
        except Exception as error:  # jinja2 errors, and whatever a template's own code runs into
            what = f"fails on this conversation: {type(error).__name__}: {error}{self._line_of(error)}"
            fix = "the template's own code fails on what this row holds: change the row"
        fix += ", or name another template in data.template"
        raise CannotRender(f"the chat template ({self.name}) {what}", where=where, fix=fix)

    def tried(self, *roles: str, generation_prompt: bool = False) -> str | None:
        """A conversation of short turns by these as text; None where the template refuses it."""
        turns: Turns = [{"role": role, "content": "Yes." if role == "assistant" else "Hello."} for role in roles]
        try:
            return self.render(turns, self.name, generation_prompt=generation_prompt)
        except LoraError:
            return None

    def require_system(self, system: str) -> None:
        """Raises LoraError if it does not say a system prompt where a conversation begins with one."""
        turns = [{"role": role, "content": text} for role, text in (("user", "Hello."), ("assistant", "Yes."))]
        try:
            why = "leaves out" if system.strip() not in self.render([_system(system), *turns], self.name) else ""
        except CannotRender:
            why = "refuses"
        what = f"the chat template ({self.name}) {why} a system turn, so system would not be trained with"
        fix = "remove it, and write what it says into the first user turn; or name another data.template"
        refuse_if(bool(why), what, where="data.system", fix=fix)

    def special_in_text(self, turns: Turns, tools: Any = None) -> tuple[int, str] | None:
        """The first turn (counted from 1; 0 is the tools) whose text holds a special token, and that token."""
        for number, turn in enumerate(turns, 1):
            text = turn["content"] if len(turn) == 2 else json.dumps(turn, ensure_ascii=False, default=str)
            if found := self.special.search(text):
                return number, found[0]
        found = self.special.search(json.dumps(tools, ensure_ascii=False, default=str)) if tools else None
        return (0, found[0]) if found else None

    def stop_run(self, text: str, at: int) -> tuple[int, str]:
        """Where an answer ends whose first special token begins at `at`, and the last token of it.

        That is the first token at which generation stops; without one, the last of those with nothing between them.
        """
        end, last = at, ""
        while (found := self.special.match(text, end)) is not None and found[0]:
            end, last = found.end(), found[0]
            if last in self._ends:
                break
        return end, last

    @cached_property
    def stop_token(self) -> str | None:
        """What the template ends the last assistant turn with; None if that is not a special token."""
        text = self.tried("user", "assistant") or ""
        stop = self.stop.match(text, text.rfind("Yes.") + len("Yes."))
        return None if stop is None else self.stop_run(text, stop.end() - len(stop[0].lstrip()))[1]

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds to prompt a generation; empty if it adds nothing."""
        without, prompted = self.tried("user"), self.tried("user", generation_prompt=True)
        if without is None or prompted is None:
            return ""
        return prompted[len(without) :] if prompted.startswith(without) else ""

    @cached_property
    def others(self) -> list[tuple[str, ChatTemplate]]:
        """What could be written in the recipe to render in another way: the setting, and the template it gives."""
        found = []
        if "enable_thinking" in self.compiled.reads:
            text = _with_arguments(self, {"enable_thinking": False})
            found.append(("data.template_arguments: {enable_thinking: false}", text))
        return found + [(f"data.template: {name}", chat_template(self.tokenizer, name)) for name in TEMPLATES]

    @cached_property
    def _ends(self) -> set[str]:
        return {str(self.tokenizer.convert_ids_to_tokens(id)) for id in generation_ends(self.tokenizer)}

    def _line_of(self, error: Exception) -> str:
        """The line of the template at which an error arose, where Jinja tells it."""
        frames = traceback.walk_tb(error.__traceback__)
        line = ([0] + [at for frame, at in frames if frame.f_code.co_filename == "<template>"])[-1]
        lines = self.text.splitlines()
        return f" (line {line} of the template: {lines[line - 1].strip()})" if line and line <= len(lines) else ""


def chat_template(
    tokenizer: PreTrainedTokenizerBase,
    wanted: str | None,
    where: str = "data.template",
    arguments: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The template to use: a built-in one by name, a file, or the model's own; with arguments and BOS written into it.

    Raises LoraError if the file cannot be read, if the model has no template of its own and none is named, or if the
    template does not read one of the arguments.
    """
    template = ChatTemplate(*_found(tokenizer, wanted, where))
    if arguments:
        _require_read(template, arguments)
        template = _with_arguments(template, arguments)
    return _with_bos(template)


def system_first(system: str) -> str:
    """What begins the text of a template that puts a system prompt before each conversation that has none."""
    turn = json.dumps(_system(system), ensure_ascii=False)
    missing = "not messages or messages[0]['role'] != 'system'"
    return f"{{%- if {missing} %}}{{%- set messages = [{turn}] + messages %}}{{%- endif %}}\n"


def _system(system: str) -> dict[str, str]:
    return {"role": "system", "content": system}


def _found(tokenizer: PreTrainedTokenizerBase, wanted: str | None, where: str) -> tuple[str, Any, str]:
    if wanted in TEMPLATES:
        text = (resources.files("lora_cli.data") / "templates" / f"{wanted}.jinja").read_text(encoding="utf-8")
        return text, tokenizer, f"built-in {wanted}"
    if wanted is not None:
        require_regular(Path(wanted))
        with reading("the chat template cannot be read", wanted, f"built-in ones are {', '.join(TEMPLATES)}"):
            return Path(wanted).read_text(encoding="utf-8"), tokenizer, wanted
    if not tokenizer.chat_template:
        fix = f"write data.template: one of {', '.join(TEMPLATES)}, or a .jinja file"
        fix += "; or use the model's instruct version"
        raise LoraError("the model has no chat template, so messages cannot be rendered", where=where, fix=fix)
    text: Any = tokenizer.chat_template
    return text if isinstance(text, str) else tokenizer.get_chat_template(), tokenizer, "the model's own"


def _require_read(template: ChatTemplate, arguments: Mapping[str, Any]) -> None:
    reads = template.compiled.reads - set(_OURS)
    if unread := [name for name in arguments if name not in reads]:
        what = f"the chat template ({template.name}) does not read {unread[0]}"
        fix = f"remove it, or write one of those that it reads: {', '.join(sorted(reads)) or 'none'}"
        raise LoraError(what, where="data.template_arguments", fix=fix)


def _with_arguments(template: ChatTemplate, arguments: Mapping[str, Any]) -> ChatTemplate:
    """Each is set at the top, and so holds whatever a program passes. Trimming blocks removes the line ends again."""
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in arguments.items()}
    top = "".join(f"{{%- set {name} = {literal} %}}\n" for name, literal in literals.items())
    return ChatTemplate(top + template.text, template.tokenizer, template.name)


def _with_bos(template: ChatTemplate) -> ChatTemplate:
    """With a BOS in front, where the tokenizer wants one and the template writes none."""
    tokenizer = template.tokenizer
    if not wants_bos(tokenizer):
        return template
    tried = (template.tried(*roles) for roles in (["user"], ["system", "user"], ["user", "assistant"]))
    bos, opening = str(tokenizer.bos_token), next((text for text in tried if text is not None), None)
    if opening is None or opening.startswith(bos):
        return template
    backend: Any = tokenizer.backend_tokenizer
    ids = [tokenizer.bos_token_id, *backend.encode(opening, add_special_tokens=False).ids]
    # A tokenizer may begin a text with a blank, yet not where it is behind a special token: then it is written.
    plain, apart = (backend.encode(bos + blank + opening, add_special_tokens=False).ids for blank in ("", " "))
    written = "{{- bos_token + ' ' }}" if plain != ids == apart else "{{- bos_token }}"
    text = re.sub(r"\A[ \t]+(?={[%#])", "", template.text)  # as at a line's start
    return ChatTemplate(written + text, tokenizer, template.name)


def generation_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which generation stops: those in generation_config.json, and the end token."""
    end: Any = tokenizer.eos_token_id
    settings = Path(tokenizer.name_or_path) / "generation_config.json"
    if not settings.is_file():
        return {end}
    stored = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")  # checked by find_base
    return {end} if stored is None else {end, *(stored if isinstance(stored, list) else [stored])}


def _with_every_name(turn: dict[str, Any]) -> dict[str, Any]:
    """Thoughts under each name that templates read, as transformers passes them (chat_template_utils.py)."""
    thoughts = next((turn[key] for key in THOUGHTS if turn.get(key) is not None), None)
    return turn if thoughts is None else {"thinking": thoughts, **turn, "reasoning_content": thoughts}


def _with_text_arguments(turns: Turns) -> Turns:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        turn | {"tool_calls": [*map(written, turn["tool_calls"])]} if "tool_calls" in turn else turn for turn in turns
    ]


def wants_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS in front of a text."""
    backend: Any = tokenizer.backend_tokenizer
    return tokenizer.bos_token_id is not None and backend.encode("a").ids[:1] == [tokenizer.bos_token_id]
