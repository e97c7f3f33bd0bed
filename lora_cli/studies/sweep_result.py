"""What the points of a sweep came to: losses on the same validation examples, with intervals, and which to take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.evaluation.gain import paired_gain
from lora_cli.recipe import Recipe
from lora_cli.training import verdict
from lora_cli.training.checkpoint import read_losses
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.two_runs import read_report


@dataclass
class Point:
    """One combination of values, with a run for each seed. why: what ended it, where it failed or was stopped."""

    name: str
    settings: dict[str, Any]
    recipes: list[Recipe]
    folders: list[RunFolder]
    why: str | None = None
    stopped: bool = False  # early, for its losses

    @property
    def state(self) -> str:
        if all(each.report.exists() for each in self.folders):
            return "done"
        if self.stopped:
            return "stopped"
        return "not finished" if self.why is None else "failed"


@dataclass(frozen=True)
class _Losses:
    """Nats of each validation example under the base and the kept adapter, and its target tokens: (examples,) each.

    rows: which data and which base they are of.
    """

    base: Tensor
    kept: Tensor
    targets: Tensor
    rows: list[Any]


def compare(points: Sequence[Point]) -> dict[str, Any]:
    """What sweep.json holds: `points`, the names of the `best` and the `recommended` one, and `recommendation`.

    Of each point: name, settings, state, why, folders, trained_parameters, seconds, seed_losses; once it is done also
    loss, its `gain` over the base, and `behind`, how much higher its loss is than the best one's; both as `Gain`.
    Several seeds are a mean for each example; where each seed holds other rows out, an example of each.
    """
    losses: dict[str, _Losses] = {}
    found = []
    for point in points:
        state = point.state
        if state == "done":
            try:
                losses[point.name] = _losses(point)
                _require_same_rows(losses, point)
            except LoraError as problem:
                losses.pop(point.name, None)
                state, point.why = "failed", problem.what
        about = {"name": point.name, "settings": point.settings, "state": state, "why": point.why}
        found.append(about | {"folders": [str(each.path) for each in point.folders]} | _reported(point))
    compared = [each for each in found if each["name"] in losses]
    for each in compared:
        own = losses[each["name"]]
        gain = paired_gain(own.base, own.kept, own.targets)
        each |= {"loss": gain.after, "gain": asdict(gain)}
    best = min(compared, key=lambda each: each["loss"], default=None)
    for each in compared:
        own, lowest = losses[each["name"]], losses[best["name"] if best else ""]
        each["behind"] = asdict(paired_gain(own.kept, lowest.kept, own.targets))
    taken = _recommended(compared, best)
    words = recommendation(compared, best, taken)
    named = {"best": best and best["name"], "recommended": taken and taken["name"]}
    return {"points": found, **named, "recommendation": words}


def _losses(point: Point) -> _Losses:
    """Raises LoraError where a run has no checkpoint left, or a damaged one."""
    of_seeds, rows = [], []
    for folder in point.folders:
        newest = next(reversed(folder.list_checkpoints()), None)
        stored = {} if newest is None else read_losses(newest)
        if "validation.best" not in stored:
            raise LoraError(f"{folder.path.name} has no checkpoint with the loss of each validation example")
        of_seeds.append(stored)
        environment = folder.stored_environment()
        rows.append([environment.get(name) for name in ("data_fingerprint", "base_fingerprint")])
    base, kept, targets = (
        joined([each[f"validation.{name}"] for each in of_seeds], point) for name in ("base", "best", "targets")
    )
    return _Losses(base, kept, targets, rows)


def joined(of_seeds: Sequence[Tensor], point: Point) -> Tensor:
    """The mean over seeds for each example; where each seed holds other rows out, the examples of all."""
    same = bool(point.recipes[0].data.held_out)
    return torch.stack([each.double() for each in of_seeds]).mean(0) if same else torch.cat(list(of_seeds))


def _require_same_rows(losses: Mapping[str, _Losses], point: Point) -> None:
    first, own = next(iter(losses.values())), losses[point.name]
    if own.rows != first.rows or not own.targets.equal(first.targets):
        raise LoraError("it was trained on other data or another base than the first point, so it is not compared")


def _reported(point: Point) -> dict[str, Any]:
    """From the reports of its runs."""
    reports: list[dict[str, Any]] = []
    for folder in point.folders:
        with suppress(LoraError):
            reports.append(read_report(folder))

    def numbers(name: str) -> list[Any]:
        return [each[name] for each in reports if name in each]

    parameters, seconds = numbers("trained_parameters"), numbers("seconds")
    values = {"trained_parameters": next(iter(parameters), None), "seconds": sum(seconds) if seconds else None}
    return values | {"seed_losses": numbers("best_validation_loss")}


def _recommended(compared: list[dict[str, Any]], best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the points that are not certainly worse than the best, the one with the fewest trained parameters."""
    close = [each for each in compared if best is not None and _is_close(each, best)]
    return min(close, key=lambda each: (each["trained_parameters"] or math.inf, each["loss"]), default=None)


def _is_close(point: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether it is not certain that the best one is better: on other rows of the kind, or with another seed."""
    low = point["behind"]["low"]
    by_seed = zip(point["seed_losses"], best["seed_losses"], strict=False)
    return point is best or (low is not None and (low <= 0 or any(own <= its for own, its in by_seed)))


# ── in words ────────────────────────────────────────────────────────────────────────────────────────────────────


def label(point: Mapping[str, Any]) -> str:
    """`adapter.rank 4, adapter.projections [q, v]`."""
    return ", ".join(f"{key} {shown(value)}" for key, value in point["settings"].items())


def shown(value: Any) -> str:
    """As in a recipe, without quotes."""
    return json.dumps(value, ensure_ascii=False, default=str).replace('"', "")


def interval(found: Mapping[str, Any] | None) -> str:
    """`0.0123 ± 0.0045`, or the number alone where there is no interval."""
    if found is None:
        return "–"
    half = verdict.half_width(found)
    places = max(4, verdict.decimals(half))
    return f"{found['gain']:.{places}f}" + ("" if half is None else f" ± {half:.{places}f}")


def recommendation(
    compared: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, taken: Mapping[str, Any] | None
) -> str:
    """One sentence with its evidence."""
    if best is None or taken is None:
        return "No point is finished, so nothing is recommended."
    gain = taken["gain"]
    if gain["low"] is None or gain["low"] <= 0:
        head = f"No point is certainly better than the base; {label(taken)} is nearest to it"
    else:
        head = f"Take {label(taken)}"
    said = f"{head}: validation loss {taken['loss']:.4f}, {interval(gain)} nats a token below the base's"
    if taken is not best:
        its, own = (each["trained_parameters"] or 0 for each in (best, taken))
        more = f", with {its / own:.2g} times the parameters" if its > own > 0 else ""
        said += f"; {label(best)} has the lowest, {interval(taken['behind'])} lower, which is not certain{more}"
    elif others := sorted((each for each in compared if each is not best), key=lambda each: each["loss"]):
        sure = "not certain" if _is_close(others[0], best) else "certain"
        said += f"; the next, {label(others[0])}, is {interval(others[0]['behind'])} worse, which is {sure}"
    seeds = taken["seed_losses"]
    chance = "one seed: how much runs differ by chance was not measured"
    if len(seeds) > 1:
        chance = f"{len(seeds)} seeds, from {min(seeds):.4f} to {max(seeds):.4f}"
    return f"{said} ({verdict.count(gain['examples'])} validation examples; {chance})."
