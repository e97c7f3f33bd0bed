"""LoRALinear: a frozen linear layer plus a trained low-rank update. The mathematics is written here, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.adapters.dropout import dropped, feature_keys
from lora_cli.adapters.trained import Trained
from lora_cli.base.linear import features, is_linear
from lora_cli.base.remade import how_made
from lora_cli.errors import LoraError


class LoRALinear(Trained):
    """base_layer(x) + scaling · B A dropout(x), with scaling = alpha / rank.

    Wraps any layer of `lora_cli.base.linear`; the base layer is never changed. A (rank, in_features) and B
    (out_features, rank) are fp32 masters, cast to the input's dtype where they are applied. B starts at zero, so a
    fresh adapter changes nothing.

    output_mask: (out_features, rank) of bool; where it is False B stays zero. It confines an adapter to some outputs
    of a fused layer, for example to q and v of a query-key-value projection.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    peft_parts: ClassVar = {"lora_A.weight": 2, "lora_B.weight": 2}

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0, output_mask: Tensor | None = None
    ):
        super().__init__(base_layer)
        in_features, out_features = features(base_layer)
        device = next(base_layer.parameters()).device
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = alpha / rank
        self.token_keys: Tensor | None = None  # of the micro-batch in work; see `dropout_keys`
        self.low_precision: tuple[Tensor, Tensor] | None = None
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.register_buffer("output_mask", None if output_mask is None else output_mask.to(device), persistent=False)
        self.register_buffer("feature_keys", None, persistent=False)

    def init_A(self, init: str, generator: torch.Generator) -> None:
        """Draw A. `kaiming`: uniform within ±1/√in_features; `gaussian`: normal with deviation 1 / rank.

        Drawn on the CPU, so that a seed gives the same A on every device. Source of both: PEFT and loralib.
        """
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if init == "kaiming":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(drawn, std=1 / self.rank, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features) in the base layer's output dtype."""
        base = self.base_layer(x)
        if not self.active:
            return base
        low_A, low_B = self.low_precision or (None, None)
        if low_A is None or low_A.dtype != x.dtype:
            low_A, low_B = self.cast(x.dtype)
        dropout = self.dropout if self.training else 0.0
        tokens, inputs = self._dropout_keys(x) if dropout else (None, None)
        out: Any = _AddUpdate.apply(
            *(base, x, self.lora_A, self.lora_B, low_A, low_B, self.output_mask, self.scaling, dropout, tokens, inputs)
        )
        return out.view(base.shape)  # here, as the model's code may change it in place

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in a compute dtype, B with its mask; outside autograd, as `_AddUpdate` wants them."""
        return self.lora_A.detach().to(dtype), self._masked_B().detach().to(dtype)

    def _dropout_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.token_keys is None or self.token_keys.numel() * x.shape[-1] != x.numel():
            raise LoraError(
                "dropout is not possible in a layer that sees only some of the tokens, such as an expert",
                fix="write adapter.dropout: 0, or leave such layers out with adapter.exclude_modules",
            )
        return self.token_keys, self.feature_keys  # type: ignore[return-value]

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        return {"A": [self.lora_A], "B": [self.lora_B]}

    def is_neutral(self) -> bool:
        return not bool(self.lora_B.any())

    def delta_weight(self) -> Tensor:
        """Dense update this adapter adds to its base layer: scaling · B @ A.

        Returns (out_features, in_features) in fp32, whatever the base dtype or storage order.
        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
        """
        return self.scaling * (self._masked_B() @ self.lora_A)

    def merged(self, weight: Tensor) -> Tensor:
        return weight.float() + self.delta_weight()

    @torch.no_grad()
    def update_norm(self, weight: Tensor) -> float:
        """‖scaling · B A‖ without making it: scaling · √ Σ (BᵀB) ⊙ (A Aᵀ), both (rank, rank), in float64.

        For ‖B A‖² is the trace of (B A)ᵀ (B A), and a trace is invariant under cyclic permutation of its factors.
        Against the dense product: 1e-12.
        """
        A, B = (each.detach().cpu().double() for each in (self.lora_A, self._masked_B()))
        square = ((B.T @ B) * (A @ A.T)).sum().item()
        return abs(self.scaling) * math.sqrt(max(square, 0.0))  # rounding may go below zero where the update is zero

    def to_peft(self, alpha: float) -> dict[str, Tensor]:
        state = self.state()
        return {"lora_A.weight": state["lora_A"], "lora_B.weight": _rescaled(state["lora_B"], self.alpha, alpha)}

    @classmethod
    def size(cls, base_layer: nn.Module, rank: int) -> int:
        """How many numbers are trained in the place of this layer."""
        return rank * sum(features(base_layer))

    @classmethod
    def of_peft(cls, name: str, tensors: Mapping[str, Tensor], alpha: float, config: Mapping[str, Any]) -> Target:
        return Target(name, len(tensors["lora_A.weight"]), alpha, kind=cls)

    @classmethod
    def misfit(cls, base_layer: nn.Module | None, tensors: Mapping[str, Tensor]) -> str | None:
        A, B = tensors["lora_A.weight"].shape, tensors["lora_B.weight"].shape
        shapes = f"A {tuple(A)}, B {tuple(B)}"
        if base_layer is None or not is_linear(base_layer):
            return f"{shapes}, but there is no such linear layer"
        inputs, outputs = features(base_layer)
        fits = (A[1], B[0]) == (inputs, outputs) and A[0] == B[1]
        return None if fits else f"{shapes}, but the layer is {inputs} → {outputs}"

    def from_peft(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        B = _rescaled(tensors["lora_B.weight"], alpha, self.alpha)
        return {"lora_A": tensors["lora_A.weight"], "lora_B": B}

    def hold_cast(self, dtype: torch.dtype | None) -> None:
        # past nn.Module.__setattr__, which costs as much as the rest of a small step's cast
        vars(self)["low_precision"] = None if dtype is None else self.cast(dtype)

    def hold_token_keys(self, name: str, tokens: Tensor | None) -> None:
        self.token_keys = tokens
        if tokens is not None and self.dropout and self.feature_keys is None:
            self.feature_keys = feature_keys(name, self.lora_A.shape[1]).to(self.lora_A.device)

    def _masked_B(self) -> Tensor:
        return self.lora_B if self.output_mask is None else self.lora_B * self.output_mask  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored; some model code looks at its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its module name, rank and alpha, where B may differ from zero, and the kind of adapter."""

    name: str
    rank: int
    alpha: float
    output_mask: Tensor | None = None  # (out_features, rank)
    kind: type[LoRALinear] = LoRALinear

    def size(self, base_layer: nn.Module) -> int:
        return self.kind.size(base_layer, self.rank)

    def wrap(self, base_layer: nn.Module, dropout: float, init: str, generator: torch.Generator) -> LoRALinear:
        """A fresh adapter around this layer, in its mode: A as `init_A` draws it, B = 0."""
        layer = self.kind(base_layer, self.rank, self.alpha, dropout, self.output_mask)
        layer.init_A(init, generator)
        return layer.train(base_layer.training)


def _rescaled(B: Tensor, alpha: float, new: float) -> Tensor:
    """B for another alpha, with the same update."""
    return B if alpha == new else (B.double() * (alpha / new)).to(B.dtype)


class _AddUpdate(torch.autograd.Function):
    """base + scaling · B A dropout(x), and the gradients of base, x, A and B.

    Kept for the backward pass: x, which layers beside each other share, or what makes it again (`how_made`); and low =
    A d(x), which is rank / in_features of its size. The dropped input is made again. The base layer has its own
    backward, so its kind does not matter here, and none of its weight is kept in another form.

    base: (..., out). x: (..., in). The result is (tokens, out). A, B: fp32 masters, (rank, in) and (out, rank). low_A,
    low_B: the same in the dtype of x, B with its mask. mask: of B. tokens, inputs: keys of dropout. With U the gradient
    of the result, d what drops without the factor 1 / (1 - p), which is part of the scaling s here, and G = s · U B:
    dA = Gᵀ d(x), dB = s · Uᵀ low, dx = d(G A) beside what the base layer gives.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        low_A: Tensor,
        low_B: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        tokens: Tensor | None,
        inputs: Tensor | None,
    ) -> Tensor:
        scaling /= 1 - dropout
        ctx.scaling, ctx.dropout, ctx.tokens, ctx.inputs, ctx.mask = scaling, dropout, tokens, inputs, mask
        ctx.make, sources = how_made(x)
        ctx.master, ctx.shape, ctx.base = A.dtype, x.shape, base.shape
        low = _dropped(ctx, _by_token(x)) @ low_A.T  # (tokens, rank)
        ctx.save_for_backward(low, low_A, low_B, *sources)
        if base.dtype == x.dtype:
            return torch.addmm(_by_token(base), low, low_B.T, alpha=scaling)
        return _by_token(base) + (scaling * (low @ low_B.T)).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low, low_A, low_B, *sources = ctx.saved_tensors
        wants_base, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        grad = grad_output.to(low.dtype)
        grad_low = (grad @ low_B).mul_(ctx.scaling)  # (tokens, rank)
        grad_x = grad_A = grad_B = None
        if wants_A:
            x = _by_token(ctx.make(*sources))
            grad_A = (grad_low.T @ _dropped(ctx, x)).to(ctx.master)
        if wants_B:
            grad_B = (grad.T @ low).to(ctx.master).mul_(ctx.scaling)
            grad_B = grad_B if ctx.mask is None else grad_B.mul_(ctx.mask)
        if wants_x:
            grad_x = _dropped(ctx, grad_low @ low_A).view(ctx.shape)
        return grad_output.view(ctx.base) if wants_base else None, grad_x, grad_A, grad_B, *(None,) * 7


def _by_token(values: Tensor) -> Tensor:
    """(tokens, features)."""
    return values.reshape(-1, values.shape[-1])


def _dropped(ctx: Any, values: Tensor) -> Tensor:
    """values where they are kept: the same elements are dropped of the input and of its gradient."""
    return dropped(values, ctx.tokens, ctx.inputs, ctx.dropout) if ctx.dropout else values
