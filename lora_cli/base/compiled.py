"""Compiling a model's blocks with torch.compile: norms, activation functions and the like become few kernels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface

from lora_cli.base.attention import PER_EXAMPLE, per_example_attention

_VERSIONS = (
    64  # of one block: adapters on or off, training or not, gradients or not, A and B cast or not; dynamo allows 8
)


class _Told(logging.Handler):
    """Says once what dynamo logs when it gives up on a function, which then runs uncompiled."""

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
    dynamo.handlers = [_Told(say)]


def compile_blocks(blocks: Sequence[nn.Module], cache: Path, say: Callable[[str], None] = print) -> None:
    """Compile each block's forward; what is compiled is kept in `cache`, so that a resumed run need not wait again.

    Lengths are dynamic from the start, and attention stays as it is, because it depends on the lengths of the examples:
    new lengths compile nothing new. Blocks of the same kind share what is compiled.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve())
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve() / "triton")
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    say_when_dynamo_gives_up(say)
    AttentionInterface.register(PER_EXAMPLE, torch.compiler.disable(per_example_attention))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
