"""`lora generate`: one prompt, from the command line or stdin, one completion, streamed as it comes.

`Prompting` is how: through the chat template, or as the text is. `Speaker` is a model with it, for the chat too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.file import AdapterFile, read_adapter
from lora_cli.adapters.named import Named, recorded_prompting
from lora_cli.adapters.opened import adapter_template, open_base, other_base
from lora_cli.adapters.several import Several
from lora_cli.data.chat.template import ChatTemplate, chat_template, system_first
from lora_cli.data.row_encoder import quoted
from lora_cli.errors import LoraError, reading, refuse_if
from lora_cli.evaluation.generation import Completion, complete, generation_config, prompt_ids, stop_id
from lora_cli.streams import print_json, print_note, print_piece

Emit = Callable[[str], None]


class Prompting:
    """How a model or one of its adapters is prompted: as training recorded it, or as the user decides.

    tokenizer: the base's. folder: the base's. through_template: True or False if the user decides; None goes by what
    training recorded, then by `default`. say: takes what a person should hear. Raises LoraError where a template is
    wanted and there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        named: Named,
        adapter: AdapterFile | None,
        folder: Path,
        *,
        through_template: bool | None,
        default: str,
        say: Callable[[str], None] = print_note,
    ):
        own = None if adapter is None else adapter_template(adapter.folder)
        self.tokenizer, self.say = copy(tokenizer), say
        if own is not None:  # the one it was trained with, where that is not the base model's own
            self.tokenizer.chat_template = own
        self.recorded, self.system = recorded_prompting(named, adapter and adapter.metadata, folder)
        self.template = self._template(through_template, default)
        self.way = (self.recorded, self.system, own)  # what several adapters have to have in common

    def _template(self, wanted: bool | None, default: str) -> ChatTemplate | None:
        """Decides, and says so unless the user did."""
        has_one = bool(self.tokenizer.chat_template)
        through = wanted
        if wanted is None:
            through = (self.recorded or (default if has_one else "raw")) == "template"
        if through:
            if wanted is None:
                why = "as in training" if self.recorded else "as nothing says how it was trained"
                self.say(f"note: prompted through the chat template, {why} (--raw turns it off)")
            tokenizer: Any = self.tokenizer
            if self.system and isinstance(tokenizer.chat_template, str):  # here the turns say whether it comes first
                tokenizer.chat_template = tokenizer.chat_template.removeprefix(system_first(self.system))
            return chat_template(tokenizer, None, "the model")
        if wanted is None and (self.recorded or has_one):
            why = "as in training" if self.recorded else "as nothing says that it was trained through a chat template"
            self.say(f"note: the prompt is used as it is, {why}" + (" (or --template)" if has_one else ""))
        return None

    def opening(self, system: str | None) -> list[dict[str, str]]:
        """The turns that a conversation begins with. system: None for the one of training, which is said; "" for none.

        Raises LoraError for one without a template.
        """
        if self.template is None:
            what = "--system is for prompts through a chat template"
            refuse_if(bool(system), what, fix="add --template, or remove it")
            return []
        if system is None and self.system:
            system = self.system
            self.say(f'note: the system prompt is that of training, {quoted(system)} (--system "" for none)')
        return [{"role": "system", "content": system}] if system else []

    def ids(self, turns: list[dict[str, Any]], where: str) -> list[int]:
        return prompt_ids(turns, self.tokenizer, self.template, where)

    @property
    def stop(self) -> int | None:
        """The token that ends an answer, beside the model's own."""
        return stop_id(self.tokenizer, self.template)

    def why_empty(self, completion: Completion) -> str:
        """What to say of a completion without text."""
        if completion.stop is None:
            return f"the completion is empty: all {completion.tokens} tokens are blanks or special tokens"
        what = f"the completion is empty: the model ended it at once, with {completion.stop}"
        if self.template is None and self.recorded == "template":
            return f"{what}; it was trained through a chat template: leave out --raw"
        if self.template is None and self.tokenizer.chat_template:
            return f"{what}; if it was trained on conversations, add --template"
        return f"{what}, as its training may have taught it"


class Speaker:
    """A model that answers as it was trained to, with one of the adapters that it holds, or alone.

    prompting: further arguments of `Prompting`. opening: of `open_base`.
    """

    def __init__(
        self,
        named: Named,
        *,
        through_template: bool | None,
        default: str,
        use_adapter: bool = True,
        seed: int,
        sampling: dict[str, Any],
        **opening: Any,
    ):
        if not use_adapter and named.adapter is None:
            raise LoraError("--no-adapter without an adapter", fix="remove it, or name a run")
        stored = None if named.adapter is None else read_adapter(named.adapter)
        self.opened = opened = open_base(named.model, [] if stored is None else [stored], **opening)
        self.several = Several(opened.model, opened.source)
        self.name: str | None = None  # of the adapter that answers; None: the base alone
        self.prompted: dict[str, Prompting] = {}  # by adapter
        self._sampling, self._how = sampling, {"through_template": through_template, "default": default}
        for note in opened.notes:
            print_note(f"note: {note}")
        if stored is None:
            self._prompt_as(Prompting(opened.tokenizer, named, None, opened.source.folder, **self._how))
        else:
            self.hold(str(named.run if named.is_run else named.adapter), named, stored)
        if not use_adapter:
            self.use(None)
        set_seed(seed)

    def hold(self, name: str, named: Named, stored: AdapterFile) -> None:
        """Hold an adapter under a name, and answer with it. Raises LoraError if it does not fit."""
        notes = other_base(stored, named.model)
        if (way := stored.metadata.quantization) not in (None, self.opened.quantization):
            notes.append(
                f"the adapter was trained on the base held as {way}, and is used on {self.opened.quantization}"
            )
        for note in notes:
            print_note(f"note: {note}")
        prompting = Prompting(self.opened.tokenizer, named, stored, self.opened.source.folder, **self._how)
        self.several.add({name: stored})
        self.prompted[name] = prompting
        self.use(name)

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on, prompted as in training; None: the base alone, prompted as before."""
        self.several.use([{} if name is None else {name: 1.0}])
        self.name = name
        if name is not None:
            self._prompt_as(self.prompted[name])

    def _prompt_as(self, prompting: Prompting) -> None:
        opened, self.prompting = self.opened, prompting
        self.config = generation_config(opened.model, opened.tokenizer, stop=prompting.stop, **self._sampling)

    def answer(self, turns: list[dict[str, str]], emit: Emit | None) -> Completion:
        """The next turn of the conversation, up to the stop token."""
        ids = self.prompting.ids(turns, "the conversation")
        return complete(self.opened.model, self.opened.tokenizer, [ids], self.config, emit=emit)[0]

    def why_cut(self, completion: Completion) -> str:
        """What to say of a completion that no end token ended."""
        if completion.tokens < self.config.max_new_tokens:
            return f"cut after {completion.tokens} tokens, as the model sees no more"
        return f"cut after {completion.tokens} tokens: --max-new-tokens allows more"


def generate(prompt: str | None, named: Named, *, system: str | None, as_json: bool, **speaking: Any) -> None:
    """Print a completion. prompt: None reads it from stdin. speaking: further arguments of `Speaker`."""
    text = _from_stdin() if prompt is None else prompt
    refuse_if(not text.strip(), "the prompt is empty", fix="give it as an argument or on stdin")
    speaker = Speaker(named, default="raw", **speaking)
    prompting = speaker.prompting
    turns = [*(opening := prompting.opening(system)), {"role": "user", "content": text}]
    completion = speaker.answer(turns, None if as_json else print_piece)
    if as_json:
        print_json(
            {"prompt": text, "completion": completion.text, "prompting": "template" if prompting.template else "raw"}
            | {"stop": completion.stop, "new_tokens": completion.tokens}
            | {"system": opening[0]["content"] if opening else None}
        )
    else:
        print_piece("\n")
    if not completion.text.strip():
        print_note(f"note: {prompting.why_empty(completion)}")
    elif completion.stop is None:
        print_note(f"note: {speaker.why_cut(completion)}")


def _from_stdin() -> str:
    if sys.stdin.isatty():
        print_note("Type the prompt; Ctrl+D on an empty line ends it.")
    with reading("the prompt cannot be read", where="stdin", fix="give it as text in UTF-8"):
        return sys.stdin.read()
