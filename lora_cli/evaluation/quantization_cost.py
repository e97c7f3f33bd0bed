"""What holding the base in fewer bits costs before anything is trained: losses of the same rows, kind by kind.

A base that quantization makes worse by half a nat has lost more than many adapters gain, and nothing else shows it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lora_cli.base.device import free_memory_bytes, pick_device, pick_dtype
from lora_cli.base.linear import held_bytes
from lora_cli.base.load import load_model
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import INT4
from lora_cli.base.stored import parameters_stored, stored_quantization
from lora_cli.base.weight_files import stored_tensors
from lora_cli.data.batches import collate
from lora_cli.data.cache import cache_folder
from lora_cli.data.example import Example
from lora_cli.data.feed import Feed
from lora_cli.errors import LoraError, refuse_if
from lora_cli.evaluation.gain import paired_gain
from lora_cli.evaluation.perplexity import example_losses
from lora_cli.files import human_bytes, write_bytes
from lora_cli.foreign import is_real_file, read_json
from lora_cli.quantization import RULES
from lora_cli.recipe import Recipe

MOST_EXAMPLES = 64
WORTH_SAYING = 0.03  # nats a token
_FILE = "quantization.json"  # beside the prepared data
_LEAST_EXAMPLES = 8  # fewer say nothing
_SECONDS = 30  # that training may spend on it before its first step
_LOADED = 200e6  # bytes of weights read and quantized a second, by a slow machine


class Cost(BaseModel):
    """loss: nats per target token of the base alone. weights: bytes.

    cost: loss above that of `none`; low, high: ends of its 95 % interval, None where there is none.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    quantization: str
    loss: float
    weights: int
    cost: float
    low: float | None
    high: float | None


class Costs(BaseModel):
    """Costs of one base on one set of data, by kind. held_out: whether the examples are those of the validation."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    data_fingerprint: str
    base_fingerprint: str
    dtype: str
    held_out: bool
    examples: int
    target_tokens: int
    group_size: int = 32  # of those kinds that have groups
    search: int | None = None  # see `Storage.search`
    costs: list[Cost]

    def is_of(self, source: BaseSource, group_size: int) -> bool:
        return (self.base_fingerprint, self.group_size, self.search) == (source.fingerprint, group_size, INT4.search)

    def of(self, quantization: str) -> Cost | None:
        return next((each for each in self.costs if each.quantization == quantization), None)


def compare_quantizations(
    recipe: Recipe,
    source: BaseSource,
    feed: Feed,
    tokenizer: Any,
    say: Callable[[str], None] = lambda _: None,
    *,
    kinds: Collection[str] = tuple(name for name, rules in RULES.items() if not rules.of_file),
    most: int = MOST_EXAMPLES,
) -> Costs:
    """Loss of the base on at most `most` validation examples (without validation data the first that are trained on),
    held in each of `kinds` in turn. Reads all weights, once a kind; one model is in memory at a time.

    say: prints what is being done, and which way this device cannot hold. Raises LoraError for a checkpoint that is
    stored quantized, which has no other form, and where the base does not fit as the recipe has it, or unquantized.
    """
    held = stored_quantization(source)
    what = f"the checkpoint is stored in {held}: there are no 16-bit weights to compare with"
    refuse_if(held is not None, what, where=source.folder, fix="name the unquantized model as base_model")
    device = pick_device(recipe.device)
    dtype, _ = pick_dtype(recipe.dtype, device)
    held_out = len(feed.validation) > 0
    examples: Sequence[Example] = feed.validation[:most] if held_out else feed.first(most)
    lay_out = partial(collate, packed=False, pad_id=tokenizer.eos_token_id, device=device)

    def measure(kind: str) -> tuple[Tensor, Tensor, int]:
        model = load_model(
            source,
            quantization=kind,
            dtype=dtype,
            device=device,
            double_quantization=recipe.double_quantization,
            group_size=recipe.group_size,
            trust_remote_code=recipe.trust_remote_code,
        )
        return *example_losses(model, examples, lay_out, recipe.data.max_seq_len), held_bytes(model)

    measured: dict[str, tuple[Tensor, Tensor, int]] = {}
    for kind in sorted(kinds, key=lambda name: name != "none"):
        say(f"loading the base as {kind}")
        try:
            measured[kind] = measure(kind)
        except (LoraError, torch.OutOfMemoryError, MemoryError) as error:
            why = error.what if isinstance(error, LoraError) else f"it does not fit into the memory of {device}"
            if kind in ("none", recipe.quantization):
                fix = "to measure on the CPU, where it takes longer, add --set device=cpu"
                raise LoraError(f"the base cannot be measured as {kind}: {why}", fix=fix) from error
            say(f"{kind} is left out: {why}")
        gc.collect()  # of the model that was measured; the next one needs its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    plain, targets, _ = measured["none"]
    costs = [_cost(kind, plain, losses, targets, weights) for kind, (losses, _, weights) in measured.items()]
    return Costs(
        data_fingerprint=feed.summary.fingerprint,
        base_fingerprint=source.fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        held_out=held_out,
        examples=len(examples),
        target_tokens=int(targets.sum()),
        group_size=recipe.group_size,
        search=INT4.search,
        costs=costs,
    )


def _cost(kind: str, plain: Tensor, losses: Tensor, targets: Tensor, weights: int) -> Cost:
    found = paired_gain(losses, plain, targets)  # of the plain base over this one
    low, high = (None, None) if kind == "none" else (found.low, found.high)
    return Cost(quantization=kind, loss=found.before, weights=weights, cost=found.gain, low=low, high=high)


def keep_costs(recipe: Recipe, costs: Costs) -> None:
    """Write the table beside the prepared data, where training and later checks find it."""
    write_bytes(cache_folder(recipe) / _FILE, costs.model_dump_json(indent=2).encode())


def kept_costs(recipe: Recipe, source: BaseSource, fingerprint: str) -> Costs | None:
    """The table that was kept, if it is of this base, these data and groups."""
    path = cache_folder(recipe) / _FILE
    with suppress(LoraError):  # damaged, or somebody else's: it is measured again
        found = read_json(path, Costs, fix="remove it") if is_real_file(path) else None
        if found and found.is_of(source, recipe.group_size) and found.data_fingerprint == fingerprint:
            return found
    return None


def found_costs(runs: Path, source: BaseSource, group_size: int = 32) -> Costs | None:
    """The newest table of this base that any of the runs in a folder keeps, whatever data it was measured on."""
    with suppress(OSError):
        tables = [path for path in runs.glob(f"*/prepared/{_FILE}") if is_real_file(path)]
        for path in sorted(tables, key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(LoraError):  # damaged, or weights that are not here
                found = read_json(path, Costs, fix="remove it")
                if found.is_of(source, group_size):
                    return found
    return None


def cost_lines(costs: Costs, chosen: str, *, other_data: bool = False) -> list[str]:
    """The table in words, the recipe's own way first named, and what to do where it costs much."""
    which = "other" if other_data else "validation" if costs.held_out else "training"
    lines = [f"loss of the base on {costs.examples} {which} examples, {costs.target_tokens:,} target tokens:"]
    for each in costs.costs:
        half = "" if each.low is None or each.high is None else f" ± {(each.high - each.low) / 2:.2f}"
        more = "" if each.quantization == "none" else f" ({each.cost:+.2f}{half})".replace("-", "−")
        held = f"{each.quantization} in {costs.dtype}" if each.quantization == "none" else each.quantization
        lines.append(f"  {held:16} {each.loss:.4f}{more}, {human_bytes(each.weights)} of weights")
    own = costs.of(chosen)
    if own is not None and own.cost > WORTH_SAYING and (own.low is None or own.low > 0):
        better = [each for each in costs.costs if each.cost < own.cost / 2]
        words = " or ".join(f"{each.quantization} ({human_bytes(each.weights)})" for each in better)
        fix = f": write quantization: {words} if the memory allows it" if better else ""
        lines.append(f"{chosen} costs this base {own.cost:.2f} nats a token before anything is learned{fix}")
    return lines


def _known(recipe: Recipe, source: BaseSource, fingerprint: str) -> Costs | None:
    """Of this base on these data, or else from a run beside this one."""
    kept = kept_costs(recipe, source, fingerprint)
    return kept or found_costs(Path(recipe.output).parent, source, recipe.group_size)


def known_lines(recipe: Recipe, source: BaseSource, fingerprint: str) -> list[str]:
    """What is known of the cost of the recipe's quantization; else how to measure it."""
    if recipe.quantization == "none" or stored_quantization(source) is not None:
        return []
    costs = _known(recipe, source, fingerprint)
    if costs is not None:
        return cost_lines(costs, recipe.quantization, other_data=costs.data_fingerprint != fingerprint)
    return [f"what {recipe.quantization} costs this base is not known: lora check --compare-quantization measures it"]


def measure_unknown(recipe: Recipe, source: BaseSource, feed: Feed, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Measure and keep the cost of the recipe's quantization before training, where nothing is known of it and that
    is quick: the 16-bit base fits into free memory, and at least 8 validation examples take half a minute at most.
    """
    kind, most = recipe.quantization, min(MOST_EXAMPLES, len(feed.validation))
    if kind == "none" or stored_quantization(source) is not None or recipe.data.streaming or most < _LEAST_EXAMPLES:
        return
    known = _known(recipe, source, feed.summary.fingerprint)
    if known is not None and known.of(kind) is not None:
        return
    most = min(most, _quick_examples(recipe, source, feed, pick_device(recipe.device)))
    if most < _LEAST_EXAMPLES:
        return
    say(f"base     measuring what {kind} costs it, on {most} validation examples")
    with suppress(LoraError):  # it does not fit: the line that names the command follows
        keep_costs(recipe, compare_quantizations(recipe, source, feed, tokenizer, kinds=("none", kind), most=most))


def _quick_examples(recipe: Recipe, source: BaseSource, feed: Feed, device: torch.device) -> int:
    """How many validation examples can be scored twice in the time that is left after loading; 0 if the 16-bit base
    does not fit. From the speed of a matrix product on this device, of which a small model reaches a fifth.
    """
    dtype, _ = pick_dtype(recipe.dtype, device)
    parameters = parameters_stored(stored_tensors(source.folder))
    if 1.2 * parameters * dtype.itemsize + 2**30 > free_memory_bytes(device):
        return 0
    one = torch.ones(1024, 1024, dtype=dtype, device=device)
    (one @ one).sum().item()  # the first product of a process also sets up the library
    start = time.perf_counter()
    (one @ one @ one).sum().item()
    rate = 4 * 1024**3 / (time.perf_counter() - start) / 5
    left = _SECONDS - 2 * parameters * dtype.itemsize / _LOADED
    tokens = float(np.mean(feed.validation.lengths[:MOST_EXAMPLES]))
    return int(left * rate / (2 * 2 * parameters * tokens)) if left > 0 else 0
