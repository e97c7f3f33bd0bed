"""What a first recipe chooses, from numbers: the shape of the model, the lengths of the rows, the memory there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from lora_cli.adapters.reach import kind_of
from lora_cli.adapters.targets import find_targets
from lora_cli.base.attention import attention_implementation
from lora_cli.base.linear import features
from lora_cli.errors import LoraError
from lora_cli.evaluation.quantization_cost import WORTH_SAYING, Costs
from lora_cli.planning.memory import GIB, OVERHEAD, Memory, ModelShape, estimate_memory
from lora_cli.planning.skeleton import BaseModel
from lora_cli.planning.survey import DataSurvey
from lora_cli.quantization import DEFAULT, RULES

USABLE = 0.85  # of the memory: the rest is for what the estimate does not know, and for a desktop
COMFORTABLE = 0.6  # of the memory: the most that training on unquantized weights may need
STEP_TOKENS = 8192
FEWEST_STEPS = 100  # or about so many: of few tokens the steps are smaller
MOST_STEPS = 5000
FULL_MICRO_BATCH, SMALL_MICRO_BATCH = 4096, 1024  # tokens: more are hardly faster; fewer leave a GPU idle
TEXT_PIECE = 2048  # tokens that longer texts are cut into
SHORTEST_PIECE = 256
HELD_OUT, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.05, 8, 1000  # share, rows, rows
FEWEST_TO_SPLIT = 50  # rows of which some are held out
_SIZES = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 128, 141, 180)  # GiB that GPUs are made with


@dataclass(frozen=True)
class Device:
    """Where training is to run. value_bytes: of a number in the compute dtype."""

    name: str
    memory: int
    value_bytes: int = 2
    on_cpu: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, or one of its size."""
        return torch.float32 if self.value_bytes == 4 else torch.bfloat16


@dataclass(frozen=True)
class Adapter:
    """Which layers are adapted, at which rank, and how many parameters that trains."""

    target_modules: str
    rank: int
    layers: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Row:
    """Length of a row. too_long: what happens to longer examples, if there are any. limit: why it is not longer."""

    tokens: int
    too_long: str | None = None
    limit: str | None = None  # model, memory or text


@dataclass(frozen=True)
class Fit:
    """What the memory allows, with the estimate of what that takes; and of what all activations kept would take."""

    quantization: str
    row: Row
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: str  # none, full, offload
    memory: Memory
    without_checkpointing: Memory


def choose_adapter(base: BaseModel, target_tokens: float) -> Adapter:
    """All linear layers at rank 16, or more where there are more than two trained tokens for each parameter.

    Attention alone where a linear layer is too narrow to have a rank, such as the gate of a shared expert.
    """

    def look(modules: str) -> tuple[list[str], int, int]:
        """Names, numbers trained at rank 1, and the smallest side of any layer."""
        unreached = base.unreached_kinds(modules)
        found = find_targets(base.skeleton, modules, rank=1, alpha=1)
        found = [target for target in found if kind_of(target.name) not in unreached]
        layers = [base.skeleton.get_submodule(target.name) for target in found]
        of_rank_1 = sum(target.size(layer) for target, layer in zip(found, layers, strict=True))
        return [target.name for target in found], of_rank_1, min((min(features(layer)) for layer in layers), default=0)

    modules, (layers, of_rank_1, narrowest) = "all-linear", look("all-linear")
    if narrowest < 8:
        with suppress(LoraError):  # a model without attention keeps all
            attention = look("attention")
            if attention[2] > narrowest:
                modules, (layers, of_rank_1, narrowest) = "attention", attention
    rank = 16
    while rank < 64 and rank * of_rank_1 < target_tokens / 2:
        rank *= 2
    rank = min(rank, 1 << (narrowest.bit_length() - 1))
    return Adapter(modules, rank, tuple(layers), rank * of_rank_1)


def choose_epochs(tokens: float) -> int:
    return 3 if tokens < 1e6 else 2 if tokens < 1e7 else 1


def choose_learning_rate(kind: str, hidden: int, examples: float) -> tuple[float, str]:
    """5e-4 · (2000 / hidden)^p · √(examples of a full step / 128), within 5e-5 … 1e-3; and why.

    kind: the model's type. hidden: its width. p is 0.781 as fitted for Llama, 0.0775 for Qwen (Schulman et al. 2025,
    LoRA Without Regret, and its code). Little data has smaller steps and keeps the rate (benchmarks/README.md).
    """
    exponent = 0.0775 if "qwen" in kind else 0.781
    rate = 5e-4 * (2000 / hidden) ** exponent * math.sqrt(examples / 128)
    bounded = min(max(rate, 5e-5), 1e-3)
    why = f"5e-4 · (2000 / width {hidden})^{exponent:g} · √({examples:,.0f} examples a full step / 128)"
    if bounded != rate:
        why += f", {'at most' if bounded < rate else 'at least'} this"
    if not ("qwen" in kind or "llama" in kind):
        why += "; the exponent is Llama's, a guess for this model"
    return float(f"{bounded:.1e}"), f"{why} (Schulman et al. 2025)"


def choose_validation(rows: int, distinct: int) -> float | None:
    """Share of the rows to hold out: 5 %, at least 8 rows, and no more than is quickly scored. None: too few rows.

    distinct: unequal rows; equal ones are held out together.
    """
    if min(rows, distinct) < FEWEST_TO_SPLIT:
        return None
    enough = math.ceil(100 * FEWEST_HELD_OUT / min(rows, distinct)) / 100
    return min(max(HELD_OUT, enough), float(f"{MOST_HELD_OUT / rows:.0e}"))


def choose_sizes(
    base: BaseModel, survey: DataSurvey, device: Device, shape: ModelShape, epochs: int, costs: Costs | None = None
) -> Fit:
    """Quantization, row length, micro-batch and what else decides over memory: the best that fits, then the fastest.

    The base as little quantized as fits; with each kind rows and micro-batches only shrink: a smaller device never gets
    more than a larger one. costs: what quantization was measured to cost; without it nothing between the smallest way
    and none is considered.
    Raises LoraError if nothing fits.
    """
    densest = cache(partial(survey.densest_row, packed=base.packs))
    keeps_scores = attention_implementation(base.config) == "eager"

    def estimate(quantization: str, row: int, micro_batch: int, checkpointing: str) -> Memory:
        on_one_row = row * micro_batch if base.packs else row  # all examples of a micro-batch, unless they are padded
        return estimate_memory(
            shape,
            quantization=quantization,
            tokens=row * micro_batch,
            target_tokens=densest(row) * micro_batch,
            gradient_checkpointing=checkpointing,
            value_bytes=device.value_bytes,
            scores=on_one_row if keeps_scores else 0,
        )

    step_tokens = min(STEP_TOKENS, survey.tokens * epochs / FEWEST_STEPS)
    tried: Fit | None = None
    for quantization, row, micro_batch, checkpointing in _ways(base, survey, device, step_tokens, costs):
        memory = estimate(quantization, row.tokens, micro_batch, checkpointing)
        filled = row.tokens if base.packs else min(row.tokens, survey.tokens / survey.rows)
        wanted = step_tokens / filled / micro_batch
        micro_steps = math.ceil(wanted) if step_tokens == STEP_TOKENS else max(1, round(wanted))
        plain = estimate(quantization, row.tokens, micro_batch, "none")
        tried = Fit(quantization, row, micro_batch, micro_steps, checkpointing, memory, plain)
        usable = COMFORTABLE if quantization == "none" else USABLE
        if memory.total <= usable * device.memory:
            return tried
    assert tried is not None
    raise _does_not_fit(base, tried, device, shape)


def _ways(
    base: BaseModel, survey: DataSurvey, device: Device, step_tokens: float, costs: Costs | None
) -> Iterator[tuple[str, Row, int, str]]:
    """Quantization, row, micro-batch and gradient checkpointing: the least quantized first, of each the fastest.

    Before rows are made shorter, inputs of blocks go to host memory; a CPU has no other.
    """
    row = _row_length(base, survey)
    most = _power_of_two(min(FULL_MICRO_BATCH, step_tokens) / row.tokens)
    least = min(most, _power_of_two(SMALL_MICRO_BATCH / row.tokens))
    smallest = base.stored or DEFAULT
    between = [kind for kind in RULES if kind not in ("none", DEFAULT) and _is_worth_it(kind, costs)]
    larger = [] if base.stored else ["none", *between]
    for quantization in (*larger, smallest):
        micro_batch = most
        while micro_batch >= least:
            yield quantization, row, micro_batch, "none"
            micro_batch //= 2
        yield quantization, row, least, "full"
    while least := least // 2:
        yield smallest, row, least, "full"
    most_spared = "full" if device.on_cpu else "offload"
    for each in (row, *_shorter_rows(survey, row)):
        yield smallest, each, 1, most_spared


def _is_worth_it(kind: str, costs: Costs | None) -> bool:
    """Whether the smallest way certainly costs this base much, and this one less than half of that."""
    smallest, this = (costs.of(each) for each in (DEFAULT, kind)) if costs else (None, None)
    if smallest is None or this is None or (smallest.low or 0) <= 0:
        return False
    return smallest.cost > WORTH_SAYING and this.cost < smallest.cost / 2


def _row_length(base: BaseModel, survey: DataSurvey) -> Row:
    """The smallest multiple of 64 that holds every row; what the model sees, if that is less; text goes in pieces."""
    longest, positions = int(survey.lengths.max()), base.positions or math.inf
    is_text = survey.reading.name == "text"
    if is_text and longest > min(TEXT_PIECE, positions):
        return Row(int(min(TEXT_PIECE, positions)), "split", "text" if positions >= TEXT_PIECE else "model")
    if longest <= positions:
        return Row(int(min(_multiple_of_64(longest), positions)))
    held = survey.lengths[survey.lengths <= positions]
    if 2 * len(held) < len(survey.lengths):
        longer = f"{len(survey.lengths) - len(held):,} of {len(survey.lengths):,} rows are longer"
        what = f"{longer} than the {positions:,} tokens that {base.source.name} sees; the longest has {longest:,}"
        raise LoraError(what, where=survey.source.name, fix="use a model that sees more, or shorten the rows")
    return Row(int(min(_multiple_of_64(int(held.max())), positions)), "drop", "model")


def _shorter_rows(survey: DataSurvey, row: Row) -> Iterator[Row]:
    """Rows that hold at least half of the examples, the longest first; of text, pieces down to 256 tokens."""
    if survey.reading.name == "text":
        for tokens in range(_multiple_of_64(row.tokens) - 64, SHORTEST_PIECE - 1, -64):
            yield Row(tokens, "split", "memory")
        return
    held = np.unique(-(-survey.lengths // 64) * 64)[::-1]
    for tokens in held[(held < row.tokens) & (held >= np.median(survey.lengths))].tolist():
        yield Row(tokens, "drop", "memory")


def _does_not_fit(base: BaseModel, least: Fit, device: Device, shape: ModelShape) -> LoraError:
    needed, usable = least.memory.total, USABLE * device.memory
    size = next((size for size in _SIZES if size * GIB * USABLE >= needed), math.ceil(needed / USABLE / GIB))
    smaller = shape.parameters * max(0.0, usable - OVERHEAD) / (needed - OVERHEAD)
    fix = f"use a {'machine' if device.on_cpu else 'GPU'} of {size} GB or more"
    if smaller > 1e8:
        fix += f", or a model of at most about {smaller / 1e9:.1f} billion parameters"
    return LoraError(
        f"{base.source.name} ({shape.parameters / 1e9:.1f} billion parameters) does not fit into {device.name}",
        details=[
            f"quantized, with gradient checkpointing and one row of {least.row.tokens:,} tokens at a time it needs "
            f"about {least.memory}",
            f"of {device.memory / GIB:.1f} GiB at most {usable / GIB:.1f} are counted on; none of this is measured",
        ],
        fix=fix,
    )


def _multiple_of_64(tokens: int) -> int:
    return -(-tokens // 64) * 64


def _power_of_two(limit: float) -> int:
    """The largest power of two up to the limit, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(limit, 1))))
