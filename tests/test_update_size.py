"""How large an update is: without making it, the same number as with it, for every kind of base layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import open_base, with_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.trained import trained_modules
from lora_cli.adapters.update_size import UpdateSize, update_sizes, weight_norm
from lora_cli.base.linear import dense_weight

CPU = torch.device("cpu")


def random_layer(base: nn.Module, rank: int = 3, mask: torch.Tensor | None = None) -> LoRALinear:
    layer = LoRALinear(base, rank=rank, alpha=7, output_mask=mask)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def norm(layer: Any) -> float:
    return layer.update_norm(dense_weight(layer.base_layer))


@pytest.mark.parametrize("rank", [1, 3, 8, 40])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked"])
def test_the_norm_is_that_of_the_dense_update(kind, rank):
    base = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24)
    mask = torch.rand(24, rank, generator=torch.Generator().manual_seed(0)) < 0.5 if kind == "masked" else None
    layer = random_layer(base, rank, mask)
    B = layer.lora_B.double() if mask is None else layer.lora_B.double() * mask
    dense = layer.scaling * (B @ layer.lora_A.double())  # (out, in)
    assert norm(layer) == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-12)
    assert norm(layer) == pytest.approx(layer.delta_weight().norm().item(), rel=1e-5)
    assert weight_norm(dense_weight(base)) == pytest.approx(base.weight.double().norm().item(), rel=1e-6)  # type: ignore[operator]


def test_an_update_that_cancels_is_zero_and_not_an_error():
    """B and A are far from zero, and their product is none: rounding must not take the root of a negative number."""
    layer = random_layer(nn.Linear(16, 24), rank=2)
    with torch.no_grad():
        layer.lora_A[1], layer.lora_B[:, 1] = layer.lora_A[0], -layer.lora_B[:, 0]
    assert norm(layer) == pytest.approx(0, abs=1e-6 * layer.lora_B.norm().item() * layer.lora_A.norm().item())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_of_a_model_every_ratio_is_that_of_the_dense_weights(tiny_llama, quantization):
    model = with_adapter(open_base(tiny_llama, quantization), "all-linear")
    layers = trained_modules(model)
    sizes = update_sizes(layers)
    assert list(sizes) == list(layers)
    for name, layer in layers.items():
        expected = layer.delta_weight().double().norm() / dense_weight(layer.base_layer).double().norm()
        assert sizes[name].ratio == pytest.approx(expected.item(), rel=1e-5)  # delta_weight is fp32


def test_gpt2s_fused_layer_counts_what_its_mask_lets_through(tiny_gpt2):
    model = with_adapter(open_base(tiny_gpt2), projections=["q"])
    masked = [layer for layer in trained_modules(model).values() if layer.output_mask is not None]
    assert masked
    for layer in masked:
        assert norm(layer) == pytest.approx(layer.delta_weight().norm().item(), rel=1e-5)


def test_a_weight_of_zero_makes_the_ratio_infinite_or_zero():
    assert UpdateSize(update=1.0, weight=0.0).ratio == math.inf
    assert UpdateSize(update=0.0, weight=0.0).ratio == 0.0
    assert UpdateSize(update=1.0, weight=4.0).ratio == 0.25
