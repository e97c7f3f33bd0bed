"""The `lora` command: its own options, and what surrounds every command."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from lora_cli import __version__, boundary
from lora_cli.cli import evaluate, export, hints, merge, plan, speak, study, sweep, train
from lora_cli.ending import end_as_by_ctrl_c, let_go
from lora_cli.streams import finish_results, guard_streams, print_result

app = typer.Typer(
    help="Fine-tune a causal language model with LoRA or QLoRA from one YAML recipe.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # the boxed help imports much more, and --help is to be instant
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        print_result(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for name, run in (
    *(("init", plan.init), ("train", train.train), ("check", plan.check), ("eval", evaluate.evaluate)),
    *(("merge", merge.merge), ("generate", speak.generate), ("chat", speak.chat), ("runs", train.runs)),
    *(("inspect", study.inspect), ("resize", study.resize), ("combine", study.combine)),
    *(("diff", study.diff), ("convert", study.convert), ("export", export.export), ("push", export.push)),
    *(("analyze", study.analyze), ("selftest", study.selftest)),
    *(("sweep", sweep.sweep), ("calibrate", merge.calibrate)),
):
    app.command(name, epilog=hints.help_of(name))(run)


def main() -> None:
    """Entry point: what a command raises becomes words, with --json a document, and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no process is forked here
    guard_streams()
    end_as_by_ctrl_c()
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Micro-batches differ in length: without this, pieces of a GPU's memory are left over that fit none of them.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    code = 1
    try:
        given = sys.argv[1:]
        given = [*given[1:], "--help"] if given[:1] == ["help"] else given
        code = boundary.run(partial(app, prog_name="lora"), given, hints.hint)
        sys.exit(code)
    finally:
        with suppress(Exception):  # of a command that failed; what it had printed matters no more
            finish_results()
        let_go(code)  # all is said: Ctrl+C in what libraries do at exit ends them
