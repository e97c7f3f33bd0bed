"""`lora sweep`: a recipe with several values of some settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli import boundary
from lora_cli.cli.common import Json, Overrides, RecipeFile, console, heavy, home, trusted_recipe
from lora_cli.errors import CheckFailed, refuse_if
from lora_cli.streams import print_json, print_result


def sweep(
    recipe: RecipeFile,
    vary: Annotated[
        list[str], typer.Option(help="A setting and its values: adapter.rank=1,4,16. Repeatable: all combinations.")
    ],
    output: Annotated[Path, typer.Option(callback=home, help="Folder for the runs and the result.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each combination, with seeds that differ.")] = 1,
    same_parameters: Annotated[
        bool, typer.Option("--same-parameters", help="Choose each rank so that all train about as many parameters.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Hours for all: compare points on the way, and train only the better ones to the end.", metavar="HOURS"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also start very many trainings.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe with every combination of some values, and say which to take.

    The base is loaded and the data are prepared once. The same command goes on with a sweep that was stopped.
    """
    trusted_recipe(recipe, overrides or [])
    sweeping = heavy("lora_cli.studies.sweep", output)
    axes = sweeping.axes_of(vary)
    fixed = same_parameters and "adapter.rank" in axes
    refuse_if(fixed, "--same-parameters chooses the ranks", fix="remove it, or do not vary adapter.rank")
    wrong = budget is not None and not 0 < budget < 1e6
    refuse_if(wrong, f"--budget is {budget}, but must be above 0", fix="for example --budget 7.5")
    asked = sweeping.Sweep(recipe, overrides or [], axes, output, seeds, same_parameters, budget)
    many = asked.size > sweeping.MOST_POINTS and not yes
    refuse_if(many, f"these are {asked.size:,} trainings", fix="name fewer values, or add --yes if they are intended")
    boundary.keep_tracebacks_in(output)
    found = sweeping.sweep(asked, console())
    print_table = heavy("lora_cli.studies.sweep_words").print_sweep
    if failed := [each["name"] for each in found["points"] if each["state"] not in ("done", "stopped")]:
        error = CheckFailed(
            f"{len(failed)} of {len(found['points'])} points failed: {', '.join(failed[:10])}",
            where=output,
            details=[found["recommendation"]],
            fix="repair what is said above; the same command tries these again and keeps the others",
        )
        error.result = found
        if not as_json:
            print_table(found, console())
        raise error
    if as_json:
        print_json(found)
        return
    print_table(found, console(stderr=False))
    print_result(f"the same with a picture: {output / sweeping.PAGE}")
