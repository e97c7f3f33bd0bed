"""Causal attention within each example of a packed row, where torch has no variable-length kernel: mostly on CPUs.

Examples of similar length are padded to one length and computed together, by SDPA. On a CPU in bf16, up to about 1,000
tokens, matrix products take its place: there the backward pass of SDPA's kernel is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 64  # tokens; below, padding costs less than another round of operations
_LONG = 1024  # tokens; above, SDPA is faster in bf16 too
_BLOCK = 128  # queries at a time: the keys that come after them are not computed


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scaling: float | None
) -> Tensor:
    """query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim).

    lengths: of the examples, in tokens. window: how many tokens back a token sees, itself included.
    Returns (1, tokens, heads, head_dim).
    """
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    sizes, places, back, padding = _buckets(tuple(lengths), query.device)
    rows = [_Take.apply(x[0].transpose(0, 1), places, back, None) for x in (query, key, value)]
    outputs = []
    for size, *parts in zip(sizes, *(x.split([each.numel() for each in sizes]) for x in rows), strict=True):
        q, k, v = (x.view(*size, *x.shape[1:]) for x in parts)  # (examples, longest, heads, head_dim)
        sees = None if window is None or window >= size[1] else _window(size[1], window, q.device)
        products = sees is None and products_are_faster(size[1], q.dtype, q.device)
        out = _by_products(q, k, v, scaling) if products else _by_sdpa(q, k, v, sees, scaling)
        outputs.append(out.flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Take.apply(out, back, places, padding).unsqueeze(0)


def products_are_faster(length: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Than SDPA, forward and backward, for causal examples of this length. Measured: docs/speed.md."""
    return device.type == "cpu" and dtype == torch.bfloat16 and length <= _LONG


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, scaling: float) -> Tensor:
    settings: Any = {"attn_mask": sees, "is_causal": sees is None, "enable_gqa": q.shape[2] != k.shape[2]}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling, **settings).transpose(1, 2)


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys each query sees: (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def _by_products(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Heads that share a key come to lie together: (examples · key_heads, length · group, head_dim)."""
    examples, length, heads, _ = q.shape
    split = (x.view(examples, length, k.shape[2], -1, x.shape[3]).transpose(1, 2) for x in (q * scaling, k, v))
    out: Any = _Causal.apply(*(x.reshape(examples * k.shape[2], -1, x.shape[4]) for x in split))
    return out.view(examples, k.shape[2], length, -1, v.shape[3]).transpose(1, 2).reshape(examples, length, heads, -1)


class _Causal(torch.autograd.Function):
    """Keeps query (scaled), key and value, and makes the weights P again in the backward pass, block by block.

    With G the gradient of the output and D = G Vᵀ: dV = Pᵀ G, dS = P ⊙ (D - rowsum(P ⊙ D)), dQ = dS K, dK = dSᵀ Q.
    Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(query, key, value)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for rows, end, weights in _blocks(query, key):
            out[:, rows] = weights @ value[:, :end]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        dtype = (
            torch.promote_types(key.dtype, torch.float32) if key.shape[1] > _BLOCK else key.dtype
        )  # sums over blocks
        grad_key, grad_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        for rows, end, weights in _blocks(query, key):
            grad = grad_output[:, rows]
            grad_value[:, :end] += weights.mT @ grad
            of_scores = torch.ops.aten._softmax_backward_data(grad @ value[:, :end].mT, weights, -1, weights.dtype)
            grad_query[:, rows] = of_scores @ key[:, :end]
            grad_key[:, :end] += of_scores.mT @ query[:, rows]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Blocks of queries: (their rows, how many keys they see, the weights of these: (…, rows, keys))."""
    length, group = key.shape[1], query.shape[1] // key.shape[1]
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        rows = slice(start * group, end * group)
        scores = query[:, rows] @ key[:, :end].mT
        scores.view(len(scores), end - start, group, end)[..., start:] += _later(end - start, query.dtype)[:, None]
        yield rows, end, scores.softmax(-1)


@lru_cache(maxsize=64)
def _later(length: int, dtype: torch.dtype) -> Tensor:
    """-inf where a key comes after the query, else 0: (length, length)."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)


class _Take(torch.autograd.Function):
    """x.index_select(0, index); x itself without an index.

    back: one place of each row of x in the result, whose gradient it gets. padding: rows of x that get none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor | None, back: Any, padding: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.back, ctx.padding = back, padding
        return x.view_as(x) if index is None else x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grad_output if ctx.back is None else grad_output.index_select(0, ctx.back)
        return grad if ctx.padding is None else grad.masked_fill_(ctx.padding[:, None, None], 0), None, None, None


@lru_cache(maxsize=8)
def _buckets(lengths: tuple[int, ...], device: torch.device) -> tuple[list[torch.Size], Any, Any, Any]:
    """Buckets of examples of similar length, padded at their ends to the longest, where a causal token never looks.

    Returns their sizes, (examples, longest); for each place in them its token of the row, for each token its place, and
    which places are padding: None, all three, where the row is one bucket as it is. In a bucket the shortest has two
    thirds of the longest, or all are short.
    """
    buckets: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[buckets[-1][0]] if buckets else 0
        if not buckets or (longest > _SHORT and lengths[at] * 3 < longest * 2):
            buckets.append([])
        buckets[-1].append(at)
    tokens = torch.arange(sum(lengths), device=device).split(lengths)
    padded = [torch.nn.utils.rnn.pad_sequence([tokens[at] for at in each], True, -1) for each in buckets]
    sizes = [each.shape for each in padded]
    if len(set(lengths)) == 1:
        return sizes, None, None, None
    places = torch.cat([each.cummax(1).values.flatten() for each in padded])  # padding repeats the last token
    marked = torch.cat([each.flatten() for each in padded])
    return sizes, places, marked.argsort()[len(marked) - sum(lengths) :], marked < 0
