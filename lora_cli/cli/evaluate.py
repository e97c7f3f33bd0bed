"""How well a model predicts: `lora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli.common import Device, Dtype, Json, Quantization, RemoteCode, console, heavy
from lora_cli.errors import refuse_if
from lora_cli.streams import print_json


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run folder.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a base or merged model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder to compare with its base.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data file to evaluate on.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="On long text: tokens to move the window by. Default: half of it.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Length of the window in tokens. Default: the run's, or 1024.")
    ] = None,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score base and adapter on the same tokens.

    Prints loss, perplexity, bits per byte and the number of target tokens.
    """
    own = (model, adapter, quantization, max_seq_len, None if dtype == "auto" else dtype)
    refuse_if(
        run is not None and any(option is not None for option in own),
        "a run folder brings its own model, adapter and settings",
        fix="give either RUN or --model and --adapter",
    )
    refuse_if(
        run is None and (data is None or (model is None and adapter is None)),
        "nothing to evaluate",
        fix="lora eval RUN, or lora eval --model MODEL [--adapter ADAPTER] --data FILE",
    )
    missing = stride is not None and data is None
    refuse_if(missing, "--stride is for long text in --data", fix="remove it, or name a file with --data")
    evaluation = heavy("lora_cli.evaluation.evaluate")
    options: dict[str, Any] = {"stride": stride, "trust_remote_code": trust_remote_code}
    if run is not None:
        scores = evaluation.evaluate_run(run, data, device=None if device == "auto" else device, **options)
    else:
        options |= {"quantization": quantization, "dtype": dtype, "device": device, "max_seq_len": max_seq_len}
        scores = evaluation.evaluate_model(model, adapter, data, **options)
    if as_json:
        print_json(evaluation.as_dict(scores))
    else:
        evaluation.print_scores(scores, console(stderr=False))
