"""`lora generate`: a prompt from the command line or stdin, one answer or a conversation, streamed as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from lora_cli.adapters.layer import adapters_disabled
from lora_cli.adapters.opened import Opened, open_model
from lora_cli.data.chat import chat_template
from lora_cli.errors import LoraError
from lora_cli.evaluation.generation import complete, generation_config


def talk(
    prompt: str | None,
    *,
    model: str | None,
    adapter: Path | None,
    use_adapter: bool,
    chat: bool,
    system: str | None,
    quantization: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    seed: int,
    as_json: bool,
    sampling: dict[str, Any],
) -> None:
    """prompt: nothing reads it from stdin; a chat on a terminal then goes on until end of input."""
    conversation = chat and prompt is None and sys.stdin.isatty()
    if conversation and as_json:
        raise LoraError(
            "--json is for one prompt, not for a conversation", fix="give the prompt as an argument or on stdin"
        )
    if prompt is None and not conversation:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise LoraError("the prompt is empty", fix="give it as an argument or on stdin")
    opened = open_model(
        model, adapter, quantization=quantization, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    set_seed(seed)
    speak = _speaker(opened, use_adapter, sampling)
    turns = [{"role": "system", "content": system}] if system is not None else []
    emit = None if as_json else _print_now
    if conversation:
        _converse(speak, opened, turns)
        return
    assert prompt is not None
    if chat:
        text = _prompt([*turns, {"role": "user", "content": prompt}], opened)
        answer = speak(text, False, emit)
    else:
        answer = speak(prompt, True, emit)
    print(json.dumps({"prompt": prompt, "completion": answer}) if as_json else "")


def _prompt(turns: list[dict[str, str]], opened: Opened) -> str:
    return chat_template(opened.tokenizer, None, "the model").render(turns, "conversation", generation_prompt=True)


def _speaker(opened: Opened, use_adapter: bool, sampling: dict[str, Any]) -> Callable[..., str]:
    config = generation_config(opened.model, opened.tokenizer, **sampling)

    def speak(text: str, special_tokens: bool, emit: Callable[[str], None] | None) -> str:
        if use_adapter:
            return complete(opened.model, opened.tokenizer, [text], config, special_tokens=special_tokens, emit=emit)[0]
        with adapters_disabled(opened.model):
            return complete(opened.model, opened.tokenizer, [text], config, special_tokens=special_tokens, emit=emit)[0]

    return speak


def _converse(speak: Callable[..., str], opened: Opened, turns: list[dict[str, str]]) -> None:
    print("Ctrl+D ends the conversation.", file=sys.stderr)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if not said.strip():
            continue
        turns.append({"role": "user", "content": said})
        text = _prompt(turns, opened)
        turns.append({"role": "assistant", "content": speak(text, False, _print_now)})
        print()


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
