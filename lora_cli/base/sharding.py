"""A frozen base that is spread over all processes: each holds a share of every weight (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_cli.base.remade import forget_how_made
from lora_cli.base.storage.registry import storage_of
from lora_cli.errors import LoraError


def require_shardable(processes: int) -> None:
    """Raises LoraError for a single process, over which no base can be spread."""
    if processes == 1:
        raise LoraError(
            "train.shard_base spreads the base model over several processes, but this is a single one",
            fix="start it with torchrun --nproc-per-node N -m lora_cli train …, or write train.shard_base: false",
        )


def shard_base(model: Any, blocks: Sequence[nn.Module], trained: Iterable[nn.Parameter], device: torch.device) -> None:
    """Spread the frozen weights of a model evenly over all processes, on `device`, in place; values stay, bit for bit.

    The model may lie on the CPU: each block moves to the device on its own and leaves its share there. A block's
    weights are brought together for its forward and again for its backward pass. What lies outside the blocks
    (embeddings, last norm, output head) stays together from the forward to the end of the backward pass, because the
    loss calls the head after the model has returned; input embeddings that are not also the head go at once.

    trained: A and B. Every process keeps them whole, so nothing is known of sharding where gradients are summed, steps
    taken and adapters saved. Nothing else has a gradient, so FSDP2 never reduces one.

    From here on every forward and backward pass is a collective: all processes must make the same ones.
    """
    whole = set(trained)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if (kind := storage_of(module)) is not None:
            kind.make_shardable(module, device)
    for block in blocks:  # one that ends in a norm: the next block would make its output again, without its weights
        forget_how_made(block)
    shares = list(blocks)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside_a_block = any(embeddings is module for block in blocks for module in block.modules())
    if embeddings.weight is not head.weight and not inside_a_block:
        shares.append(embeddings)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*shares, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=whole)
