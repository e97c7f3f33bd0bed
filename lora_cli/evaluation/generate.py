"""`lora generate`: one prompt, from the command line or stdin, one completion, streamed as it comes.

`Speaker` is a model as it is to be prompted, for the chat too: through the chat template or as the text is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from accelerate.utils import set_seed

from lora_cli.adapters.named import Named, recorded_prompting
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.data.chat.template import ChatTemplate, chat_template, system_first
from lora_cli.data.row_encoder import quoted
from lora_cli.errors import LoraError, reading
from lora_cli.evaluation.generation import Completion, complete, generation_config, prompt_ids, stop_id
from lora_cli.streams import print_json, print_note, print_piece

Emit = Callable[[str], None]


class Speaker:
    """A model that answers as it was trained to.

    through_template: True or False if the user decides; None goes by what training recorded, then by `default`.
    use_adapter: False lets the base answer alone; it may be changed between answers. Raises LoraError where a template
    is wanted and there is none.
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
        self.opened = opened = open_model(named.model, named.adapter, **opening)
        self.use_adapter = use_adapter
        for note in opened.notes:
            print_note(f"note: {note}")
        metadata = opened.adapter.metadata if opened.adapter else None
        self.recorded, self.system = recorded_prompting(named, metadata, opened.source.folder)
        self.template = self._template(through_template, default)
        stop = stop_id(opened.tokenizer, self.template)
        self.config = generation_config(opened.model, opened.tokenizer, stop=stop, **sampling)
        set_seed(seed)

    def _template(self, wanted: bool | None, default: str) -> ChatTemplate | None:
        """Decides, and says so on stderr unless the user did."""
        has_one = bool(self.opened.tokenizer.chat_template)
        through = wanted
        if wanted is None:
            through = (self.recorded or (default if has_one else "raw")) == "template"
        if through:
            if wanted is None:
                why = "as in training" if self.recorded else "as nothing says how it was trained"
                print_note(f"note: prompted through the chat template, {why} (--raw turns it off)")
            tokenizer: Any = self.opened.tokenizer
            if self.system and isinstance(tokenizer.chat_template, str):  # here the turns say whether it comes first
                tokenizer.chat_template = tokenizer.chat_template.removeprefix(system_first(self.system))
            return chat_template(tokenizer, None, "the model")
        if wanted is None and (self.recorded or has_one):
            why = "as in training" if self.recorded else "as nothing says that it was trained through a chat template"
            print_note(f"note: the prompt is used as it is, {why}" + (" (or --template)" if has_one else ""))
        return None

    def opening(self, system: str | None) -> list[dict[str, str]]:
        """The turns that a conversation begins with. system: None for the one of training, which is said; "" for none.

        Raises LoraError for one without a template.
        """
        if self.template is None:
            if system:
                fix = "add --template, or remove it"
                raise LoraError("--system is for prompts through a chat template", fix=fix)
            return []
        if system is None and self.system:
            system = self.system
            print_note(f'note: the system prompt is that of training, {quoted(system)} (--system "" for none)')
        return [{"role": "system", "content": system}] if system else []

    def answer(self, turns: list[dict[str, str]], emit: Emit | None) -> Completion:
        """The next turn of the conversation, up to the stop token."""
        model, tokenizer = self.opened.model, self.opened.tokenizer
        ids = prompt_ids(turns, tokenizer, self.template, "the conversation")
        with nullcontext() if self.use_adapter else adapters_disabled(model):
            return complete(model, tokenizer, [ids], self.config, emit=emit)[0]

    def why_empty(self, completion: Completion) -> str:
        """What to say of a completion without text."""
        if completion.stop is None:
            return f"the completion is empty: all {completion.tokens} tokens are blanks or special tokens"
        what = f"the completion is empty: the model ended it at once, with {completion.stop}"
        if self.template is None and self.recorded == "template":
            return f"{what}; it was trained through a chat template: leave out --raw"
        if self.template is None and self.opened.tokenizer.chat_template:
            return f"{what}; if it was trained on conversations, add --template"
        return f"{what}, as its training may have taught it"

    def why_cut(self, completion: Completion) -> str:
        """What to say of a completion that no end token ended."""
        if completion.tokens < self.config.max_new_tokens:
            return f"cut after {completion.tokens} tokens, as the model sees no more"
        return f"cut after {completion.tokens} tokens: --max-new-tokens allows more"


def generate(prompt: str | None, named: Named, *, system: str | None, as_json: bool, **speaking: Any) -> None:
    """Print a completion. prompt: None reads it from stdin. speaking: further arguments of `Speaker`."""
    text = _from_stdin() if prompt is None else prompt
    if not text.strip():
        raise LoraError("the prompt is empty", fix="give it as an argument or on stdin")
    speaker = Speaker(named, default="raw", **speaking)
    turns = [*(opening := speaker.opening(system)), {"role": "user", "content": text}]
    completion = speaker.answer(turns, None if as_json else print_piece)
    if as_json:
        print_json(
            {"prompt": text, "completion": completion.text, "prompting": "template" if speaker.template else "raw"}
            | {"stop": completion.stop, "new_tokens": completion.tokens}
            | {"system": opening[0]["content"] if opening else None}
        )
    else:
        print_piece("\n")
    if not completion.text.strip():
        print_note(f"note: {speaker.why_empty(completion)}")
    elif completion.stop is None:
        print_note(f"note: {speaker.why_cut(completion)}")


def _from_stdin() -> str:
    if sys.stdin.isatty():
        print_note("Type the prompt; Ctrl+D on an empty line ends it.")
    with reading("the prompt cannot be read", where="stdin", fix="give it as text in UTF-8"):
        return sys.stdin.read()
