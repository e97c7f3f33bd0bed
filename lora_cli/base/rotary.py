"""Rotary embeddings, which a model's attention calls by name: another function in that place, of one module alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.remade import note_followed
from lora_cli.base.surgery import Forward, forward_layers

_NAME = "apply_rotary_pos_emb"  # the function's name in the code of most architectures


def rotating_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose own forward calls a rotary embedding by that name."""
    for module in model.modules():
        plain: Any = type(module).forward
        named = isinstance(plain, FunctionType) and _NAME in plain.__code__.co_names and _NAME in plain.__globals__
        if named and "forward" not in vars(module):
            yield module


def rotary_forward(attention: nn.Module, rotate: Callable[..., Any], _: Forward) -> Forward:
    """The forward of this attention's class, with `rotate(own, …)` in place of the function that it knows by name."""
    plain: Any = type(attention).forward
    known = plain.__globals__ | {_NAME: partial(rotate, plain.__globals__[_NAME])}
    made = FunctionType(plain.__code__, known, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made.__get__(attention)


def noting_rotary(attention: nn.Module) -> Callable[..., Any] | None:
    """What notes on queries and keys that are made again, as normed ones are, that they are so when rotated, too.

    None where nothing in this attention is made again, or its function does not rotate one as it does two.
    """
    own: Any = type(attention).forward.__globals__[_NAME]
    normed = any("recomputation" in forward_layers(each) for each in attention.children())
    return _noted if normed and (_takes_one(own) or _rotates_one_as_two(own)) else None


def _noted(own: Forward, *given: Any, **named: Any) -> Any:
    made = own(*given, **named)
    if _takes_one(own):
        x, *rest = given
        return note_followed(made, lambda x, *angles: own(x, *angles, **named), x, *rest)
    if len(given) != 4 or named:  # a call that was not tried
        return made
    return tuple(note_followed(y, partial(_one, own), x, *given[2:]) for x, y in zip(given[:2], made, strict=True))


def _takes_one(own: Any) -> bool:
    """Whether it is called with queries, then with keys, and the angles."""
    return isinstance(own, FunctionType) and own.__code__.co_varnames[1:3] == ("cos", "sin")


def _one(own: Forward, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (batch, heads, tokens, size) alone, beside none."""
    return own(x, x[:, :0], cos, sin)[0]


def _rotates_one_as_two(own: Forward) -> bool:
    """Tried on random queries and keys: whether each comes out as both do, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    q, k, *angles = (
        torch.randn(shape, generator=generator) for shape in ((1, 3, 5, 8), (1, 2, 5, 8), *[(1, 5, 8)] * 2)
    )
    try:
        both = own(q, k, *angles)
        return all(torch.equal(y, _one(own, x, *angles)) for x, y in zip((q, k), both, strict=True))
    except Exception:  # any architecture's own code: left as it is
        return False
