"""Experiment trackers, through accelerate. What becomes of them never stops a run or makes it wait."""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lora_cli.errors import LoraError, command
from lora_cli.recipe import Recipe

Track = Callable[[dict[str, Any], int], None]
# By name and version, as in constraints.txt: this program's own name is not on the index, and anybody could take it.
TESTED = {"tensorboard": "2.21.0", "wandb": "0.31.0", "mlflow": "3.17.2", "trackio": "0.43.0"}
_LINES_WAITING = 10_000  # for a tracker that does not answer; metrics.jsonl has them all
_LAST_WORDS_SECONDS = 30.0  # that the end of a run waits for a tracker to send what it has


def require_trackers(names: Sequence[str]) -> None:
    """Raises LoraError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None and not (
            name == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            install = command("pip", "install", f"{name}=={TESTED[name]}")
            raise LoraError(f"trackers: {name} is not installed", fix=f"{install}, or remove it from trackers")


@contextmanager
def open_trackers(recipe: Recipe, say: Callable[[str], None], *, active: bool) -> Iterator[Track]:
    """Yields a function that hands one line of metrics to every tracker of the recipe, without waiting for any.

    active: whether this process reports; of several, one does.
    """
    names = recipe.trackers if active else []
    config = _flat(recipe.model_dump(mode="json"))
    trackers = [_Background(name, recipe.output, config, say) for name in names]

    def track(line: dict[str, Any], step: int) -> None:
        values = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        for tracker in trackers:
            tracker.put(values, step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


class _Background:
    """A tracker in a thread of its own: one that fails or hangs loses its lines and nothing else."""

    def __init__(self, name: str, folder: str, config: dict[str, Any], say: Callable[[str], None]):
        self.name, self.folder, self.config, self.say = name, folder, config, say
        self.lines: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(_LINES_WAITING)
        self.lost = False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def put(self, values: dict[str, Any], step: int) -> None:
        try:
            self.lines.put_nowait((values, step))
        except queue.Full:
            self._give_up("it does not answer")

    def finish(self) -> None:
        try:
            self.lines.put_nowait(None)
        except queue.Full:
            self._give_up("it does not answer")
        deadline = time.monotonic() + (0 if self.lost else _LAST_WORDS_SECONDS)
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(0.2)  # in short turns: a signal is heard in between
        if self.thread.is_alive():
            self._give_up(f"it did not end within {_LAST_WORDS_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            kind = LOGGER_TYPE_TO_CLASS[self.name]
            tracker = kind("lora", self.folder) if kind.requires_logging_directory else kind("lora")
            tracker.start()
            tracker.store_init_configuration(self.config)
            while (line := self.lines.get()) is not None:
                tracker.log(line[0], step=line[1])
            tracker.finish()
        except BaseException as error:  # whatever a tracker's library thinks of, also SystemExit
            self._give_up((str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _give_up(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            self.say(f"tracker {self.name} is lost: {why}; the run goes on, and metrics.jsonl has every line")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as trackers take them: one level, plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
