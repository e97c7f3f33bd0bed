"""Tensors that the backward pass makes again: how, noted on the tensor itself, for whoever would save it.

The output of a norm and a gated product are inputs of adapted layers, and normed queries and keys, rotated, those of
attention. What made them is kept in any case, so saving them too would hold the same information twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

_NOTE = "_made_again"  # on a tensor: what makes it, from which tensors, and their versions

Make = Callable[..., Tensor]


def note_how_made(tensor: Tensor, make: Make, *sources: Tensor) -> Tensor:
    """Note that `make(*sources)`, without gradients, gives this tensor again, bit for bit; returns the tensor.

    sources are kept by whoever saves the tensor, so they should be what autograd keeps for its maker anyway.
    """
    detached = tuple(each.detach() for each in sources)  # or the tensor would hold the graph that leads to it
    vars(tensor)[_NOTE] = (make, detached, _versions(tensor, *detached))
    return tensor


def how_made(tensor: Tensor) -> tuple[Make, tuple[Tensor, ...]]:
    """(make, sources), with make(*sources) = tensor. Of a tensor without a note, or changed since: itself.

    A view of a tensor with a note is made again as a view of that.
    """
    if not torch.compiler.is_compiling():  # compiled, the partition of the graph decides what is made again
        noted = tensor if _NOTE in vars(tensor) or tensor._base is None else tensor._base
        make, sources, versions = vars(noted).get(_NOTE, (None, (), ()))
        if make is not None and versions == _versions(noted, *sources):
            return (make if noted is tensor else _view_of(make, noted, tensor)), sources
    return _itself, (tensor.detach(),)


def forget_how_made(module: nn.Module) -> None:
    """What a module returns is kept itself by whoever saves it: for one whose weights are not there by then."""

    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for each in tree_leaves(output):
            if isinstance(each, Tensor):
                for noted in (each, each._base):
                    _ = noted is not None and vars(noted).pop(_NOTE, None)

    module.register_forward_hook(after)


def is_remade(tensor: Tensor) -> bool:
    """Whether something else makes it again."""
    return how_made(tensor)[0] is not _itself


def followed(step: Make, x: Tensor) -> Tensor:
    """step(x), with a note where x has one: what makes x again, and step. step holds no x of its own."""
    return note_followed(step(x), step, x)


def note_followed(made: Tensor, step: Make, x: Tensor, *others: Tensor) -> Tensor:
    """Note on `made`, which is step(x, *others) bit for bit, that it is made again where x is; returns it."""
    if not is_remade(x):
        return made
    make, sources = how_made(x)
    count = len(sources)
    return note_how_made(made, lambda *kept: step(make(*kept[:count]), *kept[count:]), *sources, *others)


def keeping_sources(function: Make, *inputs: Tensor) -> Tensor:
    """function(*inputs), one tensor; of inputs that are made again, what makes them is kept and not they.

    The function may save what it likes, inputs and views of them, by autograd's means alone; its own code computes
    forward and backward.
    """
    if not any(each.requires_grad and is_remade(each) for each in inputs):
        return function(*inputs)
    made: Any = _KeepingSources.apply(function, [how_made(each) for each in inputs], *inputs)
    return made


class _KeepingSources(torch.autograd.Function):
    """Runs a function with a graph of its own, whose saved tensors are kept here, or made again.

    The inner graph holds places instead of tensors, so what is kept passes through whatever hooks are around this
    function, as those of recomputed blocks.
    """

    @staticmethod
    def forward(ctx: Any, function: Make, hows: list[Any], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        again = {at: x for at, (x, how) in enumerate(zip(inputs, hows, strict=True)) if how[0] is not _itself}
        # What the places stand for while one of the passes runs; emptied then, as the inner graph holds both hooks.
        ctx.held = held = _Held(inputs={_address(x): (at, x) for at, x in again.items() if _fills_its_storage(x)})

        def pack(tensor: Tensor) -> Any:
            at, x = held.inputs.get(_address(tensor), (None, tensor))
            if at is not None:
                held.again.add(at)
                return at, _place(tensor, x)
            held.kept.append(tensor.detach())
            return len(held.kept) - 1

        def unpack(place: Any) -> Tensor:
            return held.kept[place] if isinstance(place, int) else _at(place[1], held.made[place[0]])

        begin = torch.empty(0, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            own: Any = [_Origin.apply(begin, x) if x.requires_grad else x.detach() for x in inputs]
            out = function(*own)
        edge = torch.autograd.graph.get_gradient_edge
        ctx.out, ctx.origins = edge(out), [edge(x) if x.requires_grad else None for x in own]
        ctx.save_for_backward(*held.kept, *(source for at in held.again for source in hows[at][1]))
        ctx.kept, ctx.again = len(held.kept), [(at, hows[at][0], len(hows[at][1])) for at in held.again]
        held.__init__()
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, held = iter(ctx.saved_tensors), ctx.held
        held.kept = list(islice(saved, ctx.kept))
        held.made = {at: make(*islice(saved, count)) for at, make, count in ctx.again}
        wanted = [each for each in ctx.origins if each is not None]
        try:  # nothing is gained by freeing the inner graph
            found = iter(torch.autograd.grad(ctx.out, wanted, grad_output, retain_graph=True, allow_unused=True))
        finally:
            held.__init__()
        return None, None, *(None if each is None else next(found) for each in ctx.origins)


@dataclass
class _Held:
    inputs: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # by address: which it is, and itself
    kept: list[Tensor] = field(default_factory=list)
    again: set[int] = field(default_factory=set)  # which inputs were to be saved
    made: dict[int, Tensor] = field(default_factory=dict)


class _Origin(torch.autograd.Function):
    """Where the inner graph begins: x, without a leaf that would hold it."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fills_its_storage(tensor: Tensor) -> bool:
    """Whether what lies in its storage is this tensor alone."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and _address(tensor) != 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _view_of(make: Make, noted: Tensor, view: Tensor) -> Make:
    """What makes the view again, where `make` makes what it is a view of."""
    place = _place(view, noted)
    return lambda *sources: _at(place, make(*sources))


def _place(view: Tensor, of: Tensor) -> tuple[Any, ...]:
    return of.stride(), view.size(), view.stride(), view.storage_offset() - of.storage_offset()


def _at(place: tuple[Any, ...], made: Tensor) -> Tensor:
    """The view at this place of what was made again, which may lie in memory in another order."""
    strides, size, stride, offset = place
    if made.stride() != strides:
        made = made.new_empty_strided(made.size(), strides).copy_(made)
    return made.as_strided(size, stride, made.storage_offset() + offset)


def _versions(*tensors: Any) -> tuple[int, ...]:
    return tuple(each._version for each in tensors)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
