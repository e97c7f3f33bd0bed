"""What a person names to use: a run folder, an adapter folder, a model folder or a model of the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from lora_cli.adapters.file import AdapterFile, read_adapter
from lora_cli.adapters.metadata import AdapterMetadata
from lora_cli.adapters.opened import adapter_folder
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.gguf import is_gguf
from lora_cli.errors import LoraError, home_expanded
from lora_cli.foreign import read_text
from lora_cli.recipe import load_recipe

_CHAT_FORMATS = ("instruction", "chat")  # formats of a recipe that always go through a template


@dataclass(frozen=True)
class Named:
    """model: of the base, None for the one that the adapter names. run: the folder that the adapter lies in, if any.

    is_run: whether the run itself was named, and not the adapter in it.
    """

    model: str | None
    adapter: Path | None = None
    run: Path | None = None
    is_run: bool = False


def find_named(source: str, base: str | None = None) -> Named:
    """What `source` is, by what its folder holds; what is neither a folder nor a GGUF file is taken for a model of
    the hub.

    base: a base model to use in place of the one that run or adapter names. Raises LoraError for a folder that is
    none of these, a file, and a base for what is a whole model.
    """
    path = Path(home_expanded(source))
    if path.is_dir():
        if (path / CONFIG).is_file() or (path / "recipe.yaml").is_file() or (path / "adapter" / CONFIG).is_file():
            folder = adapter_folder(path)
            run = path if folder != path else path.resolve().parent
            return Named(base, folder, run if (run / "recipe.yaml").is_file() else None, is_run=folder != path)
        if not (path / "config.json").is_file():
            raise LoraError(
                "this folder is neither a run nor an adapter nor a model",
                where=source,
                fix=f"name one with recipe.yaml (a run), {CONFIG} (an adapter) or config.json (a model)",
            )
    elif (path.exists() and not is_gguf(path)) or any(character.isspace() for character in source):
        raise LoraError(
            "this is not a folder" if path.exists() else "this names no run, adapter or model",
            where=source,
            fix="name a run, an adapter or a model first; a prompt comes after it",
        )
    elif not path.exists() and path.name != source and path.parent.is_dir():
        near = get_close_matches(path.name, [each.name for each in path.parent.iterdir() if each.is_dir()], 1, 0.5)
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path; lora runs lists the runs here"
        raise LoraError("no such folder", where=source, fix=fix)
    if base is not None:
        raise LoraError(
            "--base is for an adapter, but this is a whole model", where=source, fix="leave out --base, or name a run"
        )
    return Named(source)


def read_named(source: str, base: str | None) -> tuple[Named, AdapterFile]:
    """The adapter that `source` is, or that of the run, to be used on this base. Raises LoraError for anything else."""
    if not Path(home_expanded(source)).is_dir():
        raise LoraError("no such adapter folder, and no such run", where=source, fix="lora runs lists the runs here")
    named = find_named(source)
    if named.adapter is None:
        raise LoraError("this is a whole model, not an adapter", where=source, fix="name a run or an adapter folder")
    return replace(named, model=base), read_adapter(named.adapter)


def recorded_prompting(named: Named, of_adapter: AdapterMetadata | None, model: Path) -> tuple[str | None, str | None]:
    """`template` or `raw` and the system prompt, as training recorded them: in the adapter, in merge.json of a merged
    model, in a run's recipe.

    of_adapter: the adapter's own metadata. model: the folder of the base. None: nothing says.
    """
    if named.adapter is None:
        path = model / "merge.json"
        try:
            found = json.loads(read_text(path.resolve())) if path.is_file() else {}
            prompting, system = found.get("prompting"), found.get("system")
        except (LoraError, ValueError, AttributeError, RecursionError):
            return None, None  # somebody else's file of that name
        known = prompting if prompting in ("template", "raw") else None
        return known, system if known and isinstance(system, str) else None
    if of_adapter is not None and (of_adapter.prompting is not None or named.run is None):
        return of_adapter.prompting, of_adapter.system
    if named.run is None:
        return None, None
    data = load_recipe(named.run / "recipe.yaml").data
    if data.template is not None or data.format in _CHAT_FORMATS:
        return "template", None
    return None if data.format == "auto" else "raw", None
