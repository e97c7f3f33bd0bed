"""What autograd keeps of each transformer block for the backward pass, and recomputing blocks to keep less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_cli.base.offload import HostInputs, pinned_bytes
from lora_cli.base.surgery import Forward, replace_forward


@dataclass(frozen=True)
class ActivationPlan:
    """Of every transformer block, in the model's order: whether it is recomputed, and the bytes a token keeps in it.

    recomputed: only the block's input is kept, and the block is computed again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174). bytes_per_token: kept by autograd where it is not recomputed, inputs_per_token where it is.
    offloaded: those inputs are kept in host memory, and on the device no more than two at a time.
    """

    recomputed: tuple[bool, ...]
    bytes_per_token: tuple[float, ...]
    inputs_per_token: float
    offloaded: bool = False

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that all blocks together keep of a micro-batch on the device, at the end of its forward pass."""
        inputs = self._inputs()
        kept = sum(b for again, b in zip(self.recomputed, self.bytes_per_token, strict=True) if not again)
        return round(tokens * (kept + sum(sorted(inputs)[-2:] if self.offloaded else inputs)))

    def host_bytes(self, tokens: int, *, pinned: bool = False) -> int:
        """Bytes that they keep of it in host memory. pinned: as of a GPU."""
        sizes = [round(tokens * each) for each in self._inputs()] if self.offloaded else []
        return sum(map(pinned_bytes, sizes) if pinned else sizes)

    def _inputs(self) -> list[float]:
        each = zip(self.recomputed, self.bytes_per_token, strict=True)
        return [min(self.inputs_per_token, b) for again, b in each if again]

    def apply(self, blocks: Sequence[nn.Module]) -> None:
        """Make a model's blocks recompute what this plan says; once."""
        saved = HostInputs().saved if self.offloaded else nullcontext
        for block, recompute in zip(blocks, self.recomputed, strict=True):
            if recompute:
                replace_forward(block, "checkpointing", partial(_recomputing, saved=saved))


def plan_activations(
    mode: str, bytes_per_token: Sequence[float], inputs_per_token: float, *, tokens: int, budget_bytes: float
) -> ActivationPlan:
    """mode: `none`, `full`, `offload` (full, with the blocks' inputs in host memory), or `selective`: as few blocks
    recomputed as let `tokens` tokens keep `budget_bytes`.

    The first blocks are recomputed: when the backward pass reaches them, what the later ones kept is free again, so
    there is room for the block at work. A block that keeps nothing, as no adapter is in or below it, is left alone.
    """
    keeps = [each > 0 for each in bytes_per_token]
    plan = ActivationPlan((False,) * len(keeps), tuple(bytes_per_token), inputs_per_token)
    if mode == "none":
        return plan
    for count in range(len(keeps) + 1):
        recomputed = tuple(kept and at < count for at, kept in enumerate(keeps))
        plan = ActivationPlan(recomputed, tuple(bytes_per_token), inputs_per_token, offloaded=mode == "offload")
        if mode == "selective" and plan.kept_bytes(tokens) <= budget_bytes:
            break
    return plan


def _recomputing(forward: Forward, saved: Callable[[], AbstractContextManager[None]]) -> Forward:
    """saved: a context in which autograd saves the input."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        hidden, others = args[:1], args[1:]
        with saved():  # of the block's input alone: what is saved within the block has hooks of its own
            return checkpoint(lambda *x: forward(*x, *others, **kwargs), *hidden, use_reentrant=False)

    return call


@contextmanager
def measured(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within this context, add up the bytes that autograd keeps of each transformer block; each storage counts once.

    The list is complete when the context ends. Weights of the block itself do not count.
    """
    kept = [0] * len(blocks)
    seen: set[int] = set()
    alive: list[Tensor] = []
    current: list[int] = []
    weights: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if current and address not in weights and address not in seen:
            seen.add(address)
            alive.append(tensor.detach())  # so that its address is not reused
            kept[current[-1]] += tensor.untyped_storage().nbytes()
        return tensor.detach()  # the graph holds these and `pack`; if they held it, too, it would stay for ever

    def enter(block: nn.Module, index: int) -> None:
        current.append(index)
        weights.clear()
        weights.update(_weight_addresses(block))  # on entry, because those of a sharded base come and go

    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda *given, index=index: enter(given[0], index)))
        handles.append(block.register_forward_hook(lambda *_: current.clear()))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def _weight_addresses(block: nn.Module) -> set[int]:
    """Where a block's weights are in memory, with A and B in the compute dtype: a step casts them once."""
    cast = (pair for module in block.modules() if (pair := getattr(module, "low_precision", None)) is not None)
    weights = (*block.parameters(), *block.buffers(), *(tensor for pair in cast for tensor in pair))
    return {tensor.untyped_storage().data_ptr() for tensor in weights}
