"""Tensors that the backward pass makes again: how, noted on the tensor itself, for whoever would save it.

The output of a norm and a gated product are inputs of adapted layers. What made them is kept in any case, so saving
them too would hold the same information twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    """(make, sources), with make(*sources) = tensor. Of a tensor without a note, or changed since: itself."""
    if not torch.compiler.is_compiling():  # compiled, the partition of the graph decides what is made again
        make, sources, versions = vars(tensor).get(_NOTE, (None, (), ()))
        if make is not None and versions == _versions(tensor, *sources):
            return make, sources
    return _itself, (tensor.detach(),)


def _versions(*tensors: Any) -> tuple[int, ...]:
    return tuple(each._version for each in tensors)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
