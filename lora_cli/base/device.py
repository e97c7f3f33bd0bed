"""What this machine offers: device, compute dtype, memory. The one place that asks."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState

from lora_cli.errors import LoraError

try:
    import resource
except ImportError:  # Windows has no counterpart
    resource = None

_UNKNOWN_MEMORY = 4 * 2**30  # assumed where the system does not say
_M_ARENA_MAX = -8  # malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(request: str) -> torch.device:
    """The device to run on: `auto` is what accelerate finds (one GPU per process, else the CPU).

    Raises LoraError when the requested kind of device is absent.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    if request != "auto" and not available[request]:
        present = ", ".join(kind for kind, here in available.items() if here)
        what = f"device: {request} was asked for, but torch {torch.__version__} finds none"
        fix = f"write device: auto (devices here: {present}), or install a torch build and driver for {request}"
        raise LoraError(what, fix=fix)
    only_cpu = request == "cpu" or not any(here for kind, here in available.items() if kind != "cpu")
    return PartialState(cpu=only_cpu).device  # type: ignore[return-value]


def pick_dtype(request: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Compute dtype and the reason for it, to be printed.

    bf16 needs no loss scaling, so it comes first where the device computes in it; older GPUs get fp16; a CPU without
    bf16 instructions gets fp32, because emulated bf16 is slower there than fp32.
    """
    if request != "auto":
        if device.type == "cuda" and request == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            what = f"dtype: bf16 was asked for, but {torch.cuda.get_device_name(device)} does not have it"
            raise LoraError(what, fix="write dtype: auto")
        return DTYPES[request], "as the recipe says"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16"
        return torch.float16, "the GPU has no bf16: fp16 with loss scaling"
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "the CPU has bf16 instructions"
        return torch.float32, "the CPU has no bf16 instructions"
    return torch.bfloat16, f"default on {device.type}"


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def make_memory_errors_real(device: torch.device) -> None:
    """Let torch take no more of a GPU than is free now, so that a run that needs more fails instead of crawling.

    Beyond that, drivers on Windows and WSL silently use host memory, at a tenth of the speed: every trial would seem to
    fit. It also leaves a desktop its share.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((free + torch.cuda.memory_reserved(device)) / total, device)


def reserved_memory_bytes(device: torch.device) -> int | None:
    """Peak of what torch reserved on a GPU, unused blocks included: what a card has to have.

    The driver's own share (0.4 to 0.8 GiB) comes on top. None on other devices, which do not count it.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by torch on a GPU, resident in the process on a CPU; 0 where the system does not
    say, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status", "rb", buffering=0) as status:  # Linux, in every step
        found = re.search(rb"VmHWM:\s*(\d+) kB", status.read())  # ru_maxrss begins with what the parent process held
        if found:
            return int(found[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def free_memory_bytes(device: torch.device) -> int:
    """Memory that may still be taken: what the driver counts as free on a GPU, as available to programs on Linux.

    On a GPU also what torch has taken but does not use: loading a model leaves gigabytes of that.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if found:
        return min(int(found[1]) * 1024, *_limits())
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _UNKNOWN_MEMORY


def _limits() -> list[int]:
    """What a container and the shell leave to this process, where they limit it."""
    left = [2**62]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)  # given back when needed
        left.append(int(limit) - int((group / "memory.current").read_text()) + int(cached[1] if cached else 0))
    if resource is None:
        return left
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        left.append(soft - mapped)
    return [max(0, each) for each in left]


def share_one_heap() -> None:
    """Let all threads allocate from one heap, where the C library is glibc.

    Otherwise the backward pass's thread gets a heap of its own, whose free memory the forward pass cannot use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)} ({total / 2**30:.0f} GiB)"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else device.type
