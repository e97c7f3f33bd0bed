"""Everything a run needs before its first step: data, model, adapter, order. Cheap checks come before dear ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.attach import adapter_parameters, attach
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import find_targets
from lora_cli.base.device import describe_device, pick_device, pick_dtype
from lora_cli.base.linear import quantized_bytes, unquantized_layers
from lora_cli.base.load import checkpoint_activations, load_model, load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.data.batches import collate
from lora_cli.data.feed import Feed, IndexedFeed
from lora_cli.data.gate import KINDS
from lora_cli.data.order import Order
from lora_cli.data.prepare import PreparedData, prepare
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
    feed: Feed
    device: torch.device
    dtype: torch.dtype
    collate: Collate
    total_steps: int


def open_session(recipe: Recipe, console: Console) -> Session:
    """Data first (seconds), then the model (minutes). Says what was derived from the recipe as it goes."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    device = pick_device(recipe.device)
    dtype, reason = pick_dtype(recipe.dtype, device)
    source = find_base(recipe.base_model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    data = prepare(recipe, tokenizer, keep=True)
    order = data.order(recipe)
    total = order.total_steps(recipe.train.epochs, recipe.train.max_steps)
    _say_data(say, recipe, data, order, total)
    say(f"model    {recipe.base_model}, {recipe.quantization}, on {describe_device(device)}")
    model = load_model(
        source,
        quantization=recipe.quantization,
        dtype=dtype,
        device=device,
        double_quantization=recipe.double_quantization,
        trust_remote_code=recipe.trust_remote_code,
    )
    _require_fit(data, model.config, source)
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
    return Session(
        recipe, source, tokenizer, data, model, layers, IndexedFeed(data.train, order), device, dtype, lay_out, total
    )


def _require_fit(data: PreparedData, config: Any, source: BaseSource) -> None:
    """Raises LoraError for an example that the model has no embeddings or no positions for."""
    if data.summary.largest_id >= config.vocab_size:
        raise LoraError(
            "the tokenizer has tokens that the model does not",
            where=str(source.folder),
            fix="use the model's own tokenizer",
        )
    longest, where = data.summary.longest
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise LoraError(
            f"{longest} tokens, but {source.name} sees {positions} at most",
            where=where,
            fix=f"write data.max_seq_len: {positions}, with data.too_long: drop, truncate or split",
        )


def _layout(model: Any, recipe: Recipe, device: torch.device, say: Any) -> bool:
    """Whether examples lie side by side on one row, which needs no padding: tried on the model before it is trusted."""
    try:
        require_no_leak(model, device)
    except LoraError as error:
        if recipe.data.packing:
            raise
        say(f"rows     padded, because {error.what}")
        return False
    say("rows     examples side by side without padding; each sees only itself (tried on this model)")
    return True


def attach_from_recipe(model: Any, recipe: Recipe) -> dict[str, LoRALinear]:
    adapter = recipe.adapter
    targets = find_targets(
        model,
        adapter.target_modules,
        rank=adapter.rank,
        alpha=adapter.alpha,
        projections=adapter.projections,
        exclude_modules=adapter.exclude_modules,
        layers=adapter.layers,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
    )
    return attach(model, targets, dropout=adapter.dropout, init=adapter.init, seed=recipe.train.seed)


def disk_needed(recipe: Recipe, trained_parameters: int) -> int:
    """Bytes a run writes at most: fp32 adapters (best, last, one being written) and checkpoints with two moments."""
    adapters = 3 * 4 * trained_parameters
    checkpoints = (recipe.train.keep_checkpoints + 1) * 3 * 4 * trained_parameters
    return adapters + checkpoints + 10_000_000


def _say_data(say: Any, recipe: Recipe, data: PreparedData, order: Order, total: int) -> None:
    summary = data.summary
    tokens, targets = summary.train.tokens, summary.train.target_tokens
    limit = recipe.data.max_seq_len
    full = tokens / len(order.rows) / limit
    packed = f", packed into {len(order.rows):,} rows of {limit} ({full:.1%} full)" if recipe.data.packing else ""
    for source, form in summary.formats.items():
        say(f"data     {source}: {form}")
    say(f"         {len(data.train):,} examples{packed}; {len(data.validation):,} held out")
    if summary.template is not None:
        say(f"         chat template: {summary.template}; trained turns end in {', '.join(summary.stop_tokens)}")
    say(f"         {tokens:,} tokens, {targets:,} trained ({targets / tokens:.0%})")
    for finding in summary.findings.as_list():
        say(f"         {finding['count']:,} {KINDS[finding['kind']].title}: {summary.findings.rows(finding['kind'])}")
    if summary.findings.counts.get("too_long"):
        done = {"error": "left out", "drop": "left out", "truncate": "cut at the end", "split": "cut into pieces"}
        say(f"         rows above {limit} tokens were {done[recipe.data.too_long]}")
    epochs = total / order.steps_per_epoch
    per_step = tokens / order.steps_per_epoch
    say(f"steps    {total:,} ({epochs:.2f} epochs), about {per_step:,.0f} tokens a step")
