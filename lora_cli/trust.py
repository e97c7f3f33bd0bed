"""Whose Python code may run: a recipe's author may say so, a folder that somebody sent may not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.streams import print_note

_SIGNS_OF_A_RUN = ("environment.json", "status.json", "metrics.jsonl", "checkpoints", "adapter")


def require_trust(recipe: Recipe, file: Path, overrides: Sequence[str] = ()) -> None:
    """Before the code that a model ships runs: say so. Raises LoraError where a run folder's recipe alone wants it."""
    if not recipe.trust_remote_code:
        return
    folder = file.resolve().parent
    of_a_run = folder == Path(recipe.output).resolve() or any((folder / name).exists() for name in _SIGNS_OF_A_RUN)
    if of_a_run and not any(each.replace(" ", "").startswith("trust_remote_code=") for each in overrides):
        what = f"the recipe of this run asks to execute Python code of {recipe.base_model}, and it may be a stranger's"
        raise LoraError(what, where=file, fix="read that code, then add --set trust_remote_code=true")
    print_note(f"note: runs the Python code of {recipe.base_model}, as trust_remote_code says")
