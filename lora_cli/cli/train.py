"""`lora train`, and `lora runs` for what became of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from lora_cli import boundary
from lora_cli.cli.common import Json, Overrides, console, heavy, trusted_recipe
from lora_cli.errors import LoraError, command, refuse_if
from lora_cli.streams import print_json


def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe; with --resume also the run's folder.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: what may differ: a setting, a section, data or versions. Repeatable."),
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="Stop before this many hours have passed; --resume continues.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter according to a recipe."""
    loaded = trusted_recipe(*_of_a_run(recipe, overrides or [], resume))
    refuse_if(bool(allow) and not resume, "--allow is for --resume", fix="add --resume, or remove it")
    wrong = max_hours is not None and not 0 < max_hours < 1e6
    refuse_if(wrong, f"--max-hours is {max_hours}, but must be above 0", fix="for example --max-hours 7.5")
    training = heavy("lora_cli.training.train", Path(loaded.output))
    boundary.keep_tracebacks_in(Path(loaded.output))
    report = training.train(loaded, console(), resume=resume, allow=allow or [], max_hours=max_hours)
    if as_json and boundary.is_first_process():
        print_json(report)


def _of_a_run(path: Path, overrides: list[str], resume: bool) -> tuple[Path, list[str]]:
    """The recipe that a run's folder holds, and that it is this folder that goes on, wherever it was made."""
    if not path.is_dir():
        return path, overrides
    recipe, found = path / "recipe.yaml", sorted(path.glob("*.y*ml"))[:1]
    fix = command("lora", "train", *found) if found else "name a recipe: lora train RECIPE; lora init writes one"
    refuse_if(not recipe.is_file(), "this folder holds no run, as it has no recipe.yaml", where=path, fix=fix)
    if not any((path / name).exists() for name in ("environment.json", "status.json")):
        what = "this folder holds a recipe, but no run that could go on"
        raise LoraError(what, where=path, fix=f"train it with: {command('lora', 'train', recipe)}")
    fix = f"continue it with: {command('lora', 'train', path, '--resume')}"
    refuse_if(not resume, "this is the folder of a run, not a recipe", where=path, fix=fix)
    here = json.dumps(os.path.abspath(path).replace("$", "$$"))
    return recipe, [f"output={here}", *overrides]


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="A folder of runs, by default runs; or two runs to compare.")
    ] = None,
    per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of one hour of the machine; adds a column for the cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: their state, loss and cost; or compare two."""
    given = folders or [Path("runs")]
    refuse_if(len(given) > 2, "more than two folders", fix="lora runs FOLDER lists runs, lora runs A B compares two")
    if len(given) == 2:
        refuse_if(per_hour is not None, "--per-hour is for a list of runs", fix="remove it, or name one folder")
        comparing = heavy("lora_cli.training.two_runs")
        compared = comparing.compare_runs(*given)
        if as_json:
            print_json(compared)
        else:
            comparing.print_comparison(compared, console(stderr=False))
        return
    from lora_cli.training import runs as listing

    found = listing.list_runs(given[0], per_hour)
    if as_json:
        print_json(listing.as_dicts(found))
    else:
        listing.print_runs(found, given[0], console(stderr=False))
