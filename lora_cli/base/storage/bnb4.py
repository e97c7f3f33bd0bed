"""NF4 as bitsandbytes stores it: blocks of 64 weights, 4 bits each, with a scale (Dettmers et al. 2023, section 3)."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.base.storage.kind import Storage, is_a, whole

_BLOCK = 64
_AT_ONCE = 2**20  # weights, of which bitsandbytes makes 20 times their bytes
_SETTINGS = 256  # bytes
_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)")


class Bnb4(Storage):
    name = "nf4"
    weights_per_number = 2
    rounded_note = "hold their NF4 values in {dtype}: bitsandbytes computes their size wrongly on a CPU"

    def is_layer(self, module: nn.Module) -> bool:
        return is_a(module, "Linear4bit")

    def dense(self, layer: nn.Module) -> Tensor:
        return _dequantized(whole(layer.weight), _state(layer))

    def prepare(self, layer: nn.Module) -> None:
        """Stop bitsandbytes 0.50 from repacking weights for CPU inference.

        On CPUs with avx512_bf16 a no-grad forward in eval mode repacks a Linear4bit for good, after which training
        forwards return no input gradient, with only a warning: evaluating would silently ruin the training after it.
        """
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def same_on(self, in_features: int, device: str) -> bool:
        """Rows of another length than whole blocks get scales of other blocks from bitsandbytes 0.50 on a CPU."""
        return device != "cpu" or in_features % _BLOCK == 0

    def make_shardable(self, layer: nn.Module, device: torch.device) -> None:
        """bitsandbytes looks for scales in the module when the weight has none. It is usual to store 4-bit weights as
        bf16 for FSDP; a plain uint8 parameter without gradient needs no such disguise."""
        state = layer.quant_state = _state(layer)
        state.to(device)
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # type: ignore[arg-type]

    def load_settings(self, dtype: torch.dtype, double: bool, group_size: int = 32) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )

    def stated(self, settings: dict[str, Any]) -> str | None:
        return str(settings.get("bnb_4bit_quant_type", self.name)) if settings.get("load_in_4bit") else None

    def beside(self, name: str) -> tuple[str, str] | None:
        found = _PART.fullmatch(name)
        return (found[1], found[2]) if found else None

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        from bitsandbytes.functional import QuantState

        return _dequantized(weight, QuantState.from_dict(dict(beside), weight.device))

    def rounded(self, weight: Tensor, double: bool) -> Tensor:
        return _dequantized(*_quantized(weight, double, self.name))

    def packed(self, weight: Tensor) -> dict[str, Tensor]:
        """With scales that are quantized as well. The settings, which are JSON, end in spaces, so that their length is
        always the same."""
        packed, state = _quantized(weight, True, self.name)
        parts = state.as_dict(packed=True)
        for name in (each for each in parts if each.startswith("quant_state.")):
            assert len(parts[name]) <= _SETTINGS
            parts[name] = F.pad(parts[name], (0, _SETTINGS - len(parts[name])), value=ord(" "))
        return {"": packed} | {f".{name}": each for name, each in parts.items()}

    def packed_as(self, numbers: int) -> dict[str, Tensor]:
        blocks = -(-numbers // _BLOCK)
        shapes = {"": (-(-numbers // 2), 1), ".absmax": (blocks,), ".quant_map": (16,)}
        shapes |= {".nested_absmax": (-(-blocks // 256),), ".nested_quant_map": (256,)}
        shapes |= {f".quant_state.bitsandbytes__{self.name}": (_SETTINGS,)}
        numbers_in = {name: torch.float32 for name in shapes if "nested" in name or "map" in name}
        return {
            name: torch.empty(shape, dtype=numbers_in.get(name, torch.uint8), device="meta")
            for name, shape in shapes.items()
        }

    def bits(self, value_bytes: int, double: bool, group_size: int = 32) -> float:
        """A scale a block, in fp32; or in 8 bits, with an fp32 scale of their own for 256 of them."""
        return 4 + (8 / _BLOCK + 32 / (_BLOCK * 256) if double else 32 / _BLOCK)

    def scale_bytes(self, layer: nn.Module) -> int:
        state = _state(layer)
        scales = (getattr(part, "absmax", None) for part in (state, getattr(state, "state2", None)))
        return sum(each.nbytes for each in scales if isinstance(each, Tensor))


def _state(layer: nn.Module) -> Any:
    """Scales and shape, with the weight or, once that is sharded, with the module."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _quantized(weight: Tensor, double: bool, kind: str) -> tuple[Tensor, Any]:
    """What bitsandbytes makes of the whole weight, made of pieces of it, and its state."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    pieces = [quantize_4bit(each, quant_type=kind, blocksize=_BLOCK) for each in weight.reshape(-1).split(_AT_ONCE)]
    state = pieces[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([each.absmax for _, each in pieces])
    if double:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
    return torch.cat([packed for packed, _ in pieces]), state


def _dequantized(stored: Tensor, state: Any) -> Tensor:
    """(out_features, in_features); on a CPU as one long row, for which `same_on` gives the reason."""
    from bitsandbytes.functional import dequantize_4bit

    if stored.device.type != "cpu":
        return dequantize_4bit(stored, state)
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(stored, flat).view(state.shape)
