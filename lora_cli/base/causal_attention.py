"""Causal attention within each example of a packed row, by matrix products: what CPUs compute.

Faster there than torch's fused kernel, whose backward is slow, and as sparing: scores exist for one block of queries
at a time and are made again in the backward pass, so memory is linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 64  # tokens
_TINY, _FEW = 32, 1024  # tokens of the longest example, of all: there each operation costs more than its arithmetic
_BLOCK = 128  # queries at a time: what lies behind a block is not computed at all


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scaling: float | None
) -> Tensor:
    """query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim).

    lengths: of the examples, in tokens. window: how many tokens back a token sees, itself included.
    Returns (1, tokens, heads, head_dim).
    """
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    longest = max(lengths)
    if longest <= _TINY and sum(lengths) <= _FEW and (window is None or window >= longest):
        return _in_one_call(query, key, value, tuple(lengths), scaling)
    out: Any = _PerExample.apply(query, key, value, tuple(lengths), window, scaling)
    return out.unsqueeze(0)


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float) -> Tensor:
    """The same by torch's fused kernel, all examples padded to the longest: a third of the operations.

    It keeps its result as well, which is why larger micro-batches go another way.
    """
    (bucket,) = _buckets(lengths, query.device)
    q, k, v = (bucket.take(x).transpose(1, 2) for x in (query, key, value))  # (examples, heads, longest, head_dim)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return _put_back([out.transpose(1, 2).flatten(0, 1)], lengths, query.device).unsqueeze(0)


class _PerExample(torch.autograd.Function):
    """Keeps query, key and value, and makes the weights P again in the backward pass.

    With U the gradient of the output and D = U Vᵀ: dV = Pᵀ U, dS = P ⊙ (D - rowsum(P ⊙ D)), dQ = scaling · dS K,
    dK = scaling · dSᵀ Q. Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        window: int | None,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = lengths, window, scaling
        outputs = []
        for bucket in _buckets(lengths, query.device):
            q, k, v = (_by_key_head(bucket.take(x), key.shape[1]) for x in (query, key, value))
            q = q * scaling
            out = q.new_empty(*q.shape[:2], v.shape[2])
            for block in _blocks(q, k, window):
                out[:, block.rows] = block.weights(q, k) @ v[:, block.seen]
            outputs.append(_by_token(out, bucket.examples, k.shape[1]))
        return _put_back(outputs, lengths, query.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        lengths, window, scaling = ctx.settings
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        for bucket in _buckets(lengths, query.device):
            q, k, v = (_by_key_head(bucket.take(x), key.shape[1]) for x in (query, key, value))
            u = bucket.take(upstream.transpose(0, 1).unsqueeze(0), padding_is_zero=True)
            u, q = _by_key_head(u, key.shape[1]), q * scaling
            dq = torch.empty_like(q)
            blocks = list(_blocks(q, k, window))
            wide = q.dtype if len(blocks) == 1 else torch.promote_types(q.dtype, torch.float32)  # sums over blocks
            dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
            for block in blocks:
                weights, above = block.weights(q, k), u[:, block.rows]
                dv[:, block.seen] += weights.mT @ above
                of_weights = above @ v[:, block.seen].mT
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                dq[:, block.rows] = of_scores @ k[:, block.seen]
                dk[:, block.seen] += of_scores.mT @ q[:, block.rows]
            for gradient, x in zip(gradients, (dq.mul_(scaling), dk, dv), strict=True):
                gradient.append(_by_token(x.to(query.dtype), bucket.examples, k.shape[1]))
        dq, dk, dv = (_put_back(x, lengths, query.device).transpose(0, 1).unsqueeze(0) for x in gradients)
        return dq, dk, dv, None, None, None


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """(examples, length, heads, d) → (examples · key_heads, length · group, d): heads that share a key lie together."""
    examples, length, heads, d = x.shape
    split = x.view(examples, length, key_heads, heads // key_heads, d)
    return split.transpose(1, 2).reshape(examples * key_heads, -1, d)


def _by_token(x: Tensor, examples: int, length: int) -> Tensor:
    """The inverse, flat: (examples · length, heads, d)."""
    split = x.view(examples, x.shape[0] // examples, length, -1, x.shape[2])
    return split.transpose(1, 2).reshape(examples * length, -1, x.shape[2])


# ── examples of similar length, computed together ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Bucket:
    """Some examples of a row, padded at their ends to the longest. There a causal token never looks."""

    examples: int
    places: Tensor | None  # (examples · longest,) of each token in the row; None: they are the row as it is
    padding: Tensor | None  # (examples · longest,) bool

    def take(self, x: Tensor, *, padding_is_zero: bool = False) -> Tensor:
        """(1, heads, tokens, head_dim) → (examples, longest, heads, head_dim)."""
        rows = x[0].transpose(0, 1)
        if self.places is not None:
            rows = rows.index_select(0, self.places)
            if padding_is_zero and self.padding is not None:
                rows.masked_fill_(self.padding[:, None, None], 0)
        return rows.reshape(self.examples, -1, *rows.shape[1:])


@lru_cache(maxsize=8)
def _buckets(lengths: tuple[int, ...], device: torch.device) -> list[_Bucket]:
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    buckets = []
    for members in _similar_lengths(lengths):
        longest = lengths[members[0]]
        offsets = torch.arange(longest)
        own = torch.tensor([lengths[at] for at in members])
        padding = offsets >= own[:, None]
        places = starts[members][:, None] + torch.minimum(offsets, own[:, None] - 1)
        as_it_is = len(members) == len(lengths) and members == sorted(members) and not padding.any()
        buckets.append(
            _Bucket(
                len(members),
                None if as_it_is else places.flatten().to(device),
                padding.flatten().to(device) if padding.any() else None,
            )
        )
    return buckets


def _put_back(parts: list[Tensor], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(examples · longest, heads, d) of each bucket → (tokens, heads, d)."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    as_it_is = _buckets(lengths, device)[0].places is None
    return rows if as_it_is else rows.index_select(0, _way_back(lengths, device))


@lru_cache(maxsize=8)
def _way_back(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token of the row is among those of all buckets: (tokens,)."""
    places, real = [], []
    for bucket in _buckets(lengths, device):
        assert bucket.places is not None
        places.append(bucket.places)
        real.append(torch.ones_like(bucket.places, dtype=torch.bool) if bucket.padding is None else ~bucket.padding)
    is_real = torch.cat(real)
    back = torch.empty(sum(lengths), dtype=torch.long, device=device)
    back[torch.cat(places)[is_real]] = is_real.nonzero().flatten()
    return back


def _similar_lengths(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices of examples that are padded to one length: in a bucket the shortest has two thirds of the longest.

    Short ones are together whatever their lengths: padding costs less there than another round of operations.
    """
    buckets: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[buckets[-1][0]] if buckets else 0
        if not buckets or (longest > _SHORT and lengths[at] * 3 < longest * 2):
            buckets.append([])
        buckets[-1].append(at)
    return buckets


# ── blocks of queries ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that any of them sees."""

    rows: slice  # of length · group
    seen: slice  # of length
    mask: Tensor  # (queries, keys), 0 or -inf, for the last keys of those that are seen

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """query: (…, length · group, d), scaled; key: (…, length, d) → (…, rows, seen)."""
        scores = query[:, self.rows] @ key[:, self.seen].mT
        by_query = scores.view(len(scores), len(self.mask), -1, scores.shape[2])  # (…, queries, group, seen)
        by_query[..., -self.mask.shape[1] :] += self.mask[:, None]
        return scores.softmax(-1)


def _blocks(query: Tensor, key: Tensor, window: int | None) -> Iterator[_Block]:
    length = key.shape[1]
    group = query.shape[1] // length
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        masked = end - (start if window is None else first)  # without a window all sees what lies before the block
        mask = _mask(end - start, masked, window, query.dtype, query.device)
        yield _Block(slice(start * group, end * group), slice(first, end), mask)


@lru_cache(maxsize=64)
def _mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf where a query does not see a key, the last of both being the same token: (queries, keys)."""
    at = torch.arange(keys, device=device)
    distance = at[keys - queries :, None] - at
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
