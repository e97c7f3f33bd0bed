"""One view of every linear layer a base model may hold, however its weight is stored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap this layer: Linear, bitsandbytes 4-bit or 8-bit (both subclass it), or Conv1D.

    A subclass with a forward of its own computes something else: the routers of Llama 4 and Phi-3.5-MoE return tuples.
    """
    if isinstance(module, Conv1D):
        return True
    kind = type(module)
    quantized = any(each.__module__.startswith("bitsandbytes.") for each in kind.__mro__)
    known = quantized or kind.__name__ == "FalconLinear"
    return isinstance(module, nn.Linear) and (known or kind.forward is nn.Linear.forward)


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weight is rounded to 4 or 8 bits: held so by bitsandbytes, or its values."""
    stored = any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)
    return is_linear(module) and (stored or holds_nf4_values(module))


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def stored_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as (in, out), GPT-2's way; also once it is quantized."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that this layer multiplies by, dequantized if need be: (out_features, in_features).

    Of a base that is spread over processes it is brought together, which all of them must do.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if type(layer).__name__ == "Linear4bit":
        return _dequantized(weight.data, state)
    if any(each.__name__ == "Linear8bitLt" for each in type(layer).__mro__):
        from lora_cli.base.int8 import dequantized, int8_parts

        return dequantized(*int8_parts(layer))
    return weight.data.T if isinstance(layer, Conv1D) else weight.data


def _dequantized(stored: Tensor, state: Any) -> Tensor:
    """(out_features, in_features) of a 4-bit weight, as one long row on a CPU: rows of another length than whole blocks
    of 64 get scales of other blocks from bitsandbytes 0.50 there, some from beyond their end."""
    from bitsandbytes.functional import dequantize_4bit

    if stored.device.type != "cpu":
        return dequantize_4bit(stored, state)
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(stored, flat).view(state.shape)


def hold_nf4_values(model: nn.Module, dtype: torch.dtype) -> int:
    """On a CPU, replace 4-bit layers that bitsandbytes 0.50 computes wrongly there by plain ones; returns how many.

    These are the ones whose rows are no whole number of blocks of 64. A plain layer holds the very values that the
    4-bit weight stands for, in `dtype`: the base model is the same function on a CPU and on a GPU.
    """
    wrong = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer).__name__ == "Linear4bit" and layer.weight.device.type == "cpu" and features(layer)[0] % 64  # type: ignore[union-attr]
    ]
    for name, layer in wrong:
        weight, bias = dense_weight(layer).to(dtype), layer.bias
        outputs, inputs = weight.shape
        transposed = stored_transposed(layer)
        with torch.device("meta"):
            plain = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.data.to(dtype), requires_grad=False)  # type: ignore[operator]
        vars(plain)["holds_nf4_values"] = True
        model.set_submodule(name, plain.train(layer.training))
    return len(wrong)


def unquantized_layers(model: Any) -> list[str]:
    """Linear layers that hold other values than quantized ones, but for the output head, which never is quantized."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and not holds_nf4_values(module)
    ]


def holds_nf4_values(module: nn.Module) -> bool:
    return getattr(module, "holds_nf4_values", False)


def quantized_bytes(model: nn.Module) -> int:
    """Bytes held by all parameters and buffers of the model, quantization scales included."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        total += tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            scales = getattr(part, "absmax", None)
            total += scales.numel() * scales.element_size() if isinstance(scales, torch.Tensor) else 0
    return total
