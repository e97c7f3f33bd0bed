"""What a model says: `lora generate` and `lora chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_cli.cli.common import Base, Device, Dtype, Json, OldAdapter, Quantization, RemoteCode, Source, heavy
from lora_cli.errors import refuse_if

Through = Annotated[
    bool | None,
    typer.Option(
        "--template/--raw", help="Prompt through the chat template, or as the text is. Default: as it was trained."
    ),
]
System = Annotated[str | None, typer.Option(help="System message.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from that many of the likeliest tokens; 0 is all.")]
Penalty = Annotated[float, typer.Option(min=0.01, help="Above 1: words that were used become less likely.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sampling.")]
OldRun = Annotated[str | None, typer.Option("--run", hidden=True)]


def generate(
    source: Source = None,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")] = None,
    base: Base = None,
    through_template: Through = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    adapters: Annotated[str | None, typer.Option(help="File whose rows are prompts, each for its own adapter.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of --adapters at once. Default: 8.")] = None,
    model: Annotated[str | None, typer.Option(help="The base of --adapters, as --base.")] = None,
    adapter: OldAdapter = None,
    run: OldRun = None,
    chat: Annotated[bool, typer.Option("--chat", hidden=True)] = False,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", hidden=True)] = False,
) -> None:
    """Complete a prompt, as the model was trained to be prompted."""
    refuse_if(adapters is None and batch_size is not None, "--batch-size is for --adapters", fix="remove it")
    if adapters is not None:
        twice = any((source, prompt, adapter, run, chat, no_adapter))
        refuse_if(
            twice, "the rows of --adapters name prompts and adapters", fix="lora generate --model BASE --adapters FILE"
        )
    elif named := run or adapter or model:
        refuse_if(prompt is not None, "the model is named twice", where=source, fix='lora generate SOURCE "PROMPT"')
        both = run is not None and adapter is not None
        refuse_if(both, "--run and --adapter both name an adapter", fix="give one of them")
        source, prompt, base = named, source, base or (model if named != model else None)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
    opening = {"quantization": quantization, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    speaking = _speaking(seed, sampling | {"max_new_tokens": max_new_tokens}, opening)
    if adapters is not None:
        requests: dict[str, Any] = {"system": system, "through_template": through_template, "as_json": as_json}
        requests["batch_size"] = batch_size or 8
        heavy("lora_cli.evaluation.requests").answer_file(adapters, base or model, **requests, **speaking)
        return
    found = _found(source, base, 'lora generate SOURCE "PROMPT"')
    speaking |= {"through_template": True if chat else through_template, "use_adapter": not no_adapter}
    text = prompt if prompt != "-" else None
    heavy("lora_cli.evaluation.generate").generate(text, found, system=system, as_json=as_json, **speaking)


def chat(
    source: Source = None,
    base: Base = None,
    through_template: Through = None,
    system: System = None,
    max_new_tokens: NewTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a model in the terminal."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
    opening = {"quantization": quantization, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    speaking = _speaking(seed, sampling | {"max_new_tokens": max_new_tokens}, opening)
    found = _found(source, base, "lora chat SOURCE")
    heavy("lora_cli.evaluation.chat").chat(found, system=system, through_template=through_template, **speaking)


def _speaking(seed: int, sampling: dict[str, Any], opening: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Speaker`. Raises LoraError for options of sampling that greedy decoding would ignore."""
    greedy = sampling["temperature"] == 0 and (sampling["top_p"] < 1 or sampling["top_k"] > 0)
    what = "--top-p and --top-k are for sampling, but --temperature 0 is greedy"
    refuse_if(greedy, what, fix="add --temperature 1")
    return {"seed": seed, "sampling": sampling, **opening}


def _found(source: str | None, base: str | None, usage: str) -> Any:
    refuse_if(source is None, "which model?", fix=f"name a run, an adapter or a model: {usage}")
    return heavy("lora_cli.adapters.named").find_named(source, base)
