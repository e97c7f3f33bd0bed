"""What commands share: options, and how one begins. Imports nothing heavy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_cli import quantization as quantizations
from lora_cli.errors import home_expanded
from lora_cli.surroundings import settle

RecipeFile = Annotated[Path, typer.Argument(help="The YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key.path=value. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps", "xpu"], typer.Option(help="Where to compute.")]
Dtype = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Compute dtype.")]
Quantization = Annotated[
    quantizations.Quantization | None, typer.Option(help="How to hold the base. Default: as in training.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository ships.")
]

Source = Annotated[str | None, typer.Argument(help="A run or adapter folder, or a model: a folder or a hub id.")]
Base = Annotated[str | None, typer.Option(help="Base model. Default: the one that the adapter names.")]
Program = Annotated[
    Literal["vllm", "llama.cpp", "ollama", "mlx", "peft", "transformers"] | None,
    typer.Option("--for", help="Say what this program would refuse of the adapter."),
]
# Of earlier releases: SOURCE says it all.
OldModel = Annotated[str | None, typer.Option("--model", hidden=True)]
OldAdapter = Annotated[str | None, typer.Option("--adapter", hidden=True)]


def home(path: Path | None) -> Path | None:
    return path and Path(home_expanded(str(path)))


def trusted_recipe(file: Path, overrides: list[str]) -> Any:
    """The recipe with its overrides. Raises LoraError where it wants code to run that nobody here has read."""
    from lora_cli.recipe import load_recipe
    from lora_cli.trust import require_trust

    recipe = load_recipe(file, overrides)
    require_trust(recipe, file, overrides)
    return recipe


def console(*, stderr: bool = True) -> Any:
    from lora_cli.screen import Screen

    return Screen(stderr=stderr)


def status(what: str) -> AbstractContextManager[None]:
    from lora_cli.screen import status

    return status(console(), what)


def heavy(module: str, *outputs: Path) -> Any:
    """Import a module that imports torch, saying so meanwhile. outputs: where a temporary file may be, too."""
    import importlib

    settle(*outputs)
    with status("loading libraries"):
        loaded = importlib.import_module(module)
        importlib.import_module("lora_cli.base.load").quiet_libraries()
    return loaded
