"""What a first recipe chooses, from numbers alone: the model's shape, the lengths of the rows, the memory of the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_cli.adapters.targets import find_targets
from lora_cli.base.attention import PER_EXAMPLE, PLAIN_UP_TO, attention_implementation
from lora_cli.base.linear import features
from lora_cli.errors import LoraError
from lora_cli.planning.memory import GIB, OVERHEAD, Memory, ModelShape, estimate_memory, shape_of
from lora_cli.planning.survey import BaseModel, DataSurvey

USABLE = 0.9  # of the memory: the rest is for what the estimate does not know, and for a desktop
SMALL = 0.5  # of the memory: what an unquantized model may need in all
STEP_TOKENS = 8192
FEWEST_STEPS = 100  # about, in a run of few tokens: its steps are smaller
FULL_MICRO_BATCH, SMALL_MICRO_BATCH = 4096, 1024  # tokens: more is hardly faster; fewer leave a GPU idle
TEXT_PIECE = 2048  # tokens that long texts are cut into
HELD_OUT, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.05, 8, 1000  # share, rows, rows
MOST_STEPS = 5000
_SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 128, 141, 180)  # GiB that GPUs are made with


@dataclass(frozen=True)
class Device:
    """Where training is to run. value_bytes: of a number in the compute dtype."""

    name: str
    memory: int
    value_bytes: int = 2
    on_cpu: bool = False


@dataclass(frozen=True)
class Fit:
    """What the memory allows, and the estimate for it. too_long: what happens to longer rows, if there are any."""

    quantization: str
    max_seq_len: int
    micro_batch_size: int
    gradient_checkpointing: bool
    memory: Memory
    too_long: str | None = None
    shortened_by: str | None = None  # "model" or "memory" or "text"


@dataclass(frozen=True)
class Adapter:
    """Which layers, and how large an update. parameters: what is trained."""

    target_modules: str
    ranks: dict[str, int]
    parameters: int

    @property
    def rank(self) -> int:
        return next(iter(self.ranks.values()))


def choose_adapter(base: BaseModel, target_tokens: float) -> Adapter:
    """All linear layers, at rank 16; more where there are more than two trained tokens for each parameter.

    Attention alone where a linear layer is too narrow to have a rank, such as the gate of a shared expert.
    """
    for modules in ("all-linear", "attention"):
        names = [target.name for target in find_targets(base.skeleton, modules, rank=1, alpha=1)]
        sizes = [features(base.skeleton.get_submodule(name)) for name in names]
        widest = min(map(min, sizes))
        if widest >= 8:
            break
    one = sum(map(sum, sizes))  # parameters of rank 1
    rank = 16
    while rank < 64 and rank * one < target_tokens / 2:
        rank *= 2
    rank = min(rank, 1 << (widest.bit_length() - 1))
    return Adapter(modules, dict.fromkeys(names, rank), rank * one)


def choose_epochs(tokens: float) -> int:
    return 3 if tokens < 1e6 else 2 if tokens < 1e7 else 1


def choose_learning_rate(parameters: int) -> tuple[float, str]:
    if parameters < 5e8:
        return 1e-3, "small models take more: with this the project's demo trains one of 135 million parameters"
    if parameters <= 1.4e10:
        return 2e-4, "what QLoRA used up to 13 billion parameters (Dettmers et al. 2023, table 9)"
    return 1e-4, "what QLoRA used above 13 billion parameters (Dettmers et al. 2023, table 9)"


def choose_validation(survey: DataSurvey) -> float | None:
    """Share of the rows to hold out: enough to judge by, and no more than is quickly scored; None: too few rows."""
    if round(min(survey.rows, survey.distinct if survey.sample is None else survey.rows) * HELD_OUT) < FEWEST_HELD_OUT:
        return None
    most = MOST_HELD_OUT / survey.rows
    return HELD_OUT if most >= HELD_OUT else float(f"{most:.0e}")


@dataclass(frozen=True)
class Sizes:
    """What fits. Candidates are tried from the fastest to the one that needs least; a smaller device gets a later one.

    Along them rows and micro-batches only shrink, so no device gets more than a larger one.
    """

    base: BaseModel
    survey: DataSurvey
    device: Device
    shape: ModelShape
    rows_per_step: int  # as many as a step wants; a row being max_seq_len tokens

    @classmethod
    def of(cls, base: BaseModel, survey: DataSurvey, device: Device, adapter: Adapter) -> Sizes:
        shape = shape_of(base.skeleton, adapter.ranks, on_cpu=device.on_cpu)
        return cls(base, survey, device, shape, 0)
