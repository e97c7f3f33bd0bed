"""4 bits in groups as GGUF's Q4_1 holds them: w = d · q + m, with q of 4 bits and d and m of a group in fp16.

An update that is the same for all weights of a group is a change of m, so the merged weight is stored in the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.storage.kind import DequantizedProduct, Storage, whole
from lora_cli.errors import LoraError

BLOCK = 32  # weights that Q4_1 packs together, whatever the group: byte i holds weight i and, above it, weight i + 16
_SHRUNK = (1.0, 0.98, 0.95, 0.92, 0.88, 0.84, 0.8)  # ranges that are tried, of a group's own
_AT_ONCE = 2**19  # weights
_LEAST = 1e-12  # of a range; below it a group counts as equal numbers


class Int4(Storage):
    name = "int4"
    rounds_alone = False  # an update is added to offsets that the loaded layer holds
    weights_per_number = 2

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, Int4Linear)

    def dense(self, layer: nn.Module) -> Tensor:
        return dequantize(*(whole(part) for part in layer.parts()))  # type: ignore[operator]

    def prepare(self, layer: Any) -> None:
        """Raises LoraError for a weight beyond what d and m can hold; transformers would hide that while it loads."""
        if not all(bool(each.isfinite().all()) for each in (layer.d, layer.m)):
            what = "a weight is too large for int4, whose scales and offsets are fp16 (up to 65504)"
            raise LoraError(what, fix="write another quantization")

    def same_on(self, in_features: int, device: str) -> bool:
        """Rows that are not whole blocks stay as they are, on every device."""
        return in_features % BLOCK == 0

    def load_settings(self, dtype: torch.dtype, double: bool, group_size: int = BLOCK, given: bool = False) -> Any:
        """given: the weights that are loaded are in int4 already, as weight, d and m."""
        return _settings_class()(group_size, given)

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("no checkpoint stores weights so")

    def bits(self, value_bytes: int, double: bool, group_size: int = BLOCK) -> float:
        return 4 + 32 / group_size


class Int4Linear(nn.Module):
    """x Wᵀ + b with W = d · q + m, made in fp32 and rounded to the dtype of x, forward and backward; it is not kept.

    weight: (out, in / 2) of uint8; d, m: (out, in / group_size) of fp16. No gradients. transposed: whether the
    checkpoint stores the layer as GPT-2 does, (in, out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        group_size: int = BLOCK,
        *,
        transposed: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.weight = nn.Parameter(torch.empty(out_features, in_features // 2, dtype=torch.uint8), requires_grad=False)
        scale = torch.empty(out_features, in_features // group_size, dtype=torch.float16)
        self.d, self.m = (nn.Parameter(each, requires_grad=False) for each in (scale, scale.clone()))
        self.bias = bias

    @property
    def group_size(self) -> int:
        return self.in_features // self.m.shape[1]

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.d, self.m

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features), in the dtype of x."""
        product: Any = DequantizedProduct.apply(x, dequantize, *self.parts())
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"


def dequantize(packed: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """d · q + m in fp32: (out_features, in_features), bit for bit what llama.cpp reads in these blocks."""
    rows = len(packed)
    blocks = packed.view(rows, -1, 1, BLOCK // 2)
    q = torch.cat([blocks & 15, blocks >> 4], 2).view(rows, d.shape[1], -1)
    return (q.float() * d.float().unsqueeze(-1) + m.float().unsqueeze(-1)).view(rows, -1)


def quantize(weight: Tensor, group_size: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, d, m) of a weight (out_features, in_features), near it in squares.

    For each of several ranges around the middle of a group the nearest q is taken, then d and m by least squares in q,
    then q again for these, rounded to fp16; the best of all is kept. The idea is that of llama.cpp's quantizers. The
    group's whole range, without least squares, is one of them: what is kept is never worse than rounding.
    Sums are made in float64, so that all devices choose alike. Of numbers beyond fp16 d and m are infinite.
    """
    outputs, inputs = weight.shape
    groups = weight.detach().reshape(-1, group_size)
    made = [_quantized(part.float()) for part in groups.split(max(1, _AT_ONCE // group_size))]
    q, d, m = (torch.cat(each) for each in zip(*made, strict=True))
    low, high = q.view(-1, 2, BLOCK // 2).unbind(1)
    return (low | high << 4).view(outputs, inputs // 2), d.view(outputs, -1), m.view(outputs, -1)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, d, m of groups (groups, group_size), in uint8 and fp16."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle, half, n = (low + high) / 2, (high - low) / 2, x.shape[-1]
    mean = x.sum(-1, keepdim=True, dtype=torch.float64) / n
    candidates = [(low, (high - low) / 15)]
    for share in _SHRUNK:
        q = _nearest(x, middle - share * half, half * (2 * share / 15))
        mean_q = q.mean(-1, keepdim=True).double()
        spread = q.square().sum(-1, keepdim=True).double() - n * mean_q.square()
        together = (q * x).sum(-1, keepdim=True, dtype=torch.float64) - n * mean_q * mean
        d = torch.where(spread > 0, together / spread.clamp(min=1e-9), 0.0)
        candidates.append(((mean - d * mean_q).float(), d.float()))
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for m, d in ((each.half() for each in pair) for pair in candidates):
        q = _nearest(x, m.float(), d.float())
        error = (q * d.float() + m.float() - x).square_().sum(-1, keepdim=True, dtype=torch.float64)
        new = (error, q.to(torch.uint8), d, m)
        better = None if kept is None else error < kept[0]
        kept = new if better is None else tuple(torch.where(better, a, b) for a, b in zip(new, kept, strict=True))  # type: ignore[assignment]
    assert kept is not None
    return kept[1:]


def _nearest(x: Tensor, low: Tensor, step: Tensor) -> Tensor:
    return ((x - low) / step.clamp(min=_LEAST)).round_().clamp_(0, 15)


def with_offsets(weight: Tensor, d: Tensor, m: Tensor, new: Tensor) -> Tensor:
    """d · q + new in fp32, of a weight that is d · q + m: (out_features, in_features).

    d, m, new: (out_features, groups), in fp16.
    """
    scale, low = (each.float().unsqueeze(-1) for each in (d, m))
    groups = weight.float().view(len(weight), d.shape[1], -1)
    q = ((groups - low) / torch.where(scale == 0, 1, scale)).round_()  # exact, also for d below 0 as Q4_0 has it
    return (q * scale + new.float().unsqueeze(-1)).view(len(weight), -1)


def q4_1_blocks(packed: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """The bytes of GGUF's Q4_1: (out_features, in_features / 32 · 20) of uint8; larger groups repeat d and m."""
    rows, blocks = len(packed), packed.shape[1] * 2 // BLOCK
    own = torch.stack([d, m], -1).repeat_interleave(blocks // d.shape[1], 1)  # (rows, blocks, 2)
    halves = [own.contiguous().view(torch.uint8).view(rows, blocks, 4), packed.view(rows, blocks, BLOCK // 2)]
    return torch.cat(halves, -1).flatten(1)


def of_q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, d, m) of the bytes of GGUF's Q4_1, (out_features, in_features / 32 · 20), as they are."""
    each = blocks.reshape(len(blocks), -1, 4 + BLOCK // 2)
    d, m = each[..., :4].contiguous().view(torch.float16).unbind(-1)
    return each[..., 4:].flatten(1), d.contiguous(), m.contiguous()


def of_q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Q4_0, (out_features, in_features / 32 · 18), whose weights are d · (q - 8): m = -8 d, exactly."""
    each = blocks.reshape(len(blocks), -1, 2 + BLOCK // 2)
    d = each[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return each[..., 2:].flatten(1), d, -8 * d


@cache
def _settings_class() -> Any:
    """What makes transformers build such layers and quantize each weight as it is read, as it does for bitsandbytes."""
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

    method: Any = "lora_int4"

    @register_quantization_config(method)
    class Settings(QuantizationConfigMixin):
        def __init__(self, group_size: int = BLOCK, given: bool = False):
            self.quant_method, self.group_size, self.given = method, group_size, given

    class Quantize(ConversionOps):
        def convert(self, input_dict: dict[str, Any], model: Any = None, **more: Any) -> dict[str, Tensor]:  # type: ignore[override]
            ((name, value),) = input_dict.items()
            value = value[0] if isinstance(value, list) else value
            prefix = name.removesuffix("weight")
            layer = model.get_submodule(prefix.removesuffix("."))
            parts = quantize(value.T if layer.transposed else value, layer.group_size)
            return {f"{prefix}{key}": part for key, part in zip(("weight", "d", "m"), parts, strict=True)}

    @register_quantizer(method)
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> Any:
            settings: Any = self.quantization_config
            size = settings.group_size
            kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # as for NF4
            for name, layer in list(model.named_modules()):
                transposed = isinstance(layer, Conv1D)
                if not should_convert_module(name, kept) or not (transposed or type(layer) is nn.Linear):
                    continue
                inputs, outputs = layer.weight.shape if transposed else layer.weight.shape[::-1]
                if inputs % size == 0:
                    with torch.device("meta"):
                        own = Int4Linear(inputs, outputs, layer.bias, size, transposed=transposed)
                    model.set_submodule(name, own)
            return model

        def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
            layer, _, name = param_name.rpartition(".")
            settings: Any = self.quantization_config
            return not settings.given and name == "weight" and isinstance(model.get_submodule(layer), Int4Linear)

        def get_quantize_ops(self) -> Any:
            return Quantize()

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Settings
