"""All that a run writes: metrics, adapters, checkpoints; and going back to what was written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_cli.adapters.file import FILES as ADAPTER_FILES
from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.trained import is_neutral
from lora_cli.errors import DiskError, Interrupted
from lora_cli.files import disk_errors, free_name, remove_folder, replacing, written_whole
from lora_cli.foreign import copy_file, copy_files, is_real_folder
from lora_cli.quantization import RULES
from lora_cli.training.checkpoint import BEST, FILES, Damaged, link_or_copy, load_checkpoint, save_checkpoint, verify
from lora_cli.training.optimizer import apply_settings, learning_rate
from lora_cli.training.run_folder import RunFolder, append
from lora_cli.training.session import Session
from lora_cli.training.state import State
from lora_cli.training.stopping import Stop

_TRY_AGAIN_SECONDS = 10.0


@dataclass
class RunWriter:
    """Writes what a run leaves behind. Of several processes one writes; all read.

    A write that fails leaves what was there before; then the run stops or waits, as train.on_write_error says.
    """

    session: Session
    folder: RunFolder
    accelerator: Accelerator
    optimizer: Any
    scaler: torch.amp.GradScaler
    stop: Stop
    belongs_to: dict[str, Any]
    say: Callable[[str], None]
    planned_too: int | None = None  # a step that a run can go back to, where none was planned so far

    def __post_init__(self) -> None:
        self.recipe = self.session.recipe.train
        self.start_clock()

    def append(self, file: Path, lines: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl or samples.jsonl."""
        self.written(lambda: append(file, lines))

    def adapter(self, place: Path) -> None:
        """Ship the adapter as it is now, unless it is still neutral: nobody should take such a folder for a result."""
        if not is_neutral(self.session.model):
            self.written(lambda: self._write_adapter(place))

    def checkpoint(self, state: State) -> None:
        state.loss_scale = self.scaler.state_dict()
        self.written(lambda: self._write_checkpoint(state))
        self.start_clock()
        self.accelerator.wait_for_everyone()

    def start_clock(self) -> None:
        self.written_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether so much time has passed that a checkpoint is to be written for resuming alone."""
        minutes = self.recipe.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.written_at >= 60 * minutes

    def planned(self) -> list[Path]:
        """The checkpoints that every run of this recipe has, whenever it was interrupted and how fast it is.

        The others are for resuming alone: a run that went back to one of them would differ from a run without it.
        """
        every = self.recipe.checkpoint_every
        steps = {0, self.session.total_steps, self.planned_too}
        found = [(each, int(each.name.removeprefix("step_"))) for each in self.folder.list_checkpoints()]
        return [each for each, step in found if step in steps or (every and step % every == 0)]

    def restore(self, *, planned: bool = False) -> State | None:
        """Go back to the newest intact checkpoint: model, optimizer, random states, metrics.jsonl and adapter/.

        planned: to one of those alone. A damaged one is reported and set aside, and the one before it used. Returns
        None if there is none: the run has not begun.
        """
        candidates = self.planned if planned else self.folder.list_checkpoints
        if self.accelerator.is_main_process:
            self._set_damaged_aside(candidates())
        self.accelerator.wait_for_everyone()
        newest, state = next(reversed(candidates()), None), None
        if newest is not None:
            state = load_checkpoint(newest, self.session.model, self.optimizer)
            apply_settings(self.optimizer, self.recipe, self.session.model)
            if state.loss_scale:
                self.scaler.load_state_dict(state.loss_scale)
        self.written(lambda: self._put_back(newest))
        self.accelerator.wait_for_everyone()
        return state

    def written(self, write: Callable[[], None]) -> None:
        """Let the first process write, however long it takes to succeed; raises a DiskError that says what is left."""
        while self.accelerator.is_main_process:
            try:
                return write()
            except DiskError as problem:
                newest = next(reversed(self.folder.list_checkpoints()), None)
                left = f"the last checkpoint is {newest.name}" if newest else "no checkpoint was written yet"
                fix = f"{problem.fix}; then continue with: {self.folder.resume_command()}"
                if self.recipe.on_write_error == "stop":
                    raise DiskError(problem.what, where=problem.where, details=[left], fix=fix) from problem
                self.say(f"{problem.where}: {problem.what}; waiting, and trying again every {_TRY_AGAIN_SECONDS:.0f} s")
                self.stop.wait(_TRY_AGAIN_SECONDS)
                if self.stop.requested:
                    what = f"stopped while waiting: {problem.what}; {left}"
                    raise Interrupted(what, exit_code=self.stop.exit_code, where=problem.where, fix=fix) from problem

    # ── how ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write_adapter(self, place: Path) -> None:
        recipe = self.session.recipe
        with written_whole(place, replaces=ADAPTER_FILES) as temporary:
            save_adapter(
                self.session.model,
                temporary,
                self.session.source,
                quantization=recipe.quantization,
                double_quantization=recipe.double_quantization,
                group_size=recipe.group_size if RULES[recipe.quantization].groups else None,
                chat_template=self.session.feed.summary.own_template,
                prompting=self.session.feed.summary.prompting,
                system=self.session.feed.summary.system,
            )

    def _write_checkpoint(self, state: State) -> None:
        total = self.session.total_steps
        has_best = state.best_step is not None and is_real_folder(self.folder.adapter)
        save_checkpoint(
            self.folder.checkpoint(state.step),
            self.session.model,
            self.optimizer,
            state,
            belongs_to=self.belongs_to,
            schedule={
                "kind": self.recipe.schedule,
                "total_steps": total,
                "learning_rate": learning_rate(self.recipe, max(1, state.step), total),
            },
            lines=(self.folder.metrics, self.folder.samples),
            best=self.folder.adapter if has_best else None,
        )
        best = None if state.best_step is None else self.folder.checkpoint(state.best_step)
        kept = {self.folder.checkpoint(state.step), best, *self.planned()[-self.recipe.keep_checkpoints :]}
        with disk_errors(self.folder.checkpoints):
            for old in self.folder.list_checkpoints():
                if old not in kept:
                    remove_folder(old, FILES)

    def _set_damaged_aside(self, checkpoints: list[Path]) -> None:
        for checkpoint in reversed(checkpoints):
            try:
                verify(checkpoint)
                return
            except Damaged as problem:
                aside = free_name(checkpoint.with_name(f"damaged_{checkpoint.name}"))
                self.say(
                    f"{problem.where}: {problem.what}; it is set aside as {aside.name}, and the one before it used"
                )
                with disk_errors(aside):
                    checkpoint.rename(aside)

    def _put_back(self, checkpoint: Path | None) -> None:
        """Metrics, samples and adapter/ as they were at a checkpoint: what came later will come again, or otherwise."""
        with disk_errors(self.folder.path):
            for file in (self.folder.metrics, self.folder.samples):
                if checkpoint is None or not (checkpoint / file.name).exists():
                    file.unlink(missing_ok=True)
                else:
                    with replacing(file) as temporary:
                        copy_file(checkpoint / file.name, temporary, over=True)
            if checkpoint is not None and is_real_folder(best := checkpoint / BEST):
                with written_whole(self.folder.adapter, replaces=ADAPTER_FILES) as place:
                    copy_files(best, place, ADAPTER_FILES, link_or_copy)
            elif self.session.feed.validation:
                remove_folder(self.folder.adapter, ADAPTER_FILES)
