"""Adapters of adapters, and of whole models: `lora combine`, `lora diff`, `lora convert`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lora_cli.cli.common import Json, RemoteCode, heavy
from lora_cli.cli.study import Energy, Output, Rank, Source, require_size, say_made
from lora_cli.errors import refuse_if
from lora_cli.streams import print_json, print_result


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Runs or adapters of one base, each as ADAPTER:WEIGHT.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of a layer. Default: the sum, exact.")] = None,
    method: Annotated[
        Literal["linear", "ties", "dare"], typer.Option(help="How to add: all, by elected signs, or a random share.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each update that ties (0.2) or dare (0.5) keeps.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of what dare drops. Default: 0.")] = None,
    as_json: Json = False,
) -> None:
    """Write one adapter that adds the weighted sum of several, and say how exactly."""
    idle = "--density" if method == "linear" and density is not None else "--seed" if seed is not None else ""
    refuse_if(bool(idle) and method != "dare", f"{idle} does nothing with --method {method}", fix=f"remove {idle}")
    wrong = density is not None and not 0 < density <= 1
    refuse_if(wrong, f"--density is {density}, but must be above 0 and at most 1", fix="for example --density 0.2")
    combining = heavy("lora_cli.studies.combine", output)
    made = combining.combine(adapters, output, rank=rank, method=method, density=density, seed=seed or 0)
    say_made(made, output, as_json=as_json)


def diff(
    base: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="What a full fine-tune made of it.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write what a full fine-tune changed as an adapter, and say what an adapter cannot hold of it.

    Reads a tensor of each model at a time.
    """
    require_size(rank, energy)
    differing = heavy("lora_cli.studies.diff", output)
    made = differing.diff(base, tuned, output, rank=rank, energy=energy, trust_remote_code=trust_remote_code)
    say_made(made, output, as_json=as_json)


def convert(
    source: Source,
    to: Annotated[Literal["peft", "mlx"], typer.Option(help="The layout to write.")],
    output: Output,
    as_json: Json = False,
) -> None:
    """Write an adapter in the layout of PEFT or of mlx-lm, with the same numbers.

    Reads both, and what older PEFT and saved checkpoints leave in names.
    """
    notes = heavy("lora_cli.studies.convert", output).convert(source, output, to=to)
    if as_json:
        print_json({"output": str(output), "to": to, "notes": notes})
        return
    for line in (*notes, f"written to {output}, in the layout of {to}"):
        print_result(line)
