"""`lora merge`, and `lora calibrate`: folders that are ordinary models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.cli.common import Json, RemoteCode, heavy, home
from lora_cli.errors import command
from lora_cli.quantization import named
from lora_cli.streams import print_json, print_note


def merge(
    source: Annotated[Path, typer.Argument(help="A run folder or an adapter folder (lora's or PEFT's).")],
    output: Annotated[Path, typer.Option(callback=home, help="Folder to write the merged model to.")],
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    dtype: Annotated[
        Literal["keep", "bf16", "fp16", "fp32"],
        typer.Option(help="Dtype of the written weights. keep: as in the base."),
    ] = "keep",
    onto: Annotated[
        Literal["auto", "trained", "original"],
        typer.Option(
            help="Add the update to the weights as trained on, or to the original ones. auto: to the original ones if "
            "they are surely better on the run's held-out rows."
        ),
    ] = "auto",
    proof: Annotated[
        Literal["full", "replay", "none"],
        typer.Option(
            help="full: make every written tensor again, and compare the model's outputs with those of base + "
            "adapter. replay: compare no outputs. none: neither."
        ),
    ] = "full",
    max_shard_size: Annotated[str, typer.Option(help="The most that one weight file may hold.")] = "5GB",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help=f"Round the merged weights to {named(lambda rules: rules.written)} at the end, as bitsandbytes stores "
            "them, and measure on the run's held-out rows what that loses.",
        ),
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fuse base and adapter, and measure the result.

    Writes an ordinary Hugging Face folder; the merge fails if it is not the model that was trained.
    """
    merging = heavy("lora_cli.merging.merge", output)
    report = merging.merge(
        source,
        output,
        base=base,
        dtype=dtype,
        onto=onto,
        proof=proof,
        max_shard_size=max_shard_size,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
        say=print_note,
    )
    if as_json:
        print_json(report.as_dict())
        return
    for line in report.lines():
        print_note(line)
    print_note(f"next: {command('lora', 'chat', output)}     other programs: docs/serving.md")


def calibrate(
    model: Annotated[str, typer.Argument(help="The model: a folder or a hub id.")],
    output: Annotated[Path, typer.Option(callback=home, help="Folder to write the moved model to.")],
    text: Annotated[
        Path | None,
        typer.Option(callback=home, help="UTF-8 text like what the model will read. Default: English prose."),
    ] = None,
    group_size: Annotated[Literal["32", "64", "128"], typer.Option(help="The recipe's group_size.")] = "32",
    as_json: Json = False,
) -> None:
    """Move a model's weights to where quantization: int4 loses little of it.

    Writes an ordinary Hugging Face folder for base_model. Holds the model in fp32, on the CPU.
    """
    calibrating = heavy("lora_cli.merging.calibrate", output)
    layers, left = calibrating.calibrate(model, output, text=text, group_size=int(group_size))
    if as_json:
        print_json({"output": str(output), "layers": layers, "left": left, "group_size": int(group_size)})
        return
    print_note(f"{layers} layers moved to 4-bit weights in groups of {group_size}, in {output}")
    if left:
        print_note(
            f"{len(left)} other layers stay as they were, the first is {left[0]}: their inputs are not whole groups of "
            f"{group_size}, or no token of the text came to them"
        )
    print_note(f"next: base_model: {output} and quantization: int4 in a recipe; then lora check --compare-quantization")
