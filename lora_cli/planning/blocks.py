"""What autograd keeps of a model's transformer blocks, measured without its weights.

The model's own code runs on the CPU, with the adapters and replaced modules of training. Weights are numbers that stand
for whole tensors, matrix products are left out, and of blocks that are built alike two are run: so a block of 70B
takes no memory and a second. `activations.measured` counts here what it counts on the loaded model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli.adapters.attach import attach
from lora_cli.adapters.targets import Target, block_lists
from lora_cli.base.activations import measured
from lora_cli.base.attention import attention_implementation
from lora_cli.base.load import skeleton_of
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.text import text_config
from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import summed_loss
from lora_cli.planning.skeleton import BaseModel

_TOKENS = 256  # a multiple of what architectures compute at once, such as the chunks of a state-space model
_SMALL = 1 << 16  # numbers
_PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1}  # where their two factors begin


@dataclass(frozen=True)
class Block:
    """Bytes that autograd keeps of one transformer block: of a token, and of each pair of tokens in a row (scores)."""

    token_bytes: float
    pair_bytes: float = 0.0


def measure_blocks(base: BaseModel, adapted: Iterable[str], dtype: torch.dtype) -> tuple[Block, ...]:
    """Of all blocks in the model's order, computing in `dtype`. adapted: names of the layers that adapters are on.

    Raises LoraError where the model's code does not run without its weights.
    """
    lists = {name: list(base.skeleton.get_submodule(name)) for name in block_lists(base.skeleton)}
    kinds = {name: [_structure(block) for block in blocks] for name, blocks in lists.items()}
    few = {name: _first_two_of_each(found) for name, found in kinds.items()}
    every = {name: list(range(len(found))) for name, found in kinds.items()}
    reason = ""
    for chosen in (few, every):
        try:
            measures = iter(_measured(base, set(adapted), dtype, chosen))
        except Exception as error:  # in the model's own code: blocks may count on others being there
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        found = {name: dict(zip(at, measures, strict=False)) for name, at in chosen.items()}
        last = {name: {kinds[name][at]: block for at, block in each.items()} for name, each in found.items()}
        return tuple(last[name][kind] for name in lists for kind in kinds[name])
    what = f"what {base.source.name} needs in training cannot be measured without its weights: {reason}"
    raise LoraError(what, fix="write the recipe by hand, as docs/recipe.md says")


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that keep the same: the classes, shapes and plain settings in them, less the block's index."""
    return tuple(
        (
            name,
            type(module),
            *(tuple(each.shape) for each in module.parameters(recurse=False)),
            *((key, each) for key, each in vars(module).items() if _is_setting(key, each)),
        )
        for name, module in block.named_modules()
    )


def _is_setting(name: str, value: Any) -> bool:
    return (value is None or isinstance(value, bool | int | float | str)) and not re.search("idx|index|layer_id", name)


def _first_two_of_each(kinds: Sequence[Any]) -> list[int]:
    """Indices. The first block of a model keeps less than the others, because its input has no gradient."""
    return sorted(at for kind in dict.fromkeys(kinds) for at in [i for i, each in enumerate(kinds) if each == kind][:2])


def _measured(base: BaseModel, adapted: set[str], dtype: torch.dtype, chosen: dict[str, list[int]]) -> list[Block]:
    """Of the chosen blocks of each list of blocks, in their order."""
    model = _hollow(base, dtype, chosen, adapted)
    blocks = [block for name in chosen for block in model.get_submodule(name)]
    unit = min(_TOKENS, (base.positions or 3 * _TOKENS) // 3)
    with_scores = attention_implementation(base.config) == "eager"
    kept = []
    for count in range(1, 4 if with_scores else 3):
        example = Example(np.arange(unit * count) % 8, [(unit * count - 1, unit * count, 1.0)])
        batch = collate([example], packed=base.packs, pad_id=0, device=torch.device("cpu"))
        with _NoProducts(), measured(blocks) as sizes:
            summed_loss(model, batch)
        kept.append(np.array(sizes, float))
    # bytes of n tokens = constant + token_bytes · n + pair_bytes · n²
    pair = (kept[2] - 2 * kept[1] + kept[0]) / (2 * unit**2) if with_scores else np.zeros(len(blocks))
    token = (kept[1] - kept[0]) / unit - 3 * unit * pair
    return [Block(float(a), float(b)) for a, b in zip(token, pair, strict=True)]


def _hollow(base: BaseModel, dtype: torch.dtype, chosen: dict[str, list[int]], adapted: set[str]) -> Any:
    """The model with adapters of rank 1, ready to train but for its values, with the chosen blocks alone."""
    config = copy.deepcopy(base.config)
    model = skeleton_of(base.source, config, base.trust_remote_code)
    wrapped = {id(model.get_submodule(name)) for name in adapted}
    text = text_config(config)
    for name, at in chosen.items():
        blocks = model.get_submodule(name)
        model.set_submodule(name, nn.ModuleList([blocks[index] for index in at]))
        if getattr(text, "num_hidden_layers", None) == len(blocks):
            text.num_hidden_layers = len(at)
        if len(getattr(text, "layer_types", None) or ()) == len(blocks):
            with suppress(AttributeError):  # some derive them
                text.layer_types = [text.layer_types[index] for index in at]
    for module in model.modules():
        for name, each in module.named_parameters(recurse=False):
            of = dtype if each.is_floating_point() else each.dtype
            few = each.numel() <= _SMALL  # which a model's code may write to
            ones = torch.ones(each.shape if few else (), dtype=of).expand(each.shape)
            module.register_parameter(name, nn.Parameter(ones, requires_grad=False))
        for name, each in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.ones(each.shape, dtype=each.dtype), persistent=False)
    model.config.use_cache = False
    attach(model, [Target(name, 1, 1.0) for name, module in model.named_modules() if id(module) in wrapped])
    save_only_inputs(model)
    return model.train()


class _NoProducts(TorchDispatchMode):
    """Matrix products give zeros of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func._schema.name.removeprefix("aten::"))
        if first is None:
            return func(*args, **(kwargs or {}))
        left, right = args[first : first + 2]
        return left.new_zeros((*left.shape[:-1], right.shape[-1]))
