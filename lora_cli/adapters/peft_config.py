"""PEFT's adapter_config.json: read with every type checked, because it comes from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_cli.adapters.kinds import COMPUTED
from lora_cli.adapters.patterns import BadPattern, matching
from lora_cli.errors import LoraError, command
from lora_cli.foreign import MOST_JSON_BYTES, read_bytes

CONFIG = "adapter_config.json"
TESTED_PEFT = "peft==0.21.2"  # as in constraints.txt
# What PEFT can store in a LoRA adapter and this program cannot compute; a value other than these would be lost.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "megatron_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# Starts of PEFT that also change the base's weights; the adapter means nothing on the base as it was.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of PEFT that do not change weights: nobody can merge them.
_NOT_WEIGHTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
_LARGEST_ALPHA = 1e30  # what is far from the end of fp32
_DEFAULT_RANK = 8  # PEFT's, for a file without `r`
_COPY = "copy the adapter again"


def read_config(folder: Path) -> dict[str, Any]:
    """Raises LoraError for a file that is damaged, or that describes what this program cannot compute."""
    path = folder / CONFIG
    if not path.exists():
        raise LoraError(
            f"no adapter here: {CONFIG} is missing", where=str(folder), fix="name an adapter folder or a run folder"
        )
    try:
        config = json.loads(read_bytes(path.resolve(), MOST_JSON_BYTES))  # a link, as the hub's cache has them
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise LoraError("the adapter's configuration is not valid JSON", where=str(path), fix=_COPY)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoraError(
            f"this is a {kind} adapter; only LORA can be opened", where=str(path), fix=elsewhere(folder, config)
        )
    _require_types(config, path)
    plain = {key: value for key, value in _PLAIN.items() if key not in COMPUTED}
    lost = [f"{key}: {config[key]}" for key in plain if config.get(key, plain[key]) not in (plain[key], None, [], {})]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        lost.append(f"init_lora_weights: {start}, which changes the base model's weights")
    if lost:
        raise LoraError(
            "the adapter uses what this program cannot compute",
            where=str(path),
            details=lost,
            fix=elsewhere(folder, config),
        )
    return config


def elsewhere(folder: Path, config: Mapping[str, Any]) -> str:
    """What to do with an adapter that only PEFT understands: a command that makes it a model, where one can."""
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(kind, str):
        return "name an adapter that PEFT or lora made"
    if kind in _NOT_WEIGHTS:
        return f"use it with PEFT itself: {kind} adds to the prompt, and changes no weights that could be merged"
    if not isinstance(base, str) or not base:
        return f"write base_model_name_or_path into {CONFIG}, then run this again for the command that merges it"
    code = (
        f"from peft import AutoPeftModelForCausalLM as P; from transformers import AutoTokenizer as T; "
        f"P.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged'); "
        f"T.from_pretrained({base!r}).save_pretrained('merged')"
    )
    install, run = command("pip", "install", TESTED_PEFT), command("python", "-c", code)
    return f"merge it with PEFT ({install}), then use the folder `merged`: {run}"


def alphas(config: dict[str, Any], ranks: dict[str, int], folder: Path) -> dict[str, float]:
    """The alpha of every module. ranks: those of its tensors."""
    found = _by_pattern(config.get("lora_alpha"), config.get("alpha_pattern") or {}, "alpha_pattern", ranks, folder)
    for alpha in found.values():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < _LARGEST_ALPHA:
            raise LoraError(f"lora_alpha is {alpha!r}, not a finite number", where=str(folder / CONFIG), fix=_COPY)
    # Rank-stabilized LoRA scales by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732); ours is then alpha · √rank
    stabilized = config.get("use_rslora")
    return {name: alpha * math.sqrt(ranks[name]) if stabilized else float(alpha) for name, alpha in found.items()}


def require_ranks(config: dict[str, Any], ranks: dict[str, int], folder: Path) -> None:
    """Raises LoraError where r and rank_pattern are not the ranks of the tensors: the file is another adapter's.

    The scaling is alpha / rank, so a configuration of another run beside the tensors would be another model.
    """
    said = _by_pattern(config.get("r", _DEFAULT_RANK), config.get("rank_pattern") or {}, "rank_pattern", ranks, folder)
    wrong = [name for name in ranks if said[name] != ranks[name]]
    if wrong:
        raise LoraError(
            f"{CONFIG} does not belong to these tensors: {len(wrong)} of {len(ranks)} layers have another rank",
            where=str(folder),
            details=[f"{name}: rank {ranks[name]}, but the configuration says {said[name]!r}" for name in wrong[:5]],
            fix=f"copy {CONFIG} and the tensors again, both from the folder that one training wrote",
        )


def _by_pattern(value: Any, pattern: dict[str, Any], setting: str, names: Mapping[str, Any], folder: Path) -> dict:
    found: dict[str, Any] = dict.fromkeys(names, value)
    for key, other in reversed(pattern.items()):  # the first that matches counts
        # PEFT lets a key match the end of a name
        for name in whole_matching(key, list(names), setting, folder, before=r"(.*\.)?"):
            found[name] = other
    return found


def whole_matching(key: str, names: Sequence[str], setting: str, folder: Path, *, before: str = "") -> list[str]:
    """The names that a regular expression matches whole, as PEFT takes target_modules. before: what may precede."""
    try:
        return matching(f"{before}({key})" if before else key, names, literal=False)
    except BadPattern as error:
        raise LoraError(f"{setting}: {key!r} {error}", where=str(folder / CONFIG), fix=_COPY) from None


class _Types(BaseModel):
    """Of what is used: a wrong type would otherwise come up far from here."""

    model_config = ConfigDict(strict=True)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: str | list[str] | None = None
    alpha_pattern: dict[str, Any] | None = None
    rank_pattern: dict[str, int] | None = None
    r: int = _DEFAULT_RANK


def _require_types(config: dict[str, Any], path: Path) -> None:
    try:
        _Types.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise LoraError(f"{key} is of the wrong type: {config[key]!r}", where=str(path), fix=_COPY) from None
