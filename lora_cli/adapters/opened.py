"""Opening a model for use: a base, with or without an adapter, from whatever a person names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.file import CHAT_TEMPLATE, AdapterFile, attach_adapter, read_adapter
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.device import pick_device, pick_dtype
from lora_cli.base.load import load_model, load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.errors import LoraError


@dataclass(frozen=True)
class Opened:
    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: BaseSource
    adapter: AdapterFile | None
    quantization: str
    device: torch.device


def adapter_folder(path: Path) -> Path:
    """The adapter that `path` means: the folder itself, or the one that a run folder ships."""
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if (path / "recipe.yaml").is_file():
        raise LoraError(
            "this run has no adapter yet", where=str(path), fix=f"finish it: lora train {path / 'recipe.yaml'} --resume"
        )
    what = "there is no adapter in this folder" if path.is_dir() else "no such folder"
    raise LoraError(what, where=str(path), fix=f"name a run folder, or a folder with {CONFIG}")


def open_model(
    base: str | None,
    adapter: Path | None,
    *,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Opened:
    """Load a base model and attach an adapter to it.

    base: nothing means the one that the adapter names. quantization: nothing means as the adapter was trained; without
    an adapter, or for one that does not say, none.
    """
    stored = read_adapter(adapter_folder(adapter)) if adapter is not None else None
    if base is None:
        if stored is None or stored.base_model is None:
            raise LoraError("which base model?", fix="name it with --model (or --base)")
        base, revision = stored.base_model, stored.base_revision or None
        if Path(base).is_dir():
            revision = None
    how = quantization or (stored.quantization if stored else None) or "none"
    source = find_base(base, revision, trust_remote_code=trust_remote_code)
    at = pick_device(device)
    compute, _ = pick_dtype(dtype, at)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = load_model(
        source,
        quantization=how,
        dtype=compute,
        device=at,
        double_quantization=stored.double_quantization if stored else True,
        trust_remote_code=trust_remote_code,
    )
    if adapter is not None and stored is not None:
        attach_adapter(model, stored, source)
        template = adapter_folder(adapter) / CHAT_TEMPLATE
        if template.is_file():  # the one it was trained with, where that is not the base model's own
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return Opened(model, tokenizer, source, stored, how, at)
