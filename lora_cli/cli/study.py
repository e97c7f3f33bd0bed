"""What an adapter is: `lora inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.common import Json, console, heavy, home
from lora_cli.streams import print_json


def inspect(
    source: Annotated[str, typer.Argument(help="A run or an adapter (lora's or PEFT's).", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model whose weights the updates are compared with.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", callback=home, help="Also draw it, to a PNG file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter adds to each layer: size, effective rank, what is dead.

    Reads no weights of the base unless --base is given, and then one at a time.
    """
    inspecting = heavy("lora_cli.studies.inspect")
    found = inspecting.inspect_adapter(source, base)
    if picture is not None:
        inspecting.write_picture(found, picture)
    if as_json:
        print_json(found.as_dict())
    else:
        inspecting.print_inspected(found, console(stderr=False))
