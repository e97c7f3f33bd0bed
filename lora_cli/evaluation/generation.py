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
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import TextStreamer

from lora_cli.base.text import positions
from lora_cli.data.chat.template import ChatTemplate, wants_bos
from lora_cli.errors import CheckFailed, LoraError, refuse_if


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
            fix = "copy the adapter and download the base model again; with --dtype fp16, try --dtype bf16 or fp32"
            raise CheckFailed("the model's output is NaN or infinite", fix=fix)
        return scores


@dataclass(frozen=True)
class Sampling:
    """Settings of one prompt, as those of `generation_config`; seed: of its own random numbers."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


class _EachRow(LogitsProcessor):
    """Chooses the next token of each row by its own settings and random numbers, whatever else is in the batch.

    padding: of each row, on the left. longest: new tokens of each; then it ends, with the first of `ends`.
    """

    def __init__(self, rows: Sequence[Sampling], padding: list[int], longest: list[int], ends: Any, device: Any):
        self.rows, self.padding, self.longest, self.step = rows, padding, longest, 0
        self.end = next(iter(ends or []), None)
        self.random = [torch.Generator(device).manual_seed(each.seed) for each in rows]
        self.further = [_processors(each) for each in rows]

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:  # type: ignore[override]
        only = torch.full_like(scores, -torch.inf)
        for at, row in enumerate(self.rows):
            own = self.further[at](input_ids[at : at + 1, self.padding[at] :], scores[at : at + 1])
            if self.step >= self.longest[at] and self.end is not None:
                token: Any = self.end
            elif row.temperature > 0:
                token = torch.multinomial(own.softmax(-1), 1, generator=self.random[at])[0, 0]
            else:
                token = own.argmax()
            only[at, token] = 0
        self.step += 1
        return only


def _processors(row: Sampling) -> LogitsProcessorList:
    """As transformers orders them."""
    found = LogitsProcessorList()
    if row.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(row.repetition_penalty))
    if row.temperature > 0:
        found.append(TemperatureLogitsWarper(row.temperature))
        found += [TopKLogitsWarper(row.top_k)] if row.top_k else []
        found += [TopPLogitsWarper(row.top_p)] if row.top_p < 1 else []
    return found


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
        pad_token_id=own_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
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
    emit: Callable[[str], None] | None = None,
    each_row: Sequence[Sampling] | None = None,
) -> list[Completion]:
    """Completions of the prompts, generated as one batch (padded on the left, as causal models need it).

    prompts: texts, which the tokenizer puts its BOS before, or token ids. emit: called with each piece of text as it
    comes; for a single prompt only. each_row: settings of each prompt; of `config` then only the end tokens count.
    Raises CheckFailed for a model whose output is not finite.
    """
    encoded: Any = [tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
    rows = [torch.tensor(each, dtype=torch.long, device=model.device) for each in encoded]
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    inputs = {"input_ids": pad_left(rows, padding_value=config.pad_token_id or 0)}
    inputs["attention_mask"] = pad_left([torch.ones_like(row) for row in rows])
    require_token(max((token for each in encoded for token in each), default=0), model)
    width = inputs["input_ids"].shape[1]
    choosing: list[LogitsProcessor] = [_Finite()]
    config = deepcopy(config)
    if each_row is None:
        config.max_new_tokens = most = within_positions(width, config.max_new_tokens, model.config)  # type: ignore[arg-type]
        longest = [most] * len(rows)
    else:
        wanted = zip(rows, each_row, strict=True)
        longest = [within_positions(len(row), own.max_new_tokens, model.config) for row, own in wanted]
        config.max_new_tokens = max(longest)
        padding = [width - len(row) for row in rows]
        choosing.append(_EachRow(each_row, padding, longest, config.eos_token_id, model.device))
    streamer = _Streamer(tokenizer, emit) if emit is not None else None
    further: Any = {"streamer": streamer, "logits_processor": choosing}
    with _no_other_settings(model):
        tokens = model.eval().generate(**inputs, generation_config=config, **further)
    new = zip(tokens[:, width:].tolist(), longest, strict=True)
    return [_completion(row[:most], tokenizer, config) for row, most in new]


def _completion(new: list[int], tokenizer: Any, config: GenerationConfig) -> Completion:
    """Of the new tokens of one row, which is padded behind the end token where another row is longer."""
    ends: Any = config.eos_token_id or []
    end = next((at for at, token in enumerate(new) if token in ends), None)
    text = tokenizer.decode(new, skip_special_tokens=True)
    if end is None:
        return Completion(text, None, len(new))
    return Completion(text, str(tokenizer.convert_ids_to_tokens(new[end])), end + 1)


def within_positions(prompt: int, wanted: int, config: Any) -> int:
    """At most as many new tokens as the model has positions left after a prompt of so many. config: the model's.

    Raises LoraError if there are none left.
    """
    seen = positions(config)
    if not seen or prompt + wanted <= seen:
        return wanted
    fix = "shorten the prompt, or use a model with a longer context"
    refuse_if(prompt >= seen, f"the prompt has {prompt:,} tokens, but the model sees {seen:,} at most", fix=fix)
    return seen - prompt


def require_token(largest: int, model: Any) -> None:
    """Raises LoraError for an id without an embedding in the model: the tokenizer is not the model's own."""
    known = model.get_input_embeddings().weight.shape[0]
    fix = "use the model's own tokenizer: copy or download tokenizer.json again"
    refuse_if(largest >= known, f"the tokenizer gives token {largest}, but the model has {known} tokens", fix=fix)


@contextmanager
def _no_other_settings(model: Any) -> Iterator[None]:
    """Within this block the model has no settings of its own, such as num_beams: only those that were asked for."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
