"""`lora init`: a first recipe for a model and data, with the numbers that each choice was made from.

What is chosen is chosen here, what is looked at is in survey.py, and what fits is in memory.py.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_cli.adapters.targets import find_targets
from lora_cli.base.attention import attention_implementation
from lora_cli.base.device import describe_device, pick_device, pick_dtype
from lora_cli.data.prepared import PreparedData
from lora_cli.errors import LoraError
from lora_cli.files import disk_errors
from lora_cli.planning.memory import GIB, OVERHEAD, Memory, ModelShape, estimate_memory, parse_size, shape_of
from lora_cli.planning.survey import BaseModel, DataSurvey, choose_template, look_at_model, look_at_rows
from lora_cli.planning.survey import prepared as prepare_all_or_sample
from lora_cli.planning.survey import survey_data
from lora_cli.recipe import Recipe
from lora_cli.recipe_file import load_recipe

_USABLE = 0.9  # of a device: the rest is for what the estimate does not know, and for a desktop
_STEP_TOKENS = 8192
_STEPS = 100  # at least about so many in a run, even of few rows
_FULL_MICRO_BATCH, _SMALL_MICRO_BATCH = 4096, 1024  # tokens: more brings no speed; less leaves a GPU idle
_TEXT_PIECE = 2048
_HELD_OUT = 0.05
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 8, 1000  # rows
_MOST_STEPS = 5000
_SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 128, 141, 180)  # GiB that GPUs are made with


@dataclass(frozen=True)
class Device:
    """Where training is to run. value_bytes: of the compute dtype."""

    name: str
    memory: int
    value_bytes: int
    on_cpu: bool


@dataclass(frozen=True)
class Fit:
    """What the memory of a device allows, with the estimate for it."""

    quantization: str
    max_seq_len: int
    micro_batch_size: int
    gradient_checkpointing: bool
    memory: Memory


@dataclass(frozen=True)
class FirstRecipe:
    """What was written. notes: what a person should know and the recipe does not say."""

    path: Path
    output: str
    memory: Memory
    device: Device
    notes: list[str]


def write_first_recipe(
    model: str, data: str, path: Path, *, gpu: str | None = None, trust_remote_code: bool = False
) -> FirstRecipe:
    """Looks at model and data, chooses, tries the recipe on the data, and writes it.

    gpu: memory of the GPU to train on, such as 12GB; None: what is here. Raises LoraError if the file exists, for
    whatever is wrong with model or data, and if no recipe fits into the memory; then nothing is written.
    """
    if path.exists() or path.is_symlink():
        raise LoraError(
            "this file exists and would be overwritten", where=str(path), fix="choose another --output, or remove it"
        )
    if not path.parent.is_dir():
        raise LoraError("no such folder", where=str(path.parent), fix="make it first, or choose another --output")
    memory = parse_size(gpu) if gpu is not None else None
    source, reading = look_at_rows(data)
    base = look_at_model(model, trust_remote_code=trust_remote_code)
    device = _device_here() if memory is None else Device(f"a GPU of {_gib(memory)}", memory, 2, False)
    template = choose_template(reading, base.tokenizer)
    settings: dict[str, Any] = {"train": data, "format": reading.wanted, "columns": reading.columns}
    settings |= {"template": template[0]} if template else {}
    with tempfile.TemporaryDirectory(prefix="lora-") as temporary:
        uncut = {**settings, "max_seq_len": 2**31 - 1, "packing": False}
        measuring = Recipe.model_validate({"base_model": model, "data": uncut, "output": temporary})
        survey = survey_data(measuring, source, reading, base.tokenizer)
    choice = _Choice(base, survey, device, template)
    place = _Place(path, model, data)
    draft = _recipe_text(choice, place, None)
    tried = _tried(draft, path, base, survey)
    text = _recipe_text(choice, place, tried)
    _tried(text, path, base, survey, data=tried)
    with disk_errors(path):
        temporary_file = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        temporary_file.write_text(text, encoding="utf-8")
        temporary_file.rename(path)
    return FirstRecipe(path, place.output, choice.fit.memory, device, _notes(survey, tried))
