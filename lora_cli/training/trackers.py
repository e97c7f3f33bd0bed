"""Experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe

Track = Callable[[dict[str, Any], int], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raises LoraError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None and not (
            name == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            raise LoraError(
                f"trackers: {name} is not installed", fix=f"pip install 'lora-cli[{name}]', or remove it from trackers"
            )


@contextmanager
def open_trackers(accelerator: Accelerator, recipe: Recipe) -> Iterator[Track]:
    """Yields a function that reports one line of metrics to every tracker of the recipe."""
    if not recipe.trackers:
        yield lambda line, step: None
        return
    accelerator.init_trackers("lora", config=_flat(recipe.model_dump(mode="json")))

    def track(line: dict[str, Any], step: int) -> None:
        accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)

    try:
        yield track
    finally:
        accelerator.end_training()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as trackers take them: one level, plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
