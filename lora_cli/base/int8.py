"""int8 layers of bitsandbytes, computed through their dequantized weight."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Int8Linear(Linear8bitLt):
    """x Wᵀ + b with W dequantized in the dtype of x, in the forward and the backward pass.

    bitsandbytes' own product quantizes the activations too, and picks outlier columns, both from the whole micro-batch:
    what a token gets then depends on its neighbours, and a loss on how a step is split. Not so here. No dense weight is
    kept between the passes.

    Source of the format, which is unchanged: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (row-wise absmax).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features), in the dtype of x."""
        product: Any = _DequantizedProduct.apply(x, *int8_parts(self))
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _DequantizedProduct(Function):
    """x Wᵀ. Kept for the backward pass: the int8 weight and its scales, which the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, int8: Tensor, row_scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(int8, row_scale)
        return F.linear(x, dequantized(int8, row_scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_output @ dequantized(*ctx.saved_tensors).to(grad_output.dtype), None, None


def int8_parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(int8 weight (out_features, in_features), fp32 row maxima (out_features,)), wherever bitsandbytes keeps them."""
    held, weight = layer.state, layer.weight
    return (held.CB, held.SCB) if held.CB is not None else (weight.CB, weight.SCB)  # type: ignore[union-attr, return-value]


def dequantized(int8: Tensor, row_scale: Tensor) -> Tensor:
    """The weight that int8 values and row maxima stand for, in fp32: (out_features, in_features)."""
    return int8.float().mul_((row_scale.float() / 127.0).unsqueeze(1))


def compute_exactly(model: nn.Module) -> None:
    """Let every int8 layer of the model compute through its dequantized weight from now on."""
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = Int8Linear
