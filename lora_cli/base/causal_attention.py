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
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 128  # queries at a time: what lies behind a block is not computed at all


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scaling: float | None
) -> Tensor:
    """query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim).

    lengths: of the examples, in tokens. window: how many tokens back a token sees, itself included.
    Returns (1, tokens, heads, head_dim).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Any = _PerExample.apply(query, key, value, tuple(lengths), window, scaling)
    return out.unsqueeze(0)


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
            q, k, v = (bucket.take(x) for x in (query, key, value))
            out = q.new_empty(*q.shape[:3], v.shape[3])
            for block in _blocks(q, k, window):
                out[:, block.rows] = block.ungrouped(block.weights(scaling) @ block.keys(v))
            outputs.append(out)
        return _put_back(outputs, lengths, query.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        lengths, window, scaling = ctx.settings
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        for bucket in _buckets(lengths, query.device):
            q, k, v = (bucket.take(x) for x in (query, key, value))
            u = bucket.take(upstream.transpose(0, 1).unsqueeze(0), padding_is_zero=True)
            dq, dk, dv = (torch.zeros_like(x, dtype=_sum_dtype(x, q.shape[1])) for x in (q, k, v))
            for block in _blocks(q, k, window):
                weights, above = block.weights(scaling), block.queries(u)
                block.add(dv, weights.mT @ above)
                of_weights = above @ block.keys(v).mT
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                dq[:, block.rows] = block.ungrouped(of_scores @ block.keys(k) * scaling).to(dq.dtype)
                block.add(dk, of_scores.mT @ (block.queries(q) * scaling))
            for gradient, x in zip(gradients, (dq, dk, dv), strict=True):
                gradient.append(x.to(query.dtype))
        dq, dk, dv = (_put_back(x, lengths, query.device).transpose(0, 1).unsqueeze(0) for x in gradients)
        return dq, dk, dv, None, None, None


def _sum_dtype(x: Tensor, length: int) -> torch.dtype:
    """Sums over several blocks are kept in fp32."""
    return x.dtype if length <= _BLOCK else torch.promote_types(x.dtype, torch.float32)


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
    """(examples, longest, heads, head_dim) of each bucket → (tokens, heads, head_dim)."""
    buckets = _buckets(lengths, device)
    flat = [part.flatten(0, 1) for part in parts]
    rows = flat[0] if len(flat) == 1 else torch.cat(flat)
    return rows if buckets[0].places is None else rows.index_select(0, _way_back(lengths, device))


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
    """Indices of examples that are padded to one length: in a bucket the shortest has two thirds of the longest."""
    buckets: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not buckets or lengths[at] * 3 < lengths[buckets[-1][0]] * 2:
            buckets.append([])
        buckets[-1].append(at)
    return buckets


# ── blocks of queries ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Block:
    """Some queries and the keys that any of them sees. Query heads that share a key head are rows of one product."""

    query: Tensor  # (examples, length, heads, head_dim)
    key: Tensor  # (examples, length, key_value_heads, head_dim)
    rows: slice
    seen: slice
    window: int | None

    def queries(self, x: Tensor) -> Tensor:
        """(examples, length, heads, d) → (examples · key_value_heads, group · rows, d)."""
        examples, _, key_heads, _ = self.key.shape
        return x[:, self.rows].transpose(1, 2).reshape(examples * key_heads, -1, x.shape[3])

    def keys(self, x: Tensor) -> Tensor:
        """(examples, length, key_value_heads, d) → (examples · key_value_heads, seen, d)."""
        return x[:, self.seen].transpose(1, 2).flatten(0, 1)

    def ungrouped(self, x: Tensor) -> Tensor:
        """The inverse of `queries`, for its rows alone."""
        return x.view(len(self.query), self.query.shape[2], -1, x.shape[2]).transpose(1, 2)

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add what belongs to the keys, in the shape of `keys`, to their places in all of them."""
        examples, _, heads, d = total.shape
        total[:, self.seen] += x.view(examples, heads, -1, d).transpose(1, 2)

    def weights(self, scaling: float) -> Tensor:
        """(examples · key_value_heads, group · rows, seen)."""
        scores = (self.queries(self.query) * scaling) @ self.keys(self.key).mT
        rows, seen = (torch.arange(part.start, part.stop, device=scores.device) for part in (self.rows, self.seen))
        distance = rows[:, None] - seen[None, :]
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        scores.view(-1, len(rows), len(seen)).masked_fill_(hidden, float("-inf"))
        return scores.softmax(-1)


def _blocks(query: Tensor, key: Tensor, window: int | None) -> Iterator[_Block]:
    length = query.shape[1]
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(query, key, slice(start, end), slice(first, end), window)
