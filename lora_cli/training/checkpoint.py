"""Checkpoints: everything that the next step depends on, in safetensors and JSON; complete or absent.

    checkpoints/step_000200/
      manifest.json           size and SHA-256 of every other file; what run, data and versions it belongs to
      adapter.safetensors     A and B as they are in training, fp32
      optimizer.safetensors   every tensor of the optimizer's state
      state.safetensors       random states of Python, NumPy, torch and CUDA; losses of the held-out examples
      state.json              step, schedule, data position, what is best so far, the rest of the optimizer's state
      metrics.jsonl           the lines of all steps up to this one
      best/                   the adapter folder that is the best so far, if there is one (hard links where possible)

The order of the data and dropout need no state: they are functions of seed, step and token, so the step carries them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.layer import lora_layers
from lora_cli.errors import LoraError
from lora_cli.files import remove_folder, write_json, written_whole
from lora_cli.training.state import State

FORMAT = 3  # 1 had A and B in one group of the optimizer; 2 no manifest
BEST = "best"
_TENSOR = "__tensor__"  # marks, in state.json, the place of a tensor of optimizer.safetensors


class Damaged(LoraError):
    """A checkpoint whose bytes are not those that were written."""


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    state: State,
    *,
    belongs_to: Mapping[str, Any],
    schedule: Mapping[str, Any],
    metrics: Path,
    best: Path | None = None,
) -> None:
    """Write a checkpoint to `folder`: complete and on the disk, or not at all.

    belongs_to: fingerprints and versions, for the manifest. schedule: what the learning rate of this step was and where
    it was going, for people. metrics: the file whose lines are kept. best: adapter folder to keep, if there is one.
    Raises DiskError.
    """
    tensors: dict[str, Tensor] = {}
    described = _take_tensors(optimizer.state_dict(), "", tensors)
    states, random_values = _random_states()
    with written_whole(folder) as place:
        save_file(_adapter_tensors(model), place / "adapter.safetensors")
        save_file(tensors, place / "optimizer.safetensors")
        save_file(states | state.tensors, place / "state.safetensors")
        values = {**state.values(), "schedule": dict(schedule), "random": random_values, "optimizer": described}
        write_json(place / "state.json", values)
        if metrics.exists():
            shutil.copyfile(metrics, place / "metrics.jsonl")
        else:
            (place / "metrics.jsonl").touch()
        if best is not None:
            shutil.copytree(best, place / BEST, copy_function=_link_or_copy)
        manifest = {"format": FORMAT, "step": state.step, "files": _checksums(place), **belongs_to}
        write_json(place / "manifest.json", {**manifest, "checksum": _checksum(manifest)})


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any) -> State:
    """Put a checkpoint that was verified back into model, optimizer and random states; returns its state.

    Nothing is changed unless all of it can be. Raises LoraError if it belongs to another adapter or optimizer.
    """
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        adapter = load_file(folder / "adapter.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        states = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from None
    own = _adapter_tensors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in adapter.items()}:
        raise LoraError(
            "the checkpoint holds another adapter than the recipe describes",
            where=str(folder),
            fix="resume with the recipe of the run",
        )
    described = _put_tensors(values.pop("optimizer"), tensors)
    if _kind(described) != _kind(optimizer.state_dict()):
        raise LoraError(
            "the checkpoint holds the state of another optimizer than the recipe names",
            where=str(folder),
            fix="resume with the recipe of the run",
        )
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(adapter[f"{name}.lora_A"])
            layer.lora_B.copy_(adapter[f"{name}.lora_B"])
    optimizer.load_state_dict(described)
    _set_random_states({name: states.pop(name) for name in list(states) if name.startswith("random.")}, values)
    return State(**{name: values[name] for name in State().values()}, tensors=states)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it. Raises Damaged; LoraError for another format."""
    try:
        _require_files(folder)  # reading a pipe would wait for ever
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        checksum, stated = manifest.pop("checksum"), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        old = folder / "state.json"
        if not (folder / "manifest.json").exists() and old.is_file():
            _refuse_old(folder, old)
        raise _damaged(folder, f"its manifest cannot be read ({error})") from None
    if checksum != _checksum(manifest):
        raise _damaged(folder, "its manifest is not what was written")
    if manifest.get("format") != FORMAT:
        raise _other_format(folder, manifest.get("format"))
    try:
        found = _checksums(folder)
    except OSError as error:
        raise _damaged(folder, str(error)) from None
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            raise _damaged(folder, f"{name} is missing")
        if stated.get(name) != found[name]:
            raise _damaged(folder, f"{name} is not what was written")
    return manifest


def prune_checkpoints(checkpoints: list[Path], keep: int, best: Path | None) -> None:
    """Remove all but the newest `keep` and the one of the best step, if there is one. checkpoints: oldest first."""
    for old in checkpoints[:-keep]:
        if old != best:
            remove_folder(old)


def _damaged(folder: Path, how: str) -> Damaged:
    return Damaged(f"the checkpoint is damaged: {how}", where=str(folder), fix="the one before it can be used")


def _other_format(folder: Path, found: Any) -> LoraError:
    return LoraError(
        f"checkpoint format {found} is not {FORMAT}",
        where=str(folder),
        fix="resume with the version of lora that wrote it, or start a new run with another output",
    )


def _refuse_old(folder: Path, state: Path) -> None:
    """Formats 1 and 2 said so in state.json. A manifest that is only missing is damage."""
    try:
        found = json.loads(state.read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if found in (1, 2):
        raise _other_format(folder, found)


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest, by its path within the folder."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name != "manifest.json":
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while piece := stream.read(2**20):
                    digest.update(piece)
            found[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def _require_files(folder: Path) -> None:
    """Raises OSError for a device, a pipe or a broken link in place of a file."""
    for path in folder.rglob("*"):
        if not path.is_dir() and not path.is_file():
            raise OSError(f"{path.relative_to(folder).as_posix()} is no file")


def _checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without this entry, which no list of files can hold."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes where the disk can: adapter files are replaced whole and never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _kind(state: dict[str, Any]) -> Any:
    """What tells optimizers apart: the options of their groups and the shape of their parameters."""
    return [(sorted(group), len(group["params"])) for group in state["param_groups"]]


# ── random states ───────────────────────────────────────────────────────────────────────────────────────────────


def _random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the rest in JSON values) of every generator that a model or a library may draw from."""
    version, words, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    tensors = {
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "random.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"random.cuda.{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    rest = {key: numpy[key] for key in ("bit_generator", "has_gauss", "gauss")} | {"pos": numpy["state"]["pos"]}
    return tensors, {"python": [version, gauss], "numpy": rest}


def _set_random_states(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    stored = values["random"]
    version, gauss = stored["python"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), gauss))
    numpy = dict(stored["numpy"])
    numpy["state"] = {"key": tensors["random.numpy"].numpy().astype(np.uint32), "pos": numpy.pop("pos")}
    np.random.set_state(numpy)
    torch.set_rng_state(tensors["random.torch"])
    cuda = [tensors[f"random.cuda.{at}"] for at in range(len(tensors)) if f"random.cuda.{at}" in tensors]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


# ── tensors of nested state ─────────────────────────────────────────────────────────────────────────────────────


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
