"""Checkpoints: everything that the next step depends on, in safetensors and JSON; complete or absent.

    checkpoints/step_000200/
      adapter.safetensors     A and B as they are in training, fp32
      optimizer.safetensors   every tensor of the optimizer's state
      state.json              step, what is best so far, the rest of the optimizer's state, fingerprints, versions

Random states are not among it: dropout is seeded afresh for every micro-batch from seed, step and position, and the
order of the data is a function of seed and step, so the step number carries them all.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.layer import lora_layers
from lora_cli.errors import LoraError
from lora_cli.files import write_json, written_whole

FORMAT = 2  # 1 had A and B in one group of the optimizer
_TENSOR = "__tensor__"  # marks, in state.json, the place of a tensor of optimizer.safetensors


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Write a checkpoint to `folder`. state: JSON values that the loop wants back."""
    tensors: dict[str, Tensor] = {}
    described = _take_tensors(optimizer.state_dict(), "", tensors)
    with written_whole(folder) as place:
        save_file(_adapter_tensors(model), place / "adapter.safetensors")
        save_file(tensors, place / "optimizer.safetensors")
        write_json(place / "state.json", {"format": FORMAT, **state, "optimizer": described})


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Put a checkpoint back into model and optimizer; returns the state it was saved with."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        adapter = load_file(folder / "adapter.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LoraError(
            f"the checkpoint is damaged: {error}", where=str(folder), fix="remove it; the one before is then used"
        ) from None
    if state.get("format") != FORMAT:
        raise LoraError(
            f"checkpoint format {state.get('format')} is not {FORMAT}",
            where=str(folder),
            fix="resume with the version that wrote it",
        )
    own = _adapter_tensors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in adapter.items()}:
        raise LoraError(
            "the checkpoint holds another adapter than the recipe describes",
            where=str(folder),
            fix="resume with the recipe of the run",
        )
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(adapter[f"{name}.lora_A"])
            layer.lora_B.copy_(adapter[f"{name}.lora_B"])
    optimizer.load_state_dict(_put_tensors(state.pop("optimizer"), tensors))
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir()) if folder.is_dir() else []


def prune_checkpoints(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON copy of nested state; its tensors go into `tensors` under their path. Dict keys keep their type."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {"items": [[key, _take_tensors(inner, f"{path}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(inner, f"{path}/{at}", tensors) for at, inner in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(inner, tensors) for key, inner in value["items"]}
    if isinstance(value, list):
        return [_put_tensors(inner, tensors) for inner in value]
    return value
