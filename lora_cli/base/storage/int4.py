"""4 bits in groups as GGUF's Q4_1 holds them: w = d · q + m, with q of 4 bits and d and m of a group in fp16.

An update that is the same for all weights of a group is a change of m, so the merged weight is stored in the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.storage.blocks import BLOCK, LAYERS, BlockLinear, dense_of, settings_class
from lora_cli.base.storage.kind import Storage
from lora_cli.errors import LoraError

_CUT = (0.0, 0.06, 0.12)  # what is tried to cut off a group's range, at its lower and its upper end
_CUT_ALIKE = (0.0, 0.01, 0.025, 0.04, 0.06, 0.08, 0.1)  # the same at both ends, for larger groups
_AT_ONCE = 2**16  # weights: what is made of them stays in a cache
_LEAST = 1e-12  # of a range; below it a group counts as equal numbers


class Int4(Storage):
    name = "int4"
    search = 2
    rounds_alone = False  # an update is added to offsets that the loaded layer holds
    weights_per_number = 2

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, Int4Linear)

    def dense(self, layer: nn.Module) -> Tensor:
        return dense_of(layer)

    def prepare(self, layer: Any) -> None:
        """Raises LoraError for a weight beyond what d and m can hold; transformers would hide that while it loads."""
        if not all(bool(each.isfinite().all()) for each in (layer.d, layer.m)):
            what = "a weight is NaN, infinite or too large for int4, whose scales and offsets are fp16 (up to 65504)"
            raise LoraError(what, fix="download the model again, or train with another quantization")

    def same_on(self, in_features: int, device: str) -> bool:
        """Rows that are not whole blocks stay as they are, on every device."""
        return in_features % BLOCK == 0

    def load_settings(self, dtype: torch.dtype, double: bool, group_size: int = BLOCK) -> Any:
        return settings_class()(self.name, group_size)

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("no checkpoint stores weights so")

    def bits(self, value_bytes: int, double: bool, group_size: int = BLOCK) -> float:
        return 4 + 32 / group_size


class Int4Linear(BlockLinear):
    """W = d · q + m. weight: (out, in / 2) of uint8; d, m: (out, in / group_size) of fp16. transposed: whether the
    checkpoint stores the layer as GPT-2 does, (in, out)."""

    weight: nn.Parameter
    d: nn.Parameter
    m: nn.Parameter
    names = ("weight", "d", "m")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        group_size: int = BLOCK,
        *,
        transposed: bool = False,
    ):
        groups = in_features // group_size
        super().__init__(
            in_features,
            bias,
            weight=torch.empty(out_features, in_features // 2, dtype=torch.uint8),
            d=torch.empty(out_features, groups, dtype=torch.float16),
            m=torch.empty(out_features, groups, dtype=torch.float16),
        )
        self.transposed = transposed

    @staticmethod
    def dequantized(*parts: Tensor) -> Tensor:
        return dequantize(*parts)

    def quantized(self, weight: Tensor) -> tuple[Tensor, ...]:
        return quantize(weight.T if self.transposed else weight, self.group_size)


LAYERS[Int4.name] = Int4Linear


def dequantize(packed: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """d · q + m in fp32: (out_features, in_features), bit for bit what llama.cpp reads in these blocks.

    packed: a block of 32 weights is 16 bytes, whatever the group: byte i holds weight i and, above it, weight i + 16.
    """
    rows = len(packed)
    blocks = packed.view(rows, -1, 1, BLOCK // 2)
    q = torch.cat([blocks & 15, blocks >> 4], 2).view(rows, d.shape[1], -1)
    return (q.float() * d.float().unsqueeze(-1) + m.float().unsqueeze(-1)).view(rows, -1)


def quantize(
    weight: Tensor, group_size: int = BLOCK, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, d, m) of a weight (out_features, in_features), near it in weighted squares.

    importance: what an error counts for, by input, above 0; nothing takes a guess of the weight alone (`_guessed`), in
    groups of 32. In larger ones it costs more than it gains (docs/qa-lora.md), and all errors count alike.
    For each of several ranges of a group the nearest q is taken, then d and m by least squares in q, then q again for
    these, rounded to fp16; the best of all is kept, in groups of 32 with d and m fitted to its own q. The idea is
    that of llama.cpp's quantizers. The group's whole range, without least squares, is one of them: what is kept is
    never worse than rounding. Whatever changes the result is another `Int4.search`. Sums are made in float64, so that
    all devices choose alike. Of numbers beyond fp16 d and m are infinite.
    """
    outputs, inputs = weight.shape
    guess = importance is None and group_size == BLOCK
    by_column = importance if importance is not None else _columns(weight) if guess else weight.new_ones(inputs)
    made = []
    for part in weight.detach().split(max(1, _AT_ONCE // inputs)):
        counts, x = (each.float().reshape(-1, group_size) for each in (by_column.expand_as(part), part))
        counts = _guessed(x, counts) if guess else counts
        made.append(_quantized(x, counts.bfloat16().float()))  # few digits: the sums are exact, in any order
    q, d, m = (torch.cat(each) for each in zip(*made, strict=True))
    low, high = q.view(-1, 2, BLOCK // 2).unbind(1)
    return (low | high << 4).view(outputs, inputs // 2), d.view(outputs, -1), m.view(outputs, -1)


def _guessed(x: Tensor, columns: Tensor) -> Tensor:
    """What errors count for, as far as weights tell: where these are small, inputs tend to be large.

    columns: root mean square of each weight's column, over the largest.
    """
    size = x.double().square().mean(-1, keepdim=True).sqrt().float() + x.abs()
    return 1 / (columns * size / size.amax(-1, keepdim=True).clamp(min=_LEAST)).clamp(min=1e-4)


def _columns(weight: Tensor) -> Tensor:
    """Root mean square of each column, over the largest: of sums of whole numbers, the same in any order."""
    largest = weight.abs().max().float().clamp(min=_LEAST)
    parts = weight.detach().split(max(1, _AT_ONCE // weight.shape[1]))
    squares = sum((part.float() / largest * 2**20).round_().long().square_().sum(0) for part in parts).float()  # type: ignore[union-attr]
    return (squares / squares.max().clamp(min=1)).sqrt()


def _quantized(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, d, m of groups (groups, group_size), in uint8 and fp16. counts: of each error's square."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    counted, span = counts * x, high - low

    def total(values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True, dtype=torch.float64)

    number, mean_x = total(counts), total(counted) / total(counts)

    def fitted(q: Tensor) -> tuple[Tensor, Tensor]:
        """d and m, by least squares."""
        mean_q = total(counts * q) / number
        spread = total(counts * q.square()) - number * mean_q.square()
        together = total(counted * q) - number * mean_q * mean_x
        d = torch.where(spread > 0, together / spread.clamp(min=1e-9), 0.0)
        return d.float(), (mean_x - d * mean_q).float()

    def tried(d: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """Error, q, d and m with these, rounded."""
        d, m = d.half(), m.half()
        q = nearest(x, m.float(), d.float())
        return total(counts * (q * d.float() + m.float() - x).square_()), q.to(torch.uint8), d, m

    def better(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.where(other[0] < one[0], b, a) for a, b in zip(one, other, strict=True))

    kept, large = tried(span / 15, low), x.shape[-1] > BLOCK
    for below, above in zip(_CUT_ALIKE, _CUT_ALIKE, strict=True) if large else product(_CUT, _CUT):
        q = nearest(x, low + below * span, span * ((1 - below - above) / 15))
        kept = better(kept, tried(*fitted(q)))
    _, q, d, m = kept if large else better(kept, tried(*fitted(kept[1].float())))
    return q, d, m


def nearest(x: Tensor, low: Tensor, step: Tensor) -> Tensor:
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
