"""Attention within each example of a packed row, by SDPA or matrix products: what torch gives each example alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_cli.base import causal_attention as attention_module
from lora_cli.base.causal_attention import causal_attention, products_are_faster

HEADS, WIDTH = 4, 8
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def inputs(tokens: int, key_heads: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and a gradient of the output; scores have deviation 2.8 · scaling, far from uniform attention."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (drawn(1, heads, tokens, WIDTH).requires_grad_() for heads in (HEADS, key_heads, key_heads))
    return q, k, v, drawn(1, tokens, HEADS, WIDTH)


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scaling: float | None
) -> Tensor:
    """One example at a time, with a mask that is written out."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        at = torch.arange(q.shape[2])
        back = at[:, None] - at
        sees = (back >= 0) & (back < (window or len(at)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


def results(attention: Any, lengths: list[int], key_heads: int, dtype: torch.dtype, *rest: Any) -> list[Tensor]:
    q, k, v, upstream = inputs(sum(lengths), key_heads, dtype)
    out = attention(q, k, v, lengths, *rest)
    return [out, *torch.autograd.grad(out, (q, k, v), upstream)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """The output, and the gradients of q, k and v, which are zero up to rounding where a token sees itself alone."""
    assert_near(actual, expected, tolerance, least=1.0)


@pytest.fixture(params=["SDPA", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two, whatever length and dtype; a window goes to SDPA all the same."""
    monkeypatch.setattr(attention_module, "products_are_faster", lambda *_: request.param == "products")
    return request.param


@pytest.mark.parametrize(
    ("lengths", "key_heads", "window", "scaling", "dtype"),
    [
        ([1], 2, None, None, torch.float64),
        ([127], 1, None, 0.3, torch.float64),  # one block, one key head
        ([128], 4, None, None, torch.float32),
        ([129], 2, None, None, torch.float64),  # a second block of one query
        ([40, 40, 40], 2, None, 0.3, torch.float32),  # a row as it is
        ([300, 5, 200, 128, 1], 2, None, None, torch.float64),  # three buckets, one of them padded
        ([3, 2, 200, 190, 140], 4, 3, None, torch.float32),
        ([300, 5, 200, 128, 1], 2, 200, 0.3, torch.float64),  # shorter than one example, longer than others
        ([32, 1, 7, 20], 1, 1, None, torch.float32),
    ],
    ids=str,
)
def test_it_is_torchs_attention_of_each_example(lengths, key_heads, window, scaling, dtype, way):
    settings = lengths, key_heads, dtype, window, scaling
    assert_same(results(causal_attention, *settings), results(by_torch, *settings), TOLERANCES[dtype])


def test_products_are_for_short_rows_in_bf16_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert products_are_faster(500, torch.bfloat16, cpu)
    assert not products_are_faster(2048, torch.bfloat16, cpu)
    assert not products_are_faster(500, torch.float32, cpu)
    assert not products_are_faster(500, torch.bfloat16, gpu)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 160),
    key_heads=st.sampled_from([1, 2, 4]),
)
def test_any_lengths_and_any_window(way: str, lengths: list[int], window: int | None, key_heads: int):
    settings = lengths, key_heads, torch.float64, window, None
    actual, expected = results(causal_attention, *settings), results(by_torch, *settings)
    for one, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[300, 5, 200, 128, 1], [32, 1, 7, 20]], ids=str)
def test_bf16_is_as_near_as_bf16_can_be(lengths, window):
    """Against fp32 on the same (rounded) values: scores, weights and sums are each rounded to 8 bits, 2⁻⁸."""
    key_heads = 2
    q, k, v, upstream = inputs(sum(lengths), key_heads, torch.bfloat16)
    out = causal_attention(q, k, v, lengths, window, None)
    assert out.dtype == torch.bfloat16
    actual = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    right = by_torch(wide[0], wide[1], wide[2], lengths, window, None)
    assert_same(actual, [right, *torch.autograd.grad(right, wide, upstream.float())], 4 * 2**-8)


@pytest.mark.parametrize(
    ("lengths", "changed", "window"),
    [([130, 7, 90, 7], 0, None), ([130, 7, 90, 7], 3, 3), ([16, 16, 16, 16], 1, None), ([30, 7, 20, 7], 2, None)],
    ids=str,
)
def test_no_example_sees_another(lengths, changed, window, way):
    """Neither its output nor its gradients change by a bit when all of another example does."""
    runs = []
    for replaced in (False, True):
        q, k, v, upstream = (x.detach().clone() for x in inputs(sum(lengths), 2, torch.float32))
        if replaced:
            others = inputs(sum(lengths), 2, torch.float32, seed=1)
            for x, other, dim in zip((q, k, v, upstream), others, (2, 2, 2, 1), strict=True):
                x.split(lengths, dim)[changed].copy_(other.detach().split(lengths, dim)[changed])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = causal_attention(q, k, v, lengths, window, None)
        found = [(out, 1), *((x, 2) for x in torch.autograd.grad(out, leaves, upstream))]
        runs.append([x.split(lengths, dim) for x, dim in found])
    for before, after in zip(*runs, strict=True):
        same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        assert same == [at != changed for at in range(len(lengths))]


def test_products_keep_q_k_and_v_alone():
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    q, k, v, _ = inputs(320, 2, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_attention(q, k, v, [180, 140], None, None)  # in one bucket, with 40 tokens of padding
    assert len({x.data_ptr() for x in kept}) == 3
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in (q, k, v)) * 360 / 320


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out


def test_memory_is_linear_in_the_length():
    """Of q, k and v: four times the length makes four times the largest tensor, not 16 times as scores would."""
    largest = {}
    for length in (512, 2048):
        q, k, v, upstream = inputs(length, 2, torch.float32)
        with LargestTensor() as seen:
            causal_attention(q, k, v, [length], None, None).backward(upstream)
        largest[length] = seen.elements
    assert largest[2048] <= 4.5 * largest[512]
    assert largest[2048] < HEADS * 2048 * 2048 / 8
