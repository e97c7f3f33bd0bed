"""The seam to torch's variable-length attention, which only a GPU has: tried on a stand-in with its contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lora_cli.base import attention


def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The documented contract: (tokens, heads, dim), examples by their ends, (left, right) windows, shared KV heads."""
    assert q.dim() == 3
    assert cu_q.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == cu_q.diff().max()
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0  # causal
    out = torch.empty_like(q)
    for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        at = torch.arange(end - start)
        distance = at[:, None] - at[None]
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else torch.ones_like(distance, dtype=torch.bool))
        one = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(*one, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(
            0, 1
        )
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_variable_length_attention_is_attention_example_by_example(monkeypatch, window, scaling, kv_heads):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 4]
    shape = lambda heads: (1, heads, sum(lengths), 8)  # noqa: E731
    query, key, value = (torch.randn(shape(h), generator=generator) for h in (4, kv_heads, kv_heads))
    inputs = attention.packed_inputs(lengths, torch.device("cpu"))
    ends, longest = inputs["cu_seq_lens_q"], inputs["max_length_q"]

    def call():
        return attention.per_example_attention(
            torch.nn.Module(), query, key, value, None, 0.0, scaling, ends, window, max_length_q=longest
        )[0]

    expected = call()
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "varlen_fits", lambda *_: True)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-6)


def test_it_fits_only_where_its_kernel_runs():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not attention.varlen_fits(cpu, torch.bfloat16, 64)
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 260), (torch.bfloat16, 60)):
        assert not attention.varlen_fits(cuda, dtype, head_dim)


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_it_needs_ampere_or_later(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    cuda = torch.device("cuda")
    assert attention.varlen_fits(cuda, torch.bfloat16, 64) is fits

    class Config:
        head_dim = 64

    monkeypatch.setattr(attention, "attention_implementation", lambda _config: attention.PER_EXAMPLE)
    named = attention.packed_attention_name(Config(), cuda, torch.bfloat16)
    assert named == ("torch's variable-length attention" if fits else "SDPA with a block mask")
    settings = {"device": cuda, "config": Config(), "dtype": torch.bfloat16}
    assert attention._by_example(settings) is fits
