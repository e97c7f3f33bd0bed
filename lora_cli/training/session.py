"""Everything a run needs before its first step: data, model, adapter, order. Cheap checks come before dear ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.attach import adapter_parameters, attach
from lora_cli.adapters.layer import LoRALinear, cast_once, dropout_keys
from lora_cli.adapters.reach import leave_out, left_out_lines, unreached
from lora_cli.adapters.targets import block_lists, not_adapted, targets_of
from lora_cli.base.activations import ActivationPlan, measured, plan_activations
from lora_cli.base.attention import packed_attention_name
from lora_cli.base.compiled import compile_blocks
from lora_cli.base.device import (
    describe_device,
    free_memory_bytes,
    make_memory_errors_real,
    pick_device,
    pick_dtype,
    share_one_heap,
)
from lora_cli.base.linear import holds_nf4_values, quantized_bytes, unquantized_layers
from lora_cli.base.load import load_model, load_tokenizer, unused_tensors
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.sharding import frozen_bytes, require_shardable, shard_base
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import require_quantization, stored_quantization
from lora_cli.base.text import hidden_size, positions, vocabulary
from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.data.feed import IndexedFeed
from lora_cli.data.gate import Weights
from lora_cli.data.prepare import prepare
from lora_cli.data.prepared import PreparedData, split_in_step
from lora_cli.data.report import data_lines, finding_lines, stream_lines
from lora_cli.data.stream import StreamFeed
from lora_cli.errors import LoraError
from lora_cli.evaluation.forgetting import GeneralText, general_text
from lora_cli.evaluation.loss import logit_rule, summed_loss
from lora_cli.evaluation.trials import ordinary_tokens, require_causal, require_no_leak
from lora_cli.files import human_bytes, require_space
from lora_cli.recipe import Recipe
from lora_cli.screen import say_on
from lora_cli.training.optimizer import paging_note

Collate = Any  # (examples) -> MicroBatch
_SAMPLE_TOKENS = 64  # enough to see what a token keeps
_METRICS_BYTES = 300  # of one line
_FREE_SHARE = 0.8  # of free memory, for activations: the rest is for what kernels need while they run


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
    activations: ActivationPlan
    general_text: GeneralText | None

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
    def loss_weights(self) -> Weights | None:
        """Those in force; of a stream, in its first window. None: all are 1."""
        return self.feed.weights if isinstance(self.feed, StreamFeed) else self.data.summary.weights

    @property
    def own_template(self) -> str | None:
        """Text of the chat template that was trained with, where it is not the model's own."""
        return self.feed.own_template if isinstance(self.feed, StreamFeed) else self.data.summary.own_template

    @property
    def prompting(self) -> str:
        """`template` if any source went through a chat template, else `raw`."""
        streamed = isinstance(self.feed, StreamFeed) and self.feed.uses_template
        return "template" if streamed or self.data.summary.template is not None else "raw"


def open_session(recipe: Recipe, console: Console) -> Session:
    """Data first (seconds), then the model (minutes). Says what was derived from the recipe as it goes."""
    say = say_on(console)
    device = pick_device(recipe.device)
    dtype, reason = pick_dtype(recipe.dtype, device)
    if device.type == "cpu":
        share_one_heap()
    make_memory_errors_real(device)
    if recipe.train.shard_base:
        require_shardable(PartialState().num_processes)
    source = find_base(recipe.base_model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    require_quantization(source, recipe.quantization)
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
    processes = PartialState().num_processes
    several = f", {processes} processes" if processes > 1 else ""
    say(f"model    {recipe.base_model}, {recipe.quantization}, on {describe_device(device)}{several}")
    model = load_model(
        source,
        quantization=recipe.quantization,
        dtype=dtype,
        device=torch.device("cpu") if recipe.train.shard_base else device,  # where all of it fits
        double_quantization=recipe.double_quantization,
        trust_remote_code=recipe.trust_remote_code,
    )
    data.require_fit(model.config, source.name)
    if isinstance(feed, StreamFeed):
        feed.require_fit(model.config, source.name)
    unrelated = general_text(tokenizer, model, Path(recipe.data.general_text) if recipe.data.general_text else None)
    layers = attach_from_recipe(model, recipe)
    held = human_bytes(quantized_bytes(model))
    say(f"         compute in {str(dtype).removeprefix('torch.')} ({reason}), {held} held")
    for line in _other_layers(model, recipe, source):
        say(f"         {line}")
    blocks = [block for name in block_lists(model) for block in model.get_submodule(name)]
    if not recipe.train.compile:
        save_only_inputs(model)
    layers, left_out = _those_that_learn(model, layers, recipe.adapter.target_modules)
    if recipe.train.shard_base:
        say(f"         {_spread(model, blocks, device)}")
    require_causal(model, device)
    side_by_side = _layout(model, recipe, device, say)
    trained = sum(parameter.numel() for parameter in adapter_parameters(model))
    say(f"adapter  {len(layers)} layers, {trained:,} trained parameters")
    for line in left_out:
        say(f"         {line}")
    sizes = [parameter.numel() for parameter in adapter_parameters(model)]
    if note := paging_note(recipe.train.optimizer, sizes, device.type):
        say(f"         {note}")
    pad_id: Any = tokenizer.eos_token_id
    lay_out = partial(collate, packed=side_by_side, pad_id=pad_id, device=device)
    if logit_rule(model) is None:
        say(f"loss     logits of all targets at once: what {type(model).__name__} does to them is not known here")
    tokens = sum(len(example.ids) for example in feed.largest())
    if recipe.train.compile:
        compile_blocks(blocks, say)
        say("compile  transformer blocks, at their first use: this takes minutes once")
    plan = _plan_activations(model, blocks, layers, recipe, lay_out, tokens, device)
    say(f"memory   {_describe_plan(plan, tokens)}")
    session = Session(recipe, source, tokenizer, data, model, layers, feed, device, dtype, lay_out, plan, unrelated)
    needed = disk_needed(recipe, trained, session.total_steps)
    require_space(Path(recipe.output), needed, "the run (adapter and checkpoints)")
    say(f"disk     up to {human_bytes(needed)} in {recipe.output}")
    return session


def _those_that_learn(
    model: Any, layers: dict[str, LoRALinear], target_modules: Any
) -> tuple[dict[str, LoRALinear], list[str]]:
    """The adapters that text gives a gradient to, and what to say of the others. Raises LoraError as that does."""
    ids = ordinary_tokens(model, min(_SAMPLE_TOKENS, positions(model.config) or _SAMPLE_TOKENS), 0).numpy()
    sample = [Example(ids, [(1, len(ids), 1.0)])]
    batch = collate(sample, packed=False, pad_id=0, device=model.device, dropout=(0, 0))

    def backward() -> None:
        with dropout_keys(layers, batch.dropout_keys):
            summed_loss(model, batch).backward()

    names = unreached(model, layers, backward)
    lines = left_out_lines(target_modules, names, some=len(names) < len(layers))
    return (leave_out(model, names) if names else layers), lines


def _other_layers(model: Any, recipe: Recipe, source: BaseSource) -> Iterator[str]:
    """What is to be known of layers that are not adapted, or not held as the recipe says."""
    held = sum(holds_nf4_values(module) for module in model.modules())
    if held:
        where = str(model.dtype).removeprefix("torch.")
        yield f"{held} layers hold their NF4 values in {where}: bitsandbytes computes their size wrongly on a CPU"
    if recipe.quantization != "none" and (plain := unquantized_layers(model)):
        kept = "the checkpoint stores" if stored_quantization(source) else "transformers keeps"
        yield f"{len(plain)} layers stay unquantized, as {kept} them"
    yield from unused_tensors(model)
    yield from not_adapted(model)


def _spread(model: Any, blocks: Sequence[nn.Module], device: torch.device) -> str:
    """Leave this process its share of the frozen weights; says how large that is."""
    whole = frozen_bytes(model)
    shard_base(model, blocks, adapter_parameters(model), device)
    processes = PartialState().num_processes
    return f"each of {processes} processes holds {human_bytes(frozen_bytes(model))} of {human_bytes(whole)}"


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


def _plan_activations(
    model: Any,
    blocks: Sequence[nn.Module],
    layers: dict[str, LoRALinear],
    recipe: Recipe,
    lay_out: Collate,
    tokens: int,
    device: torch.device,
) -> ActivationPlan:
    """Measure what autograd keeps of each block, plan with it for micro-batches of `tokens`, make the blocks obey."""
    train = recipe.train
    if train.offload_activations:
        raise LoraError(
            "train.offload_activations is retired", fix="remove it, or use train.gradient_checkpointing: full"
        )
    ids = np.arange(_SAMPLE_TOKENS) % vocabulary(model.config)
    sample = [Example(ids, [(1, _SAMPLE_TOKENS, 1.0)])]
    batch = lay_out(sample, dropout=(0, 0))
    training = model.training
    model.train()
    with cast_once(layers, model.dtype), dropout_keys(layers, batch.dropout_keys), measured(blocks) as kept:
        try:
            summed_loss(model, batch)
        except Exception as error:
            if not train.compile:
                raise
            raise LoraError(
                f"train.compile: the blocks cannot be compiled: {str(error).strip().splitlines()[0][:200]}",
                fix="write train.compile: false, or see whether a C++ compiler (g++) is missing",
            ) from error
    model.train(training)
    hidden = hidden_size(model) * torch.finfo(model.dtype).bits // 8
    budget = train.activation_memory and train.activation_memory * 2**30
    plan = plan_activations(
        train.gradient_checkpointing,
        [each / _SAMPLE_TOKENS for each in kept],
        hidden,
        tokens=tokens,
        budget_bytes=budget or _FREE_SHARE * free_memory_bytes(device),
    )
    plan.apply(blocks)
    return plan


def _describe_plan(plan: ActivationPlan, tokens: int) -> str:
    kept = human_bytes(plan.kept_bytes(tokens))
    text = f"activations of up to {tokens:,} tokens at once: {kept} kept"
    again = sum(plan.recomputed)
    return f"{text}, {again} of {len(plan.recomputed)} blocks recomputed" if again else text


def attach_from_recipe(model: Any, recipe: Recipe) -> dict[str, LoRALinear]:
    adapter = recipe.adapter
    targets = targets_of(model, adapter)
    return attach(model, targets, dropout=adapter.dropout, init=adapter.init, seed=recipe.train.seed)


def disk_needed(recipe: Recipe, trained_parameters: int, steps: int) -> int:
    """Bytes a run writes at most.

    fp32 adapters: best, last, one being written. Checkpoints, each with A and B and two moments, and the metrics of all
    steps: those kept, that of the best step, that of the clock, one being written; the best adapter in them costs
    nothing where links can.
    """
    adapter, metrics = 4 * trained_parameters, _METRICS_BYTES * steps
    checkpoints = (recipe.train.keep_checkpoints + 3) * (3 * adapter + metrics)
    return 3 * adapter + checkpoints + metrics + 10_000_000
