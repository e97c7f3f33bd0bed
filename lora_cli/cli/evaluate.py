"""How well a model predicts: `lora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli.common import Base, Device, Dtype, Json, OldModel, Quantization, RemoteCode, Source, console, heavy
from lora_cli.errors import LoraError, command, home_expanded, refuse_if
from lora_cli.streams import print_json, print_note


def evaluate(
    source: Source = None,
    data: Annotated[Path | None, typer.Option(help="Data file. Default: the run's validation data.")] = None,
    base: Base = None,
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
    model: OldModel = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Several adapters of one base, compared: one --adapter for each."),
    ] = None,
) -> None:
    """Score base and adapter on the same tokens, or several adapters.

    Prints loss, perplexity, bits per byte and the number of target tokens.
    """
    compared = len(adapters or ()) > 1
    twice = source is not None and (model or adapters)
    fix = "lora eval SOURCE --data FILE, or lora eval --adapter A --adapter B"
    refuse_if(bool(twice), "the model is named twice", where=source, fix=fix)
    if compared:
        options: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "device": device}
        options |= {"stride": stride, "max_seq_len": max_seq_len, "trust_remote_code": trust_remote_code}
        idle = data is None and (stride is not None or max_seq_len is not None)
        refuse_if(idle, "--stride and --max-seq-len are for --data", fix="remove it, or name a file with --data")
        comparing = heavy("lora_cli.evaluation.compare")
        found = comparing.evaluate_several(adapters, base or model, data, **options)
        if as_json:
            print_json(found.as_dict())
        else:
            comparing.print_compared(found, console(stderr=False))
        return
    if adapters:
        source, base = adapters[0], base or model
    source = source or model
    if source is None or (data is None and not Path(home_expanded(source)).is_dir()):
        raise LoraError("nothing to evaluate", where=source, fix="lora eval RUN, or lora eval MODEL --data FILE")
    missing = stride is not None and data is None
    refuse_if(missing, "--stride is for long text in --data", fix="remove it, or name a file with --data")
    evaluation = heavy("lora_cli.evaluation.evaluate")
    named = heavy("lora_cli.adapters.named").find_named(source, base)
    options = {"stride": stride, "trust_remote_code": trust_remote_code}
    if named.run is not None and (data is None or named.is_run):
        own = (base, quantization, max_seq_len, None if dtype == "auto" else dtype)
        instead = command("lora", "eval", named.adapter or source, "--data", "FILE")
        given = any(option is not None for option in own)
        fix = f"name its adapter and a file instead: {instead}"
        refuse_if(given, "a run folder brings its own model and settings", where=source, fix=fix)
        scores = evaluation.evaluate_run(named.run, data, device=None if device == "auto" else device, **options)
    else:
        refuse_if(data is None, "this is not a run: name the data to evaluate on", where=source, fix="add --data FILE")
        options |= {"quantization": quantization, "dtype": dtype, "device": device, "max_seq_len": max_seq_len}
        scores = evaluation.evaluate_model(named.model, named.adapter, data, **options)
    if as_json:
        print_json(evaluation.as_dict(scores))
        return
    evaluation.print_scores(scores, console(stderr=False))
    print_note(f"next: {command('lora', 'chat', source)}")
    if named.adapter is not None:
        print_note(f"      {command('lora', 'merge', source, '--output', f'{Path(source).name}-merged')}")
