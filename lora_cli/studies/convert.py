"""`lora convert`: an adapter in another program's layout, with the same numbers.

mlx-lm keeps `<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out) in adapters.safetensors, and in
adapter_config.json one rank and one scale for all layers: mlx_lm/tuner/utils.py (load_adapters) and lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lora_cli.adapters.file import CHAT_TEMPLATE, TENSORS, AdapterFile, commonest, peft_scaling, read_adapter
from lora_cli.adapters.keys import by_module
from lora_cli.adapters.low_rank import pairs_of, ranks_of
from lora_cli.adapters.metadata import AdapterMetadata, read_metadata
from lora_cli.adapters.opened import adapter_folder, adapter_template
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.bounds import read_object
from lora_cli.base.tensor_files import NAMES, write_tensors
from lora_cli.errors import LoraError, command, home_expanded, reading, refuse_if
from lora_cli.files import whole_output
from lora_cli.merging.files import require_outside_adapter, require_place

MLX = "adapters.safetensors"
_PEFT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
_LARGEST_SCALE = 1e20
_MERGE = "merge it, and use the merged folder there: lora merge ADAPTER --output FOLDER"
_TRAINED = "convert what mlx_lm.lora wrote with fine_tune_type: lora"
# The decoder blocks in transformers, in mlx-lm, and what some layer in them is called, where others have these names
_BLOCKS = (
    ("model.layers", "language_model.model.layers", r"\.linear_attn\.in_proj_qkv$"),  # Qwen3.5
    ("model.layers", "model.layers", ""),
    ("model.language_model.layers", "language_model.model.layers", ""),  # beside a vision tower, as in Gemma 3
    ("gpt_neox.layers", "model.h", r"\.(query_key_value|dense\w*)$"),
    ("transformer.h", "model.h", r"\.c_(attn|proj|fc)$|\d\.attn\.([qkv]|out)_proj$|\.fc_(in|out)$"),  # GPT-2, GPT-J
)


def convert(source: str, output: Path, *, to: Literal["peft", "mlx"]) -> list[str]:
    """Write the adapter in that layout; returns what a person should hear. A and B keep their numbers, and their
    dtypes but for fp8, which is written as bf16.

    source: a run, or an adapter in either layout; PEFT's also with what older versions and training programs leave in
    names. Raises LoraError for what the layout has no place for.
    """
    place = require_place(output)
    folder = adapter_folder(Path(home_expanded(source)))
    require_outside_adapter(place, folder)
    of_mlx = (folder / MLX).is_file() and "peft_type" not in read_object(folder / CONFIG)
    adapter = _of_mlx(folder) if of_mlx else read_adapter(folder)
    brings = "it brings weights of its own, such as embeddings"
    refuse_if(bool(adapter.base_weights), brings, where=folder, fix=_MERGE)
    notes: list[str] = []
    if to == "mlx":
        file, (tensors, config) = MLX, _to_mlx(adapter, notes)
    else:
        parts = adapter.tensors.items()
        tensors = {f"base_model.model.{name}.{key}": each for name, own in parts for key, each in own.items()}
        file, config = TENSORS, adapter.config
    template = adapter_template(folder)
    with whole_output(place) as temporary:
        ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
        ordered = {name: each if each.dtype in NAMES else each.bfloat16() for name, each in ordered.items()}  # of fp8
        write_tensors(temporary / file, ordered, adapter.metadata.as_texts())
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if template is not None:
            (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        if to == "peft":
            read_adapter(temporary)  # raises for settings that came along and mean another adapter
    return notes


def _to_mlx(adapter: AdapterFile, notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json of mlx-lm, with PEFT's settings kept beside for the way back."""
    pairs = pairs_of(adapter, fix=_MERGE)
    names = _renamed(pairs, 0, adapter.folder, "mlx-lm has another name for {}, which is not known here", _MERGE)
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    rank, scales = max(ranks.values()), {name: adapter.alphas[name] / ranks[name] for name in pairs}
    scale = commonest({name: each for name, each in scales.items() if each} or scales)
    tensors = {}
    for name, (A, B) in pairs.items():
        scaled = B if scales[name] == scale else B.float() * (scales[name] / scale)
        more = (0, 0, 0, rank - len(A))  # rows of zeros: mlx-lm has one rank for all layers
        tensors[f"{names[name]}.lora_a"] = torch.nn.functional.pad(A, more).T
        tensors[f"{names[name]}.lora_b"] = torch.nn.functional.pad(scaled.T, more)
    if len(set(ranks.values())) > 1:
        notes.append(f"mlx-lm has one rank for all layers: those below {rank} were filled up with zeros")
    if len(set(scales.values())) > 1:
        notes.append("mlx-lm has one scale for all layers: B carries what others had")
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.config.get("lora_dropout") or 0.0}
    parameters["keys"] = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in names.values()})
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}  # -1: all, zeros elsewhere
    return tensors, config | {"model": adapter.base_model, "peft": adapter.config}


def _renamed(names: Collection[str], source: int, folder: Path, unknown: str, fix: str) -> dict[str, str]:
    """Layers' names in the other program. source: the column of _BLOCKS. Raises LoraError for `unknown` ones."""
    known: set[str] = set()
    for blocks in _BLOCKS:
        start = re.compile(rf"{re.escape(blocks[source])}(?=\.\d+\.)")
        found = {name for name in names if start.match(name) and not re.search(r"\.(experts|switch_\w+)\.", name)}
        if any(re.search(blocks[2], name) for name in found):
            if len(found) == len(names):
                return {name: start.sub(blocks[1 - source], name) for name in names}
            known |= found
    odd = next((name for name in names if name not in known), next(iter(names)))
    raise LoraError(unknown.format(odd), where=folder, fix=fix)


def _of_mlx(folder: Path) -> AdapterFile:
    """Raises LoraError for anything but LoRA on linear layers, of one rank."""
    path, stored = folder / MLX, read_object(folder / CONFIG)
    kind, said = stored.get("fine_tune_type") or "lora", stored.get("lora_parameters")
    fusing = command("mlx_lm.fuse", "--model", "MODEL", "--adapter-path", folder, "--save-path", "FOLDER")
    fuse = f"fuse it there, and use the fused folder: {fusing}"
    refuse_if(kind != "lora", f"this is mlx-lm's {kind}, not lora", where=folder, fix=fuse)
    said = said if isinstance(said, dict) else {}
    scale, dropout = said.get("scale"), said.get("dropout") or 0.0
    for key, value, most in (("scale", scale, _LARGEST_SCALE), ("dropout", dropout, 1.0)):
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < most
        what = f"lora_parameters.{key} is {repr(value)[:60]}, not a number below {most:g}"
        refuse_if(wrong, what, where=folder / CONFIG, fix=_TRAINED)
    flat: dict[str, Tensor] = {}
    with reading("damaged or incomplete adapter file", path, "copy it again"), safe_open(path, "pt") as file:
        texts = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 - it has keys, but is not a dict
            module, part = key[: -len(".lora_a")], key[-len(".lora_a") :]
            tensor = file.get_tensor(key)
            if part not in (".lora_a", ".lora_b") or tensor.ndim != 2 or "embed" in module:
                what = f"{key} is not the A or B of a linear layer"
                raise LoraError(what, where=str(path), fix=fuse)
            flat[f"{module}.lora_{part[-1].upper()}.weight"] = tensor.T.contiguous()
    of_mlx, _ = by_module(flat, path, {}, _TRAINED)
    names = _renamed(of_mlx, 1, path, "what transformers calls mlx-lm's {} is not known here", fuse)
    tensors = {names[name]: parts for name, parts in of_mlx.items()}
    ranks = ranks_of(tensors)
    refuse_if(len(set(ranks.values())) > 1, "its layers have several ranks", where=path, fix=_TRAINED)
    alpha = _whole(scale * commonest(ranks))  # type: ignore[operator]
    kept = stored["peft"] if isinstance(stored.get("peft"), dict) else {}
    base = stored.get("model")
    named = {"base_model_name_or_path": base if isinstance(base, str) else None, "revision": None}
    own = {"lora_dropout": dropout, "target_modules": sorted(ranks)}
    config = _PEFT | named | own | kept | peft_scaling(ranks, alpha) | {"use_rslora": False, "use_dora": False}
    metadata = read_metadata(texts, path)
    if metadata.alpha is not None:
        metadata = AdapterMetadata.model_validate(metadata.model_dump() | {"alpha": alpha})
    return AdapterFile(folder, config, metadata, dict.fromkeys(ranks, alpha), tensors, {})


def _whole(alpha: float) -> float:
    """Without what scale = alpha / rank lost."""
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
