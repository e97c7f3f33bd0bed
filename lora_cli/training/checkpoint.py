"""Checkpoints: everything that the next step depends on, in safetensors and JSON; complete or absent.

    checkpoints/step_000200/
      manifest.json           size and SHA-256 of every other file; what run, data and versions it belongs to
      adapter.safetensors     A and B as they are in training, fp32
      optimizer.safetensors   every tensor of the optimizer's state
      state.safetensors       random states of Python, NumPy, torch and CUDA; losses of the validation examples
      state.json              step, schedule, data position, what is best so far, the rest of the optimizer's state
      metrics.jsonl           the lines of all steps up to this one; samples.jsonl too, where there are samples
      best/                   the adapter folder that is the best so far, if there is one (hard links where possible)

The order of the data and dropout need no state: they are functions of seed, step and token, so the step carries them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.file import SAVED as ADAPTER_FILES
from lora_cli.adapters.trained import load_state, state_of
from lora_cli.errors import LoraError
from lora_cli.files import write_json, written_whole
from lora_cli.foreign import (
    NotOurs,
    Shape,
    copy_file,
    copy_files,
    files_of,
    open_binary,
    parse_json,
    read_bytes,
    read_json,
)
from lora_cli.training.optimizer import state_after_a_step
from lora_cli.training.random_states import random_states, require_random_states, restore_random_states
from lora_cli.training.state import State, StateFile
from lora_cli.training.stored import Manifest

FORMAT = 4  # 1 had A and B in one group of the optimizer; 2 no manifest; 3 another order of the data
BEST = "best"
_TENSORS = ("adapter.safetensors", "optimizer.safetensors", "state.safetensors")
FILES: Shape = dict.fromkeys((*_TENSORS, "manifest.json", "state.json", "metrics.jsonl", "samples.jsonl")) | {
    BEST: ADAPTER_FILES
}
NAME = re.compile(r"step_(\d{6,15})")
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
    lines: Sequence[Path],
    best: Path | None = None,
) -> None:
    """Write a checkpoint to `folder`: complete and on the disk, or not at all.

    belongs_to: fingerprints and versions, for the manifest. schedule: what the learning rate of this step was and where
    it was going, for people. lines: the files whose lines are kept. best: adapter folder to keep, if there is one.
    Raises DiskError.
    """
    tensors: dict[str, Tensor] = {}
    described = _take_tensors(optimizer.state_dict(), "", tensors)
    randoms, random_values = random_states()
    with written_whole(folder, replaces=FILES) as place:
        for name, each in zip(_TENSORS, (state_of(model), tensors, randoms | state.tensors), strict=True):
            save_file(each, place / name)
        values = {**state.values(), "schedule": dict(schedule), "random": random_values, "optimizer": described}
        write_json(place / "state.json", values)
        (place / "metrics.jsonl").touch()
        for file in lines:
            if file.exists():
                copy_file(file, place / file.name, over=True)
        if best is not None:
            (place / BEST).mkdir()
            copy_files(best, place / BEST, ADAPTER_FILES, link_or_copy)
        manifest = {"format": FORMAT, "step": state.step, "files": _checksums(place), **belongs_to}
        write_json(place / "manifest.json", {**manifest, "checksum": _checksum(manifest)})


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any) -> State:
    """Put a checkpoint that was verified back into model, optimizer and random states; returns its state.

    Nothing is changed unless all of it can be. Raises LoraError if it belongs to another adapter or optimizer.
    """
    stored, randoms, losses = _read_state(folder)
    adapter, tensors = _load(folder / "adapter.safetensors"), _load(folder / "optimizer.safetensors")
    if problem := _unlike(adapter, state_of(model), "tensor"):
        what = f"the checkpoint holds another adapter than the recipe describes: {problem}"
        raise LoraError(what, where=folder, fix="resume with the recipe of the run")
    described = _optimizer_state(stored.optimizer, tensors, optimizer, folder)
    load_state(model, adapter)
    optimizer.load_state_dict(described)
    restore_random_states(randoms, stored.random)
    stored.tensors = losses
    return stored


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it, and what is in them with what has to be there.

    Raises Damaged; LoraError for another format.
    """
    try:
        found = _checksums(folder)
    except (NotOurs, OSError) as error:
        raise _damaged(folder, f"{error.where}: {error.what}" if isinstance(error, NotOurs) else str(error)) from None
    try:
        manifest = parse_json(read_bytes(folder / "manifest.json"))
        stated = Manifest.model_validate(manifest)
        del manifest["checksum"]
    except (OSError, ValueError, TypeError, LoraError) as error:
        if not (folder / "manifest.json").exists():
            _refuse_old(folder)
        raise _damaged(folder, f"its manifest cannot be read ({str(error).splitlines()[0]})") from None
    if stated.checksum != _checksum(manifest):
        raise _damaged(folder, "its manifest is not what was written")
    if stated.format != FORMAT:
        raise _other_format(folder, stated.format)
    for name in sorted(stated.files.keys() | found.keys()):
        if stated.files.get(name) != found.get(name):
            raise _damaged(folder, f"{name} is {'not what was written' if name in found else 'missing'}")
    state, _, _ = _read_state(folder)
    if NAME.fullmatch(folder.name) and int(folder.name.removeprefix("step_")) != state.step:
        raise _damaged(folder, f"its state is that of step {state.step}")
    return manifest


def read_losses(folder: Path) -> dict[str, Tensor]:
    """Nats of each validation example, and its target tokens, as `State` names them. Raises LoraError, Damaged."""
    verify(folder)
    return _read_state(folder)[2]


def _read_state(folder: Path) -> tuple[StateFile, dict[str, Tensor], dict[str, Tensor]]:
    """state.json by its schema; of state.safetensors the random states, and the losses. Raises Damaged."""
    try:
        stored = read_json(folder / "state.json", StateFile, fix="the one before it can be used")
    except LoraError as problem:
        raise _damaged(folder, f"state.json: {problem.what}") from None
    losses = _load(folder / "state.safetensors")
    randoms = {name: losses.pop(name) for name in list(losses) if name.startswith("random.")}
    try:
        _require_losses(losses, stored)
        require_random_states(randoms, stored.random)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise _damaged(folder, f"state.safetensors: {error}") from None
    return stored, randoms, losses


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from None


def _require_losses(losses: dict[str, Tensor], state: State) -> None:
    """Raises ValueError for losses of validation examples that no gain can be computed from."""
    names = {"validation.base", "validation.targets", "validation.best"}
    if not losses.keys() <= names:
        raise ValueError(f"{min(losses.keys() - names)[:80]} is not a tensor of a checkpoint")
    scored = losses or state.base_validation_loss is not None
    if scored and not losses.keys() >= names - {"validation.best"}:
        raise ValueError("losses of the base model, or the numbers of their tokens, are missing")
    shapes = {tuple(each.shape) for each in losses.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or not shape[0] for shape in shapes):
        raise ValueError("losses of validation examples have different lengths")
    for name, each in losses.items():
        if each.is_floating_point() == (name == "validation.targets") or not each.isfinite().all():
            raise ValueError(f"{name} is not what was written")
        if name == "validation.targets" and int(each.min()) < 1:
            raise ValueError("a validation example has no target token")


def _optimizer_state(values: Any, tensors: dict[str, Tensor], optimizer: Any, folder: Path) -> dict[str, Any]:
    """What the optimizer loads. Raises LoraError unless every tensor is as the optimizer itself would make it.

    Kernels that update all parameters at once trust the shapes of the moments, and would write past their ends.
    """
    try:
        described = _put_tensors(values, tensors)
        problem = _unlike(described["param_groups"], (own := state_after_a_step(optimizer))["param_groups"], "group")
        if problem is None and any(described["state"].values()):  # before the first update there is none
            problem = _unlike(described["state"], own["state"], "parameter")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        described, problem = {}, f"it cannot be read ({type(error).__name__})"
    if problem is not None:
        what = f"the checkpoint holds the state of another optimizer than the recipe names: {problem}"
        fix = "resume with the recipe of the run; or remove this checkpoint, to go on from the one before it"
        raise LoraError(what, where=folder, fix=fix)
    return described


def _unlike(found: Any, wanted: Any, path: str) -> str | None:
    """Where nested state is of another kind than `wanted`: names, lengths, types, shapes; None if it is nowhere."""
    here, there = _kinds(found, path), _kinds(wanted, path)
    at = next((each for each in sorted(here | there) if here.get(each) != there.get(each)), None)
    return at and f"{at} is {here.get(at, 'missing')}, but should be {there.get(at, 'absent')}"


def _kinds(value: Any, path: str) -> dict[str, str]:
    """What nested state is made of: each place in it with the shape and dtype of its tensor, or the type of its value.

    A number is a number, whole or not; of `params`, which parameters a group has is compared, too.
    """
    if isinstance(value, Tensor):
        return {path: f"{tuple(value.shape)} {value.dtype}"}
    if isinstance(value, dict):
        inner, kind = value.items(), "a dict"
    elif isinstance(value, list | tuple):
        inner, kind = enumerate(value), str(list(value)) if path.endswith("'params'") else "a list"
    else:
        return {path: "a number" if type(value) in (int, float) else type(value).__name__}
    within = [_kinds(each, f"{path} {key!r}") for key, each in inner]
    return {path: kind} | {place: each for part in within for place, each in part.items()}


def _damaged(folder: Path, how: str) -> Damaged:
    return Damaged(f"the checkpoint is damaged: {how}", where=str(folder), fix="the one before it can be used")


def _other_format(folder: Path, found: Any) -> LoraError:
    return LoraError(
        f"checkpoint format {found} is not {FORMAT}: another version of lora wrote it, which draws the rows in another "
        "order",
        where=str(folder),
        fix="resume with the version of lora that wrote it, or start a new run with another output",
    )


def _refuse_old(folder: Path) -> None:
    """Formats 1 and 2 said so in state.json. A manifest that is only missing is damage."""
    try:
        found = parse_json(read_bytes(folder / "state.json"))["format"]
    except (OSError, ValueError, LookupError, TypeError, LoraError):
        return
    if found in (1, 2):
        raise _other_format(folder, found)


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest, by its path within the folder. Raises NotOurs, OSError."""
    found: dict[str, dict[str, Any]] = {}
    for path in files_of(folder, FILES):
        name = path.relative_to(folder).as_posix()
        if name != "manifest.json":
            with open_binary(path) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                found[name] = {"bytes": stream.tell(), "sha256": digest}
    return found


def _checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without this entry, which no list of files can hold."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where the disk can: adapter files are replaced whole and never changed."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        copy_file(source, target)


# ── tensors of nested state ─────────────────────────────────────────────────────────────────────────────────────


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
