"""What the program asks of a way to store weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


class Storage(ABC):
    """A way to store the weights of linear layers. What has an answer here is so unless a kind says otherwise.

    Layers are asked about by module, checkpoints by what their config.json states and by the names of their tensors.
    """

    name: str  # in recipes and adapter files
    weights_per_number = 1  # in a stored tensor
    rounds_alone = True  # whether `rounded` needs no layer and no settings beyond it
    search: int | None = None  # the version of how its numbers are chosen, where that is ours: others make another base
    rounded_note = ""  # of layers that hold their values instead, because `same_on` is False; {dtype} is filled in

    # ── layers ──────────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def is_layer(self, module: nn.Module) -> bool:
        """Whether this is a linear layer that stores its weight so."""

    @abstractmethod
    def dense(self, layer: nn.Module) -> Tensor:
        """The weight that the layer multiplies by: (out_features, in_features)."""

    def prepare(self, layer: nn.Module) -> None:  # noqa: B027 - most kinds have nothing to prepare
        """Make a layer that was just loaded compute x Wᵀ + b with `dense`, in training and evaluation alike."""

    def same_on(self, in_features: int, device: str) -> bool:
        """Whether layers of that width compute with `dense` on a device of that type ("cpu", "cuda")."""
        return True

    def make_shardable(self, layer: nn.Module, device: torch.device) -> None:  # noqa: B027 - nor to change
        """Leave nothing but plain parameters for FSDP2 to cut; what stays whole goes to `device`.

        Which kinds can be spread at all is said in quantization.py.
        """

    # ── loading and checkpoints ─────────────────────────────────────────────────────────────────────────────────

    def load_settings(self, dtype: torch.dtype, double: bool, group_size: int = 32) -> Any:
        """The quantization_config for transformers that quantizes plain weights while they are loaded.

        None for plain weights.
        """
        return None

    def stated(self, settings: dict[str, Any]) -> str | None:
        """What config.json's quantization_config says, if it speaks of this family: a recipe's name, or another."""
        return None

    def beside(self, name: str) -> tuple[str, str] | None:
        """(the weight's name, which part) of a tensor that a checkpoint stores beside a weight; None of any other."""
        return None

    @abstractmethod
    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """The weight that stored tensors stand for, bit for bit `dense` of the layer that is loaded from them.

        beside: by the parts that `beside` names. (out_features, in_features), whatever the layer was; of plain weights
        laid out as they are stored.
        """

    def rounded(self, weight: Tensor, double: bool) -> Tensor:
        """`dense` of the layer that loading makes of a plain weight in the compute dtype: (out_features, in_features).

        Asked only of a kind that `rounds_alone`.
        """
        return weight

    def packed(self, weight: Tensor) -> dict[str, Tensor]:
        """What a checkpoint stores of a plain weight (out_features, in_features), by what a name has after that of the
        weight: "" is the weight itself.

        Asked only of the kinds that are `written` (quantization.py).
        """
        raise AssertionError(f"no checkpoint is written in {self.name}")

    def packed_as(self, numbers: int) -> dict[str, Tensor]:
        """Of a weight of so many numbers what `packed` gives, on the device meta: shapes and dtypes alone."""
        raise AssertionError(f"no checkpoint is written in {self.name}")

    # ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def bits(self, value_bytes: int, double: bool, group_size: int = 32) -> float:
        """Of a weight, scales included. value_bytes: of a number in the compute dtype."""

    def scale_bytes(self, layer: nn.Module) -> int:
        """Bytes that the layer holds beside its parameters."""
        return 0


class DequantizedProduct(torch.autograd.Function):
    """x Wᵀ with W = dequantized(*parts) in the dtype of x. Kept for the backward pass: the parts, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantized: Callable[..., Tensor], *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dequantized = dequantized
        ctx.save_for_backward(*parts)
        return F.linear(x, dequantized(*parts).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = ctx.saved_tensors
        return grad_output @ ctx.dequantized(*parts).to(grad_output.dtype), None, *(None for _ in parts)


def is_a(module: nn.Module, name: str) -> bool:
    """By the class's name, because importing bitsandbytes takes seconds that plain weights do not need."""
    return any(each.__name__ == name for each in type(module).__mro__)


def whole(weight: Any) -> Tensor:
    """Of a base that is spread over processes the weight is brought together, which all of them must do."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).data
