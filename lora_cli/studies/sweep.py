"""`lora sweep`: one recipe trained with every combination of some values, each an ordinary run beside the others."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lora_cli.adapters.targets import targets_of
from lora_cli.base.device import pick_dtype
from lora_cli.base.kept import KeptBase
from lora_cli.errors import Interrupted, LoraError, command, is_error, reason_of, refuse_if
from lora_cli.files import disk_errors, write_json
from lora_cli.planning.check import base_of
from lora_cli.recipe import Recipe, all_keys, load_recipe
from lora_cli.recipe.peers import hint
from lora_cli.recipe.yaml import NO_VALUE, parse_value
from lora_cli.screen import say_on
from lora_cli.studies.halving import Halving, Notes, read_notes, rungs_of
from lora_cli.studies.sweep_result import Point, compare
from lora_cli.studies.sweep_words import write_page
from lora_cli.training.loop import Run
from lora_cli.training.opening import loading, open_device
from lora_cli.training.resume import changes_of_recipe
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.run_lock import LOCK, locked
from lora_cli.training.stopping import Stop
from lora_cli.training.train import train
from lora_cli.training.verdict import duration

MOST_POINTS = 100  # trainings that nobody has to confirm
RESULT, PAGE, NOTES = "sweep.json", "sweep.html", "rungs.json"
_KEYS = {".".join(key): key[-1] for key in all_keys() if key[0] in ("adapter", "train")}
_NAME = 60  # characters


@dataclass(frozen=True)
class Sweep:
    """recipe: its file. overrides: of --set. axes: values by key. seeds: how many runs each combination has.

    same_parameters: rank follows from the others, so that all points train about as many parameters as the recipe.
    hours: for successive halving, see `Halving`; None trains all points to their end.
    """

    recipe: Path
    overrides: Sequence[str]
    axes: Mapping[str, list[Any]]
    output: Path
    seeds: int = 1
    same_parameters: bool = False
    hours: float | None = None

    @property
    def size(self) -> int:
        return self.seeds * math.prod(map(len, self.axes.values()))


def axes_of(given: Sequence[str]) -> dict[str, list[Any]]:
    """The values by key of every --vary KEY=VALUE,VALUE. Raises LoraError for a key that cannot be varied."""
    axes: dict[str, list[Any]] = {}
    for each in given:
        key, equals, text = each.partition("=")
        key = key.strip()
        said = f"--vary {key}"
        refuse_if(
            not equals, f"--vary {each} is not of the form KEY=VALUE,VALUE", fix="for example --vary adapter.rank=4,16"
        )
        refuse_if(key not in _KEYS, f"{key} is not a setting of adapter or train", where=said, fix=_known(key))
        refuse_if(key == "train.seed", "seeds are repetitions, not points", where=said, fix="write --seeds 3 instead")
        refuse_if(key in axes, f"{key} is varied twice", where=said, fix="name all its values in one --vary")
        try:
            values: Any = parse_value(f"[{text}]", said)
        except LoraError as problem:
            raise LoraError(problem.what, where=said, fix="name fewer or simpler values") from None
        except (yaml.YAMLError, *NO_VALUE):
            values = None
        what = "the right side is not the inside of a YAML list"
        refuse_if(not isinstance(values, list), what, where=said, fix="for example [q],[v],[q,v]; quote what is text")
        refuse_if(not values, f"{key} has no value", where=said, fix=f"for example --vary {key}=1,2,4")
        axes[key] = values
    return axes


def _known(key: str) -> str:
    last = key.rpartition(".")[2][:80]
    leaves = {leaf: name for name, leaf in _KEYS.items()}
    if said := hint(last):  # as other programs call it
        return said
    near = difflib.get_close_matches(last, leaves, n=1)
    return f"did you mean {leaves[near[0]]}?" if near else "name one of docs/recipe.md; data and base stay the same"


def sweep(asked: Sweep, console: Console) -> dict[str, Any]:
    """Train every point that is not finished; returns what sweep.json says of all.

    A point that fails is noted, and the others go on. Raises LoraError for what no point could be trained with,
    Interrupted after a signal: the same call then goes on where it stopped.
    """
    say = say_on(console)
    base_recipe = load_recipe(asked.recipe, list(asked.overrides))
    fix = "write data.validation: 0.05, or --set data.validation=0.05"
    refuse_if(base_recipe.data.validation is None, "without validation data nothing tells points apart", fix=fix)
    placed = any(each.partition("=")[0].strip() == "output" for each in asked.overrides)
    refuse_if(placed, "--set output: the runs of a sweep lie in its own folder", fix="name that with --output")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    refuse_if(several, "a sweep trains with one process", fix="start it without torchrun or accelerate launch")
    with locked(asked.output, say):
        _claim(asked.output)
        base = KeptBase()
        counted = _Counted(base, base_recipe) if asked.same_parameters else None
        points = list(_points(asked, base_recipe, counted, say))
        for point in points:
            _require_same_runs(point)
        notes, budget = read_notes(asked.output / NOTES, points), None
        _written(asked, points, notes, budget)  # from now on the folder is that of a sweep
        try:
            if asked.hours is None:
                _train_all(points, base, console)
            else:
                train_one = partial(_train, base=base, console=console)
                halving = Halving(points, asked.hours, notes, asked.output / NOTES, train_one, say)
                budget = halving.to_the_end()
        finally:
            found = _written(asked, points, notes, budget)
            write_page(asked.output / PAGE, found)
    return found


def _written(asked: Sweep, points: Sequence[Point], notes: Notes, budget: dict[str, Any] | None) -> dict[str, Any]:
    about = {"recipe": str(asked.recipe), "output": str(asked.output), "seeds": asked.seeds, "budget": budget}
    found: dict[str, Any] = about | {"same_parameters": asked.same_parameters} | compare(points)
    rungs = rungs_of(points, notes)
    for each in found["points"]:
        each["rungs"] = rungs[each["name"]]
    write_json(asked.output / RESULT, found)
    return found


def _claim(output: Path) -> None:
    with disk_errors(output):
        names = {each.name for each in output.iterdir()} - {LOCK}
    taken = bool(names) and RESULT not in names
    fix = "name a new folder, or the one of a sweep that is to go on"
    refuse_if(taken, "the output folder already holds other files", where=output, fix=fix)


def _train_all(points: Sequence[Point], base: KeptBase, console: Console) -> None:
    say = say_on(console)
    runs = [(point, at) for point in points for at in range(len(point.recipes))]
    left = [each for each in runs if not each[0].folders[each[1]].report.exists()]
    if done := len(runs) - len(left):
        say(f"sweep    {done} of {len(runs)} runs are finished already")
    began = time.monotonic()
    for number, (point, at) in enumerate(left):
        mean = (time.monotonic() - began) / number if number else None
        about = f", about {duration(mean * (len(left) - number))} left" if mean else ""
        say(f"sweep    run {number + 1} of {len(left)}: {point.folders[at].path.name}{about}")
        _train(point, at, base=base, console=console)


def _train(
    point: Point, at: int, before_step: Callable[[Run], None] = lambda _: None, *, base: KeptBase, console: Console
) -> None:
    """A run of a point, to its end or to where `before_step` asks it to stop. What makes it fail is noted and said."""
    folder = point.folders[at]
    stops: list[Stop] = []

    def watched(run: Run) -> None:
        if not run.stop.requested:
            before_step(run)
            stops.extend([run.stop] if run.stop.requested else [])

    try:
        train(point.recipes[at], console, resume=folder.recipe.exists(), load=base.load, before_step=watched)
    except Interrupted as stopped:
        signal = next((each.first for each in stops), None)
        if stops and signal is None:
            return
        stopped.exit_code = stopped.exit_code if signal is None else 128 + signal
        stopped.fix = "give the same command again: finished runs are kept, and this one goes on"
        raise
    except BaseException as error:
        if not is_error(error):
            raise
        if not folder.report.exists():  # one that learned nothing is a result
            point.why = reason_of(error) if not isinstance(error, LoraError) else error.what
            say_on(console)(error.render() if isinstance(error, LoraError) else f"error: {folder.path}: {point.why}")


# ── the points ──────────────────────────────────────────────────────────────────────────────────────────────────


def _points(asked: Sweep, base: Recipe, counted: _Counted | None, say: Callable[[str], None]) -> Iterator[Point]:
    """In the order of the axes, the last one fastest. Raises LoraError where one is not a valid recipe."""
    names: set[str] = set()
    cache = base.data.cache or str(asked.output.absolute() / "prepared")
    for values in itertools.product(*asked.axes.values()):
        settings = dict(zip(asked.axes, values, strict=True))
        varied = [f"{key}={_text(value)}" for key, value in settings.items()]
        recipe = _loaded(asked, varied)
        settings = {key: _value(recipe, key) for key in settings}
        name = _name(settings)
        fix = "name each value once"
        refuse_if(name in names, f"the point {name} is named twice", where="--vary", fix=fix)
        names.add(name)
        if counted is not None:
            rank = counted.rank_for(recipe)
            varied.append(f"adapter.rank={rank}")
            say(f"sweep    {name}: rank {rank}, to train about {counted.parameters:,} parameters")
            settings["adapter.rank"] = rank
        recipes = []
        for seed in range(base.train.seed, base.train.seed + asked.seeds):
            place = asked.output.absolute() / (f"{name}_seed-{seed}" if asked.seeds > 1 else name)
            own = {"train.seed": seed, "output": str(place).replace("$", "$$"), "data.cache": cache.replace("$", "$$")}
            recipes.append(_loaded(asked, [*varied, *(f"{key}={_text(value)}" for key, value in own.items())]))
        yield Point(name, settings, recipes, [RunFolder(Path(each.output)) for each in recipes])


def _loaded(asked: Sweep, varied: list[str]) -> Recipe:
    try:
        return load_recipe(asked.recipe, [*asked.overrides, *varied])
    except LoraError as error:
        for each in getattr(error, "problems", [error]):
            if each.where in (f"--set {one.partition('=')[0]}" for one in varied):
                each.where = each.where.replace("--set", "--vary", 1)
        raise


def _value(recipe: Recipe, key: str) -> Any:
    """As the recipe has it, whichever way it was written."""
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else value


def _text(value: Any) -> str:
    """As --set reads it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _name(settings: Mapping[str, Any]) -> str:
    """The folder of a point. It does not depend on the other points, so that a sweep can be given more values."""
    whole = "_".join(f"{key.partition('.')[2]}-{_plain(value)}" for key, value in settings.items())
    plain = re.sub(r"[^\w.+-]", "-", whole, flags=re.ASCII)[:_NAME]
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def _plain(value: Any) -> str:
    short = isinstance(value, list) and value and all(isinstance(each, str | int) for each in value)
    return "+".join(map(str, value)) if short else value if isinstance(value, str) else _text(value)


def _require_same_runs(point: Point) -> None:
    """Raises LoraError where a run's folder holds another one than is asked for."""
    for recipe, folder in zip(point.recipes, point.folders, strict=True):
        changes = changes_of_recipe(folder.stored_recipe(), recipe) if folder.recipe.exists() else []
        fix = f"name another --output; or, if you no longer need that run: {command('rm', '-r', folder.path)}"
        if changes:
            said = [each.said for each in changes]
            raise LoraError("this folder holds a run of another recipe", where=folder.path, details=said, fix=fix)


class _Counted:
    """Trained parameters of recipes, on the base itself. parameters: those of the recipe that is varied."""

    def __init__(self, base: KeptBase, recipe: Recipe):
        device = open_device(recipe)
        self.model = base.load(base_of(recipe), **loading(recipe, pick_dtype(recipe.dtype, device)[0], device))
        self.parameters = self._count(recipe, recipe.adapter.rank)

    def rank_for(self, recipe: Recipe) -> int:
        """The whole number, 1 or more, whose parameters are nearest; they grow by the same number with each rank."""
        one, two = (self._count(recipe, rank) for rank in (1, 2))
        return max(1, round(1 + (self.parameters - one) / (two - one))) if two > one else recipe.adapter.rank

    def _count(self, recipe: Recipe, rank: int) -> int:
        adapter = recipe.adapter.model_copy(update={"rank": rank})
        targets = targets_of(self.model, adapter, recipe.group_size)
        return sum(each.size(self.model.get_submodule(each.name)) for each in targets)
