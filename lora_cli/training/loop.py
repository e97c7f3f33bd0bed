"""The training loop: a session in, a report out."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.device import peak_memory_bytes, reserved_memory_bytes, reset_peak_memory
from lora_cli.base.text import vocabulary
from lora_cli.data.row_encoder import ahead
from lora_cli.errors import CheckFailed, DiskError, Interrupted, LoraError
from lora_cli.evaluation.perplexity import EvaluationStopped
from lora_cli.screen import say_on
from lora_cli.training.divergence import what_is_wrong
from lora_cli.training.micro_batches import DoesNotFit, MicroBatches, StepData, smaller_line
from lora_cli.training.optimizer import averaged_weights, learning_rate, make_optimizer, set_learning_rate
from lora_cli.training.processes import any_process, asked, process_lost_errors
from lora_cli.training.progress import Progress
from lora_cli.training.report import make_report, require_learned, say_result, write_card, write_report
from lora_cli.training.resume import COMPUTING, Change
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.sampler import Sampler
from lora_cli.training.session import Session
from lora_cli.training.state import State
from lora_cli.training.stopping import Stop
from lora_cli.training.trackers import open_trackers
from lora_cli.training.validation import Validator
from lora_cli.training.writer import RunWriter

_SKIPPED_IN_A_ROW = 10  # then the data are not to blame
_REWINDS = 3


@dataclass
class Run:
    """One run from its first or resumed step to its last. before_step: called before each; may ask `stop` to end."""

    session: Session
    folder: RunFolder
    accelerator: Accelerator
    console: Console
    stop: Stop
    environment: dict[str, Any]
    before_step: Callable[[Run], None] = lambda _: None

    def __post_init__(self) -> None:
        session, folder, accelerator, stop = self.session, self.folder, self.accelerator, self.stop
        self.say = say_on(self.console)
        self.recipe = session.recipe.train
        self.parameters = trained_parameters(session.model)
        self.optimizer = make_optimizer(self.recipe, session.model)
        # Without it fp16's gradients would vanish in its narrow range; with other dtypes it does nothing.
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
        self.state = State()
        self.ahead: Generator[StepData, None, None] = ahead(iter(()), 1)
        self.tried = False  # whether the largest micro-batch has been tried on this machine
        self.wall_seconds_before = folder.wall_seconds()
        self.micro_batches = MicroBatches(session, accelerator, self.parameters, self.scaler)
        self.validator = Validator(session, accelerator, lambda: stop.requested)
        environment = {name: self.environment[name] for name in (*COMPUTING, "device", "dtype", "processes")}
        belongs_to = {
            "recipe": session.recipe.model_dump(mode="json"),
            "data_fingerprint": session.feed.summary.fingerprint,
            "base_fingerprint": session.source.fingerprint,
            "environment": environment,
        }
        self.writer = RunWriter(session, folder, accelerator, self.optimizer, self.scaler, stop, belongs_to, self.say)
        # Signals alone stop it: a run whose time is up at its last step goes on to its report.
        self.sampler = Sampler(session, accelerator, self.writer, lambda: stop.first is not None)
        # What a model's own code or a library may draw from; torch is seeded in each step.
        random.seed(self.recipe.seed)
        np.random.seed(self.recipe.seed)

    def go_back(self, changes: Sequence[Change] = ()) -> None:
        """To the newest checkpoint, or the beginning if there is none."""
        state = self.writer.restore()
        self.state = state or State()
        if state is not None:
            self.session.feed.seek(state.position)
        if any(each.allow.startswith(("data", "base_model", "quantization", "dtype")) for each in changes):
            self.validator.forget(self.state)
            self.writer.written(lambda: self.folder.samples.unlink(missing_ok=True))
        self.validator.require_fit(self.state)
        if self._is_over() and self.state.pending is None and self.folder.report.exists():
            fix = f"its adapter is in adapter/; to train it longer: {self.folder.longer_command()}"
            raise LoraError("this run is finished", where=self.folder.path, fix=fix)
        self.say(f"resuming after step {self.state.step} of {self.session.total_steps}")

    def to_the_end(self) -> dict[str, Any]:
        self._say_state("running")
        try:
            progress = Progress(self.console, self.session.total_steps, self.state.step + 1, self.session.feed.epochs)
            reporting = self.accelerator.is_main_process
            with process_lost_errors(self.folder.resume_command()):
                with open_trackers(self.session.recipe, progress.say, active=reporting) as track, progress:
                    try:
                        self._steps(progress, track)
                    finally:
                        self.ahead.close()
                with averaged_weights(self.optimizer):
                    report = self._finish()
        except BaseException as error:
            asked = isinstance(error, Interrupted | KeyboardInterrupt)
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say_state("interrupted" if asked else "failed", why=why)
            raise
        self._say_state("nothing learned" if report["verdict"] == "nothing learned" else "done")
        require_learned(report, self.folder)
        return report

    def _steps(self, progress: Progress, track: Any) -> None:
        self.stop.in_steps = True
        self._score_base(progress)
        self._sample(0, progress, track)
        if self.state.pending is not None:
            self._complete(self.state.pending, progress, track)
        first = self.accelerator.is_main_process
        if self.recipe.on_nan == "rewind" and any_process(self.accelerator, first and not self.writer.planned()):
            self.writer.planned_too = self.state.step  # there must be something to go back to
            self.writer.checkpoint(self.state)
        reset_peak_memory(self.session.device)
        if not self.tried:
            self.state.parts = self.micro_batches.try_largest(self.state.step + 1, self.state.parts, progress.say)
        self.writer.start_clock()
        while not self._is_over():
            self.before_step(self)
            stop, due = asked(self.accelerator, self.stop, due=self.writer.is_due())
            if stop or (due and self.state.step):
                self.writer.checkpoint(self.state)
                self._say_state("running")
            if stop:
                raise self._interrupted()
            began = time.monotonic()
            self._one_step(self.state.step + 1, progress, track)
            self.stop.watch_the_clock(time.monotonic() - began)

    def _one_step(self, step: int, progress: Progress, track: Any) -> None:
        started = time.monotonic()
        line, wrong = self._optimize(step)
        if wrong is not None:
            if self._goes_back(wrong, step):
                return
            line["skipped"] = wrong
        line["seconds"] = time.monotonic() - started
        line["tokens_per_second"] = line["tokens"] / line["seconds"]
        line["peak_memory_bytes"] = peak_memory_bytes(self.session.device)
        if (reserved := reserved_memory_bytes(self.session.device)) is not None:
            line["reserved_memory_bytes"] = reserved
        state = self.state
        state.step, state.last_loss = step, line["loss"]
        state.first_loss = line["loss"] if state.first_loss is None else state.first_loss
        state.tokens += line["tokens"]
        state.target_tokens += line["target_tokens"]
        state.seconds += line["seconds"]
        state.peak_memory_bytes = max(state.peak_memory_bytes, line["peak_memory_bytes"])
        state.reserved_memory_bytes = max(state.reserved_memory_bytes, line.get("reserved_memory_bytes", 0))
        self._complete(line, progress, track)

    def _complete(self, line: dict[str, Any], progress: Progress, track: Any) -> None:
        """What follows a step: evaluation, samples, the line in metrics.jsonl, a checkpoint; each where it is due."""
        step, last = line["step"], line["step"] == self.session.total_steps
        self.state.pending = line
        due = last or (self.recipe.eval_every and step % self.recipe.eval_every == 0)
        if self.validator.has_data and due and "validation_loss" not in line:
            progress.doing("evaluating")
            loss = self._score_step()
            if not math.isfinite(loss) and self._goes_back(f"the validation loss is {loss}", step, can_skip=False):
                return
            line["validation_loss"] = loss
        if self.sampler.is_due(step, last=self._is_over()):
            self._sample(step, progress, track)
        self.state.pending = None
        self.writer.append(self.folder.metrics, [line])
        track(line, step)
        if self._is_over() or (self.recipe.checkpoint_every and step % self.recipe.checkpoint_every == 0):
            self.writer.checkpoint(self.state)
            self._say_state("running")
        progress.step(line)

    def _is_over(self) -> bool:
        """Whether the last step is done, or train.patience is at its end."""
        patience, waited = self.recipe.patience, self.state.evaluations_since_best
        return self.state.step >= self.session.total_steps or (patience is not None and waited >= patience)

    def _optimize(self, step: int) -> tuple[dict[str, Any], str | None]:
        """One optimizer step over all its micro-batches, on all processes.

        Returns the line for metrics.jsonl, and what is wrong with the step if something is; then nothing was updated.
        """
        data = self._data_of(step)
        batches = data.batches
        targets = sum(example.targets for batch in batches for example in batch)
        weight = sum(example.target_weight for batch in batches for example in batch)
        rate = learning_rate(self.recipe, step, self.session.total_steps)
        set_learning_rate(self.optimizer, rate)
        total, norm = self._gradients(step, data, weight)
        mean = total / weight
        wrong, overflow = self._update(step, mean, norm)
        self.state.position = data.position
        line = {
            "step": step,
            "loss": mean if math.isfinite(mean) else None,  # JSON cannot hold NaN or infinity
            "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "target_tokens": targets,
            "tokens": sum(len(example.ids) for batch in batches for example in batch),
        }
        return line | ({"skipped": overflow} if overflow else {}), wrong

    def _update(self, step: int, loss: float, norm: float) -> tuple[str | None, str | None]:
        """Let the optimizer step, unless something is wrong. Returns what is, and why the fp16 scaler left it out."""
        is_wrong = partial(
            what_is_wrong,
            loss,
            first_loss=self.state.first_loss,
            vocabulary=vocabulary(self.session.model.config),
            scaled=not math.isfinite(norm) and self.scaler.get_scale() > 1,
        )
        of_loss = is_wrong(None)
        wrong = of_loss or is_wrong(norm)
        overflow = None
        if wrong is None and math.isfinite(norm):
            self.optimizer.step()
            self.state.clipped += norm > self.recipe.max_grad_norm
        elif wrong is None:
            overflow = self._say_overflow(step)
        # The gradients of a loss that is wrong say nothing of the scale.
        self.scaler.update(None if of_loss is None else self.scaler.get_scale())
        self.optimizer.zero_grad()
        return wrong, overflow

    def _say_overflow(self, step: int) -> str:
        """Why the fp16 scaler has skipped the update of this step; it then halves its scale."""
        self.state.skipped.append(step)
        why = f"gradients overflow fp16 at a loss scale of {self.scaler.get_scale():g}"
        self.say(f"step {step}: {why}; its update is skipped, and the scale is halved")
        return why

    def _data_of(self, step: int) -> StepData:
        """Made while the step before it computed; no data are read behind the last step."""
        data = next(self.ahead, None)
        if data is None:  # at the beginning, and where going back has moved the last step
            self.ahead = ahead(self._steps_of_data(step), 1)
            data = next(self.ahead)
        return data

    def _steps_of_data(self, step: int) -> Iterator[StepData]:
        offset = self.state.data_offset
        for number in range(step + offset, self.session.total_steps + offset + 1):
            for_step = number - self.state.data_offset
            yield self.micro_batches.make_ahead(self.session.feed, number, for_step, self.state.parts)

    def _gradients(self, step: int, data: StepData, weight: float) -> tuple[float, float]:
        """(cross-entropy summed over a step, norm of its gradients), in smaller micro-batches if need be.

        It leaves the gradients clipped and, with fp16, unscaled.
        """
        while True:
            parts = self.state.parts
            made = data.made if data.made_for == (step, parts) else None
            try:
                return self.micro_batches.run(step, data.batches, weight, parts, self._clip, made)
            except DoesNotFit as problem:
                with suppress(AssertionError):  # of a scaler that has not scaled yet
                    self.scaler.update(self.scaler.get_scale())  # so that gradients may be unscaled again
                self.state.parts = self.micro_batches.smaller(data.batches, parts, problem)
                self.say(smaller_line(problem, self.state.parts))
                if self.state.step:  # the last step that is complete
                    self.writer.checkpoint(self.state)

    def _clip(self) -> Tensor:
        """The norm of a step's gradients, before they were clipped."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)

    # ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────

    def _score_base(self, progress: Progress) -> None:
        if not self.validator.has_data or self.state.base_validation_loss is not None:
            return
        progress.doing("evaluating the base model")
        try:
            loss = self.validator.score_base(self.state)
        except EvaluationStopped:
            raise self._interrupted() from None
        progress.say(f"base model: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 80)):.2f})")

    def _score_step(self) -> float:
        try:
            with averaged_weights(self.optimizer):
                loss, best = self.validator.score_step(self.state)
                if best:
                    self.writer.adapter(self.folder.adapter)
        except EvaluationStopped:  # the step is complete, and its evaluation comes first when the run goes on
            self.writer.checkpoint(self.state)
            raise self._interrupted() from None
        return loss

    def _sample(self, step: int, *told: Any) -> None:
        """What the prompts are answered at a step, as `Sampler.sample` takes it."""
        try:
            self.sampler.sample(step, *told)
        except EvaluationStopped:  # as for an evaluation
            if self.state.pending is not None:
                self.writer.checkpoint(self.state)
            raise self._interrupted() from None

    # ── a step that went wrong ──────────────────────────────────────────────────────────────────────────────────

    def _goes_back(self, wrong: str, step: int, *, can_skip: bool = True) -> bool:
        """What train.on_nan says: False to go on without the update, True after going back; else raises CheckFailed."""
        state = self.state
        if self.recipe.on_nan == "skip" and can_skip:
            state.skipped.append(step)
            if state.skipped[-_SKIPPED_IN_A_ROW:] != list(range(step - _SKIPPED_IN_A_ROW + 1, step + 1)):
                self.say(f"step {step}: {wrong}; its update is skipped")
                return False
            wrong = f"{wrong}, as in each of the last {_SKIPPED_IN_A_ROW} steps,"
        if self.recipe.on_nan == "rewind":
            back_to = self.writer.planned()[-1:]
            if back_to and sum(to == back_to[0].name for _, to in state.rewound) < _REWINDS:
                self._rewind(wrong, step)
                return True
            wrong = f"{wrong}, after going back {_REWINDS} times,"
        newest = self.folder.list_checkpoints()[-1:]
        raise CheckFailed(
            f"{wrong} at step {step}: training has diverged and was stopped",
            where=str(self.folder.path),
            details=[f"last checkpoint: {newest[0].name if newest else 'none'}; this step's adapter was not saved"],
            fix="lower train.learning_rate, raise train.warmup_ratio, or look for broken rows in the data; "
            "train.on_nan: skip or rewind goes on without such steps",
        )

    def _rewind(self, wrong: str, step: int) -> None:
        """Go back to the last checkpoint, and continue with the data after this step."""
        before = self.state
        restored = self.writer.restore(planned=True)
        assert restored is not None
        self.state = restored
        left_out = step - restored.step
        restored.data_offset = before.data_offset + left_out
        restored.rewound = [*before.rewound, (step, self.folder.checkpoint(restored.step).name)]
        restored.position = before.position
        self.writer.checkpoint(restored)  # so that a run that is killed now goes on the same way
        self.say(
            f"step {step}: {wrong}; back to step {restored.step}, continuing without the data of these {left_out} steps"
        )

    # ── how a run ends ──────────────────────────────────────────────────────────────────────────────────────────

    def _interrupted(self) -> Interrupted:
        done = f"after step {self.state.step} of {self.session.total_steps}; a checkpoint is written"
        what = f"stopped {done if self.state.step else 'before step 1: nothing was trained yet'} ({self.stop.why})"
        fix = f"continue with: {self.folder.resume_command()}"
        return Interrupted(what, exit_code=self.stop.exit_code, where=self.folder.path, fix=fix)

    def _say_state(self, state: str, why: str | None = None) -> None:
        if not self.accelerator.is_main_process:
            return
        with suppress(DiskError):  # what matters more will complain
            self.folder.say_state(
                state,
                why=why,
                step=self.state.step,
                total_steps=self.session.total_steps,
                wall_seconds=round(self.wall_seconds_before + time.monotonic() - self.stop.began, 1),
                processes=self.accelerator.num_processes,
            )

    def _finish(self) -> dict[str, Any]:
        self.writer.adapter(self.folder.last_adapter if self.validator.has_data else self.folder.adapter)
        self.accelerator.wait_for_everyone()  # the shipped adapter is there for all
        report = make_report(self.session, self.state, self.folder, self.accelerator)
        kept = self.state.best_step or self.state.step
        self._sample(kept)
        report["samples"] = self.sampler.report(kept)
        self.writer.written(lambda: write_card(self.session, report, self.folder))
        self.writer.written(lambda: write_report(self.folder, report, self.say))
        self.accelerator.wait_for_everyone()
        say_result(report, self.folder, self.say)
        return report
