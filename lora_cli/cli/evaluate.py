"""What a model says and how well: `lora eval` and `lora generate`."""

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


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.", show_default=False)
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder whose base and adapter to use.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model. Default: the adapter's base.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder or run folder.")] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Use only the base, for comparison.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat the prompt as a user turn; without a prompt, hold a conversation.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Complete a prompt, or chat."""
    both = run is not None and adapter is not None
    refuse_if(both, "--run and --adapter both name an adapter", fix="give one of them")
    refuse_if(system is not None and not chat, "--system is for --chat", fix="add --chat")
    greedy = "--top-p and --top-k are for sampling, but --temperature 0 is greedy"
    refuse_if(temperature == 0 and (top_p < 1 or top_k > 0), greedy, fix="add --temperature 1")
    adapter = adapter or run
    without = no_adapter and adapter is None
    refuse_if(without, "--no-adapter without an adapter", fix="remove it, or name a run with --run")
    refuse_if(model is None and adapter is None, "which model?", fix="give --model, --adapter or --run")
    heavy("lora_cli.evaluation.generate").generate(
        prompt if prompt not in (None, "-") else None,
        model=model,
        adapter=adapter,
        use_adapter=not no_adapter,
        chat=chat,
        system=system,
        quantization=quantization,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        seed=seed,
        as_json=as_json,
        sampling={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
        },
    )
