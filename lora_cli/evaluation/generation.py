"""Completing a prompt, or answering in a chat, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer


class _Streamer(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.emit(text)


def generation_config(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: int | None = None,
) -> GenerationConfig:
    """temperature 0 is greedy. Stops at the end tokens of the model and of the tokenizer, and at `stop`."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    own_end: Any = tokenizer.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), own_end, stop} - {None}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        use_cache=True,
        **sampling,
    )


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    special_tokens: bool = True,
    emit: Callable[[str], None] | None = None,
) -> list[str]:
    """Completions of the prompts, generated as one batch (padded on the left, as causal models need it).

    special_tokens: whether the tokenizer adds its BOS; not wanted after a chat template, which brings its own.
    emit: called with each piece of text as it comes; for a single prompt only.
    """
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=special_tokens)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}  # type: ignore[union-attr]
    streamer = _Streamer(tokenizer, emit) if emit is not None else None
    tokens = model.eval().generate(**inputs, generation_config=config, streamer=streamer)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)
