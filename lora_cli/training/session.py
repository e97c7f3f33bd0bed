"""Everything a run needs before its first step: data, model, adapter, order. Cheap checks come before dear ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.attach import adapter_parameters, attach
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import targets_of
from lora_cli.base.attention import packed_attention_name
from lora_cli.base.device import describe_device, pick_device, pick_dtype
from lora_cli.base.linear import quantized_bytes, unquantized_layers
from lora_cli.base.load import checkpoint_activations, load_model, load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.data.batches import collate
from lora_cli.data.feed import IndexedFeed
from lora_cli.data.prepare import prepare
from lora_cli.data.prepared import PreparedData, split_in_step
from lora_cli.data.report import data_lines, finding_lines, stream_lines
from lora_cli.data.stream import StreamFeed
from lora_cli.errors import LoraError
from lora_cli.evaluation.packing_check import require_no_leak
from lora_cli.files import human_bytes, require_space
from lora_cli.recipe import Recipe

Collate = Any  # (examples) -> MicroBatch


@dataclass(frozen=True)
class Session:
    recipe: Recipe
    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model: Any
    layers: dict[str, LoRALinear]
    feed: IndexedFeed | StreamFeed
    device: torch.device
    dtype: torch.dtype
    collate: Collate

    @property
    def total_steps(self) -> int:
        train = self.recipe.train
        if isinstance(self.feed, IndexedFeed):
            return self.feed.order.total_steps(train.epochs, train.max_steps)
        assert train.max_steps is not None
        return train.max_steps

    @property
    def data_fingerprint(self) -> str:
        """The same exactly when the run sees the same data; of a stream, when its sources are the same."""
        own = self.data.fingerprint
        return f"{self.feed.fingerprint} {own}" if isinstance(self.feed, StreamFeed) else own

    @property
    def data_files(self) -> dict[str, str]:
        streamed = self.feed.identity if isinstance(self.feed, StreamFeed) else {}
        return {**streamed, **self.data.summary.files}

    @property
    def own_template(self) -> str | None:
        """Text of the chat template that was trained with, where it is not the model's own."""
        return self.feed.own_template if isinstance(self.feed, StreamFeed) else self.data.summary.own_template


def open_session(recipe: Recipe, console: Console) -> Session:
    """Data first (seconds), then the model (minutes). Says what was derived from the recipe as it goes."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    device = pick_device(recipe.device)
    dtype, reason = pick_dtype(recipe.dtype, device)
    source = find_base(recipe.base_model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    with PartialState().main_process_first():  # the others then find it prepared
        data = prepare(recipe, tokenizer, keep=True)
    feed: IndexedFeed | StreamFeed
    if recipe.data.streaming:
        feed = StreamFeed(recipe, tokenizer)
        lines = stream_lines(feed, data, recipe)
    else:
        feed = IndexedFeed(data.train, data.order(recipe), split_in_step(recipe))
        lines = [*data_lines(data, recipe), *finding_lines(data)]
    for number, line in enumerate(lines):
        say(f"{'' if number else 'data':9}{line}")
    say(f"model    {recipe.base_model}, {recipe.quantization}, on {describe_device(device)}")
    model = load_model(
        source,
        quantization=recipe.quantization,
        dtype=dtype,
        device=device,
        double_quantization=recipe.double_quantization,
        trust_remote_code=recipe.trust_remote_code,
    )
    data.require_fit(model.config, source.name)
    if isinstance(feed, StreamFeed):
        feed.require_fit(model.config, source.name)
    layers = attach_from_recipe(model, recipe)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    held = human_bytes(quantized_bytes(model))
    say(f"         compute in {str(dtype).removeprefix('torch.')} ({reason}), {held} held")
    if recipe.quantization == "nf4" and (plain := unquantized_layers(model)):
        say(f"         {len(plain)} layers stay unquantized: bitsandbytes computes their size wrongly on a CPU")
    side_by_side = _layout(model, recipe, device, say)
    trained = sum(parameter.numel() for parameter in adapter_parameters(model))
    say(f"adapter  {len(layers)} layers, {trained:,} trained parameters")
    require_space(Path(recipe.output), disk_needed(recipe, trained), "the run (adapter and checkpoints)")
    pad_id: Any = tokenizer.eos_token_id
    lay_out = partial(collate, packed=side_by_side, pad_id=pad_id, device=device)
    return Session(recipe, source, tokenizer, data, model, layers, feed, device, dtype, lay_out)


def _layout(model: Any, recipe: Recipe, device: torch.device, say: Any) -> bool:
    """Whether examples lie side by side on one row, which needs no padding: tried on the model before it is trusted."""
    try:
        require_no_leak(model, device)
    except LoraError as error:
        if recipe.data.packing:
            raise
        say(f"rows     padded, because {error.what}")
        return False
    how = packed_attention_name(model.config, device, model.dtype)
    say(f"rows     examples side by side without padding, by {how}; each sees only itself (tried on this model)")
    return True


def attach_from_recipe(model: Any, recipe: Recipe) -> dict[str, LoRALinear]:
    adapter = recipe.adapter
    targets = targets_of(model, adapter)
    return attach(model, targets, dropout=adapter.dropout, init=adapter.init, seed=recipe.train.seed)


def disk_needed(recipe: Recipe, trained_parameters: int) -> int:
    """Bytes a run writes at most: fp32 adapters (best, last, one being written) and checkpoints with two moments."""
    adapters = 3 * 4 * trained_parameters
    checkpoints = (recipe.train.keep_checkpoints + 1) * 3 * 4 * trained_parameters
    return adapters + checkpoints + 10_000_000
