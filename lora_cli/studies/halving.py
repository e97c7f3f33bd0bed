"""`lora sweep --budget`: successive halving. All points go a part of the way, and only the better ones to the end.

A stopped point is an interrupted run of its whole recipe, with its whole schedule: it can go on at any time, and is
then the run that was never stopped. Source: Jamieson and Talwalkar 2016, arXiv:1502.07943.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.evaluation.gain import paired_gain
from lora_cli.evaluation.perplexity import EvaluationStopped
from lora_cli.files import write_json
from lora_cli.foreign import read_json
from lora_cli.studies.sweep_result import Point, interval, joined
from lora_cli.training.loop import Run
from lora_cli.training.optimizer import averaged_weights
from lora_cli.training.stored import Count, Seconds, Stored
from lora_cli.training.verdict import duration

RUNGS = (0.25, 0.5)  # the parts of its steps after which a run is compared
_FIRST = 3  # steps that the first estimate is made from


class Noted(Stored):
    """Of a run: its steps, about how many seconds all of it takes, and the nats of each validation example by step."""

    total: Count
    seconds: Seconds
    targets: list[Count]
    losses: dict[str, list[float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if not sum(self.targets) or any(len(each) != len(self.targets) for each in self.losses.values()):
            raise ValueError("losses and targets do not fit each other")
        return self

    def step(self, rung: float) -> str:
        return str(_step(self.total, rung))


def _step(total: int, rung: float) -> int:
    return max(1, round(rung * total))


class Notes(Stored):
    """rungs.json of a sweep: runs by the names of their folders."""

    runs: dict[str, Noted] = Field(default_factory=dict)

    def of(self, point: Point, rung: float) -> list[Noted] | None:
        """Of each run of a point that was compared at a rung."""
        found = [self.runs.get(each.path.name) for each in point.folders]
        noted = [each for each in found if each is not None and each.step(rung) in each.losses]
        return noted if len(noted) == len(found) else None


def read_notes(path: Path, points: Sequence[Point]) -> Notes:
    """Of runs that still exist. Raises LoraError for a damaged file."""
    if not path.exists():
        return Notes()
    notes = read_json(path, Notes, fix="remove it: unfinished points are then compared anew, or trained to the end")
    begun = {each.path.name for point in points for each in point.folders if each.recipe.exists()}
    return Notes(runs={name: each for name, each in notes.runs.items() if name in begun})


def rungs_of(points: Sequence[Point], notes: Notes) -> dict[str, list[dict[str, Any]]]:
    """By point, where it was compared: step, loss, and how far it was `behind` the best of all there, as `Gain`.

    Points of other validation examples than the first one's are not compared.
    """
    found: dict[str, list[dict[str, Any]]] = {point.name: [] for point in points}
    for rung in RUNGS:
        noted = {point.name: (point, of) for point in points if (of := notes.of(point, rung)) is not None}
        losses = {name: _losses(*each, rung) for name, each in noted.items()}
        first = next(iter(losses.values()), None)
        losses = {name: each for name, each in losses.items() if first and each[1].equal(first[1])}  # of the same data
        best = min(losses.values(), key=lambda each: float(each[0].sum() / each[1].sum()), default=None)
        for name, (own, targets) in losses.items():
            assert best is not None
            behind = paired_gain(own, best[0], targets)
            step = int(noted[name][1][0].step(rung))
            found[name].append({"step": step, "loss": behind.before, "behind": asdict(behind)})
    return found


def _losses(point: Point, noted: Sequence[Noted], rung: float) -> tuple[Tensor, Tensor]:
    losses = [torch.tensor(each.losses[each.step(rung)], dtype=torch.float64) for each in noted]
    return joined(losses, point), joined([torch.tensor(each.targets) for each in noted], point)


def how_many(seconds: Sequence[float], rungs: Sequence[float], left: float) -> int:
    """How many of some points, best first, go on from the first of the rungs; seconds: of all of each one's training.

    All if there is time to train all to the end; else at most half, as many as there is time for, and at least one.
    """
    if sum(seconds) * (1 - rungs[0]) <= left:
        return len(seconds)
    half = math.ceil(len(seconds) / 2)
    return next((most for most in range(half, 1, -1) if _needed(seconds[:most], rungs) <= left), 1)


def _needed(seconds: Sequence[float], rungs: Sequence[float]) -> float:
    """Seconds to go on from the first of the rungs, with half of the points from each later one."""
    if len(rungs) == 1:
        return sum(seconds) * (1 - rungs[0])
    return sum(seconds) * (rungs[1] - rungs[0]) + _needed(seconds[: math.ceil(len(seconds) / 2)], rungs[1:])


@dataclass
class Halving:
    """Trains points as far as their losses and the hours go.

    train: takes a point, the number of its run, and maybe a `before_step`, see `Run`; returns when the run has ended or
    was asked to stop by that, and notes in the point what made it fail. file: where `notes` are kept.
    """

    points: Sequence[Point]
    hours: float
    notes: Notes
    file: Path
    train: Callable[..., None]
    say: Callable[[str], None]
    rungs: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    estimated: bool = False

    @property
    def left(self) -> float:
        """Seconds."""
        return 3600 * self.hours - (time.monotonic() - self.began)

    def to_the_end(self) -> dict[str, Any]:
        """What sweep.json says of the budget. Raises LoraError after the first steps if the hours are too few."""
        alive = [point for point in self.points if point.state != "done"]
        known = list(self.notes.runs.values())
        if known and (refused := self.estimate(fmean(each.seconds for each in known), known[0].total)):
            raise refused
        for number, rung in enumerate(RUNGS):
            for point in alive:
                self._train(point, rung)
            for point in alive:
                if point.why is None and self.notes.of(point, rung) is None:  # a run was beyond this rung before
                    self._train(point)
            alive = self._kept([point for point in alive if point.state == "not finished"], number)
        for point in alive:
            self._train(point)
        return {"hours": self.hours, "hours_used": self.hours - self.left / 3600, "rungs": self.rungs}

    def _train(self, point: Point, rung: float | None = None) -> None:
        """To a rung, or to the end."""
        for at, folder in enumerate(point.folders):
            noted = self.notes.runs.get(folder.path.name)
            if folder.report.exists() or (rung and noted and noted.step(rung) in noted.losses):
                continue
            if rung is None:
                self.train(point, at)
                continue
            watch = _Watch(self, folder.path.name, rung)
            self.train(point, at, watch)
            if watch.refused is not None:
                raise watch.refused

    def _kept(self, points: list[Point], number: int) -> list[Point]:
        """Those that go on from a rung, best first; the others know why they do not."""
        rung, compared = RUNGS[number], rungs_of(self.points, self.notes)
        for point in points:
            if len(compared[point.name]) <= number:
                point.why = "it was trained on other data than the first point, so it is not compared"
        points = [point for point in points if point.why is None]
        ranked = sorted(points, key=lambda each: compared[each.name][number]["loss"])
        seconds = [sum(each.seconds for each in self.notes.of(point, rung) or ()) for point in ranked]
        most = how_many(seconds, RUNGS[number:], self.left) if ranked else 0
        for point in ranked[most:]:
            at = compared[point.name][number]
            point.stopped = True
            point.why = f"stopped at step {at['step']}: its loss there is {interval(at['behind'])} above the lowest"
            self.say(f"budget   {point.name} {point.why}")
        self.rungs.append({"part": rung, "points": len(points), "kept": [each.name for each in ranked[:most]]})
        self.say(f"budget   after {rung:.0%} of the steps {most} of {len(points)} points go on")
        return ranked[:most]

    def estimate(self, seconds: float, total: int) -> LoraError | None:
        """Say what is planned, if a training takes so many seconds; or what is wrong with that."""
        self.estimated = True
        points = [point for point in self.points if point.state != "done"]
        if not points:
            return None
        each = [seconds * len(point.folders) for point in points]
        about = f"about {duration(seconds)} a training of {total} steps, {duration(sum(each))} for all"
        compared = [rung for rung in RUNGS for point in points if self.notes.of(point, rung) is not None]
        to_compare = sum(each) * RUNGS[0] * (1 - compared.count(RUNGS[0]) / len(points))
        least = to_compare + each[0] * (1 - max(compared, default=RUNGS[0]))
        if least > self.left:
            return LoraError(
                f"{self.hours:g} hours are too few: {about}, {duration(least)} to compare all and to finish one",
                where="--budget",
                fix=f"write --budget {math.ceil(least / 36) / 100:g} or more, or vary fewer values",
            )
        counts, left = [len(each)], self.left - to_compare
        for number, (rung, after) in enumerate(zip(RUNGS, (*RUNGS[1:], 1.0), strict=True)):
            counts.append(how_many(each[: counts[-1]], RUNGS[number:], left))
            left -= sum(each[: counts[-1]]) * (after - rung)
        steps = [f"{most} to step {_step(total, part)}" for most, part in zip(counts, (*RUNGS, 1), strict=True)]
        self.say(f"budget   {about}; planned for {self.hours:g} hours: {', '.join(steps)}")
        return None


class _Watch:
    """Called before each step of a run on its way to a rung, so that one that goes on from it is compared, too."""

    def __init__(self, of: Halving, name: str, rung: float):
        self.of, self.name, self.rung = of, name, rung
        self.began = time.monotonic()
        self.before: float | None = None  # seconds, until the first step
        self.refused: LoraError | None = None

    def __call__(self, run: Run) -> None:
        step, total = run.state.step, run.session.total_steps
        if self.before is None:
            self.before = time.monotonic() - self.began
        rung = _step(total, self.rung)
        first = not self.of.estimated and step >= min(_FIRST, rung)
        if step == 0 or not (first or step == rung):
            return
        began = time.monotonic()
        try:
            with averaged_weights(run.optimizer):
                losses, targets = run.validator.losses(run.state)
        except EvaluationStopped:  # by a signal, which ends the run before its next step
            return
        evaluations = total // (run.recipe.eval_every or total)
        seconds = self.before + total * run.state.seconds / step + evaluations * (time.monotonic() - began)
        if first:
            self.refused = self.of.estimate(seconds, total)
        at_rung = step == rung and bool(losses.isfinite().all())  # what training does of others follows
        if at_rung:
            self._note(Noted(total=total, seconds=seconds, targets=targets.tolist()), {str(step): losses.tolist()})
        if at_rung or self.refused:
            run.stop.ask("--budget is too small" if self.refused else "all points are compared here", 130)

    def _note(self, noted: Noted, losses: dict[str, list[float]]) -> None:
        runs = self.of.notes.runs
        noted.losses = (runs[self.name].losses if self.name in runs else {}) | losses
        runs[self.name] = noted
        write_json(self.of.file, self.of.notes.model_dump())
