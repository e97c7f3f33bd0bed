"""PEFT's adapter_config.json: read with every type checked, because it comes from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.adapters.patterns import BadPattern, matching
from lora_cli.errors import LoraError

CONFIG = "adapter_config.json"
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
_LARGEST_ALPHA = 1e30  # what is far from the end of fp32
_COPY = "copy the adapter again"


def read_config(folder: Path) -> dict[str, Any]:
    """Raises LoraError for a file that is damaged, or that describes what this program cannot compute."""
    path = folder / CONFIG
    if not path.is_file():
        raise LoraError(
            f"no adapter here: {CONFIG} is missing", where=str(folder), fix="name an adapter folder or a run folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise LoraError("the adapter's configuration is not valid JSON", where=str(path), fix=_COPY)
    if config.get("peft_type") != "LORA":
        raise LoraError(
            f"this is a {config.get('peft_type')} adapter; only LORA can be opened", where=str(path), fix=_COPY
        )
    _require_types(config, path)
    lost = [
        f"{key}: {config[key]}" for key, plain in _PLAIN.items() if config.get(key, plain) not in (plain, None, [], {})
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        lost.append(f"init_lora_weights: {start}, which changes the base model's weights")
    if lost:
        raise LoraError(
            "the adapter uses what this program cannot compute",
            where=str(path),
            details=lost,
            fix="merge it into its base with the program that made it",
        )
    return config


def alphas(config: dict[str, Any], ranks: dict[str, int], folder: Path) -> dict[str, float]:
    """The alpha of every module. ranks: those of its tensors."""
    found: dict[str, Any] = dict.fromkeys(ranks, config.get("lora_alpha"))
    for key, alpha in reversed((config.get("alpha_pattern") or {}).items()):  # the first that matches counts
        for name in peft_matching(key, list(ranks), "alpha_pattern", folder):
            found[name] = alpha
    for alpha in found.values():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < _LARGEST_ALPHA:
            raise LoraError(f"lora_alpha is {alpha!r}, not a finite number", where=str(folder / CONFIG), fix=_COPY)
    # Rank-stabilized LoRA scales by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732); ours is then alpha · √rank
    stabilized = config.get("use_rslora")
    return {name: alpha * math.sqrt(ranks[name]) if stabilized else float(alpha) for name, alpha in found.items()}


def peft_matching(key: str, names: Sequence[str], setting: str, folder: Path) -> list[str]:
    """The names that PEFT takes a key of a pattern to mean."""
    try:
        return matching(rf"(.*\.)?({key})", names, literal=False)
    except BadPattern as error:
        raise LoraError(f"{setting}: {key!r} {error}", where=str(folder / CONFIG), fix=_COPY) from None


def _require_types(config: dict[str, Any], path: Path) -> None:
    """Of what is used: a wrong type would else come up far from here."""

    def is_texts(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))

    wrong = [key for key in ("base_model_name_or_path", "revision") if not isinstance(config.get(key), str | None)]
    wrong += [key for key in ("target_modules",) if config.get(key) is not None and not is_texts(config[key])]
    wrong += [key for key in ("alpha_pattern",) if not isinstance(config.get(key), dict | None)]
    if wrong:
        raise LoraError(f"{wrong[0]} is of the wrong type: {config[wrong[0]]!r}", where=str(path), fix=_COPY)
