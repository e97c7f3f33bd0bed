"""Conversations through the model's own chat template, with a mask on the assistant's turns.

Where a turn begins and ends is found by rendering, never by looking for strings: the conversation up to the turn, with
the generation prompt, is what the model will see; what the template adds for the turn is what it has to say.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.errors import LoraError

Span = tuple[int, int]  # characters of the rendered conversation


def encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is trained: assistant turns up to their stop token.

    Raises LoraError for malformed messages, a tokenizer without a template, a template in which turns cannot be told
    apart, or one that does not end a turn with a special token (the model would never learn to stop).
    """
    turns = _checked(messages, where)
    whole, spans = _assistant_spans(turns, tokenizer, where)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
    offsets: list[Span] = encoded["offset_mapping"]  # type: ignore[assignment]
    trained = [False] * len(ids)
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for start, end in spans:
        inside = [at for at, (first, last) in enumerate(offsets) if last > start and first < end]
        if not inside or ids[inside[-1]] not in special:
            raise LoraError(
                "the chat template ends an assistant turn without a special token: the model would not learn to stop",
                where=where,
                fix="use a model whose chat template ends turns with a stop token",
            )
        for at in inside:
            trained[at] = True
    return ids, trained


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, generation_prompt: bool = False
) -> str:
    """The conversation as text, by the model's chat template."""
    if not tokenizer.chat_template:
        raise LoraError(
            "the model has no chat template, so messages cannot be rendered",
            where=where,
            fix="use the model's instruct version, or give the rows prompt and completion instead of messages",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)  # type: ignore[return-value]
    except Exception as error:  # jinja2 errors, and whatever a template raises
        raise LoraError(
            f"the model's chat template refuses this conversation: {error}",
            where=where,
            fix="check the roles and their order (many templates want user and assistant in turn)",
        ) from None


def _assistant_spans(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[Span]]:
    whole = render(turns, tokenizer, where)
    spans = []
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if at == 0:
            raise LoraError("the conversation begins with the assistant", where=where, fix="put a user turn first")
        before = render(turns[:at], tokenizer, where, generation_prompt=True)
        upto = render(turns[: at + 1], tokenizer, where)
        if not (upto.startswith(before) and whole.startswith(upto)):
            raise LoraError(
                f"turn {at + 1} cannot be told apart: the template renders it differently in a longer conversation",
                where=where,
                fix="give each assistant turn a row of its own, with the turns before it",
            )
        spans.append((len(before), len(upto.rstrip())))  # white space after the stop token is not the model's to say
    return whole, spans


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise LoraError(
            "messages is not a list of turns", where=where, fix='write [{"role": "user", "content": "…"}, …]'
        )
    turns = []
    for number, message in enumerate(messages, 1):
        turn = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise LoraError(
                f"turn {number} of messages has no role or no content",
                where=where,
                fix="every turn needs both, as text",
            )
        turns.append(turn)
    return turns
