"""How a checkpoint is stored: as its weights are, or quantized already. Asked by everything that takes a base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_cli.base.gguf import require_kept
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import PLAIN, Part, is_known, part_of, storage_stated
from lora_cli.base.tensor_files import read_tensor
from lora_cli.base.weight_files import StoredTensor
from lora_cli.errors import LoraError
from lora_cli.quantization import DEFAULT, RULES, named


def stored_quantization(source: BaseSource, asked: str | None = None) -> str | None:
    """A recipe's word, another method by its own name, None for plain weights.

    asked: in which way it is held; the blocks of a GGUF file can be held in several, or as numbers.
    Raises LoraError where config.json says that it is quantized, but not how.
    """
    if source.gguf is not None:
        ways = [] if asked == PLAIN.name else source.gguf.ways()
        return asked if asked in ways else next(iter(ways), None)
    stated = source.stated("quantization_config", "compression_config")
    if stated is None:
        return None
    kind = storage_stated(stated) if isinstance(stated, dict) else None
    if kind is None:
        what = "quantization_config in config.json does not say how the weights are stored (quant_method)"
        fix = "download the model again, or use the unquantized model"
        raise LoraError(what, where=str(source.folder / "config.json"), fix=fix)
    return kind


def require_quantization(source: BaseSource, quantization: str, group_size: int = 32) -> None:
    """Raises LoraError if the weights are stored in another way than `quantization` asks for."""
    if source.gguf is not None:
        require_kept(source.gguf, quantization, group_size)
        return
    if RULES[quantization].of_file:
        what = f"quantization: {quantization} keeps the blocks of a GGUF file, and {source.name} is not one"
        raise LoraError(what, fix=f"write quantization: {named(lambda rules: not rules.of_file)}")
    kind = stored_quantization(source)
    if kind in (None, quantization):
        return
    require_trainable(source)
    what = f"the checkpoint is already quantized ({kind}), but was asked for with quantization: {quantization}"
    fix = f"write quantization: {kind} (on the command line --quantization {kind})"
    raise LoraError(what, where=source.place, fix=fix)


def require_trainable(source: BaseSource) -> None:
    """Raises LoraError if no recipe can train on weights that are stored so, such as GPTQ, AWQ, FP8 or MXFP4."""
    kind = stored_quantization(source)
    if kind is not None and not is_known(kind):
        what = f"the checkpoint is already quantized ({kind}), which cannot be trained on"
        fix = f"use the unquantized model; quantization: {DEFAULT} then quantizes it as it is loaded"
        raise LoraError(what, where=source.place, fix=fix)


def parameters_stored(stored: Mapping[str, StoredTensor]) -> int:
    """Parameters of a checkpoint, however its weights are stored."""
    parts = {name: part for name in stored if (part := part_of(name)) is not None}
    several = {part.weight: part.kind.weights_per_number for part in parts.values()}
    sizes = {name: torch.Size(each.shape).numel() for name, each in stored.items() if name not in parts}
    return sum(several.get(name, 1) * size for name, size in sizes.items())


def parts_of(names: Iterable[str]) -> dict[str, dict[str, Part]]:
    """Of each weight that is stored quantized, what is stored beside it, by the tensors' names."""
    found: dict[str, dict[str, Part]] = {}
    for name in names:
        if (part := part_of(name)) is not None:
            found.setdefault(part.weight, {})[name] = part
    return found


def dense_tensor(tensors: Mapping[str, StoredTensor], name: str, parts: Mapping[str, Mapping[str, Part]]) -> Tensor:
    """A stored weight as numbers, read without its model, bit for bit what the loaded layer computes with.

    parts: as `parts_of` gives them. (out_features, in_features) of a quantized weight, whatever the layer was; of
    others as they are stored.
    """
    own = parts.get(name, {})
    kind = next((each.kind for each in own.values()), PLAIN)
    beside = {part.name: read_tensor(tensors[each]) for each, part in own.items()}
    return kind.dense_stored(read_tensor(tensors[name]), beside)
