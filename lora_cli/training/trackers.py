"""Experiment trackers, through accelerate. What becomes of them never stops a run or makes it wait."""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lora_cli.ending import exit_within
from lora_cli.errors import LoraError, command
from lora_cli.foreign import is_real_folder
from lora_cli.recipe import Recipe

Track = Callable[[dict[str, Any], int], None]
# By name and version, as in constraints.txt: this program's own name is not on the index, and anybody could take it.
TESTED = {"tensorboard": "2.21.0", "wandb": "0.31.0", "mlflow": "3.17.2", "trackio": "0.43.0"}
_FOLDERS = {"tensorboard": "lora", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
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
    config = _flat(_without_places(recipe.model_dump(mode="json")))
    for name in names:
        is_real_folder(Path(recipe.output) / _FOLDERS[name])  # a link would lead them elsewhere
    before = _keep_it_here(Path(recipe.output), names) if names else {}
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
        for name in before:
            os.environ.pop(name, None)


def _keep_it_here(output: Path, names: Sequence[str]) -> dict[str, str]:
    """Tell the trackers' libraries, by variables that the user did not set, to write into the run and tell nobody else.

    Returns what was set.
    """
    here = output.absolute()
    ours = {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{here / 'mlflow' / 'mlflow.db'}",
        "WANDB_DIR": str(here),
        "WANDB_CACHE_DIR": str(here / "wandb" / "cache"),
        "WANDB_DATA_DIR": str(here / "wandb" / "data"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_X_DISABLE_META": "true",  # host name, command line and paths
        "TRACKIO_DIR": str(here / "trackio"),
        "GRADIO_ANALYTICS_ENABLED": "false",
    }
    if not _has_wandb_settings():  # they say which server gets the run
        ours["WANDB_CONFIG_DIR"] = str(here / "wandb" / "config")
    unset = {name: value for name, value in ours.items() if name not in os.environ}
    for name in names:
        with suppress(OSError):  # then it says so itself
            (here / _FOLDERS[name]).mkdir(parents=True, exist_ok=True)
    os.environ.update(unset)
    return unset


def _has_wandb_settings() -> bool:
    try:
        return (Path.home() / ".config" / "wandb" / "settings").exists()
    except (OSError, RuntimeError):  # no home
        return False


class _Background:
    """A tracker in a thread of its own: one that fails or hangs loses its lines and nothing else."""

    def __init__(self, name: str, folder: str, config: dict[str, Any], say: Callable[[str], None]):
        self.name, self.folder, self.config, self.say = name, folder, config, say
        self.lines: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(_LINES_WAITING)
        self.lost = False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            self._give_up(str(error))

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
            tracker = kind("lora", **self._place(kind))
            tracker.start()
            tracker.store_init_configuration(self.config)
            while (line := self.lines.get()) is not None:
                tracker.log(line[0], step=line[1])
            tracker.finish()
        except BaseException as error:  # whatever a tracker's library thinks of, also SystemExit
            self._give_up((str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _place(self, kind: Any) -> dict[str, str]:
        """Where a tracker is to write, for those that ask; the others have their variables."""
        if kind.requires_logging_directory:
            return {"logging_dir": self.folder}
        here = Path(self.folder).absolute() / "mlflow"
        if self.name == "mlflow" and str(here) in os.environ.get("MLFLOW_TRACKING_URI", ""):
            return {"logging_dir": (here / "artifacts").as_uri()}
        return {}

    def _give_up(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            exit_within(_LAST_WORDS_SECONDS)  # what its library left running may hang there, too
            self.say(f"tracker {self.name} is lost: {why}; the run goes on, and metrics.jsonl has every line")


def _without_places(value: Any) -> Any:
    """A setting without the folders of this machine: of a path its last part."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as trackers take them: one level, plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
