"""`lora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.cli.common import Base, Json, RemoteCode, heavy, home
from lora_cli.streams import print_json, print_note


def export(
    source: Annotated[str, typer.Argument(help="A run or adapter folder, or a model: a folder or a hub id.")],
    to: Annotated[
        Literal["gguf", "gguf-adapter", "ollama"],
        typer.Option(help="A model's file, an adapter's alone, or a folder with a Modelfile."),
    ],
    output: Annotated[Path, typer.Option(callback=home, help="File to write; for ollama a folder.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1. Default: q8_0; of a QA-LoRA adapter q4_1."
        ),
    ] = None,
    onto: Annotated[
        Literal["auto", "trained", "original"] | None,
        typer.Option(help="Of an adapter: the weights to add its update to, as for merge."),
    ] = None,
    proof: Annotated[
        Literal["full", "replay", "none"] | None,
        typer.Option(help="Of an adapter: how its merge is proved, as for merge."),
    ] = None,
    base: Base = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write the files that llama.cpp, LM Studio and Ollama open.

    A run or an adapter is merged on the way. Needs the extra `gguf`.
    """
    exporting = heavy("lora_cli.exporting.export", output)
    made = exporting.export(
        source,
        output,
        to,
        kind=kind.lower() if kind else None,
        base=base,
        onto=onto,
        proof=proof,
        trust_remote_code=trust_remote_code,
        say=print_note,
    )
    if as_json:
        print_json(made.as_dict())
        return
    for line in exporting.result_lines(made):
        print_note(line)
    print_note(f"next: {exporting.next_line(made)}")
