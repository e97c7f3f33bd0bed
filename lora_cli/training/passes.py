"""What changes a loaded model before it trains: passes in a fixed order, each tried on that model first.

A pass that changes what blocks compute belongs before the compiling of blocks, and one that replaces a forward does it
with `base.surgery.replace_forward`, which checks the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from lora_cli.adapters.attach import attach, leave_out
from lora_cli.adapters.beside import join, watch_inputs
from lora_cli.adapters.reach import left_out_lines, unreached
from lora_cli.adapters.targets import not_adapted, targets_of
from lora_cli.adapters.trained import Trained, cast_once, dropout_keys, trained_parameters
from lora_cli.base.activations import measured, plan_activations
from lora_cli.base.attention import packed_attention_name
from lora_cli.base.compiled import compile_blocks
from lora_cli.base.device import free_memory_bytes
from lora_cli.base.liger import use_liger
from lora_cli.base.linear import features, held_bytes, rounded_lines, unquantized_layers
from lora_cli.base.load import unused_tensors
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.sharding import shard_base
from lora_cli.base.source import BaseSource
from lora_cli.base.stored import stored_quantization
from lora_cli.base.text import hidden_size, positions
from lora_cli.base.trials import model_errors, ordinary_tokens, require_causal, require_no_leak
from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import logit_rule, summed_loss
from lora_cli.files import human_bytes
from lora_cli.quantization import RULES
from lora_cli.recipe import Recipe
from lora_cli.training.optimizer import paging_note
from lora_cli.training.session import Session

_SAMPLE_TOKENS = 64  # enough to see what a token keeps
_ENOUGH_TOKENS = 4096  # of a micro-batch: more are hardly faster
_STATE_BYTES = 12  # of a trained parameter, in the first step: gradient and two moments of Adam
_FREE_SHARE = 0.8  # of free memory, for activations: the rest is for what kernels need while they run

Lines = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Pass:
    """One change of a loaded model, after a trial on it.

    applies: whether recipe and device ask for it. apply: tries it, makes the change, and yields what to say, as (title,
    text); raises LoraError where the trial shows that the model cannot be trained as asked.
    """

    name: str
    apply: Callable[[Session], Lines]
    applies: Callable[[Recipe], bool] = lambda recipe: True


def run_passes(passes: Sequence[Pass], session: Session) -> None:
    for each in passes:
        if each.applies(session.recipe):
            for title, text in each.apply(session):
                session.say(f"{title:9}{text}")


def attach_from_recipe(model: Any, recipe: Recipe) -> dict[str, Trained]:
    adapter = recipe.adapter
    targets = targets_of(model, adapter, recipe.group_size)
    return attach(model, targets, dropout=adapter.dropout, init=adapter.init, seed=recipe.train.seed)


def _adapters(session: Session) -> Lines:
    """Attach adapters, take those out again that no gradient of text reaches, and join those that share an input."""
    model, recipe = session.model, session.recipe
    session.layers = attach_from_recipe(model, recipe)
    dtype = str(model.dtype).removeprefix("torch.")
    yield "", f"compute in {dtype} ({session.why_dtype}), {human_bytes(held_bytes(model))} of weights"
    yield from (("", line) for line in _other_layers(model, recipe, session.source))
    with watch_inputs(session.layers.values()) as beside:
        names = unreached(model, session.layers, lambda: _backward(session))
    left_out = left_out_lines(recipe.adapter.target_modules, names, some=len(names) < len(session.layers))
    if names:
        session.layers = leave_out(model, names)
    join(beside, session.layers.values())
    sizes = [parameter.numel() for parameter in trained_parameters(model)]
    yield "adapter", f"{len(session.layers)} layers, {sum(sizes):,} trained parameters"
    yield from (("", line) for line in left_out)
    if note := paging_note(recipe.train.optimizer, sizes, session.device.type):
        yield "", note


def _sample(model: Any) -> Example:
    ids = ordinary_tokens(model, min(_SAMPLE_TOKENS, positions(model.config) or _SAMPLE_TOKENS), 0).numpy()
    return Example(ids, [(1, len(ids), 1.0)])


def _backward(session: Session) -> None:
    model = session.model
    batch = collate([_sample(model)], packed=False, pad_id=0, device=model.device, dropout=(0, 0))
    with dropout_keys(session.layers, batch.dropout_keys):
        summed_loss(model, batch).backward()


def _other_layers(model: Any, recipe: Recipe, source: BaseSource) -> Iterator[str]:
    """What is to be known of layers that are not adapted, or not held as the recipe says."""
    yield from rounded_lines(model, model.dtype)
    if recipe.quantization != "none" and (plain := unquantized_layers(model)):
        kept = "as the checkpoint stores them" if stored_quantization(source) else "as transformers keeps them"
        size = recipe.group_size
        if RULES[recipe.quantization].groups and (
            odd := [n for n in plain if features(model.get_submodule(n))[0] % size]
        ):
            kept = f"{len(odd)} of them because group_size: {size} does not divide their inputs, first {odd[0]}"
        yield f"{len(plain)} layers stay unquantized, {kept}"
    yield from unused_tensors(model)
    yield from not_adapted(model)


def _kernels(session: Session) -> Lines:
    with model_errors("train.liger_kernel: Liger's kernels fail here", "remove train.liger_kernel"):
        replaced = use_liger(session.model)
    if not any(replaced.values()):
        name = type(session.model).__name__
        what = f"train.liger_kernel: nothing in {name} is what one of Liger's kernels computes"
        raise LoraError(what, fix="remove train.liger_kernel")
    counts = ", ".join(f"{count} {kind}" for kind, count in replaced.items())
    yield "kernels", f"Liger's for {counts} (tested on this model)"


def _recomputation(session: Session) -> Lines:
    save_only_inputs(session.model)
    return iter(())


def _sharding(session: Session) -> Lines:
    """Leave this process its share of the frozen weights, on the device that trains."""
    whole = held_bytes(session.model, frozen_alone=True)
    shard_base(session.model, session.blocks, trained_parameters(session.model), session.device)
    held, processes = held_bytes(session.model, frozen_alone=True), PartialState().num_processes
    yield "", f"each of {processes} processes holds {human_bytes(held)} of {human_bytes(whole)}"


def _attention(session: Session) -> Lines:
    """Require causality; lay examples side by side on one row, without padding, if the model keeps them apart."""
    model, device = session.model, session.device
    require_causal(model, device)
    try:
        require_no_leak(model, device)
    except LoraError as error:
        if session.recipe.data.packing:
            raise
        yield "packing", f"none: examples are padded, because {error.what}"
        return
    session.side_by_side = True
    how = packed_attention_name(model.config, device, model.dtype)
    yield "packing", f"examples side by side without padding, by {how}; each sees only itself (tested on this model)"


def _loss(session: Session) -> Lines:
    if logit_rule(session.model) is None:
        name = type(session.model).__name__
        yield "loss", f"logits of all targets at once: what {name} does to them is not known here"


def _compilation(session: Session) -> Lines:
    compile_blocks(session.blocks, session.device, session.say)
    yield "compile", "transformer blocks, at their first use: this takes minutes once"


def _checkpointing(session: Session) -> Lines:
    """Measure what autograd keeps of each block, plan with it for the largest micro-batch, recompute what has to be."""
    model, train = session.model, session.recipe.train
    lengths = [len(example.ids) for example in session.feed.largest()]
    largest = sum(lengths)
    if train.micro_batch_size == "auto" and train.gradient_checkpointing in ("selective", "offload"):
        largest = min(largest, max(_ENOUGH_TOKENS, *lengths))  # no block is recomputed for more than that
    states = _STATE_BYTES * sum(each.numel() for each in trained_parameters(model))
    budget = train.activation_memory and train.activation_memory * 2**30
    plan = plan_activations(
        train.gradient_checkpointing,
        _kept_of_a_token(session),
        hidden_size(model) * torch.finfo(model.dtype).bits // 8,
        tokens=largest,
        budget_bytes=budget or _FREE_SHARE * (free_memory_bytes(session.device) - states),
    )
    on_host = plan.host_bytes(largest, pinned=session.device.type == "cuda")
    host_free = free_memory_bytes(torch.device("cpu"))
    if on_host > host_free:
        raise LoraError(
            f"train.gradient_checkpointing: offload would hold {human_bytes(on_host)} of {largest:,} tokens in host "
            f"memory, where {human_bytes(host_free)} are free",
            fix="write train.gradient_checkpointing: full, or a smaller train.micro_batch_size or data.max_seq_len",
        )
    plan.apply(session.blocks)
    session.activations = plan
    again = sum(plan.recomputed)
    kept = human_bytes(plan.kept_bytes(largest))
    kept += f", {again} of {len(plan.recomputed)} blocks recomputed" if again else ""
    kept += f" from {human_bytes(on_host)} in host memory" if on_host else ""
    yield "memory", f"activations of up to {largest:,} tokens at once: {kept}"


def _kept_of_a_token(session: Session) -> list[float]:
    """Bytes that autograd keeps of one token in each block. Where blocks are compiled, this compiles them."""
    model, layers, sample = session.model, session.layers, _sample(session.model)
    batch, training = session.collate([sample], dropout=(0, 0)), model.training
    model.train()
    with cast_once(layers, model.dtype), dropout_keys(layers, batch.dropout_keys), measured(session.blocks) as kept:
        try:
            summed_loss(model, batch)
        except Exception as error:
            if not session.recipe.train.compile:
                raise
            what = f"train.compile: the blocks cannot be compiled: {str(error).strip().splitlines()[0][:200]}"
            fix = "write train.compile: false, or see whether a C++ compiler (g++) is missing"
            raise LoraError(what, fix=fix) from error
    model.train(training)
    return [each / len(sample.ids) for each in kept]


# Adapters first: whether a gated MLP can be replaced depends on them, and sharding has to leave them out. Kernels
# before recomputation, which leaves alone what has one. Attention
# after sharding: until then the model may be on a CPU that cannot compute it. Compiling after all that changes what
# blocks compute, and checkpointing around what was compiled, measured as it will run.
PASSES = (
    Pass("adapters", _adapters),
    Pass("kernels", _kernels, lambda recipe: recipe.train.liger_kernel),
    Pass("recomputation", _recomputation, lambda recipe: not recipe.train.compile),
    Pass("sharding", _sharding, lambda recipe: recipe.train.shard_base),
    Pass("attention", _attention),
    Pass("loss", _loss),
    Pass("compilation", _compilation, lambda recipe: recipe.train.compile),
    Pass("checkpointing", _checkpointing),
)
