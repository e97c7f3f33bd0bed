"""The run folder: what stands where, what a new run finds there, and what it says of itself."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import DiskError, LoraError
from lora_cli.files import disk_errors, finish_moves, require_regular, write_bytes, write_json
from lora_cli.recipe import Recipe
from lora_cli.recipe_file import dump_recipe, load_recipe
from lora_cli.training.run_lock import LOCK, now

_BEFORE_A_RUN = re.compile(r"prepared|\.lock")  # what one that did not begin may leave
_OF_A_KILLED = re.compile(r"environment\.json|\..+\.tmp-\w+")  # and one that was killed just then, with its lock
_STEP = re.compile(r"step_\d{6,}")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """What you ship: the best adapter by validation loss; without validation data, the last."""
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        return self.path / "adapter_last"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    def refuse_if_taken(self, resume: bool) -> None:
        """Raises LoraError if a new run would overwrite something, or there is no run to resume. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise LoraError("the output is a file, not a folder", where=str(self.path), fix="choose another output")
        with disk_errors(self.path):
            names = [each.name for each in self.path.iterdir()] if self.path.is_dir() else []
        ours = [_BEFORE_A_RUN, _OF_A_KILLED] if LOCK in names else [_BEFORE_A_RUN]
        taken = any(not any(each.fullmatch(name) for each in ours) for name in names)
        if taken and not resume:
            what = "another run" if self.recipe.exists() else "other files"
            raise LoraError(
                f"the output folder already holds {what}",
                where=str(self.path),
                fix="continue that run with --resume, choose another output (--set output=…), or remove the folder",
            )
        if resume and not self.recipe.exists():
            raise LoraError("there is no run to resume", where=str(self.path), fix="start it without --resume")

    def stored_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def stored_environment(self) -> dict[str, Any]:
        try:
            require_regular(self.environment)
            found = json.loads(self.environment.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is no mapping")
        except (OSError, ValueError, RecursionError) as error:
            raise LoraError(
                f"what this run was trained on cannot be read: {error}",
                where=str(self.environment),
                fix="put the file back, or start a new run with another output",
            ) from None
        return found

    def begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        """Also where a resumed run goes on under a changed recipe. recipe.yaml comes last: it is what makes a run."""
        write_json(self.environment, environment)
        try:
            write_bytes(self.recipe, dump_recipe(recipe).encode())
        except DiskError:
            if not self.recipe.exists():  # no run began, so the place stays free for one
                self.environment.unlink()
            raise

    def clear_after_a_kill(self) -> None:
        for folder in (self.path, self.checkpoints):
            with disk_errors(folder):
                finish_moves(folder)

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first. Whether their bytes are right shows when one is opened."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        named = (path for path in found if _STEP.fullmatch(path.name) and path.is_dir())
        return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Raises DiskError; then nothing of the line is there."""
        before = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except BaseException:
            if self.metrics.exists():
                os.truncate(self.metrics, before)
            raise

    def say_state(self, state: str, **values: Any) -> None:
        """Update status.json, which `lora runs` reads. What is not given stays as it was."""
        own = {"pid": os.getpid(), "host": platform.node(), "updated": now()}
        write_json(self.status, {"started": own["updated"], **self._said(), **own, "state": state, **values})

    def wall_seconds(self) -> float:
        """How long all processes of this run that ended in order have taken together."""
        found = self._said().get("wall_seconds")
        return float(found) if isinstance(found, int | float) else 0.0

    def _said(self) -> dict[str, Any]:
        if not self.status.is_file():
            return {}
        try:
            known = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
