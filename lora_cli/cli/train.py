"""`lora train`, and `lora runs` for what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli import boundary
from lora_cli.cli.common import Json, Overrides, RecipeFile, console, status, trusted_recipe
from lora_cli.errors import refuse_if
from lora_cli.streams import print_json
from lora_cli.surroundings import settle


def train(
    recipe: RecipeFile,
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
    loaded = trusted_recipe(recipe, overrides or [])
    refuse_if(bool(allow) and not resume, "--allow is for --resume", fix="add --resume, or remove it")
    wrong = max_hours is not None and not 0 < max_hours < 1e6
    refuse_if(wrong, f"--max-hours is {max_hours}, but must be above 0", fix="for example --max-hours 7.5")
    screen = console()
    settle(Path(loaded.output))
    with status("loading libraries"):
        from lora_cli.base.load import quiet_libraries
        from lora_cli.training.train import train as run
    quiet_libraries()
    boundary.keep_tracebacks_in(Path(loaded.output))
    report = run(loaded, screen, resume=resume, allow=allow or [], max_hours=max_hours)
    if as_json and boundary.is_first_process():
        print_json(report)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of one hour of the machine; adds a column for the cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: their state, loss and cost."""
    from lora_cli.training import runs as listing

    found = listing.list_runs(folder, per_hour)
    if as_json:
        print_json(listing.as_dicts(found))
    else:
        listing.print_runs(found, folder, console(stderr=False))
