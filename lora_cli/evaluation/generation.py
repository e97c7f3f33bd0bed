"""Completing a prompt, or answering in a chat, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from lora_cli.base.text import positions
from lora_cli.data.chat.template import ChatTemplate, wants_bos
from lora_cli.errors import CheckFailed, LoraError


@dataclass(frozen=True)
class Completion:
    """text: without special tokens. stop: the end token that it ended at; None if max_new_tokens cut it.

    tokens: how many are new, the end token among them.
    """

    text: str
    stop: str | None
    tokens: int


class _Streamer(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.emit(text)


class _Finite(LogitsProcessor):
    """Raises CheckFailed if the model's logits are NaN or infinite: choosing a token would be meaningless."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.isfinite(scores.amax(-1)).all() or scores.isnan().any():
            raise CheckFailed(
                "the model's output is NaN or infinite",
                fix="copy the adapter and download the base model again; with --dtype fp16, try --dtype bf16 or fp32",
            )
        return scores


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
    """temperature 0 is greedy. Stops at the end tokens of the model and of the tokenizer, and at `stop`.

    Raises LoraError for an end token that the model does not have.
    """
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    own_end: Any = tokenizer.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), own_end, stop} - {None, -1}  # some write -1 for none
    tokens = model.get_input_embeddings().weight.shape[0]
    if beyond := [each for each in stops if not 0 <= each < tokens]:
        fix = "correct eos_token_id in generation_config.json and config.json, or download the model again"
        raise LoraError(f"the end token {str(beyond[0])[:20]} is not one of the model's {tokens} tokens", fix=fix)
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


def prompt_ids(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, where: str
) -> list[int]:
    """What the model reads: the turns through the template; without one the last turn's text alone.

    With one BOS where the tokenizer wants one. where: of the turns, for messages.
    """
    text = turns[-1]["content"] if template is None else template.render(turns, where, generation_prompt=True)
    bos = wants_bos(tokenizer) and not text.startswith(str(tokenizer.bos_token))
    return tokenizer(text, add_special_tokens=bos if template is not None else True)["input_ids"]  # type: ignore[return-value]


def stop_id(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> int | None:
    """The token that the template ends an answer with, if it is a special one."""
    stop = template.stop_token if template is not None else None
    return None if stop is None else tokenizer.convert_tokens_to_ids(stop)  # type: ignore[return-value]


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    config: GenerationConfig,
    *,
    special_tokens: bool = True,
    emit: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Completions of the prompts, generated as one batch (padded on the left, as causal models need it).

    prompts: texts, or their token ids. special_tokens: whether the tokenizer adds its BOS to texts; not wanted after a
    chat template, which brings its own.
    emit: called with each piece of text as it comes; for a single prompt only. Raises CheckFailed for a model whose
    output is not finite.
    """
    encoded: Any = [
        tokenizer(each, add_special_tokens=special_tokens)["input_ids"] if isinstance(each, str) else each
        for each in prompts
    ]
    rows = [torch.tensor(each, dtype=torch.long, device=model.device) for each in encoded]
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    inputs = {"input_ids": pad_left(rows, padding_value=config.pad_token_id or 0)}
    inputs["attention_mask"] = pad_left([torch.ones_like(row) for row in rows])
    require_token(max((token for each in encoded for token in each), default=0), model)
    config = _within_positions(config, inputs["input_ids"].shape[1], model)
    streamer = _Streamer(tokenizer, emit) if emit is not None else None
    further: Any = {"streamer": streamer, "logits_processor": [_Finite()]}
    with _no_other_settings(model):
        tokens = model.eval().generate(**inputs, generation_config=config, **further)
    return [_completion(new, tokenizer, config) for new in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


def _completion(new: list[int], tokenizer: Any, config: GenerationConfig) -> Completion:
    """Of the new tokens of one row, which is padded behind the end token where another row is longer."""
    ends: Any = config.eos_token_id or []
    end = next((at for at, token in enumerate(new) if token in ends), None)
    text = tokenizer.decode(new, skip_special_tokens=True)
    if end is None:
        return Completion(text, None, len(new))
    return Completion(text, str(tokenizer.convert_ids_to_tokens(new[end])), end + 1)


def _within_positions(config: GenerationConfig, prompt: int, model: Any) -> GenerationConfig:
    """The settings with at most as many new tokens as the model has positions left after the prompt.

    Raises LoraError if there are none left.
    """
    seen = positions(model.config)
    if not seen or prompt + config.max_new_tokens <= seen:  # type: ignore[operator]
        return config
    if prompt >= seen:
        fix = "shorten the prompt, or use a model with a longer context"
        raise LoraError(f"the prompt has {prompt:,} tokens, but the model sees {seen:,} at most", fix=fix)
    shorter = deepcopy(config)
    shorter.max_new_tokens = seen - prompt
    return shorter


def require_token(largest: int, model: Any) -> None:
    """Raises LoraError for an id without an embedding in the model: the tokenizer is not the model's own."""
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        fix = "use the model's own tokenizer: copy or download tokenizer.json again"
        raise LoraError(f"the tokenizer gives token {largest}, but the model has {known} tokens", fix=fix)


@contextmanager
def _no_other_settings(model: Any) -> Iterator[None]:
    """Within this block the model has no settings of its own, such as num_beams: only those that were asked for."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
