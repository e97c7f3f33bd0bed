"""What autograd keeps of each transformer block between the forward and the backward pass, and how it is made less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SMALL = 1 << 16  # bytes; moving less than this costs more than it frees


@dataclass(frozen=True)
class ActivationPlan:
    """Of every transformer block, in the model's order: whether it is recomputed, and the bytes a token keeps in it.

    recomputed: only the block's input is kept, and the block is computed again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174). bytes_per_token: kept by autograd where it is not recomputed, inputs_per_token where it is.
    offloaded: what is kept lies in host memory.
    """

    recomputed: tuple[bool, ...]
    bytes_per_token: tuple[float, ...]
    inputs_per_token: float
    offloaded: bool = False

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that all blocks together keep of a micro-batch at the end of its forward pass."""
        each = zip(self.recomputed, self.bytes_per_token, strict=True)
        return round(tokens * sum(min(self.inputs_per_token, b) if again else b for again, b in each))


def plan_activations(
    mode: str,
    bytes_per_token: Sequence[float],
    inputs_per_token: float,
    *,
    tokens: int,
    budget_bytes: float,
    offloaded: bool = False,
) -> ActivationPlan:
    """mode: `none`, `full`, or `selective`: as few blocks recomputed as let `tokens` tokens keep `budget_bytes`.

    The first blocks are recomputed: by their turn in the backward pass what the later ones kept is free again, so that
    the block in work fits there. A block that keeps nothing, because no adapter lies in or below it, stays as it is.
    """
    keeps = [each > 0 for each in bytes_per_token]
    plan = ActivationPlan((False,) * len(keeps), tuple(bytes_per_token), inputs_per_token, offloaded)
    if mode == "none":
        return plan
    for count in range(len(keeps) + 1):
        recomputed = tuple(kept and at < count for at, kept in enumerate(keeps))
        plan = ActivationPlan(recomputed, tuple(bytes_per_token), inputs_per_token, offloaded)
        if mode == "selective" and plan.kept_bytes(tokens) <= budget_bytes:
            break
    return plan


def follow(plan: ActivationPlan, blocks: Sequence[nn.Module], *, to_host: Callable[[Tensor], Tensor]) -> None:
    """Make a model's blocks obey a plan, once. to_host: copies a tensor to host memory, for `plan.offloaded`."""
    for block, recompute in zip(blocks, plan.recomputed, strict=True):
        if plan.offloaded:
            block.forward = _offloading(block, _recomputing(block.forward) if recompute else block.forward, to_host)
        elif recompute:
            block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def _offloading(
    block: nn.Module, forward: Callable[..., Any], to_host: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """What autograd keeps of `forward` goes to host memory and comes back for the backward pass; weights stay."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        weights = _places(block)  # asked each time: those of a sharded base come and go
        moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # with the tensor itself, so that its place stays its

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            place = tensor.untyped_storage().data_ptr()
            if place in weights or tensor.nbytes < _SMALL:
                return tensor.device, tensor
            key = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
            if key not in moved:  # several layers keep the same input
                moved[key] = tensor, to_host(tensor)
            return tensor.device, moved[key][1]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[1].to(kept[0], non_blocking=True)):
            result = forward(*args, **kwargs)
        moved.clear()
        return result

    return call


def _places(block: nn.Module) -> set[int]:
    """Where a block's weights lie, A and B in the compute dtype among them: a step casts them once, for all tokens."""
    cast = (pair for module in block.modules() if (pair := getattr(module, "low_precision", None)) is not None)
    weights = (*block.parameters(), *block.buffers(), *(tensor for pair in cast for tensor in pair))
    return {tensor.untyped_storage().data_ptr() for tensor in weights}


def to_pinned_memory(tensor: Tensor) -> Tensor:
    """A copy in page-locked host memory, which a GPU writes and reads at full speed."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def measured(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within this block of code, what autograd keeps of each transformer block is added up: bytes, each storage once.

    The list is complete when the code is left. Weights of the block in work are not counted.
    """
    kept = [0] * len(blocks)
    seen: set[int] = set()
    alive: list[Tensor] = []
    at: list[int] = []
    weights: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if at and place not in weights and place not in seen:
            seen.add(place)
            alive.append(tensor)  # or its place is given to another
            kept[at[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(block: nn.Module, index: int) -> None:
        at.append(index)
        weights.clear()
        weights.update(_places(block))  # now, because those of a sharded base come and go

    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda *given, index=index: enter(given[0], index)))
        handles.append(block.register_forward_hook(lambda *_: at.clear()))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()
