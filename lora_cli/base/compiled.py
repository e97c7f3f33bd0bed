"""Compiling transformer blocks with torch.compile, which fuses norms, activation functions and the like."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface

from lora_cli.base.attention import PER_EXAMPLE, per_example_attention
from lora_cli.base.surgery import replace_forward
from lora_cli.ending import make_temporary

# Versions of one block: adapters on or off, training or not, gradients or not, A and B cast or not. dynamo allows 8.
_VERSIONS = 64


class _SayOnce(logging.Handler):
    """Say once that dynamo gave up on a function, which then runs uncompiled."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.say: Callable[[str], None] | None = say

    def emit(self, record: logging.LogRecord) -> None:
        if self.say is not None and "recompile_limit" in record.getMessage():
            self.say("compile  torch gave up compiling a part of the model, which now runs as without train.compile")
            self.say = None


def say_when_dynamo_gives_up(say: Callable[[str], None]) -> None:
    dynamo = logging.getLogger("torch._dynamo.convert_frame")
    dynamo.setLevel(logging.WARNING)
    dynamo.propagate = False
    dynamo.handlers = [_SayOnce(say)]


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device, say: Callable[[str], None]) -> None:
    """Compile each block's forward at its first use, with a cache in `cache_folder()` for the next run.

    Lengths are dynamic from the start: new lengths compile nothing new. A block is one graph, except on a CPU, where
    attention goes by the lengths of the examples, which a graph does not know, and stays outside. Blocks of one kind
    share the compiled code.
    """
    cache = cache_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    say_when_dynamo_gives_up(say)
    attention = torch.compiler.disable(per_example_attention) if device.type == "cpu" else per_example_attention
    AttentionInterface.register(PER_EXAMPLE, attention)
    for block in blocks:
        replace_forward(block, "compilation", partial(torch.compile, dynamic=True))


def cache_folder() -> Path:
    """Where torch keeps what it compiled: its own setting, else a private folder in the user's cache.

    torch loads these files as code, so they are never in a run folder, which may come from a stranger. Where the user's
    cache cannot be written, or others can write to it, a temporary folder is used.
    """
    if named := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(named)
    with suppress(OSError, RuntimeError):  # not writable; no home
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place.mkdir(parents=True, exist_ok=True)
        for name in ("lora", "compiled"):
            place = place / name
            place.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours_alone(place):
                return make_temporary()
        return place
    return make_temporary()


def _is_ours_alone(place: Path) -> bool:
    found = place.lstat()
    own = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return stat.S_ISDIR(found.st_mode) and own and not found.st_mode & 0o022 and os.access(place, os.W_OK)
