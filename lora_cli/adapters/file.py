"""The adapter file: PEFT's two files, adapter tensors only.

Names are PEFT's (`base_model.model.<module>.lora_A.weight`), so PEFT, vLLM and llama.cpp's converter read them. The
safetensors metadata also says which base weights the adapter belongs to, and how they were quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_cli.adapters.attach import attach
from lora_cli.adapters.layer import LoRALinear, lora_layers
from lora_cli.adapters.peft_config import CONFIG, alphas, peft_matching, read_config
from lora_cli.adapters.targets import Target, linear_layers
from lora_cli.base.linear import features, is_linear, stored_transposed
from lora_cli.base.source import BaseSource
from lora_cli.base.weight_files import order_metadata
from lora_cli.errors import LoraError

TENSORS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"  # where the Hugging Face libraries look for it
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, read and understood, not yet attached to a model."""

    folder: Path
    base_model: str | None
    base_revision: str | None
    base_fingerprint: str | None  # absent in adapters of other programs
    quantization: str | None  # how the base was held in training, where known
    double_quantization: bool
    target_modules: str | list[str] | None
    whole: bool  # whether target_modules alone says which layers there must be
    alphas: dict[str, float]  # by module; scaling is alpha / rank
    tensors: dict[str, dict[str, Tensor]]  # module → {"A": (rank, in), "B": (out, rank)}


def save_adapter(
    model: Any,
    folder: Path,
    base: BaseSource,
    *,
    quantization: str,
    double_quantization: bool,
    chat_template: str | None = None,
) -> None:
    """Write the model's adapter into the existing `folder`. chat_template: where it is not the base model's own."""
    layers = lora_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    metadata = {
        "format": "pt",
        "base_model": base.name,
        "base_revision": base.revision or "",
        "base_fingerprint": base.fingerprint,
        "quantization": quantization,
        "double_quantization": str(double_quantization).lower(),
    }
    save_file(tensors, folder / TENSORS, metadata)
    order_metadata(folder / TENSORS)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    config = _peft_config(model, layers, base)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _peft_config(model: Any, layers: Mapping[str, LoRALinear], base: BaseSource) -> dict[str, Any]:
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    dropout = max(layer.dropout for layer in layers.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": dropout,
        "target_modules": _target_modules(model, list(layers)),
        "fan_in_fan_out": any(stored_transposed(layer.base_layer) for layer in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _commonest(values: dict[str, Any]) -> Any:
    counts = list(values.values())
    return max(dict.fromkeys(counts), key=counts.count)


def _target_modules(model: Any, adapted: list[str]) -> list[str]:
    """Last parts of names where they mean exactly the adapted layers (as other tools expect), else full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    everything = [name.removesuffix(".base_layer") for name, module in model.named_modules() if is_linear(module)]
    meant = {name for name in everything if name.rsplit(".", 1)[-1] in short}
    return short if meant == set(adapted) else adapted


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter of this program or of PEFT. Raises LoraError for damage or for what cannot be computed."""
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and is not opened)" if (folder / "adapter_model.bin").exists() else ""
        raise LoraError(
            f"the adapter folder has no {TENSORS}{pickled}", where=str(folder), fix="save it with safetensors"
        )
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            flat = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it has keys, but is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraError(
            f"damaged or incomplete adapter file: {error}",
            where=str(path),
            fix="copy it again, or use an earlier checkpoint",
        ) from None
    tensors = _by_module(flat, path)
    return AdapterFile(
        folder=folder,
        base_model=metadata.get("base_model") or config.get("base_model_name_or_path"),
        base_revision=metadata.get("base_revision") or config.get("revision"),
        base_fingerprint=metadata.get("base_fingerprint"),
        quantization=metadata.get("quantization"),
        double_quantization=metadata.get("double_quantization", "true") == "true",
        target_modules=config.get("target_modules"),
        whole=not any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules")),
        alphas=alphas(config, {name: pair["A"].shape[0] for name, pair in tensors.items()}, folder),
        tensors=tensors,
    )


def attach_adapter(model: Any, adapter: AdapterFile, base: BaseSource) -> dict[str, LoRALinear]:
    """Attach a stored adapter to its base model.

    Raises LoraError when it was trained on another base (by the base's fingerprint; without one, by names and shapes),
    or when any tensor has no place or any place no tensor.
    """
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != base.fingerprint:
        raise LoraError(
            f"the adapter was trained on another base model: on {adapter.base_model}, not on {base.name}",
            where=str(adapter.folder),
            fix=f"use the base model {adapter.base_model}"
            + (f" at revision {adapter.base_revision}" if adapter.base_revision else ""),
        )
    modules = dict(model.named_modules())
    problems = _misfits(modules, adapter) + _unfilled(model, adapter)
    if problems:
        raise LoraError(
            f"the adapter (of {adapter.base_model or 'an unnamed base'}) does not fit {base.name}: "
            f"{len(problems)} layers differ",
            where=str(adapter.folder),
            details=problems[:6],
            fix="use the base model that it was trained on",
        )
    targets = [
        Target(name, adapter.tensors[name]["A"].shape[0], adapter.alphas[name])
        for name in modules
        if name in adapter.tensors
    ]
    layers = attach(model, targets)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(adapter.tensors[name]["A"])
            layer.lora_B.copy_(adapter.tensors[name]["B"])
    return layers


def _by_module(flat: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    again = "copy the adapter again"
    for key, tensor in flat.items():
        found = _KEY.fullmatch(key)
        if found is None or tensor.ndim != 2 or not tensor.numel():
            what = f"{key} {tuple(tensor.shape)} is not the A or B of a linear layer"
            raise LoraError(what, where=str(path), fix="name an adapter for a language model, or copy it again")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise LoraError(f"{key} holds what is no finite number", where=str(path), fix=again)
        tensors.setdefault(found[1], {})[found[2]] = tensor
    if not tensors:
        raise LoraError("the adapter file holds no tensors", where=str(path), fix=again)
    half = [name for name, pair in tensors.items() if len(pair) != len("AB")]
    if half:
        raise LoraError(f"{half[0]} has only one of lora_A and lora_B", where=str(path), fix=again)
    return tensors


def _misfits(modules: Mapping[str, Any], adapter: AdapterFile) -> list[str]:
    problems = []
    for name, pair in adapter.tensors.items():
        shapes = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
        if name not in modules or not is_linear(modules[name]):
            problems.append(f"{name}: {shapes}, but there is no such linear layer")
            continue
        in_features, out_features = features(modules[name])
        if (pair["A"].shape[1], pair["B"].shape[0]) != (in_features, out_features) or pair["A"].shape[0] != pair[
            "B"
        ].shape[1]:
            problems.append(f"{name}: {shapes}, but the layer is {in_features} → {out_features}")
    return problems


def _unfilled(model: Any, adapter: AdapterFile) -> list[str]:
    wanted = adapter.target_modules
    if not adapter.whole or not wanted or wanted == "all-linear":
        return []
    names = list(linear_layers(model))
    if isinstance(wanted, str):
        meant = set(peft_matching(wanted, names, "target_modules", adapter.folder))
    else:
        meant = {name for name in names if any(name == last or name.endswith(f".{last}") for last in wanted)}
    return [
        f"{name}: in target_modules, but not in the file"
        for name in names
        if name in meant and name not in adapter.tensors
    ]
