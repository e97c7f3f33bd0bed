"""Giving away what was trained: `lora push`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cli.cli.common import Json, heavy
from lora_cli.streams import print_json, print_note, print_result


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
