"""A base moved to where int4 loses little of it: each layer's weights chosen so that its outputs change least.

A weight that is rounded leaves an error, and those after it in their row take it back as far as the inputs of a text
say that they can (GPTQ: Frantar et al. 2022, arXiv:2210.17323). What is written is an ordinary folder whose weights are
4-bit ones, in the dtype of the base: `quantization: int4` finds its blocks again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.linear import dense_weight, features, stored_transposed
from lora_cli.base.load import load_model, load_tokenizer, model_config
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import BLOCK, nearest, quantize
from lora_cli.base.stored import stored_quantization
from lora_cli.base.weight_files import stored_tensors, weight_files
from lora_cli.errors import LoraError, refuse_if
from lora_cli.evaluation.forgetting import general_text
from lora_cli.files import require_space, whole_output
from lora_cli.merging import files
from lora_cli.merging.names import Places
from lora_cli.merging.tensors import SHARD_SIZE, Fresh, parse_shard_size, write_weights

_DAMPING = 1.0  # of each input's own squares, added to them: how little a short text is believed


def calibrate(base: str, output: Path, *, text: Path | None = None, group_size: int = 32) -> tuple[int, list[str]]:
    """Write the base with the linear layers of its blocks in 4-bit numbers; returns how many there are, and the names
    of those that stay as they are: their inputs are not whole groups, or no token of the text came to them.

    text: whose tokens (the first 4,096) the layers' inputs are made of; nothing takes the built-in English prose.
    Holds the base in fp32 on the CPU. Raises LoraError, writing nothing, for a base that is stored quantized, and for a
    text that the tokenizer cannot spell, layers that are not whole groups, and weights that int4 cannot hold.
    """
    place, source = files.require_place(output), find_base(base)
    files.require_outside(place, source.folder)
    what = f"the base is stored in {stored_quantization(source)}: there are no 16-bit weights to choose from"
    refuse_if(stored_quantization(source) is not None, what, fix="name the unquantized model")
    require_space(place, sum(each.stat().st_size for each in weight_files(source.folder)), "the moved model")
    tokenizer = load_tokenizer(source)
    found = general_text(tokenizer, model_config(source, False), text)
    if found is None:
        raise LoraError(
            "the model cannot read the built-in English text", fix="name a text of its language with --text"
        )
    rows = [each.ids for each in found.windows]
    ids = torch.tensor([each for each in rows if len(each) == len(rows[0])])
    model = load_model(source, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
    chosen = choose_weights(model, ids, group_size)
    what = f"no linear layer of this model has inputs that are whole groups of {group_size}, as int4 needs"
    fix = "choose a smaller --group-size" if group_size > BLOCK else "use another quantization"
    refuse_if(not chosen, what, where=source.place, fix=fix)
    fresh = {
        f"{name}.weight": Fresh(tuple(each.shape), lambda each=each: iter([each])) for name, each in chosen.items()
    }
    taken, _ = files.base_files(source.folder, code=False)
    with whole_output(place) as temporary:
        stored = Places.of(model, stored_tensors(source.folder)).fresh(fresh)
        shard = parse_shard_size(SHARD_SIZE)
        write_weights(source, temporary, stored, dtype=None, dense=torch.float32, shard_bytes=shard)
        files.copy_files(source.folder, taken, temporary)
    inside = {id(layer) for block in _blocks(model) for layer in _linear(block)}
    return len(chosen), [name for name, each in model.named_modules() if id(each) in inside and name not in chosen]


@torch.no_grad()
def choose_weights(model: Any, ids: Tensor, group_size: int) -> dict[str, Tensor]:
    """Replace the weights of the linear layers in the model's blocks; returns them by name, as the model holds them.

    ids: (rows, tokens). Block by block: each sees what the blocks before it give in 4 bits.
    """
    chosen: dict[str, Tensor] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def settle(block: nn.Module, given: Any, keywords: Any, _: Any) -> Any:
        for handle in handles.pop(id(block)):
            handle.remove()
        for layer in (each for each in block.modules() if id(each) in products):
            name, seen = names[id(layer)], products.pop(id(layer))
            what = f"what {name} is given holds NaN or infinity: a weight before it is damaged"
            refuse_if(not bool(seen.isfinite().all()), what, fix="download the model again")
            weight = compensated(dense_weight(layer), seen, group_size)
            what = f"{name} holds NaN, infinity or a number too large for int4, whose scales are fp16 (up to 65504)"
            refuse_if(not bool(weight.isfinite().all()), what, fix="download the model again, or do not use int4")
            layer.weight.data = weight.T.contiguous() if stored_transposed(layer) else weight
            chosen[name] = layer.weight.data
        return block(*given, **keywords)

    def collect(layer: nn.Module, given: Any) -> None:
        x = given[0].flatten(0, -2)
        products[id(layer)] = products.get(id(layer), 0) + x.T @ x

    products: dict[int, Tensor] = {}
    handles: dict[int, list[Any]] = {}
    for block in _blocks(model):
        whole = [each for each in _linear(block) if features(each)[0] % group_size == 0]
        hooks = [each.register_forward_pre_hook(collect) for each in whole]
        handles[id(block)] = [*hooks, block.register_forward_hook(settle, with_kwargs=True)]
    model(input_ids=ids)
    return chosen


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def _linear(block: nn.Module) -> list[nn.Module]:
    return [each for each in block.modules() if isinstance(each, nn.Linear) or stored_transposed(each)]


def compensated(weight: Tensor, products: Tensor, group_size: int) -> Tensor:
    """A weight (out_features, in_features) in 4-bit numbers that gives nearly the same outputs, in fp32.

    products: of the inputs with each other, summed over tokens, (in_features, in_features). Column by column: the
    rounding error of one is taken back by those after it. d and m of a group are chosen when its first column is
    reached, each weight counting as its input's square does.
    """
    importance = products.diagonal().clone()
    products = products.double()
    products.diagonal().mul_(1 + _DAMPING).add_(1e-6 * products.diagonal().mean().clamp(min=1e-6))
    left = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True).float()
    weight, made = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        _, d, m = (each.float() for each in quantize(weight[:, group], group_size, importance[group]))
        errors = torch.empty_like(weight[:, group])
        for at in range(start, start + group_size):
            made[:, at] = (nearest(weight[:, at : at + 1], m, d) * d + m)[:, 0]
            error = (weight[:, at] - made[:, at]) / left[at, at]
            errors[:, at - start] = error
            weight[:, at : group.stop] -= error[:, None] * left[at, at : group.stop]
        weight[:, group.stop :] -= errors @ left[group, group.stop :]
    return made
