"""One view of every linear layer that a base model may hold, however its weight is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lora_cli.base.storage.registry import PLAIN, storage_named, storage_of

_ROUNDED = "rounded_to"  # on a plain layer that holds the values of a quantized one: the kind's name


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap this layer."""
    return storage_of(module) is not None


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weight is rounded: stored so, or a plain one with the rounded values."""
    kind = storage_of(module)
    return kind is not None and (kind.name != "none" or rounded_to(module) is not None)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def stored_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as (in, out), GPT-2's way; also once it is quantized."""
    return (
        isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D or getattr(layer, "transposed", False)
    )


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that this layer multiplies by, dequantized if need be: (out_features, in_features).

    Of a base that is spread over processes it is brought together, which all of them must do.
    """
    if isinstance(layer, nn.Embedding):
        return layer.weight.data
    kind = storage_of(layer)
    assert kind is not None, f"{type(layer).__name__} is not a linear layer"
    return kind.dense(layer)


def plain_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen layer of torch, or GPT-2's, with the weight that this one multiplies by, in `dtype`."""
    weight, bias = dense_weight(layer).to(dtype), getattr(layer, "bias", None)
    outputs, inputs = weight.shape
    transposed = stored_transposed(layer)
    with torch.device("meta"):
        plain = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.data.to(dtype), requires_grad=False)
    return plain.train(layer.training)


def settle_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model that was just loaded the same function on every device, in training and evaluation alike.

    A layer that its library computes wrongly on this device becomes a plain one with the very values that its weight
    stands for, in `dtype`.
    """
    for name, layer in list(model.named_modules()):
        kind = storage_of(layer)
        if kind is None:
            continue
        if kind.same_on(features(layer)[0], layer.weight.device.type):  # type: ignore[union-attr]
            kind.prepare(layer)
        else:
            plain = plain_layer(layer, dtype)
            vars(plain)[_ROUNDED] = kind.name
            model.set_submodule(name, plain)


def rounded_to(module: nn.Module) -> str | None:
    """The quantization whose values a plain layer holds, if it does."""
    return getattr(module, _ROUNDED, None)


def rounded_lines(model: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """For a person: which layers are plain because their kind is computed wrongly on this device."""
    for name, count in Counter(filter(None, map(rounded_to, model.modules()))).items():
        note = storage_named(name).rounded_note.format(dtype=str(dtype).removeprefix("torch."))
        yield f"{count} layers {note}"


def unquantized_layers(model: Any) -> list[str]:
    """Linear layers that hold other values than quantized ones, but for the output head, which never is quantized."""
    head = model.get_output_embeddings()
    layers = ((name, module) for name, module in model.named_modules() if module is not head)
    return [name for name, module in layers if storage_of(module) is PLAIN and rounded_to(module) is None]


def held_bytes(model: nn.Module, *, frozen_alone: bool = False) -> int:
    """Bytes that this process holds of all parameters and buffers while no pass runs, quantization scales included.

    frozen_alone: of the frozen parameters and their scales.
    """
    parameters = [each for each in model.parameters() if not (frozen_alone and each.requires_grad)]
    tensors = [*parameters, *([] if frozen_alone else model.buffers())]
    total = sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)
    kinds = ((storage_of(module), module) for module in model.modules())
    return total + sum(kind.scale_bytes(module) for kind, module in kinds if kind is not None)
