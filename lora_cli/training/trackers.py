"""Experiment trackers, through accelerate. One that fails or does not answer is dropped, and the run goes on."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import indent
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lora_cli.ending import exit_within
from lora_cli.errors import LoraError, command
from lora_cli.foreign import is_real_folder
from lora_cli.recipe import Recipe
from lora_cli.training.stored import Sample


class Track(Protocol):
    """Hands the numbers of a line of metrics, and samples, to every tracker of the recipe."""

    def __call__(self, line: dict[str, Any], step: int, samples: Sequence[Sample] = ()) -> None: ...


# By name and version, as in constraints.txt: this program's own name is not on the index, and anybody could take it.
TESTED = {"tensorboard": "2.21.0", "wandb": "0.31.0", "mlflow": "3.17.2", "trackio": "0.43.0"}
_FOLDERS = {"tensorboard": "lora", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
_CALL_SECONDS = 30.0  # the longest that one call to a tracker may hold up the run


def require_trackers(names: Sequence[str]) -> None:
    """Raises LoraError for a tracker whose package is not installed."""
    for name in names:
        packages = [name, "tensorboardX"] if name == "tensorboard" else [name]
        if not any(map(importlib.util.find_spec, packages)):
            install = command("pip", "install", f"{name}=={TESTED[name]}")
            raise LoraError(f"trackers: {name} is not installed", fix=f"{install}, or remove it from trackers")


class _NoAnswer(BaseException):
    """Not an Exception, so that no library takes it for one of its own."""


@contextmanager
def open_trackers(recipe: Recipe, say: Callable[[str], None], *, active: bool) -> Iterator[Track]:
    """active: whether this process reports; of several, one does."""
    names = recipe.trackers if active else []
    output = Path(recipe.output).absolute()
    config = _flat(_without_places(recipe.model_dump(mode="json")))
    for name in names:
        is_real_folder(output / _FOLDERS[name])  # a link would lead them elsewhere
    before = _keep_it_here(output, names) if names else {}
    trackers = [_Tracker(name, say) for name in names]

    def track(line: dict[str, Any], step: int, samples: Sequence[Sample] = ()) -> None:
        values = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        for tracker in trackers:
            if values:
                tracker.call(tracker.log, values, step)
            if samples:
                tracker.call(tracker.log_samples, samples, step)

    try:
        for tracker in trackers:
            tracker.call(tracker.start, output, config)
        yield track
    finally:
        for tracker in trackers:
            tracker.call(tracker.finish)
        for name in before:
            os.environ.pop(name, None)


def _keep_it_here(here: Path, names: Sequence[str]) -> dict[str, str]:
    """Set the variables that make the trackers' libraries write into the run and report to nobody else.

    Those that the user has set stay as they are. Returns what was set.
    """
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
    if not os.path.exists(os.path.expanduser("~/.config/wandb/settings")):  # they say which server gets the run
        ours["WANDB_CONFIG_DIR"] = str(here / "wandb" / "config")
    unset = {name: value for name, value in ours.items() if name not in os.environ}
    for name in names:
        with suppress(OSError):  # then it says so itself
            (here / _FOLDERS[name]).mkdir(parents=True, exist_ok=True)
    os.environ.update(unset)
    return unset


class _Tracker:
    """A tracker of one of accelerate's kinds. It is dropped, once and for all, when a call to it fails or hangs."""

    def __init__(self, name: str, say: Callable[[str], None]):
        self.name, self.say, self.dropped = name, say, False
        self.own: Any = None  # accelerate's tracker, from `start` on

    def start(self, output: Path, config: dict[str, Any]) -> None:
        kind, options = LOGGER_TYPE_TO_CLASS[self.name], {}
        if kind.requires_logging_directory:
            options = {"logging_dir": str(output)}
        elif self.name == "mlflow" and str(output / "mlflow") in os.environ.get("MLFLOW_TRACKING_URI", ""):
            options = {"logging_dir": (output / "mlflow" / "artifacts").as_uri()}  # else the server's own place
        self.own = kind("lora", **options)
        self.own.start()
        self.own.store_init_configuration(config)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.own.log(values, step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Of accelerate's trackers these two take text. tensorboard reads Markdown: indented, it is as it is."""
        if self.name == "tensorboard":
            texts = {f"sample {each.number}": f"{each.prompt}\n\n→ {each.words}" for each in samples}
            self.own.log({name: indent(text, "    ", lambda _: True) for name, text in texts.items()}, step=step)
        elif self.name == "wandb":
            rows = [[each.prompt, each.wanted, each.words] for each in samples]
            self.own.log_table("samples", columns=["prompt", "wanted", "words"], data=rows, step=step)

    def finish(self) -> None:
        self.own.finish()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.dropped:
            return
        try:
            with _answer_within(_CALL_SECONDS):
                function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a tracker's library raises, SystemExit too
            self.dropped = True
            exit_within(_CALL_SECONDS)  # what the library left running may hang at the end of the program, too
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self.say(f"tracker {self.name} was dropped: {why}; the run goes on, and metrics.jsonl has every line")


@contextmanager
def _answer_within(seconds: float) -> Iterator[None]:
    """Raises _NoAnswer inside the block when the time is up. Without SIGALRM (Windows) it waits as long as it takes."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def give_up(*_: Any) -> None:
        raise _NoAnswer(f"it did not answer within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, in case a library catches it
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the alarm may go off just here; then the next line resets it
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


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
