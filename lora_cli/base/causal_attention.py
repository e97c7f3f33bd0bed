"""Causal attention within each example of a packed row, where torch has no variable-length kernel: mostly on CPUs.

Examples of similar length are padded to one length and computed together, by SDPA. On a CPU in bf16, up to about 1,000
tokens, matrix products take its place: there the backward pass of SDPA's kernel is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.base.remade import followed, keeping_sources

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

    def take(x: Tensor) -> Any:
        return _Take.apply(x[0].transpose(0, 1), places, back, None)

    def attend(*rows: Tensor) -> Tensor:
        outputs = []
        for size, *parts in zip(sizes, *(x.split([each.numel() for each in sizes]) for x in rows), strict=True):
            q, k, v = (x.view(*size, *x.shape[1:]) for x in parts)  # (examples, longest, heads, head_dim)
            sees = None if window is None or window >= size[1] else _window(size[1], window, q.device)
            products = sees is None and products_are_faster(size[1], q.dtype, q.device)
            out: Any = _Causal.apply(q, k, v, scaling) if products else _by_sdpa(q, k, v, sees, scaling)
            outputs.append(out.flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    out = keeping_sources(attend, *(followed(take, x) for x in (query, key, value)))
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


class _Causal(torch.autograd.Function):
    """Keeps query, key and value, and makes the weights P again in the backward pass, block by block.

    query: (examples, length, heads, head_dim); key, value: (examples, length, key_heads, head_dim). With G the gradient
    of the output and D = G Vᵀ: dV = Pᵀ G, dS = P ⊙ (D - rowsum(P ⊙ D)), dQ = scaling · dS K, dK = scaling · dSᵀ Q.
    Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        q, k, v = _by_key_head(query * scaling, key, value)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for rows, end, weights in _blocks(q, k):
            out[:, rows] = weights @ v[:, :end]
        return _by_head(out, (*query.shape[:3], v.shape[2]), key.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        q, k, v = _by_key_head(query * ctx.scaling, key, value)
        (upstream,) = _by_key_head(grad_output, heads=key.shape[2])
        grad_q = torch.empty_like(q)
        dtype = torch.promote_types(k.dtype, torch.float32) if k.shape[1] > _BLOCK else k.dtype  # sums over blocks
        grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        for rows, end, weights in _blocks(q, k):
            grad = upstream[:, rows]
            grad_v[:, :end] += weights.mT @ grad
            of_scores = torch.ops.aten._softmax_backward_data(grad @ v[:, :end].mT, weights, -1, weights.dtype)
            grad_q[:, rows] = of_scores @ k[:, :end]
            grad_k[:, :end] += of_scores.mT @ q[:, rows]
        grads = ((grad_q, query), (grad_k.to(k.dtype), key), (grad_v.to(v.dtype), value))
        grad_query, grad_key, grad_value = (_by_head(grad, x.shape, key.shape[2]) for grad, x in grads)
        return grad_query.mul_(ctx.scaling), grad_key, grad_value, None


def _by_key_head(*tensors: Tensor, heads: int = 0) -> list[Tensor]:
    """Heads that share a key come to lie together: (examples · key_heads, length · group, head_dim).

    heads: how many keys have, if no key is among the tensors.
    """
    heads = heads or tensors[1].shape[2]
    split = (x.view(*x.shape[:2], heads, -1, x.shape[3]).transpose(1, 2) for x in tensors)
    return [x.reshape(x.shape[0] * heads, -1, x.shape[4]) for x in split]


def _by_head(values: Tensor, shape: Sequence[int], key_heads: int) -> Tensor:
    """The way back: (examples, length, heads, head_dim)."""
    examples, length, heads, size = shape
    return values.view(examples, key_heads, length, heads // key_heads, size).transpose(1, 2).reshape(shape)


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
