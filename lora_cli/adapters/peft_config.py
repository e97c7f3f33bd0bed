"""PEFT's adapter_config.json: read with every type checked, because it comes from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_cli.adapters.kinds import COMPUTED
from lora_cli.adapters.patterns import BadPattern, matching
from lora_cli.errors import LoraError, command
from lora_cli.foreign import read_bytes, reason

CONFIG = "adapter_config.json"
TESTED_PEFT = "peft==0.21.2"  # as in constraints.txt
# What PEFT can store in a LoRA adapter and this program cannot compute; a value other than those of OFF would be lost
_LOST = {"use_dora", "bias", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"}
_LOST |= {"alora_invocation_tokens", "layer_replication", "megatron_config", "use_qalora", "use_bdlora"}
_LOST |= {"arrow_config", "kasa_config", "monteclora_config"}
_KNOWN_USES = {"use_rslora"}
OFF = (None, False, "none", [], {})
# Starts of PEFT that also change the base's weights; the adapter means nothing on the base as it was.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of PEFT that do not change weights: nobody can merge them.
_NOT_WEIGHTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
_LARGEST_ALPHA = 1e30  # what is far from the end of fp32
_DEFAULT_RANK = 8  # PEFT's, for a file without `r`
_COPY = "copy the adapter again"


class _Config(BaseModel):
    """PEFT's configuration, with the types of what is used: a wrong one would otherwise come up far from here."""

    model_config = ConfigDict(strict=True, extra="allow")

    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: str | list[str] | None = None
    alpha_pattern: dict[str, Any] | None = None
    rank_pattern: dict[str, int] | None = None
    r: int = _DEFAULT_RANK
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None


def stored_config(folder: Path) -> dict[str, Any]:
    """The file as it is. Raises LoraError if it is damaged, or of another kind of adapter than LoRA."""
    path = folder / CONFIG
    if not path.exists():
        fix = "name an adapter folder or a run folder"
        raise LoraError(f"no adapter here: {CONFIG} is missing", where=str(folder), fix=fix)
    try:
        content = read_bytes(path.resolve())  # a link, as the hub's cache has them
        config = _Config.model_validate_json(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        what = f"the adapter's configuration is not valid: {reason(error)}"
        raise LoraError(what, where=str(path), fix=_COPY) from None
    kind = config.get("peft_type")
    if kind != "LORA":
        what = f"this is a {kind} adapter; only LORA can be opened"
        what = "this adapter is in mlx-lm's layout" if "lora_parameters" in config else what
        raise LoraError(what, where=str(path), fix=elsewhere(folder, config))
    return config


def changed_base(config: Mapping[str, Any]) -> str:
    """A start that also changed the base's weights, in words; "" of the usual ones."""
    start = config.get("init_lora_weights")
    return f"init_lora_weights: {start}" if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE) else ""


def read_config(folder: Path) -> dict[str, Any]:
    """Raises LoraError for a file that is damaged, or that describes what this program cannot compute."""
    config, path = stored_config(folder), folder / CONFIG
    unknown = {key for key in config if key.startswith("use_") and key not in _KNOWN_USES}  # of a newer PEFT
    lost = [f"{key}: {config[key]}" for key in sorted((_LOST | unknown) - COMPUTED) if config.get(key) not in OFF]
    if start := changed_base(config):
        lost.append(f"{start}, which changes the base model's weights")
    if lost:
        what, fix = "the adapter uses what this program cannot compute", elsewhere(folder, config)
        raise LoraError(what, where=str(path), details=lost, fix=fix)
    return config


def elsewhere(folder: Path, config: Mapping[str, Any]) -> str:
    """What to do with an adapter that only PEFT understands: a command that makes it a model, where one can."""
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if "lora_parameters" in config:
        return f"bring it into PEFT's: {command('lora', 'convert', folder, '--to', 'peft', '--output', 'FOLDER')}"
    if not isinstance(kind, str):
        return "name an adapter that PEFT or lora made"
    if kind in _NOT_WEIGHTS:
        return f"use it with PEFT itself: {kind} adds to the prompt, and changes no weights that could be merged"
    if config.get("use_qalora"):
        return "use it with PEFT on the GPTQ base of its training: PEFT cannot merge it, and scales it by width"
    if not isinstance(base, str) or not base:
        return f"write base_model_name_or_path into {CONFIG}, then run this again for the command that merges it"
    code = (
        f"from peft import AutoPeftModelForCausalLM as P; from transformers import AutoTokenizer as T; "
        f"P.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged'); "
        f"T.from_pretrained({base!r}).save_pretrained('merged')"
    )
    install, run = command("pip", "install", TESTED_PEFT), command("python", "-c", code)
    again = command("lora", "diff", base, "merged", "--rank", "32", "--output", "FOLDER")
    more = f" (for an adapter without magnitudes: {again})" if config.get("use_dora") else ""
    return f"merge it with PEFT ({install}), then use the folder `merged`{more}: {run}"


def alphas(config: dict[str, Any], ranks: dict[str, int], folder: Path) -> dict[str, float]:
    """The alpha of every module. ranks: those of its tensors."""
    found = _by_pattern(config.get("lora_alpha"), config.get("alpha_pattern") or {}, "alpha_pattern", ranks, folder)
    for alpha in found.values():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < _LARGEST_ALPHA:
            raise LoraError(
                f"lora_alpha is {repr(alpha)[:60]}, not a finite number", where=str(folder / CONFIG), fix=_COPY
            )
    # Rank-stabilized LoRA scales by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732); ours is then alpha · √rank
    stabilized = config.get("use_rslora")
    return {name: alpha * math.sqrt(ranks[name]) if stabilized else float(alpha) for name, alpha in found.items()}


def require_own(config: dict[str, Any], ranks: dict[str, int], alpha: float | None, folder: Path) -> None:
    """Raises LoraError for another adapter's file: its ranks are not the tensors', or its alpha not that of the save.

    The scaling is alpha / rank, so a configuration of another run beside the tensors would be another model.
    alpha: that the tensors were saved for, where they say so.
    """
    details: list[str] = []
    said = _by_pattern(config.get("r", _DEFAULT_RANK), config.get("rank_pattern") or {}, "rank_pattern", ranks, folder)
    wrong = [name for name in ranks if said[name] != ranks[name]]
    if wrong:
        why = f"{len(wrong)} of {len(ranks)} layers have another rank"
        details = [f"{name}: rank {ranks[name]}, but the configuration says {said[name]!r}" for name in wrong[:5]]
    elif alpha is not None and (config.get("lora_alpha") != alpha or config.get("alpha_pattern")):
        why = f"they were saved for lora_alpha {alpha:g}, but it has {config.get('lora_alpha')!r}"
    else:
        return
    what = f"{CONFIG} does not belong to these tensors: {why}"
    fix = f"copy {CONFIG} and the tensors again, both from the folder that one training wrote"
    raise LoraError(what, where=str(folder), details=details, fix=fix)


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
