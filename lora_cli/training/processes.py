"""What the processes of one run exchange, and the error when one of them is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_cli.base.device import pick_device
from lora_cli.data.store import micro_batches_per_step
from lora_cli.errors import LoraError, ProcessLost, reason_of
from lora_cli.recipe import Recipe
from lora_cli.training.stopping import EXIT_CODES, Stop

# Said by gloo, NCCL and torch's store, which raise plain RuntimeErrors too; the last by NCCL, of a socket.
_LOST = re.compile(
    "connection (closed by peer|reset by peer|was closed|refused)|broken pipe|socket timeout|timed out (waiting|after)|"
    "remote process exited|failed to recv, got 0 bytes|nccl communicator was aborted|unhandled system error",
    re.IGNORECASE,
)
_OF_PROCESSES = re.compile("gloo|nccl|processgroup|store|socket", re.IGNORECASE)


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Raises LoraError for a recipe that this number of processes cannot run."""
    # No autocast: the frozen weights are in the compute dtype already, and the layers cast A and B. Under autocast
    # some operations would return fp32 beside it, and tensors would be copied for nothing.
    accelerator = Accelerator(mixed_precision="no", cpu=pick_device(recipe.device).type == "cpu")
    micro_batches = micro_batches_per_step(recipe)
    if recipe.train.batch_size is None and accelerator.num_processes > micro_batches:
        what = f"{accelerator.num_processes} processes, but {micro_batches} micro-batches a step"
        raise LoraError(what, fix="raise train.gradient_accumulation_steps to the number of processes or more")
    if accelerator.num_processes > 1 and recipe.train.on_write_error == "pause":
        raise LoraError(  # the others would wait for the one that writes, and give up
            f"train.on_write_error: pause is for one process, but there are {accelerator.num_processes}",
            fix="write on_write_error: stop",
        )
    return accelerator


@contextmanager
def process_lost_errors(resume: str) -> Iterator[None]:
    """If a peer process dies inside this block, raise ProcessLost instead of gloo's or NCCL's error.

    resume: the command that continues this run.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise ProcessLost(
            "another process of this run ended, so this one cannot go on",
            details=[f"torch says: {reason_of(error).split('. This ')[0][:200]}"],
            fix="its own message says why, or the system's log if it was killed; then continue with: " + resume,
        ) from error


def is_lost_process(error: BaseException) -> bool:
    """Whether an exchange between processes failed because one of them is gone."""
    known = isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError)
    return bool(_LOST.search(str(error)) and (known or _OF_PROCESSES.search(str(error))))


def sum_over_processes(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum over all processes of `value`, which has one shape in all."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.reduce(value.to(accelerator.device), "sum")  # type: ignore[return-value]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true in any process; every process gets the same answer."""
    return bool(sum_over_processes(accelerator, torch.tensor(float(flag))).item())


def asked(accelerator: Accelerator, stop: Stop, *, due: bool) -> tuple[bool, bool]:
    """(whether to stop, as any process was asked to; whether `due`, a checkpoint, holds in the first)."""
    due = accelerator.is_main_process and due
    if accelerator.num_processes > 1:
        counts = torch.zeros(len(EXIT_CODES) + 1, dtype=torch.int64)
        counts[-1] = due
        if stop.requested:
            counts[EXIT_CODES.index(stop.exit_code)] = 1
        *by_code, clock = sum_over_processes(accelerator, counts).tolist()
        due = bool(clock)
        if any(by_code):
            code = next(code for code, count in zip(EXIT_CODES, by_code, strict=True) if count)
            stop.ask("another of its processes was asked to", code)
    return stop.requested, due
