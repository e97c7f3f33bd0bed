"""The run folder: which file is where, what a new run may find there, and what the run records about itself."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lora_cli.adapters.file import FILES as ADAPTER_FILES
from lora_cli.errors import DiskError, LoraError, command
from lora_cli.files import disk_errors, finish_moves, write_bytes, write_json
from lora_cli.foreign import is_real_folder, kind, not_ours, open_binary, open_to_append, read_json
from lora_cli.recipe import Recipe, dump_recipe, load_recipe
from lora_cli.training.checkpoint import FILES as CHECKPOINT_FILES
from lora_cli.training.checkpoint import NAME as CHECKPOINT_NAME
from lora_cli.training.run_lock import LOCK, now
from lora_cli.training.stored import Environment, Line, Sample, Status, Stored

_FILES = (
    *("recipe.yaml", "environment.json", "status.json", "metrics.jsonl"),
    *("report.json", "report.html", "samples.jsonl", "loss.png"),
)
Known = TypeVar("Known", bound=Stored)
_LONGEST_LINE = 100_000  # bytes
_FOLDERS = ("checkpoints", "adapter", "adapter_last", "prepared")
_OF_TRACKERS = ("lora", "wandb", "mlflow", "trackio")
_BEFORE_A_RUN = re.compile(r"prepared|\.lock")  # what a run that did not begin may leave
# What it may also leave, beside its lock, if it was killed while it began.
_OF_A_KILLED = re.compile(r"environment\.json|\.(environment\.json|recipe\.yaml)\.tmp-[\d-]+")


class RunFolder:
    """The files of one run. adapter: the best by validation loss; without validation data, the last.

    remote_code: whether the person let the model's own code run, which a command that goes on has to say again.
    """

    def __init__(self, path: Path, *, remote_code: bool = False):
        self.path, self.remote_code = path, remote_code
        self.recipe, self.environment, self.status = (path / name for name in _FILES[:3])
        self.metrics, self.report, self.page, self.samples = (path / name for name in _FILES[3:7])
        self.checkpoints, self.adapter, self.last_adapter = (path / name for name in _FOLDERS[:3])

    def refuse_if_taken(self, resume: bool) -> None:
        """Raises LoraError if a new run would overwrite something, or there is no run to resume. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise LoraError("the output is a file, not a folder", where=str(self.path), fix="choose another output")
        self._refuse_links()
        with disk_errors(self.path):
            names = [each.name for each in self.path.iterdir()] if self.path.is_dir() else []
        ours = [_BEFORE_A_RUN, _OF_A_KILLED] if LOCK in names else [_BEFORE_A_RUN]
        taken = any(not any(each.fullmatch(name) for each in ours) for name in names)
        taken = taken or (self.environment.name in names and not self._began_here())
        if taken and not resume:
            raise self._taken()
        if resume and not self.recipe.exists():
            raise LoraError("there is no run to resume", where=str(self.path), fix="start it without --resume")

    def _refuse_links(self) -> None:
        """Raises NotOurs for a link, or a folder in place of a file, under a name that a run writes.

        A link may lead anywhere, and then files of another folder would be overwritten or removed.
        """
        for name in _FILES:
            if (found := kind(self.path / name)) in ("link", "folder"):
                raise not_ours(self.path / name, found, "file")
        for name in (*_FOLDERS, *_OF_TRACKERS):
            is_real_folder(self.path / name)
        for name in os.listdir(self.checkpoints) if self.checkpoints.is_dir() else ():
            if CHECKPOINT_NAME.fullmatch(name):
                is_real_folder(self.checkpoints / name)

    def _began_here(self) -> bool:
        try:
            return "lora" in self.stored_environment()
        except LoraError:
            return False

    def _taken(self) -> LoraError:
        other = "choose another output (--set output=…), or remove the folder"
        if not self.recipe.exists():
            return LoraError("the output folder already holds other files", where=str(self.path), fix=other)
        if not self.report.exists():
            fix = f"continue it with: {self.resume_command()}; or {other}"
            return LoraError("the output folder already holds a run", where=str(self.path), fix=fix)
        with suppress(LoraError):  # its recipe may be damaged, which is not the point here
            other = f"train it longer with: {self.longer_command()}; or {other}"
        return LoraError("the output folder already holds a finished run", where=str(self.path), fix=other)

    def resume_command(self) -> str:
        return command(*self._resumed())

    def _resumed(self) -> list[str]:
        own_code = ["--set", "trust_remote_code=true"] if self.remote_code else []
        return ["lora", "train", str(self.path), "--resume", *own_code]

    def longer_command(self) -> str:
        """The command that trains a finished run for twice as long. What may end it sooner is raised too."""
        train, words = self.stored_recipe().train, self._resumed()
        values = {"train.epochs": None if self.stored_recipe().data.streaming else f"{2 * train.epochs:g}"}
        values["train.max_steps"] = None if train.max_steps is None else str(2 * train.max_steps)
        values["train.patience"] = None if train.patience is None else str(2 * train.patience)
        longer = {name: value for name, value in values.items() if value is not None}
        words += [word for name, value in longer.items() for word in ("--set", f"{name}={value}", "--allow", name)]
        return command(*words)

    def stored_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def stored_environment(self) -> dict[str, Any]:
        fix = "put the file back, or start a new run with another output"
        try:
            return read_json(self.environment, Environment, fix=fix).model_dump(exclude_unset=True)
        except LoraError as problem:
            what = f"what this run was trained on cannot be read: {problem.what}"
            raise LoraError(what, where=str(self.environment), fix=fix) from None

    def begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        """Write what a run is, also when it is resumed with changes. recipe.yaml comes last: with it a run exists."""
        write_json(self.environment, environment)
        try:
            write_bytes(self.recipe, dump_recipe(recipe).encode())
        except DiskError:
            if not self.recipe.exists():  # no run began, so the folder stays free for one
                self.environment.unlink()
            raise

    def clear_after_a_kill(self) -> None:
        """For the holder of the lock, after `refuse_if_taken`."""
        with disk_errors(self.path):
            if not self.recipe.exists() and self._began_here():  # or it would be foreign once our lock is gone
                self.environment.unlink()
            finish_moves(self.path, {"adapter": ADAPTER_FILES, "adapter_last": ADAPTER_FILES}.get, _FILES)
        with disk_errors(self.checkpoints):
            finish_moves(self.checkpoints, lambda name: CHECKPOINT_FILES if CHECKPOINT_NAME.fullmatch(name) else None)

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first. Their bytes are checked when one is opened."""
        found = self.checkpoints.iterdir() if is_real_folder(self.checkpoints) else ()
        named = (path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and kind(path) == "folder")
        return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def say_state(self, state: str, **values: Any) -> None:
        """Update status.json, which `lora runs` reads. When the run started, and how long it took before, are kept."""
        own = {"pid": os.getpid(), "host": platform.node(), "updated": now()}
        write_json(self.status, {"started": own["updated"], **self._said(), **own, "state": state, **values})

    def wall_seconds(self) -> float:
        """How long the run took before, over all its sessions that could record it."""
        return float(self._said().get("wall_seconds") or 0.0)

    def _said(self) -> dict[str, Any]:
        """What status.json says; {} if it is missing or damaged, because the run does not depend on it."""
        try:
            return read_json(self.status, Status, fix="").model_dump(exclude_unset=True)
        except LoraError:
            return {}


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines of JSON to a file, all of them or none. Raises DiskError."""
    text = "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8")
    with disk_errors(path), open_to_append(path) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            stream.write(text)
            stream.flush()
        except BaseException:
            os.truncate(path, before)
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, up to the first one that is incomplete, after a kill, or that lora did not write."""
    return [line.values() for line in _read_lines(path, Line)]


def read_samples(path: Path) -> list[Sample]:
    """The same of samples.jsonl."""
    return list(_read_lines(path, Sample))


def _read_lines(path: Path, model: type[Known]) -> Iterator[Known]:
    if kind(path) is None:
        return
    with open_binary(path) as stream:
        while text := stream.readline(_LONGEST_LINE):
            try:
                yield model.model_validate_json(text)
            except ValidationError:
                return
