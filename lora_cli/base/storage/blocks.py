"""What ways of storing weights in GGUF's blocks share: a layer, and how transformers' loader makes such layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.base.storage.kind import DequantizedProduct, whole

BLOCK = 32  # weights
LAYERS: dict[str, Any] = {}  # classes of layers by the name of their kind, which each puts here


class BlockLinear(nn.Module):
    """x Wᵀ + b with W made of its parts in fp32 and rounded to the dtype of x, forward and backward; it is not kept.

    The parts are parameters of its `names`, without gradients.
    """

    names: ClassVar[tuple[str, ...]]
    transposed = False

    def __init__(self, in_features: int, bias: nn.Parameter | None, **parts: Tensor):
        super().__init__()
        self.in_features, self.out_features = in_features, len(parts["weight"])
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part, requires_grad=False))
        self.bias = bias

    @staticmethod
    @abstractmethod
    def dequantized(*parts: Tensor) -> Tensor:
        """(out_features, in_features) in fp32, bit for bit what llama.cpp reads in the blocks."""

    def quantized(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts of a weight as the checkpoint stores it. Asked only of a kind that has `load_settings`."""
        raise AssertionError("no weight is quantized so")

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.in_features // self.parts()[1].shape[1]

    def parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features), in the dtype of x."""
        product: Any = DequantizedProduct.apply(x, self.dequantized, *self.parts())
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"


def dense_of(layer: Any) -> Tensor:
    return layer.dequantized(*(whole(part) for part in layer.parts()))


@cache
def settings_class() -> Any:
    """What makes transformers build such layers, as it does for bitsandbytes.

    Of `kinds`, by the layers' names, the parts themselves are loaded; without it every linear layer with whole groups
    is of `kind`, and each weight is quantized as it is read.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

    method: Any = "lora_blocks"

    @register_quantization_config(method)
    class Settings(QuantizationConfigMixin):
        def __init__(self, kind: str = "", group_size: int = BLOCK, kinds: Mapping[str, str] | None = None):
            self.quant_method, self.kind, self.group_size, self.kinds = method, kind, group_size, kinds

    class Quantize(ConversionOps):
        def convert(self, input_dict: dict[str, Any], model: Any = None, **more: Any) -> dict[str, Tensor]:  # type: ignore[override]
            ((name, value),) = input_dict.items()
            value = value[0] if isinstance(value, list) else value
            prefix = name.removesuffix("weight")
            layer = model.get_submodule(prefix.removesuffix("."))
            return {f"{prefix}{key}": part for key, part in zip(layer.names, layer.quantized(value), strict=True)}

    @register_quantizer(method)
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> Any:
            settings: Any = self.quantization_config
            size, kinds = settings.group_size, settings.kinds
            kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # as for NF4
            for name, layer in list(model.named_modules()):
                transposed = isinstance(layer, Conv1D)
                if not (transposed or type(layer) is nn.Linear):
                    continue
                inputs, outputs = layer.weight.shape if transposed else layer.weight.shape[::-1]
                with torch.device("meta"):
                    if kinds is not None and name in kinds:
                        own = LAYERS[kinds[name]](inputs, outputs, layer.bias)
                    elif kinds is None and should_convert_module(name, kept) and inputs % size == 0:
                        own = LAYERS[settings.kind](inputs, outputs, layer.bias, size, transposed=transposed)
                    else:
                        continue
                model.set_submodule(name, own)
            return model

        def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
            layer, _, name = param_name.rpartition(".")
            settings: Any = self.quantization_config
            return settings.kinds is None and name == "weight" and isinstance(model.get_submodule(layer), BlockLinear)

        def get_quantize_ops(self) -> Any:
            return Quantize()

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Settings
