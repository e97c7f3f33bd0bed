"""Opening a model for use: a base, with or without an adapter, from whatever a person names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.file import CHAT_TEMPLATE, AdapterFile, attach_adapter, read_adapter
from lora_cli.adapters.metadata import AdapterMetadata
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.device import pick_device, pick_dtype
from lora_cli.base.load import load_model, load_tokenizer, unused_tensors
from lora_cli.base.source import BaseSource, find_base, require_inside
from lora_cli.base.storage.registry import is_known
from lora_cli.base.stored import stored_quantization
from lora_cli.base.trials import require_computes
from lora_cli.errors import LoraError, command
from lora_cli.foreign import read_text
from lora_cli.quantization import RULES


@dataclass(frozen=True)
class Opened:
    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: BaseSource
    adapter: AdapterFile | None
    quantization: str
    device: torch.device
    notes: list[str] = field(default_factory=list)  # what a person should hear before the result


def adapter_folder(path: Path) -> Path:
    """The adapter that `path` means: the folder itself, or the one that a run folder ships."""
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if (path / "recipe.yaml").is_file():
        finishing = command("lora", "train", path, "--resume")
        raise LoraError("this run has no adapter yet", where=str(path), fix=f"finish it: {finishing}")
    what = "there is no adapter in this folder" if path.is_dir() else "no such folder"
    raise LoraError(what, where=str(path), fix=f"name a run folder, or a folder with {CONFIG}")


def open_model(base: str | None, adapter: Path | None, **opening: Any) -> Opened:
    """Load a base model and attach an adapter to it. opening: further arguments of `open_base`."""
    stored = read_adapter(adapter_folder(adapter)) if adapter is not None else None
    opened = open_base(base, [] if stored is None else [stored], **opening)
    if stored is None:
        return opened
    attach_adapter(opened.model, stored, opened.source)
    template = adapter_template(stored.folder)
    if template is not None:  # the one it was trained with, where that is not the base model's own
        opened.tokenizer.chat_template = template
    return replace(opened, adapter=stored, notes=opened.notes + other_base(stored, base))


def open_base(
    base: str | None,
    adapters: Sequence[AdapterFile],
    *,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Opened:
    """Load the base model of adapters, which are yet to be attached.

    base: nothing means the one that they all name. quantization: nothing means as they were trained; for those that do
    not say, and without an adapter, as the checkpoint is stored. Raises LoraError where they do not agree.
    """
    if base is None:
        base, revision = base_of(adapters)
    words = {each.tokenizer_for(base) for each in adapters}
    if len(words) > 1:
        raise LoraError("the adapters were trained with different tokenizers", fix="use them one by one")
    words_of = next(iter(words), None)
    source = find_base(base, revision, trust_remote_code=trust_remote_code, tokenizer=words_of)
    ways = dict.fromkeys(way for each in adapters if (way := _way(each.metadata)) and quantization in (None, way[0]))
    if len(ways) > 1:
        details = [f"{each.folder}: {each.metadata.quantization}" for each in adapters]
        fix = "choose for all with --quantization none (or int8, nf4, int4)"
        raise LoraError("the adapters were trained on the base held in different ways", details=details, fix=fix)
    how, double, group_size = next(iter(ways), (quantization or _stored_as(source), True, 32))
    at = pick_device(device)
    compute, _ = pick_dtype(dtype, at)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = load_model(
        source,
        quantization=how,
        dtype=compute,
        device=at,
        double_quantization=double,
        group_size=group_size,
        trust_remote_code=trust_remote_code,
    )
    require_computes(model)
    return Opened(model, tokenizer, source, None, how, at, [*source.notes, *unused_tensors(model)])


def base_of(adapters: Sequence[AdapterFile]) -> tuple[str, str | None]:
    """The base model that these adapters name, and its revision. Raises LoraError if they name none, or several."""
    if not adapters:
        raise LoraError("which base model?", fix="name it with --model (or --base)")
    named = {each.folder: each.own_base() for each in adapters}
    prints = {each.metadata.base_fingerprint for each in adapters}
    if len(set(named.values())) > 1 and (None in prints or len(prints) > 1):
        details = [f"{folder}: {name}" for folder, (name, _) in named.items()]
        fix = "name the base of all with --model (or --base), or use them one by one"
        raise LoraError("the adapters name different base models", details=details, fix=fix)
    return adapters[0].own_base()


def _way(metadata: AdapterMetadata) -> tuple[str, bool, int] | None:
    """How an adapter's base was held in training: kind, double quantization, group size; None where it does not say."""
    if metadata.quantization is None:
        return None
    rules = RULES[metadata.quantization]
    double = metadata.double_quantization is not False or not rules.double
    return metadata.quantization, double, (metadata.group_size if rules.groups else None) or 32


def adapter_template(folder: Path) -> str | None:
    """The chat template that an adapter brings. Raises LoraError if it is not text, or a link to a file elsewhere."""
    path = folder / CHAT_TEMPLATE
    if not path.exists() and not path.is_symlink():
        return None
    require_inside(path, folder)
    try:
        return read_text(path.resolve())
    except LoraError as error:
        raise LoraError(error.what, where=str(path), fix="copy the adapter again") from None


def _stored_as(source: BaseSource) -> str:
    """As a checkpoint is stored, if a recipe can ask for that; others are loaded as they are, or refused on loading."""
    kind = stored_quantization(source) or "none"
    return kind if is_known(kind) else "none"


def other_base(adapter: AdapterFile, named: str | None) -> list[str]:
    """Without a fingerprint only names and shapes are compared, which other models have too."""
    if named is None or adapter.metadata.base_fingerprint is not None:
        return []
    if adapter.base_model is None:
        return [f"the adapter does not say which base it was trained on; it is used on {named}, as asked"]
    if Path(named).name == Path(adapter.base_model).name:
        return []
    return [f"the adapter names {adapter.base_model} as its base, and is used on {named}, as asked"]
