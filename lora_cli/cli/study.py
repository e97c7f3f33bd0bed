"""What an adapter is, and others made of it: `lora inspect`, `resize`, `combine`, `diff`, `convert`, `analyze`.

And `lora selftest`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_cli.cli.common import Base, Json, Program, RemoteCode, console, heavy, home, status
from lora_cli.errors import command, home_expanded, refuse_if
from lora_cli.streams import print_json, print_result

Source = Annotated[str, typer.Argument(help="A run or an adapter (lora's or PEFT's).")]
Output = Annotated[Path, typer.Option(callback=home, help="Folder to write the adapter to.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Largest rank of a layer.")]
Energy = Annotated[float | None, typer.Option(help="Keep this share of each layer's energy, such as 0.95.")]


def inspect(
    source: Source,
    base: Annotated[str | None, typer.Option(help="Base model whose weights the updates are compared with.")] = None,
    picture: Annotated[Path | None, typer.Option(callback=home, help="Also draw it, to a PNG file.")] = None,
    program: Program = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter adds to each layer: size, effective rank, what is dead.

    Reads no weights of the base unless --base is given, and then one at a time.
    """
    if program is not None:
        refuse_if(picture is not None, "--for says what a program takes and draws nothing", fix="remove --picture")
        _for_program(source, base, program, as_json=as_json)
        return
    inspecting = heavy("lora_cli.studies.inspect")
    found = inspecting.inspect_adapter(source, base)
    if picture is not None:
        inspecting.write_picture(found, picture)
    if as_json:
        print_json(found.as_dict())
    else:
        inspecting.print_inspected(found, console(stderr=False))


def _for_program(source: str, base: str | None, program: str, *, as_json: bool) -> None:
    programs = heavy("lora_cli.adapters.programs")
    folder = heavy("lora_cli.adapters.opened").adapter_folder(Path(home_expanded(source)))
    found = heavy("lora_cli.base.source").find_base(base) if base is not None else None
    said = programs.require_taken(programs.look_at(folder, found), program)
    if as_json:
        print_json({"program": program, "refused": [], "said": said})
    else:
        print_result(said)


def resize(source: Source, output: Output, rank: Rank = None, energy: Energy = None, as_json: Json = False) -> None:
    """Write the nearest adapter of a smaller rank, and say how far it is."""
    require_size(rank, energy)
    resizing = heavy("lora_cli.studies.resize", output)
    say_made(resizing.resize(source, output, rank=rank, energy=energy), output, as_json=as_json)


def require_size(rank: int | None, energy: float | None) -> None:
    """Raises LoraError where neither is given, or `energy` is not a share."""
    refuse_if(rank is None and energy is None, "how small?", fix="add --rank 8, or --energy 0.95, or both")
    wrong = energy is not None and not 0 < energy <= 1
    refuse_if(wrong, f"--energy is {energy}, but must be above 0 and at most 1", fix="for example --energy 0.95")


def say_made(made: Any, output: Path, *, as_json: bool) -> None:
    """What was written, and how near it is."""
    if as_json:
        print_json({"output": str(output)} | made.as_dict())
        return
    for line in (*made.notes, *made.lines()):
        print_result(line)
    print_result(f"written to {output}; what it costs in loss: {command('lora', 'eval', output, '--data', 'FILE')}")


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


def analyze(
    sources: Annotated[list[str], typer.Argument(help="Runs or adapters of one base (lora's or PEFT's).")],
    base: Base = None,
    output: Annotated[Path | None, typer.Option(callback=home, help="Folder for a page, pictures and numbers.")] = None,
    as_json: Json = False,
) -> None:
    """Show what adapters amplify of their base, and which directions they share: section 7 of the LoRA paper.

    Reads the base's weights one at a time. A single adapter is compared with a random one.
    """
    analyzing = heavy("lora_cli.studies.analyze", *([output] if output else []))
    with status("reading weights"):
        found = analyzing.analyze(sources, output, base)
    if as_json:
        print_json(found.as_dict() | {"output": None if output is None else str(output)})
        return
    analyzing.print_analyzed(found, console(stderr=False))
    if output is not None:
        print_result(f"written to {output}: open analysis.html")


def selftest(
    model: Annotated[str | None, typer.Option(help="Base model to measure on. Default: a tiny one.")] = None,
    as_json: Json = False,
) -> None:
    """Measure on this machine what lora promises: E1 to E15 of docs/design.md. Takes about a minute.

    Exit code 3 if one does not hold. The lines hold no paths and no data, so a bug report can show them.
    """
    testing = heavy("lora_cli.studies.selftest")
    document = testing.selftest(model, status)
    if as_json:
        print_json(document)
        return
    for line in testing.lines(document):
        print_result(line)
