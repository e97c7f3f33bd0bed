"""`lora init`: a first recipe for a model and data, with the numbers that each choice was made from.

survey.py looks, choices.py chooses, memory.py estimates; here the recipe is written, after it was tried on the data.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lora_cli.base.device import describe_device, pick_device, pick_dtype
from lora_cli.data.columns import Columns
from lora_cli.data.files.sources import open_source
from lora_cli.data.report import finding_lines
from lora_cli.data.store import PreparedData
from lora_cli.errors import LoraError, command
from lora_cli.evaluation.quantization_cost import Costs, found_costs
from lora_cli.files import write_bytes
from lora_cli.planning import choices
from lora_cli.planning.cards import require_new
from lora_cli.planning.choices import Device
from lora_cli.planning.memory import GIB, Memory, parse_size, shape_of
from lora_cli.planning.reading import Unread, choose_template, read_together
from lora_cli.planning.recipe_text import Chosen, Names, Tried, recipe_text
from lora_cli.planning.skeleton import BaseModel, look_at_model
from lora_cli.planning.survey import DataSurvey, look_apart, prepare_rows, survey_data
from lora_cli.quantization import DEFAULT
from lora_cli.recipe import TEMPLATES, Recipe, load_recipe


@dataclass(frozen=True)
class FirstRecipe:
    """What was written. notes: what the checks found in the data that does not stop a run."""

    path: Path
    recipe: Recipe
    memory: Memory
    device: Device
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For --json. Memory in bytes, by an estimate that is not measured."""
        memory = vars(self.memory) | {"total": self.memory.total, "available": self.device.memory}
        return {"recipe": str(self.path), "output": self.recipe.output, "memory": memory, "notes": self.notes}


def write_first_recipe(
    model: str,
    data: Sequence[str],
    path: Path,
    *,
    gpu: str | None = None,
    columns: Columns | None = None,
    system: str | None = None,
    template: str | None = None,
    drop: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> FirstRecipe:
    """Looks at model and data, chooses, tries the recipe on the data, and writes it.

    gpu: memory of the GPU to train on, such as 12GB; None: what is here. columns: what they mean, as in data.columns;
    questions and answers go through the model's chat template, if it has one. system, template and drop: as in
    data. Raises LoraError if the file exists, for whatever is wrong with model or data, and if nothing fits into the
    memory; then nothing is written.
    """
    require_new(path, fix="name another with --output, or remove it first")
    device = _device_here() if gpu is None else Device(f"a GPU of {parse_size(gpu) / GIB:g} GiB", parse_size(gpu))
    looked = [part for each in data for part in look_apart(each)]
    rows = [(source.name, first) for _, source, first in looked]
    try:
        read_together(rows, columns or {}, template=False)  # what cannot be read is said before a model is downloaded
        base = look_at_model(model, trust_remote_code=trust_remote_code)
        reading = read_together(rows, columns or {}, template=bool(template or base.tokenizer.chat_template))
    except Unread as error:
        given = {"--gpu": gpu, "--system": system, "--template": template}
        more = tuple(part for option in given.items() if option[1] for part in option)
        more += ("--drop", ",".join(drop)) if drop else ()
        again = [*("lora", "init", model, *data), *more, "--output", path]
        raise _with_command(error, again) from None
    if system and not {"chat", "instruction"} & {*reading.names}:
        what = f"--system is for conversations, questions and answers, but these rows are read as {reading.name}"
        raise LoraError(what, fix="leave it out, or say what is asked and answered: --columns question=…,answer=…")
    chosen_template = (template, "as asked for") if template else choose_template(reading, base.tokenizer)
    named, sources = chosen_template and chosen_template[0], [source for _, source, _ in looked]
    survey = survey_data(sources, reading, base.tokenizer, template=named, system=system, drop=drop)
    if template and template not in TEMPLATES:  # a file: from the recipe's folder
        chosen_template = _path(template, path.resolve().parent), "as asked for"
    costs = found_costs(path.parent / "runs", base.source)
    chosen = _choose(base, survey, device, chosen_template, system, drop, costs)
    names = _names(path, model, data[0], [part for part, _, _ in looked])
    recipe = load_recipe(path, text=recipe_text(chosen, names, None))
    prepared = _prepared(recipe, chosen)
    text = recipe_text(chosen, names, _tried(recipe, prepared, survey))
    final = load_recipe(path, text=text)
    assert final.data == recipe.data, "what was tried is not what is written"
    write_bytes(path, text.encode())
    left = [f"{name} is not read: {why}" for source in sources for name, why in source.left.items()]
    return FirstRecipe(path, final, chosen.fit.memory, device, [*finding_lines(prepared.findings), *left[:20]])


def _with_command(error: Unread, again: Sequence[str | Path]) -> LoraError:
    """The same error with a fix that can be pasted."""
    if error.titled is not None:
        path = Path(error.titled)
        new = path.with_name(f"{path.stem}-table{path.suffix}")
        fix = f"remove the first line: `tail -n +2 {command(path)} > {command(new)}`, and name {new}"
        what = "the first line is a title or merged cells, and the names of the columns come below it"
        return LoraError(what, where=error.where, fix=fix)
    fix, named = error.fix, io.StringIO()
    if error.named:
        csv.writer(named, lineterminator="").writerow(f"{meaning}={column}" for meaning, column in error.named.items())
        fix = f"say what the columns mean, such as: {command(*again, '--columns', named.getvalue())}"
    return LoraError(error.what, where=error.where, details=error.details, fix=fix)


def _device_here() -> Device:
    """What a run on this machine would be given; of a CPU, the machine's memory."""
    device = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(f"the CPU here and {memory / GIB:.1f} GiB", memory, dtype.itemsize, on_cpu=True)
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory()
    else:
        memory = getattr(torch, device.type).get_device_properties(device).total_memory
    return Device(f"the GPU here, {describe_device(device)}", memory, dtype.itemsize)


def _choose(
    base: BaseModel,
    survey: DataSurvey,
    device: Device,
    template: tuple[str, str] | None,
    system: str | None,
    drop: Sequence[str],
    costs: Costs | None,
) -> Chosen:
    adapter = choices.choose_adapter(base, survey.target_tokens)
    ranks = dict.fromkeys(adapter.layers, adapter.rank)
    kind, at = base.stored or DEFAULT, "cpu" if device.on_cpu else "cuda"
    shape = shape_of(base, ranks, device.dtype, quantization=kind, device=at)
    epochs = choices.choose_epochs(survey.tokens)
    validation = choices.choose_validation(survey.rows, survey.distinct)
    fit = choices.choose_sizes(base, survey, device, shape, epochs, costs)
    return Chosen(base, survey, device, template, system, tuple(drop), adapter, shape, epochs, validation, fit, costs)


# ── trying it ───────────────────────────────────────────────────────────────────────────────────────────────────


def _prepared(recipe: Recipe, chosen: Chosen) -> PreparedData:
    """The data as `lora check` prepares them, or of large data the sample. Raises LoraError as that does."""
    data, train = recipe.data, recipe.train
    if chosen.survey.sample and isinstance(data.validation, float):  # a small share may be less than a row of a sample
        data = data.model_copy(update={"validation": choices.HELD_OUT})
    opened = chosen.survey.sample or [open_source(each) for each in data.train]
    sources = list(zip(data.train, opened, strict=True))
    row_tokens = train.tokens_per_micro_batch
    prepared = prepare_rows(sources, data, chosen.base.tokenizer, seed=train.seed, row_tokens=row_tokens)
    prepared.require_fit(chosen.base.config, chosen.base.source.name)
    return prepared


def _tried(recipe: Recipe, prepared: PreparedData, survey: DataSurvey) -> Tried:
    """Exact where all rows were tokenized; else what the sample makes likely for all."""
    order = prepared.order(recipe)
    tokens, examples = prepared.summary.train.tokens, len(prepared.train) + len(prepared.validation)
    epochs, held_out = recipe.train.epochs, len(prepared.validation)
    if survey.sample is None:
        return Tried(order.total_steps(epochs, None), tokens / order.steps_per_epoch, examples, held_out)
    fraction = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
    rows = len(order.rows) * survey.tokens * (1 - fraction) / tokens
    steps_per_epoch = math.ceil(rows / order.rows_per_step)
    return Tried(
        math.ceil(steps_per_epoch * epochs),
        survey.tokens * (1 - fraction) / steps_per_epoch,
        round(examples * survey.rows / len(survey.lengths)),
        round(survey.rows * fraction),
    )


# ── names and paths ─────────────────────────────────────────────────────────────────────────────────────────────


def _names(path: Path, model: str, first: str, data: Sequence[str]) -> Names:
    """Model, data and run folder as the recipe writes them: from its own folder, unless they were given absolute.

    first: what the run is called after.
    """
    folder = path.resolve().parent
    called = re.sub(r"[^A-Za-z0-9._]+", "-", f"{Path(model).resolve().name}-{_stem(first)}").strip("-.")
    outputs = (f"runs/{called or 'first'}{f'-{number}' if number > 1 else ''}" for number in count(1))
    output = next(output for output in outputs if not (folder / output).exists())
    base_model = _path(model, folder) if Path(model).is_dir() else model
    train = [_path(each, folder) for each in data]
    return Names(base_model, train if len(train) > 1 else train[0], output, path.name)


def _stem(data: str) -> str:
    path = Path(data)
    return path.resolve().name if path.is_dir() else path.name.split(".")[0].replace("*", "")


def _path(given: str, folder: Path) -> str:
    text = os.path.normpath(given) if os.path.isabs(given) else os.path.relpath(Path.cwd() / given, folder)
    text = f"./{text}" if text.startswith("~") else text
    return text.replace("$", "$$")
