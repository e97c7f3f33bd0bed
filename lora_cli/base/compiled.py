"""Compiling a model's blocks with torch.compile: norms, activation functions and the like become few kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface

from lora_cli.base.attention import PER_EXAMPLE, per_example_attention


def compile_blocks(blocks: Sequence[nn.Module], cache: Path) -> None:
    """Compile each block's forward; what is compiled is kept in `cache`, so that a resumed run need not wait again.

    Lengths are dynamic from the start, and attention stays as it is, because it depends on the lengths of the examples:
    new lengths compile nothing new. Blocks of the same kind share what is compiled.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve())
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve() / "triton")
    AttentionInterface.register(PER_EXAMPLE, torch.compiler.disable(per_example_attention))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
