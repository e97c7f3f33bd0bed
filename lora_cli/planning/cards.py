"""Recipes by card: the packaged ones, for the sizes that consumer GPUs are made with. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from lora_cli.errors import LoraError, command, refuse_if
from lora_cli.files import write_bytes

_FOLDER = Path(__file__).with_name("by_card")


def cards() -> dict[str, str]:
    """What each packaged recipe is for, in a line, by the card's size: `12GB`; the smallest first."""
    files = sorted(_FOLDER.glob("*.yaml"), key=lambda file: int(file.stem.removesuffix("GB")))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for file in files}


def copy_recipe(card: str, output: Path) -> None:
    """Write the recipe for a card, such as 12GB, 12 or 12 gib. Raises LoraError if there is none, or output exists."""
    sizes = list(cards())
    found = re.fullmatch(r"\s*(\d+)(?:\.0+)?\s*(?:g|gb|gib)?\s*", card, re.IGNORECASE)
    name = f"{int(found[1])}GB" if found else ""
    if name not in sizes:
        smaller = [each for each in sizes if found and int(each[:-2]) < int(found[1])] or sizes[:1]
        fix = f"--card {smaller[-1]}; or for any GPU, with your data: lora init MODEL DATA --gpu 10GB"
        raise LoraError(f"--card {card}: there are recipes for {', '.join(sizes[:-1])} and {sizes[-1]}", fix=fix)
    again = command("lora", "init", "--card", name, "--output", f"{output.stem}-{name}.yaml")
    require_new(output, fix=f"name another: {again}")
    write_bytes(output, (_FOLDER / f"{name}.yaml").read_bytes())


def require_new(recipe: Path, *, fix: str) -> None:
    """Raises LoraError if the file exists, or its folder does not. fix: what to do where it exists."""
    refuse_if(recipe.exists() or recipe.is_symlink(), "this file exists", where=recipe, fix=fix)
    folder = recipe.parent
    refuse_if(not folder.is_dir(), "no such folder", where=folder, fix="make it first, or name another --output")
