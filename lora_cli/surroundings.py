"""What a command finds around it, made fit for libraries that read it as they are imported. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_cli.ending import require_temporary_folder
from lora_cli.errors import LoraError, command

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
_OTHER_WAYS = re.compile(r"ACCELERATE_USE_(?!CPU$)\w+")  # DeepSpeed, Megatron-LM, accelerate's own FSDP
_TRUE, _FALSE = {"1", "true", "yes", "y", "t", "on"}, {"", "0", "false", "no", "n", "f", "off"}


def settle(*outputs: Path) -> None:
    """Before torch and accelerate are imported. outputs: where temporary files may be, if they may be nowhere else.

    Raises LoraError for what asks for another training than the recipe does, or for processes that are not there.
    """
    require_temporary_folder(*outputs)
    _forget_accelerate()
    _require_whole_launch()


def _forget_accelerate() -> None:
    """The recipe says how a run computes; accelerate would take settings from these, and fail on values it lacks."""
    for name, value in list(os.environ.items()):
        if _OTHER_WAYS.fullmatch(name) and value.strip().lower() not in _FALSE:
            what = f"{name}={value} asks accelerate for a way of training that lora does not use"
            fix = f"{command('unset', name)}; several GPUs are used by what docs/processes.md describes"
            raise LoraError(what, where="the environment", fix=fix)
    for name, value in list(os.environ.items()):
        flag = name == "ACCELERATE_USE_CPU" and value.strip().lower() in _TRUE | (_FALSE - {""})
        if (name.startswith("ACCELERATE_") and not flag) or name == "FORK_LAUNCHED":
            del os.environ[name]


def _require_whole_launch() -> None:
    """torchrun and its like set all of their variables. Some of them, left over, make a process wait for others."""
    present = {name: os.environ[name].strip() for name in _OF_A_LAUNCHER if name in os.environ}
    for name in _NUMBERS:
        if name in present and not re.fullmatch(r"\d{1,9}", present[name]):
            _refuse(f"{name}={present[name]} is not a number", present)
    if len(present) == len(_OF_A_LAUNCHER):
        if int(present["RANK"]) >= int(present["WORLD_SIZE"]):
            _refuse(f"RANK={present['RANK']} is not below WORLD_SIZE={present['WORLD_SIZE']}", present)
        return
    if int(present.get("WORLD_SIZE", 1)) <= 1 and int(present.get("RANK", 0)) == int(present.get("LOCAL_RANK", 0)) == 0:
        for name in present:  # one process is all there is
            del os.environ[name]
        return
    missing = [name for name in _OF_A_LAUNCHER if name not in present]
    said = ", ".join(f"{name}={value}" for name, value in present.items())
    _refuse(f"{said} set by a launcher, but {', '.join(missing)} missing: the other processes cannot be found", present)


def _refuse(what: str, present: dict[str, str]) -> None:
    several = "torchrun --standalone --nproc-per-node 2 -m lora_cli train RECIPE"
    fix = f"{command('unset', *present)} for one process; for several: {several}"
    raise LoraError(what, where="the environment", fix=fix)
