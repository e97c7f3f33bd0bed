"""What a model says and how well: `lora eval` and `lora generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.common import Device, Dtype, Json, Quantization, RemoteCode, console, heavy
from lora_cli.errors import LoraError
from lora_cli.streams import print_json


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run folder.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder of a base or merged model.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter folder to compare with its base.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data file to evaluate on.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens a window moves on long text. Default: half a window.")
    ] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Window in tokens. Default: the run's, or 1024.")] = None,
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
    if run is not None and any(option is not None for option in own):
        raise LoraError(
            "a run folder brings its own model, adapter and settings", fix="give either RUN or --model and --adapter"
        )
    if run is None and (data is None or (model is None and adapter is None)):
        raise LoraError(
            "nothing to evaluate", fix="lora eval RUN, or lora eval --model MODEL [--adapter ADAPTER] --data FILE"
        )
    if stride is not None and data is None:
        raise LoraError("--stride is for long text in --data", fix="remove it, or name a file with --data")
    evaluation = heavy("lora_cli.evaluation.evaluate")
    if run is not None:
        chosen = None if device == "auto" else device
        scores = evaluation.evaluate_run(run, data, stride=stride, device=chosen, trust_remote_code=trust_remote_code)
    else:
        scores = evaluation.evaluate_model(
            model,
            adapter,
            data,
            max_seq_len=max_seq_len,
            stride=stride,
            quantization=quantization,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(evaluation.as_dict(scores))
    else:
        evaluation.print_scores(scores, console(stderr=False))


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.", show_default=False)
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run folder whose base and adapter to use.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id or folder of the model. Default: the adapter's base.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter folder or run folder.")] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Use the base alone, to compare.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat the prompt as a user turn; without a prompt, hold a conversation.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message, with --chat.")] = None,
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
    if run is not None and adapter is not None:
        raise LoraError("--run and --adapter both name an adapter", fix="give one of them")
    if system is not None and not chat:
        raise LoraError("--system is for --chat", fix="add --chat")
    if temperature == 0 and (top_p < 1 or top_k > 0):
        raise LoraError(
            "--top-p and --top-k are for sampling, but --temperature 0 is greedy", fix="add --temperature 1"
        )
    if no_adapter and adapter is None and run is None:
        raise LoraError("--no-adapter without an adapter", fix="remove it, or name a run with --run")
    adapter = adapter or run
    if model is None and adapter is None:
        raise LoraError("which model?", fix="give --model, --adapter or --run")
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
