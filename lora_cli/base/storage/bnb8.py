"""int8 as bitsandbytes stores it, a scale a row (Dettmers et al. 2022, arXiv:2208.07339, section 2.1), made exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.storage.kind import DequantizedProduct, Storage, is_a

_PART = re.compile(r"(.+\.)(SCB|weight_format)")


class Bnb8(Storage):
    name = "int8"

    def is_layer(self, module: nn.Module) -> bool:
        return is_a(module, "Linear8bitLt")

    def dense(self, layer: nn.Module) -> Tensor:
        return _dequantized(*_parts(layer))

    def prepare(self, layer: nn.Module) -> None:
        if type(layer).__name__ == "Linear8bitLt":
            layer.__class__ = _exact_layer()

    def load_settings(self, dtype: torch.dtype, double: bool, group_size: int = 32) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)

    def stated(self, settings: dict[str, Any]) -> str | None:
        return self.name if settings.get("load_in_8bit") else None

    def beside(self, name: str) -> tuple[str, str] | None:
        found = _PART.fullmatch(name)
        return (f"{found[1]}weight", found[2]) if found else None

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        return _dequantized(weight, beside["SCB"])

    def rounded(self, weight: Tensor, double: bool) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        return _dequantized(*int8_vectorwise_quant(weight.half())[:2])

    def bits(self, value_bytes: int, double: bool, group_size: int = 32) -> float:
        return 8  # the scale of a row is next to nothing

    def scale_bytes(self, layer: nn.Module) -> int:
        return _parts(layer)[1].nbytes


def _parts(layer: Any) -> tuple[Tensor, Tensor]:
    """(int8 weight (out_features, in_features), fp32 row maxima (out_features,)), wherever bitsandbytes keeps them."""
    held, weight = layer.state, layer.weight
    return (held.CB, held.SCB) if held.CB is not None else (weight.CB, weight.SCB)


def _dequantized(int8: Tensor, row_scale: Tensor) -> Tensor:
    """The weight that int8 values and row maxima stand for, in fp32: (out_features, in_features)."""
    return int8.float().mul_((row_scale.float() / 127.0).unsqueeze(1))


@cache
def _exact_layer() -> Any:
    """The class of layers that compute x Wᵀ + b with W dequantized in the dtype of x, forward and backward.

    bitsandbytes' own product quantizes the activations too, and picks outlier columns, both from the whole micro-batch:
    what a token gets then depends on its neighbours, and a loss on how a step is split. Not so here. No dense weight is
    kept between the passes.
    """
    from bitsandbytes.nn import Linear8bitLt

    class Int8Linear(Linear8bitLt):
        def forward(self, x: Tensor) -> Tensor:
            """x: (..., in_features) → (..., out_features), in the dtype of x."""
            product: Any = DequantizedProduct.apply(x, _dequantized, *_parts(self))
            return product if self.bias is None else product + self.bias.to(product.dtype)

    return Int8Linear
