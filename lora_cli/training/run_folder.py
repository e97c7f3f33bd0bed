"""The run folder: what stands where, who may write into it, and what a new or resumed run finds there."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.errors import LoraError
from lora_cli.files import disk_errors, write_json
from lora_cli.recipe import Recipe
from lora_cli.recipe_file import differences, load_recipe, write_recipe
from lora_cli.training.checkpoint import list_checkpoints


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

    def refuse_if_taken(self, recipe: Recipe, resume: bool) -> None:
        """Raises LoraError if a new run would overwrite something, or a resumed one would be another run."""
        if self.path.exists() and not self.path.is_dir():
            raise LoraError("the output is a file, not a folder", where=str(self.path), fix="choose another output")
        caches = ("prepared", "compiled")  # of a run that did not begin
        taken = self.path.is_dir() and any(each.name not in caches for each in self.path.iterdir())
        if not resume:
            if taken:
                what = "another run" if self.recipe.exists() else "other files"
                raise LoraError(
                    f"the output folder already holds {what}",
                    where=str(self.path),
                    fix="continue that run with --resume, choose another output (--set output=…), or remove the folder",
                )
            return
        if not self.recipe.exists():
            raise LoraError("there is no run to resume", where=str(self.path), fix="start it without --resume")
        stored = self.stored_recipe()
        if recipe.revision is None:  # stored with the commit that "nothing" meant when the run began
            stored = stored.model_copy(update={"revision": None})
        changed = differences(stored, recipe)
        if changed:
            raise LoraError(
                "the recipe is not the one that this run began with, so resuming would be another run",
                where=str(self.recipe),
                details=changed,
                fix=f"undo these changes, or resume with the run's own recipe: lora train {self.recipe} --resume",
            )

    def stored_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_recipe(recipe, self.recipe)
        write_json(self.environment, environment)

    def require_same(self, environment: dict[str, Any]) -> None:
        """Raises LoraError if data, tokens or base weights are not those that the run began with."""
        began = json.loads(self.environment.read_text(encoding="utf-8"))
        names = {"data_fingerprint": "training or validation data", "base_fingerprint": "base weights"}
        for key, name in names.items():
            if began.get(key) != environment[key]:
                raise LoraError(
                    f"the {name} changed since this run began, so resuming would be another run",
                    where=str(self.path),
                    details=[f"{key}: {began.get(key)} → {environment[key]}"],
                    fix="restore them, or start a new run with another output",
                )

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(list_checkpoints(self.checkpoints)), None)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will run again, so that no step is ever logged twice."""
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
        temporary = self.metrics.with_suffix(".tmp")
        with disk_errors(self.metrics):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.metrics)

    def append_metrics(self, line: dict[str, Any]) -> None:
        with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def environment_of(device: str, dtype: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers")
    return {
        "lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "dtype": dtype,
        **{name: version(name) for name in packages},
    }
