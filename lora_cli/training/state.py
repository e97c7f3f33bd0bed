"""How far a run has come: what a checkpoint holds besides adapter and optimizer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor

from lora_cli.foreign import LARGEST
from lora_cli.training.stored import Count, Line, Random, Seconds, Stored, Text

_LOSS_SCALE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_POSITION = {"pass", "rows", "unit", "step"}


def _a_line(values: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if values is None else Line.model_validate(values).values()


def _all_or_none(names: set[str], *more: str) -> AfterValidator:
    """more: what further names begin with."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        if values and {name for name in values if not name.startswith(more)} != names:
            raise ValueError(f"it has to have {', '.join(sorted(names))}")
        return values

    return AfterValidator(check)


class State(Stored):
    """Plain values, which go into state.json, and `tensors`, which go into state.safetensors.

    pending: the line of metrics.jsonl of a step whose evaluation was interrupted; it comes first when the run goes on.
    data_offset: how many steps of data lie behind the run because it rewound and left them out.
    tensors: nats of each validation example, of the base and of the best adapter, and the target tokens of each.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    step: Count = 0
    base_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: Count | None = None
    last_validation_loss: float | None = None
    evaluations_since_best: Count = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: Count = 0
    target_tokens: Count = 0
    seconds: Seconds = 0.0
    peak_memory_bytes: Count = 0
    reserved_memory_bytes: Count = 0  # of a GPU
    # Pieces that each micro-batch of the recipe is cut into, because it did not fit whole.
    parts: Annotated[int, Field(ge=1, le=LARGEST)] = 1
    loss_scale: Annotated[dict[str, float | int], _all_or_none(_LOSS_SCALE)] = Field(default_factory=dict)
    # Of the data, where the step does not say it.
    position: Annotated[dict[str, Count], _all_or_none(_POSITION, "dropped.")] = Field(default_factory=dict)
    pending: Annotated[dict[str, Any] | None, AfterValidator(_a_line)] = None
    data_offset: Count = 0
    clipped: Count = 0  # steps whose gradient norm was above train.max_grad_norm
    skipped: list[Count] = Field(default_factory=list)  # steps whose update was left out, see train.on_nan
    rewound: list[tuple[Count, Text]] = Field(default_factory=list)  # (step that went wrong, checkpoint gone back to)
    tensors: Annotated[dict[str, Tensor], Field(exclude=True)] = Field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        return self.model_dump(include=set(State.model_fields), warnings=False)


class StateFile(State):
    """state.json: the values, and what the tensors of the random states and of the optimizer leave to be said."""

    random: Random
    optimizer: Any
