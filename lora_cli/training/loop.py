"""The training loop: recipe in, adapter out."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from lora_cli.adapters.attach import adapter_parameters, is_inert
from lora_cli.adapters.file import save_adapter
from lora_cli.base.device import describe_device, peak_memory_bytes, pick_device, pick_dtype, reset_peak_memory
from lora_cli.data.example import Example
from lora_cli.data.prepared import micro_batches_per_step, rows_per_micro_batch
from lora_cli.errors import CheckFailed, Interrupted, LoraError
from lora_cli.evaluation.perplexity import mean_loss
from lora_cli.files import human_bytes, write_json, written_whole
from lora_cli.recipe import Recipe
from lora_cli.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from lora_cli.training.micro_batches import DoesNotFit, MicroBatches, smaller_from_now_on
from lora_cli.training.optimizer import averaged_weights, learning_rate, make_optimizer, set_learning_rate
from lora_cli.training.progress import Progress
from lora_cli.training.run_folder import RunFolder, environment_of
from lora_cli.training.session import Session, open_session
from lora_cli.training.trackers import open_trackers, require_trackers


@dataclass
class State:
    """What a checkpoint carries beside adapter and optimizer."""

    step: int = 0
    base_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    last_validation_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    parts: int = 1  # pieces that each micro-batch of the recipe is cut into, because it did not fit whole
    loss_scale: dict[str, Any] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)  # of the data, where the step does not say it


def train(recipe: Recipe, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end; returns the report that is also written to report.json.

    Raises Interrupted after Ctrl+C or SIGTERM, with a checkpoint written; CheckFailed when the loss is not finite or
    nothing was learned.
    """
    folder = RunFolder(Path(recipe.output))
    folder.refuse_if_taken(recipe, resume)
    if resume:
        recipe = folder.stored_recipe()  # the same, with the revision that the run began with
    accelerator = _accelerator(recipe)
    console.quiet |= not accelerator.is_main_process
    session = open_session(recipe, console)
    environment = environment_of(describe_device(session.device), str(session.dtype)) | {
        "processes": accelerator.num_processes,
        "base_revision": session.source.revision,
        "base_fingerprint": session.source.fingerprint,
        "data_fingerprint": session.data_fingerprint,
        "data_files": session.data_files,
    }
    if resume:
        folder.require_same(environment)
    elif accelerator.is_main_process:
        folder.begin(recipe.model_copy(update={"revision": session.source.revision}), environment)
    accelerator.wait_for_everyone()
    return _Run(session, folder, accelerator, console).to_the_end(resume)


def _accelerator(recipe: Recipe) -> Accelerator:
    require_trackers(recipe.trackers)
    # fp16 needs loss scaling, which accelerate brings with its fp16 mode. For bf16 the frozen weights already are
    # bf16 and the layers cast A and B: no autocast, so no copies of what need not be copied.
    device = pick_device(recipe.device)
    dtype, _ = pick_dtype(recipe.dtype, device)
    accelerator = Accelerator(
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        cpu=device.type == "cpu",
        log_with=list(recipe.trackers) or None,
        project_dir=recipe.output if recipe.trackers else None,
    )
    micro_batches = micro_batches_per_step(recipe)
    if recipe.train.batch_size is None and accelerator.num_processes > micro_batches:
        raise LoraError(
            f"{accelerator.num_processes} processes, but {micro_batches} micro-batches a step",
            fix="raise train.gradient_accumulation_steps to the number of processes or more",
        )
    return accelerator


class _Run:
    """One run from its first or resumed step to its last."""

    def __init__(self, session: Session, folder: RunFolder, accelerator: Accelerator, console: Console):
        self.session, self.folder, self.accelerator, self.console = session, folder, accelerator, console
        self.recipe = session.recipe.train
        self.model = session.model
        self.parameters = adapter_parameters(self.model)
        optimizer = make_optimizer(self.recipe, self.model)
        # Only fp16 needs accelerate around each step and backward; it looks for packages on the disk every time.
        self.optimizer = optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)
        self.state = State()
        self.stop_requested = False
        self.micro_batches = MicroBatches(session, accelerator, self.parameters)

    def to_the_end(self, resume: bool) -> dict[str, Any]:
        if resume:
            self._resume()
        first = self.state.step + 1
        progress = Progress(self.console, self.session.total_steps, first)
        with open_trackers(self.accelerator, self.session.recipe) as track, progress, self._stop_signals():
            if first == 1:
                self._evaluate_base(progress)
            reset_peak_memory(self.session.device)
            self.state.parts = self.micro_batches.rehearse(first, self.state.parts, progress.say)
            for step in range(first, self.session.total_steps + 1):
                self._one_step(step, progress, track)
                if self.stop_requested:
                    self._interrupt(step)
        with averaged_weights(self.optimizer):
            return self._finish()

    def _one_step(self, step: int, progress: Progress, track: Any) -> None:
        started = time.monotonic()
        line = self._optimize(step)
        line["seconds"] = time.monotonic() - started
        line["tokens_per_second"] = line["tokens"] / line["seconds"]
        line["peak_memory_bytes"] = peak_memory_bytes(self.session.device)
        state = self.state
        state.step, state.last_loss = step, line["loss"]
        state.first_loss = line["loss"] if state.first_loss is None else state.first_loss
        state.tokens += line["tokens"]
        state.target_tokens += line["target_tokens"]
        state.seconds += line["seconds"]
        state.peak_memory_bytes = max(state.peak_memory_bytes, line["peak_memory_bytes"])
        last = step == self.session.total_steps
        if self.session.data.validation and (last or (self.recipe.eval_every and step % self.recipe.eval_every == 0)):
            progress.doing("evaluating")
            with averaged_weights(self.optimizer):
                line["validation_loss"] = self._evaluate(step)
        if self.accelerator.is_main_process:
            self.folder.append_metrics(line)
        track(line, step)
        if last or (self.recipe.checkpoint_every and step % self.recipe.checkpoint_every == 0):
            self._checkpoint()
        progress.step(line)

    def _optimize(self, step: int) -> dict[str, Any]:
        """One optimizer step over all its micro-batches, on all processes; the line for metrics.jsonl."""
        batches = self.session.feed.step(step)
        targets = sum(example.targets for batch in batches for example in batch)
        weight = sum(example.target_weight for batch in batches for example in batch)
        rate = learning_rate(self.recipe, step, self.session.total_steps)
        set_learning_rate(self.optimizer, rate)
        mean = self._gradients(step, batches, weight) / weight
        if not math.isfinite(mean):
            raise self._not_finite(f"the loss is {mean}", step)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm))  # type: ignore[arg-type]
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # fp16 overflows now and then; its scaler skips
            raise self._not_finite(f"the gradient norm is {norm}", step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.position = self.session.feed.position()
        tokens = sum(len(example.ids) for batch in batches for example in batch)
        return {
            "step": step,
            "loss": mean,
            "learning_rate": rate,
            "grad_norm": norm,
            "target_tokens": targets,
            "tokens": tokens,
        }

    def _gradients(self, step: int, batches: list[list[Example]], weight: float) -> float:
        """Cross-entropy summed over a step, whose gradients are then there; in smaller micro-batches if need be."""
        while True:
            try:
                return self.micro_batches.run(step, batches, weight, self.state.parts)
            except DoesNotFit as problem:
                self.state.parts = self.micro_batches.smaller(batches, self.state.parts, problem)
                self.console.print(smaller_from_now_on(problem, self.state.parts), highlight=False, soft_wrap=True)
                if self.state.step:  # the last step that is complete
                    self._checkpoint()

    # ── evaluation and what is kept ─────────────────────────────────────────────────────────────────────────────

    def _evaluate_base(self, progress: Progress) -> None:
        """With B = 0 the model is its base: what the run has to beat."""
        if not self.session.data.validation:
            return
        progress.doing("evaluating the base model")
        self.state.base_validation_loss = loss = self._validation_loss()
        progress.say(f"base model: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 80)):.2f})")

    def _evaluate(self, step: int) -> float:
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise self._not_finite(f"the validation loss is {loss}", step)
        self.state.last_validation_loss = loss
        if self.state.best_validation_loss is None or loss < self.state.best_validation_loss:
            self.state.best_validation_loss, self.state.best_step = loss, step
            self._save_adapter(self.folder.adapter)
        return loss

    def _validation_loss(self) -> float:
        held_out = self.session.data.validation
        budget = max(int(held_out.lengths.max()), self._micro_batch_tokens)
        with self.accelerator.autocast():
            return mean_loss(self.model, held_out, self.session.collate, budget)[0]

    @property
    def _micro_batch_tokens(self) -> int:
        rows = rows_per_micro_batch(self.session.recipe) / self.state.parts
        return self.recipe.tokens_per_micro_batch or math.ceil(rows) * self.session.recipe.data.max_seq_len

    def _save_adapter(self, place: Path) -> None:
        """Ship the adapter as it is now, unless it is still inert: nobody should take such a folder for a result."""
        if not self.accelerator.is_main_process or is_inert(self.model):
            return
        recipe = self.session.recipe
        with written_whole(place) as temporary:
            save_adapter(
                self.model,
                temporary,
                self.session.source,
                quantization=recipe.quantization,
                double_quantization=recipe.double_quantization,
                chat_template=self.session.own_template,
            )

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.state.loss_scale = self.accelerator.scaler.state_dict()
            place = self.folder.checkpoints / f"step_{self.state.step:06d}"
            save_checkpoint(place, self.model, self.optimizer, vars(self.state))
            prune_checkpoints(self.folder.checkpoints, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        newest = self.folder.newest_checkpoint()
        if newest is not None:
            saved = load_checkpoint(newest, self.model, self.optimizer)
            self.state = State(**{name: saved[name] for name in vars(State())})
            self.session.feed.seek(self.state.position)
            if self.accelerator.scaler is not None and self.state.loss_scale:
                self.accelerator.scaler.load_state_dict(self.state.loss_scale)
        if self.accelerator.is_main_process:
            self.folder.forget_metrics_after(self.state.step)
        if self.state.step >= self.session.total_steps and self.folder.report.exists():
            raise LoraError(
                "this run is finished",
                where=str(self.folder.path),
                fix="its adapter is in adapter/; start a new run to train more",
            )
        self.console.print(f"resuming after step {self.state.step} of {self.session.total_steps}", highlight=False)

    # ── how a run ends ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """First Ctrl+C or SIGTERM: stop after this step. Second: stop at once."""

        def request(signum: int, _frame: Any) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.console.print(
                f"{signal.Signals(signum).name}: finishing this step, then writing a checkpoint", highlight=False
            )

        before = {sig: signal.signal(sig, request) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _interrupt(self, step: int) -> None:
        if step == self.session.total_steps:
            return
        self._checkpoint()
        raise Interrupted(
            f"stopped after step {step} of {self.session.total_steps}; a checkpoint is written",
            where=str(self.folder.path),
            fix=f"continue with: lora train {self.folder.recipe} --resume",
        )

    def _not_finite(self, what: str, step: int) -> CheckFailed:
        newest = self.folder.newest_checkpoint()
        return CheckFailed(
            f"{what} at step {step}: training has diverged and was stopped",
            where=str(self.folder.path),
            details=[f"last checkpoint: {newest.name if newest else 'none'}; the adapter of this step was not saved"],
            fix="lower train.learning_rate, raise train.warmup_ratio, or look for broken rows in the data",
        )

    def _finish(self) -> dict[str, Any]:
        state, session = self.state, self.session
        if session.data.validation:
            self._save_adapter(self.folder.last_adapter)
        else:
            self._save_adapter(self.folder.adapter)
        report = {
            "steps": state.step,
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "base_validation_loss": state.base_validation_loss,
            "best_validation_loss": state.best_validation_loss,
            "best_step": state.best_step,
            "last_validation_loss": state.last_validation_loss,
            "tokens": state.tokens,
            "target_tokens": state.target_tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / state.seconds, 1),
            "peak_memory_bytes": state.peak_memory_bytes,
            "adapted_layers": len(session.layers),
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "learned": not is_inert(self.model),
            "adapter": str(self.folder.adapter),
        }
        if self.accelerator.is_main_process:
            write_json(self.folder.report, report)
        self.accelerator.wait_for_everyone()
        if not report["learned"]:
            raise CheckFailed(
                "this run learned nothing: every B of the adapter is still zero",
                where=str(self.folder.path),
                fix="raise train.learning_rate; with one step and a warm-up the rate may have been too small to count",
            )
        self._say_result(report)
        return report

    def _say_result(self, report: dict[str, Any]) -> None:
        def say(text: str) -> None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

        if report["best_validation_loss"] is not None:
            before, after = report["base_validation_loss"], report["best_validation_loss"]
            change = 1 - math.exp(after - before)
            say(
                f"validation perplexity {math.exp(min(before, 80)):.2f} → {math.exp(min(after, 80)):.2f} "
                f"({abs(change):.0%} {'lower' if change >= 0 else 'higher'}; best at step {report['best_step']})"
            )
        minutes, seconds = divmod(round(report["seconds"]), 60)
        say(
            f"{report['steps']} steps in {minutes}:{seconds:02d}, {report['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {human_bytes(report['peak_memory_bytes'])}"
        )
        say(f"adapter in {report['adapter']}")
