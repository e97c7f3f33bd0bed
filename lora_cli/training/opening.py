"""Everything a run needs before its first step: data, model, passes, plan. Cheap checks come before expensive ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.device import describe_device, make_memory_errors_real, pick_device, pick_dtype, share_one_heap
from lora_cli.base.liger import require_liger
from lora_cli.base.load import load_model, load_tokenizer, model_config
from lora_cli.base.sharding import require_shardable
from lora_cli.base.source import BaseSource
from lora_cli.data.feed import Feed, open_feed
from lora_cli.data.prepare import prepare
from lora_cli.data.report import finding_lines
from lora_cli.evaluation.forgetting import general_text
from lora_cli.evaluation.quantization_cost import known_lines, measure_unknown
from lora_cli.evaluation.samples import sample_prompts
from lora_cli.files import human_bytes, require_space
from lora_cli.planning.check import Checked, base_of
from lora_cli.recipe import MOST_SAMPLES, Recipe
from lora_cli.screen import say_on
from lora_cli.training.passes import PASSES, run_passes
from lora_cli.training.session import Session

_METRICS_BYTES, _SAMPLE_BYTES = 300, 1500  # of one line


def open_session(recipe: Recipe, console: Console, load: Callable[..., Any] = load_model) -> Session:
    """Data first (seconds), then the model (minutes). Says what was derived from the recipe as it goes.

    load: see `open_model`.
    """
    say = say_on(console)
    open_device(recipe)  # one that is missing is refused before data are prepared
    source = base_of(recipe)
    for note in source.notes:
        say(f"base     {note}")
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    with PartialState().main_process_first():  # the others then find it prepared
        data = prepare(recipe, tokenizer, keep=True)
    feed = open_feed(recipe, data, tokenizer)
    for number, line in enumerate([*feed.lines(), *finding_lines(feed.summary.findings)]):
        say(f"{'' if number else 'data':9}{line}")
    config = model_config(source, recipe.trust_remote_code)
    feed.require_fit(config, source.name)
    text = general_text(tokenizer, config, Path(recipe.data.general_text) if recipe.data.general_text else None)
    prompts = sample_prompts(recipe, tokenizer, feed, config)
    if PartialState().num_processes == 1:
        measure_unknown(recipe, source, feed, tokenizer, say)
    for number, line in enumerate(known_lines(recipe, source, feed.summary.fingerprint)):
        say(f"{'' if number else 'base':9}{line}")
    session = open_model(recipe, source, tokenizer, feed, say, load)
    session.general_text, session.prompts = text, prompts
    trained = sum(parameter.numel() for parameter in trained_parameters(session.model))
    needed = disk_needed(recipe, trained, session.total_steps)
    require_space(Path(recipe.output), needed, "the run (adapter and checkpoints)")
    say(f"disk     up to {human_bytes(needed)} in {recipe.output}")
    return session


def open_model(
    recipe: Recipe,
    source: BaseSource,
    tokenizer: PreTrainedTokenizerBase,
    feed: Feed,
    say: Callable[[str], None],
    load: Callable[..., Any] = load_model,
) -> Session:
    """The model as it trains: loaded, then tried and changed by all passes, which say what they found.

    load: gives the base as `load_model` does, such as `KeptBase.load`, one that is in memory already.
    Raises LoraError where it cannot be trained as the recipe asks.
    """
    device = open_device(recipe)
    processes = PartialState().num_processes
    several = f", {processes} processes" if processes > 1 else ""
    held = "not quantized" if recipe.quantization == "none" else recipe.quantization
    say(f"model    {recipe.base_model}, {held}, on {describe_device(device)}{several}")
    dtype, why = pick_dtype(recipe.dtype, device)
    at = torch.device("cpu") if recipe.train.shard_base else device  # where all of it fits
    model = load(source, **loading(recipe, dtype, at))
    session = Session(recipe, source, tokenizer, feed, model, device, why, say)
    run_passes(PASSES, session)
    return session


def loading(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `load_model` is asked for by a recipe."""
    names = ("quantization", "double_quantization", "group_size", "trust_remote_code")
    return {name: getattr(recipe, name) for name in names} | {"dtype": dtype, "device": device}


def try_model(recipe: Recipe, checked: Checked, console: Console | None) -> list[str]:
    """What training says of the model, from loading it to its memory: printed on the console, or returned without one.

    Raises LoraError as training would.
    """
    said: list[str] = []
    say = said.append if console is None else say_on(console)
    open_model(recipe, checked.source, checked.tokenizer, checked.feed, say)
    return said


def open_device(recipe: Recipe) -> torch.device:
    """The device to train on, with its allocator set up. Raises LoraError if it cannot do what the recipe asks."""
    device = pick_device(recipe.device)
    pick_dtype(recipe.dtype, device)
    if recipe.train.liger_kernel:
        require_liger(device)
    if device.type == "cpu":
        share_one_heap()
    make_memory_errors_real(device)
    if recipe.train.shard_base:
        require_shardable(PartialState().num_processes)
    return device


def disk_needed(recipe: Recipe, trained_parameters: int, steps: int) -> int:
    """Bytes a run writes at most.

    fp32 adapters: best, last, one being written. Checkpoints, each with A and B and two moments, and the metrics and
    samples of all steps: those kept, that of the best step, that of the clock, one being written; the best adapter in
    them costs nothing where links can.
    """
    adapter, metrics = 4 * trained_parameters, _METRICS_BYTES * steps
    if (every := recipe.train.sample_every) is not None:
        prompts = recipe.train.samples if isinstance(recipe.train.samples, int) else MOST_SAMPLES
        metrics += _SAMPLE_BYTES * prompts * (steps // every + 2)
    checkpoints = (recipe.train.keep_checkpoints + 3) * (3 * adapter + metrics)
    return 3 * adapter + checkpoints + metrics + 10_000_000
