"""A frozen base that is spread over all processes: each holds a share of every weight (FSDP2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_cli.base.storage.registry import storage_of
from lora_cli.errors import LoraError


def require_shardable(processes: int) -> None:
    """Raises LoraError where no base can be spread: over one process, or with a torch that is too old."""
    if processes == 1:
        raise LoraError(
            "train.shard_base spreads the base model over several processes, but this is a single one",
            fix="start it with torchrun --nproc-per-node N -m lora_cli train …, or write train.shard_base: false",
        )
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise LoraError(
            f"train.shard_base needs torch 2.7 or later, and this is {torch.__version__}", fix="upgrade torch"
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
    settings: dict[str, Any] = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),))}
    settings["ignored_params"] = whole
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **settings)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not head.weight and not _inside(embeddings, blocks):
        fully_shard(embeddings, reshard_after_forward=True, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)


def _inside(module: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    return any(module is other for block in blocks for other in block.modules())
