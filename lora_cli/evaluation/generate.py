"""`lora generate`: a prompt from the command line or stdin, one answer or a conversation, streamed as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from lora_cli.adapters.opened import Opened, open_model
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.data.chat.template import ChatTemplate, chat_template, wants_bos
from lora_cli.errors import LoraError
from lora_cli.evaluation.generation import complete, generation_config
from lora_cli.streams import print_json, print_note, print_piece


def generate(
    prompt: str | None,
    *,
    model: str | None,
    adapter: Path | None,
    use_adapter: bool,
    chat: bool,
    system: str | None,
    seed: int,
    as_json: bool,
    sampling: dict[str, Any],
    **opening: Any,
) -> None:
    """Print a completion, or hold a conversation. opening: further arguments of `open_model`.

    prompt: None reads it from stdin; with chat on a terminal, the conversation then goes on until end of input.
    """
    conversation = chat and prompt is None and sys.stdin.isatty()
    if conversation and as_json:
        what = "--json is for one prompt, not for a conversation"
        raise LoraError(what, fix="give the prompt as an argument or on stdin")
    if prompt is None and not conversation:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise LoraError("the prompt is empty", fix="give it as an argument or on stdin")
    opened = open_model(model, adapter, **opening)
    for note in opened.notes:
        print_note(f"note: {note}")
    set_seed(seed)
    template = chat_template(opened.tokenizer, None, "the model") if chat else None
    answer = _answerer(opened, use_adapter, sampling, template)
    turns = [{"role": "system", "content": system}] if system is not None else []
    emit = None if as_json else print_piece
    if conversation:
        assert template is not None
        _converse(answer, template, turns)
        return
    assert prompt is not None
    text = prompt
    if template is not None:
        text = template.render([*turns, {"role": "user", "content": prompt}], "the prompt", generation_prompt=True)
    completion = answer(text, emit)
    if not completion.strip():
        print_note("note: the completion is empty: the model ended it at once, or wrote only blanks and special tokens")
    if as_json:
        print_json({"prompt": prompt, "completion": completion})
    else:
        print_piece("\n")


def _answerer(
    opened: Opened, use_adapter: bool, sampling: dict[str, Any], template: ChatTemplate | None
) -> Callable[..., str]:
    """Completes a text as training would have seen it: with one BOS where one is wanted, up to the stop token."""
    tokenizer = opened.tokenizer
    token = template.stop_token if template is not None else None
    stop: Any = tokenizer.convert_tokens_to_ids(token) if token is not None else None
    config = generation_config(opened.model, tokenizer, stop=stop, **sampling)

    def answer(text: str, emit: Callable[[str], None] | None) -> str:
        bos = wants_bos(tokenizer) and not text.startswith(str(tokenizer.bos_token))
        special = bos if template is not None else True
        with nullcontext() if use_adapter else adapters_disabled(opened.model):
            return complete(opened.model, tokenizer, [text], config, special_tokens=special, emit=emit)[0]

    return answer


def _converse(answer: Callable[..., str], template: ChatTemplate, turns: list[dict[str, str]]) -> None:
    print_note("Ctrl+D ends the conversation.")
    while True:
        try:
            typed = input("> ")
        except EOFError:
            print_piece("\n")
            return
        if not typed.strip():
            continue
        turns.append({"role": "user", "content": typed})
        text = template.render(turns, "the conversation", generation_prompt=True)
        turns.append({"role": "assistant", "content": answer(text, print_piece)})
        print_piece("\n")
