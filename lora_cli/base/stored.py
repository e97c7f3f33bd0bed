"""How a checkpoint is stored: as its weights are, or quantized already. Asked by everything that takes a base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import PLAIN, is_known, part_of, storage_stated
from lora_cli.base.tensor_files import read_tensor
from lora_cli.base.weight_files import StoredTensor
from lora_cli.errors import LoraError
from lora_cli.quantization import DEFAULT


def stored_quantization(source: BaseSource) -> str | None:
    """A recipe's word, another method by its own name, None for plain weights.

    Raises LoraError where config.json says that it is quantized, but not how.
    """
    stated = _stated(source.config)
    if stated is None:
        return None
    kind = storage_stated(stated) if isinstance(stated, dict) else None
    if kind is None:
        raise LoraError(
            "quantization_config in config.json does not say how the weights are stored (quant_method)",
            where=str(source.folder / "config.json"),
            fix="download the model again, or use the unquantized model",
        )
    return kind


def require_quantization(source: BaseSource, quantization: str) -> None:
    """Raises LoraError if the weights are stored in another way than `quantization` asks for."""
    kind = stored_quantization(source)
    if kind in (None, quantization):
        return
    require_trainable(source)
    raise LoraError(
        f"the checkpoint is already quantized ({kind}), but was asked for with quantization: {quantization}",
        where=str(source.folder),
        fix=f"write quantization: {kind} (on the command line --quantization {kind})",
    )


def require_trainable(source: BaseSource) -> None:
    """Raises LoraError if no recipe can train on weights that are stored so, such as GPTQ, AWQ, FP8 or MXFP4."""
    kind = stored_quantization(source)
    if kind is not None and not is_known(kind):
        raise LoraError(
            f"the checkpoint is already quantized ({kind}), which cannot be trained on",
            where=str(source.folder),
            fix=f"use the unquantized model; quantization: {DEFAULT} then quantizes it as it is loaded",
        )


def dense_tensor(tensors: Mapping[str, StoredTensor], name: str) -> Tensor:
    """A stored weight as numbers, read without its model, bit for bit what the loaded layer computes with.

    (out_features, in_features) of a quantized weight, whatever the layer was; of others as they are stored.
    """
    parts = [(part, each) for each in tensors if (part := part_of(each)) is not None and part.weight == name]
    kind = parts[0][0].kind if parts else PLAIN
    return kind.dense_stored(
        read_tensor(tensors[name]), {part.name: read_tensor(tensors[each]) for part, each in parts}
    )


def _stated(config: dict[str, Any]) -> Any:
    """What a configuration says of quantization; a composite one may say it of its text alone."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                return part[key]
    return None
