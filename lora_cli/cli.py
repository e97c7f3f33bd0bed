"""The `lora` command: parse, call, print. Heavy libraries are imported inside the commands, so --help is instant."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_cli import __version__, boundary
from lora_cli import quantization as quantizations
from lora_cli.ending import end_as_by_ctrl_c, let_go
from lora_cli.errors import LoraError, command, home_expanded
from lora_cli.streams import finish_results, guard_streams, print_json, print_note, print_result
from lora_cli.surroundings import settle

app = typer.Typer(
    help="Fine-tune a causal language model with LoRA or QLoRA from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # the boxed help imports much more, and --help is to be instant
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps", "xpu"], typer.Option(help="Where to compute.")]
Dtype = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Compute dtype.")]
Quantization = Annotated[
    quantizations.Quantization | None, typer.Option(help="How to hold the base. Default: as it was trained.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository ships.")
]


def _version(show: bool) -> None:
    if show:
        print_result(f"lora {__version__}")
        raise typer.Exit


def _home(path: Path | None) -> Path | None:
    return path and Path(home_expanded(str(path)))


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder of the base model.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Argument(help="Data: a file, a folder of them, or a glob in quotes.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Memory of the GPU to train on, such as 12GB. Default: what is here.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", callback=_home, help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe, for editors.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe for a model and data.

    Looks at both, and says in the recipe why each setting is as it is. No weight is read.
    """
    if schema:
        if model is not None or gpu is not None:
            raise LoraError("--schema prints the schema and writes no recipe", fix="remove --schema, or all else")
        from lora_cli.recipe import json_schema

        sys.stdout.write(json_schema() + "\n")
        return
    if model is None or data is None:
        raise LoraError(
            "which model, and which data?",
            fix="lora init MODEL DATA [--gpu 12GB]; or for editors: lora init --schema > recipe.schema.json",
        )
    planning = _heavy("lora_cli.planning.first_recipe", output)
    with _status("looking at model and data"):
        written = planning.write_first_recipe(model, data, output, gpu=gpu, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(written.as_dict())
        return
    for note in written.notes:
        print_note(f"note: {note}")
    print_result(
        f"{output} is written, for {written.device.name}: about {written.memory.total / 2**30:.1f} GiB, estimated"
    )
    print_result(f"next: {command('lora', 'check', output)}     shows what is trained on")
    print_result(f"      {command('lora', 'train', output)}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: key.path=value. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", help="With --resume: a setting or section that may have changed, data, or versions. Repeatable."
        ),
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", help="End before this many hours have passed, resumably.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter as a recipe says."""
    from lora_cli.recipe import load_recipe
    from lora_cli.trust import require_trust

    loaded = load_recipe(recipe, overrides)
    require_trust(loaded, recipe, overrides or [])
    if allow and not resume:
        raise LoraError("--allow is for --resume", fix="add --resume, or remove it")
    if max_hours is not None and not 0 < max_hours < 1e6:
        raise LoraError(f"--max-hours is {max_hours}, but must be above 0", fix="for example --max-hours 7.5")
    console = _console()
    settle(Path(loaded.output))
    with _status("loading libraries"):
        from lora_cli.base.load import quiet_libraries
        from lora_cli.training.train import train as run
    quiet_libraries()
    boundary.keep_tracebacks_in(Path(loaded.output))
    report = run(loaded, console, resume=resume, allow=allow or [], max_hours=max_hours)
    if as_json and boundary.is_first_process():
        print_json(report)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: key.path=value. Repeatable.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many examples to show, token by token.")] = 3,
    html: Annotated[
        Path | None, typer.Option("--html", callback=_home, help="Write the preview to an HTML file too.")
    ] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Keep the prepared tokens for `lora train`.")] = False,
    try_model: Annotated[
        bool, typer.Option("--model", help="Load the model too, and try it as training would.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check recipe and data, and show what would be trained on.

    Everything short of training; no weight is read without --model.
    """
    from lora_cli.recipe import load_recipe
    from lora_cli.trust import require_trust

    loaded = load_recipe(recipe, overrides)
    require_trust(loaded, recipe, overrides or [])
    checking = _heavy("lora_cli.planning.check", Path(loaded.output))
    with _status("preparing the data"):
        checked = checking.check(loaded, keep=prepare)
    if html is not None:
        checking.write_page(checked, html, show)
    if not as_json:
        checking.print_checked(checked, _console(stderr=False), show)
    document = checked.as_dict(show)
    try:
        checked.require_ok()
        if try_model:
            from lora_cli.training.opening import try_model as tried

            document["model"] = tried(loaded, checked, None if as_json else _console(stderr=False))
    except LoraError as error:
        error.result = document
        raise
    if as_json:
        print_json(document)


@app.command("eval")
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
    evaluation = _heavy("lora_cli.evaluation.evaluate")
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
        evaluation.print_scores(scores, _console(stderr=False))


@app.command()
def merge(
    source: Annotated[
        Path, typer.Argument(help="A run folder or an adapter folder (ours or PEFT's).", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", callback=_home, help="Folder to write the merged model to.", show_default=False)
    ],
    base: Annotated[str | None, typer.Option("--base", help="Base model. Default: the one the adapter names.")] = None,
    dtype: Annotated[
        Literal["keep", "bf16", "fp16", "fp32"],
        typer.Option(help="Dtype of the written weights. keep: as in the base."),
    ] = "keep",
    onto: Annotated[
        Literal["trained", "original"],
        typer.Option(help="Add the update to the weights as trained on, or to the original ones."),
    ] = "trained",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fuse base and adapter, and measure the result.

    Writes an ordinary Hugging Face folder; the merge fails if it is not the model that was trained.
    """
    merging = _heavy("lora_cli.merging.merge", output)
    report = merging.merge(
        source, output, base=base, dtype=dtype, onto=onto, trust_remote_code=trust_remote_code, say=print_note
    )
    if as_json:
        print_json(report.as_dict())
        return
    for line in merging.result_lines(report):
        print_note(line)


@app.command()
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
    _heavy("lora_cli.evaluation.generate").generate(
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


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs, or a run.")] = Path("runs"),
    per_hour: Annotated[
        float | None, typer.Option("--per-hour", min=0.0, help="Price of an hour of the machine, for a cost column.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: their state, loss and cost."""
    from lora_cli.training import runs as listing

    found = listing.list_runs(folder, per_hour)
    if as_json:
        print_json(listing.as_dicts(found))
    else:
        listing.print_runs(found, folder, _console(stderr=False))


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
        code = boundary.run(app, sys.argv[1:])
        sys.exit(code)
    finally:
        with suppress(Exception):  # of a command that failed; what it had printed matters no more
            finish_results()
        let_go(code)  # all is said: Ctrl+C in what libraries do at exit ends them


def _console(*, stderr: bool = True) -> Any:
    from lora_cli.screen import Screen

    return Screen(stderr=stderr)


def _status(what: str) -> AbstractContextManager[None]:
    from lora_cli.screen import status

    return status(_console(), what)


def _heavy(module: str, *outputs: Path) -> Any:
    """Import a module that imports torch, saying so meanwhile. outputs: where a temporary file may be, too."""
    import importlib

    settle(*outputs)
    with _status("loading libraries"):
        loaded = importlib.import_module(module)
        importlib.import_module("lora_cli.base.load").quiet_libraries()
    return loaded
