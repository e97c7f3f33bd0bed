"""The seam to torch's variable-length attention, which only a GPU has: tried on a stand-in with its contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV3Config, Gemma3Config, Gemma4TextConfig, LlamaConfig, Mamba2Config

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
    monkeypatch.setattr(attention, "_CAPABILITY", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    cuda = torch.device("cuda")
    assert attention.varlen_fits(cuda, torch.bfloat16, 64) is fits

    config = LlamaConfig(head_dim=64)
    named = attention.packed_attention_name(config, cuda, torch.bfloat16)
    assert named == ("torch's variable-length attention" if fits else "SDPA with a block mask")
    settings = {"device": cuda, "config": config, "dtype": torch.bfloat16}
    assert attention._by_example(settings) is fits


@pytest.mark.parametrize("widths", [(24, 16), (16, 24)])
def test_heads_whose_values_have_another_width_than_queries(monkeypatch, widths):
    """Latent attention (DeepSeek-V2 and V3: 192 and 128): the kernel takes one width, so the narrower is padded."""
    generator = torch.Generator().manual_seed(0)
    lengths, (wide, narrow) = [5, 1, 9], widths
    query, key = (torch.randn(1, 4, sum(lengths), wide, generator=generator) for _ in "qk")
    value = torch.randn(1, 4, sum(lengths), narrow, generator=generator)
    inputs = attention.packed_inputs(lengths, torch.device("cpu"))

    def call():
        return attention.per_example_attention(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=inputs["cu_seq_lens_q"], max_length_q=9
        )[0]

    def one_width(q, k, v, *rest, **named):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        return stand_in(q, k, v, *rest, **named)

    expected = call()
    monkeypatch.setattr(attention, "varlen_attn", one_width)
    monkeypatch.setattr(attention, "varlen_fits", lambda *_: True)
    out = call()
    assert out.shape == (1, sum(lengths), 4, narrow)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_an_earlier_form_of_the_kernel_is_not_used(monkeypatch):
    """torch 2.10's has no window_size and no enable_gqa: what it cannot be given it must not be called with."""
    import importlib
    import sys
    import types

    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = lambda q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None: q  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    source = importlib.util.find_spec("lora_cli.base.attention")
    assert source is not None
    assert source.loader is not None
    again = importlib.util.module_from_spec(source)
    monkeypatch.setattr(attention.AttentionInterface, "register", lambda *_: None)  # leave the real one in place
    monkeypatch.setattr(attention.AttentionMaskInterface, "register", lambda *_: None)
    source.loader.exec_module(again)
    assert again.varlen_attn is None
    assert attention.varlen_attn is not None


CONFIGS = {
    "llama": (LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=None), 128),
    "deepseek_v3": (DeepseekV3Config(), 192),  # q and k: 128 + 64; v: 128
    "gemma4": (Gemma4TextConfig(), 512),  # 256 in layers with a window, 512 in the others
    "gemma3": (Gemma3Config(), 256),
    "mamba2": (Mamba2Config(), None),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_widest_head_decides(kind):
    """By config alone, also where it differs from layer to layer, where reading it plainly raises an error."""
    config, expected = CONFIGS[kind]
    wide = attention.head_dim(config)
    assert expected is None or wide == expected
    attention.packed_attention_name(config, torch.device("cuda"), torch.float32)


def test_a_row_of_one_example_does_not_wait_for_its_bounds():
    """On a GPU without the kernel. Values on the device meta cannot be read: reading one would be an error."""
    shape, device = (1, 4, 20, 16), "meta"
    query, key, value = (torch.empty(shape, device=device) for _ in "qkv")
    ends = torch.empty(2, dtype=torch.int32, device=device)
    for window in (None, 20, 512):
        out, _ = attention.per_example_attention(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends, sliding_window=window, max_length_q=20
        )
        assert out.shape == (1, 20, 4, 16)
