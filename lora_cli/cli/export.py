"""Giving away what was trained: `lora export`, `lora push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.cli.common import Base, Json, RemoteCode, heavy, home
from lora_cli.streams import print_json, print_note, print_result


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
        typer.Option(
            help="Of an adapter: how its merge is proved, as for merge, and whether what rounding costs is measured."
        ),
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


def push(
    source: Annotated[str, typer.Argument(help="A run, an adapter or a merged folder.")],
    to: Annotated[str, typer.Option(help="Repository on the hub: owner/name.")],
    base: Annotated[str | None, typer.Option(help="Name of the base on the hub, if it was a folder here.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it. Default: private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and card; use no network.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Also upload the Python code of a merged model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter or a merged folder to the Hugging Face hub.

    Prints the list of files and the model card first.
    """
    pushing = heavy("lora_cli.push")
    upload = pushing.prepare_upload(source, to, base=base, public=public, code=trust_remote_code)
    if not as_json:
        for line in upload.lines():
            (print_result if dry_run else print_note)(line)
    url = None if dry_run else pushing.send(upload)
    if as_json:
        print_json(upload.as_dict() | {"url": url})
    else:
        print_result(url or "dry run: nothing was uploaded")
