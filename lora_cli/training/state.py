"""Where a run stands: what a checkpoint carries beside adapter and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class State:
    """Plain values, which go into state.json, and `tensors`, which go into state.safetensors.

    pending: the line of metrics.jsonl of a step whose evaluation was interrupted; it comes first when the run goes on.
    data_offset: how many steps of data lie behind the run because it rewound and left them out.
    tensors: nats of each held-out example, of the base and of the best adapter, and the target tokens of each.
    """

    step: int = 0
    base_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    last_validation_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    reserved_memory_bytes: int = 0  # of a GPU
    parts: int = 1  # pieces that each micro-batch of the recipe is cut into, because it did not fit whole
    loss_scale: dict[str, Any] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)  # of the data, where the step does not say it
    pending: dict[str, Any] | None = None
    data_offset: int = 0
    skipped: list[int] = field(default_factory=list)  # steps whose update was left out, see train.on_nan
    rewound: list[tuple[int, str]] = field(default_factory=list)  # (step that went wrong, checkpoint gone back to)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "tensors"}
