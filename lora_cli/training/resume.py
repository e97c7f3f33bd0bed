"""Whether a run that goes on is the run that was begun: what changed since, and what the user lets change."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli import __version__
from lora_cli.base.device import describe_device
from lora_cli.base.storage.registry import storage_named
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, all_keys, differences
from lora_cli.training.session import Session

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy", "datasets", "safetensors", "tokenizers")
# What a step's numbers come from; NumPy draws the order of the data.
COMPUTING = ("lora", "torch", "transformers", "bitsandbytes", "accelerate", "numpy")
_ROUNDING = ("device", "processes")  # a change of these leaves all but rounding as it was


class Change(NamedTuple):
    """allow: what --allow has to name, or a section of it."""

    allow: str
    said: str


def environment_of(session: Session, processes: int) -> dict[str, Any]:
    """What goes into environment.json: machine and versions, base weights and data."""
    return {
        "lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe_device(session.device),
        "dtype": str(session.dtype),
        **{name: version(name) for name in _PACKAGES},
        "liger-kernel": version("liger-kernel") if session.recipe.train.liger_kernel else None,
        "processes": processes,
        "base_revision": session.source.revision,
        "base_fingerprint": session.source.fingerprint,
        "search": storage_named(session.recipe.quantization).search if session.source.gguf is None else None,
        "data_fingerprint": session.feed.summary.fingerprint,
        "data_files": session.feed.summary.files,
    }


def changes_of_recipe(stored: Recipe, given: Recipe) -> list[Change]:
    """What differs but for where the run and its tokens lie: a folder may be moved, and the run in it is the same."""
    data = stored.data.model_copy(update={"cache": given.data.cache})
    stored = stored.model_copy(update={"output": given.output, "data": data})
    if given.revision is None and given.base_model == stored.base_model:
        stored = stored.model_copy(update={"revision": None})  # stored with the commit that "nothing" meant then
    return [Change(".".join(key), f"{'.'.join(key)}: {old} → {new}") for key, old, new in differences(stored, given)]


def changes_of_environment(began: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Other data, other base weights, another compute dtype, other versions of what computes."""
    found: list[Change] = []
    if began.get("data_fingerprint") != now["data_fingerprint"]:
        files = _file_changes(began.get("data_files", {}), now["data_files"])
        found += [Change("data", f"data: {each}") for each in files or ["other tokens from the same files"]]
    compared = {"base_fingerprint": ("base_model", "base weights"), "dtype": ("dtype", "compute dtype")}
    compared |= {name: ("versions", f"version of {name}") for name in COMPUTING}
    compared["liger-kernel"] = ("versions", "version of liger-kernel")
    compared["search"] = ("versions", "version of how the base's weights are quantized")
    for key, (allow, what) in compared.items():
        if began.get(key) != now[key]:
            found.append(Change(allow, f"{what}: {began.get(key)} → {now[key]}"))
    return found


def rounding_note(began: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Changes that leave the run the same except for rounding; None if nothing did."""
    found = [f"{key}: {began.get(key)} → {now[key]}" for key in _ROUNDING if began.get(key) != now[key]]
    return f"the same from here except for rounding: {'; '.join(found)}" if found else None


def require_known(allow: Sequence[str]) -> None:
    """Raises LoraError for an --allow that names nothing which could change."""
    keys = [".".join(path) for path in all_keys()]
    known = {*keys, *(key.partition(".")[0] for key in keys), "versions"} - {"output"}
    for name in allow:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "for example --allow train.epochs, data, or versions"
            raise LoraError(f"--allow {name} is neither a setting nor a section of the recipe", fix=fix)


def refuse_other_run(changes: Sequence[Change], allow: Sequence[str], where: Path) -> None:
    """Raises LoraError, with all changes, unless each is allowed by its own name or its section's."""
    refused = [each for each in changes if not any(each.allow == a or each.allow.startswith(f"{a}.") for a in allow)]
    if not refused:
        return
    names = list(dict.fromkeys(each.allow for each in refused))
    what = "this is no longer the run that was started: these have changed"
    fix = f"undo these changes; or, if they are intended, add {' '.join(f'--allow {name}' for name in names)}"
    raise LoraError(what, where=where, details=[each.said for each in refused], fix=fix)


def _file_changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    gone = [f"{name} is no longer used" for name in before if name not in after]
    new = [f"{name} is new" for name in after if name not in before]
    changed = [f"{name} has other contents" for name in after if name in before and before[name] != after[name]]
    return gone + new + changed
