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
from lora_cli.adapters.trained import ALL, Trained
from lora_cli.base.linear import features, is_linear
from lora_cli.base.remade import how_made
from lora_cli.errors import LoraError

_LOWS = "_lows"  # noted on an input: its version, itself for the base layers, A x for layers yet to be called


class OverLinear(nn.Module):
    """A module in the place of a linear layer, `base_layer`: some model code looks at its weight's dtype or device."""

    base_layer: nn.Module

    @property
    def weight(self) -> Tensor:
        """As it is stored."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]


class LoRALinear(OverLinear, Trained):
    """base_layer(x) + scaling · B A dropout(x), with scaling = alpha / rank.

    Wraps any layer of `lora_cli.base.linear`; the base layer is never changed. A (rank, in_features) and B
    (out_features, rank) are fp32 masters, cast to the input's dtype where they are applied. B starts at zero, so a
    fresh adapter changes nothing.

    output_mask: (out_features, rank) of bool; where it is False B stays zero. It confines an adapter to some outputs
    of a fused layer, for example to q and v of a query-key-value projection.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    peft_parts: ClassVar = {"lora_A.weight": 2, "lora_B.weight": 2}
    grouped: ClassVar = False  # whether A has a column for each group of a base in groups

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0, output_mask: Tensor | None = None
    ):
        super().__init__(base_layer)
        _, out_features = features(base_layer)
        device = next(base_layer.parameters()).device
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = alpha / rank
        self.beside: list[LoRALinear] = [self]  # layers that share their input, in the order of their calls
        self.token_keys: Tensor | None = None  # of the micro-batch in work; see `dropout_keys`
        self.low_precision: tuple[Tensor, Tensor] | None = None
        self.lora_A = nn.Parameter(torch.zeros(rank, self.columns(base_layer), dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.register_buffer("output_mask", None if output_mask is None else output_mask.to(device), persistent=False)
        self.register_buffer("feature_keys", None, persistent=False)

    def init_A(self, init: str, generator: torch.Generator) -> None:
        """Draw A. `kaiming`: uniform within ±1/√in_features; `gaussian`: normal with deviation 1 / rank.
        So it is where A has a column for several inputs as well.

        Drawn on the CPU, so that a seed gives the same A on every device. Source of both: PEFT and loralib.
        """
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if init == "kaiming":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            drawn *= math.sqrt(drawn.shape[1] / features(self.base_layer)[0])
        else:
            nn.init.normal_(drawn, std=1 / self.rank, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    @classmethod
    def columns(cls, base_layer: nn.Module) -> int:
        """Of A."""
        return features(base_layer)[0]

    def spread_A(self) -> Tensor:
        """A with a column for each input: (rank, in_features)."""
        return self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features) in the base layer's output dtype."""
        if not self.active:
            return self.base_layer(x)
        through, low = self._low(x)
        _, low_B = self._cast(x.dtype)
        p = self.dropout if self.training else 0.0
        out: Any = _AddUpdate.apply(
            self.base_layer(through), low, self.lora_B, low_B, self.output_mask, self.scaling / (1 - p)
        )
        return out

    def _low(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the base layer, and A d(x): (tokens, rank).

        In training the first of the layers `beside` each other computes it for all, and keeps it on x until they are
        called. Not for an x that begins a graph: it may outlive the step, and with it what was never used.
        """
        joined = not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.grad_fn is not None
        state = (x._version, *(each.lora_A._version for each in self.beside)) if joined else ()
        noted, through, lows = vars(x).pop(_LOWS, (None, x, {})) if joined else (None, x, {})
        if noted != state or self not in lows:
            layers = self.beside if joined and self.beside[0] is self else [self]
            low_A = self._cast(x.dtype)[0][: sum(each.rank for each in layers)]
            drops = [each._drop(x) for each in layers]
            made: Any = _SharedInput.apply(x, low_A, drops, *(each.lora_A for each in layers))
            passed, lows = made[: -len(layers)], dict(zip(layers, made[-len(layers) :], strict=True))
            through = passed[0] if passed and x.requires_grad else x
        low = lows.pop(self)
        if lows:
            vars(x)[_LOWS] = (state, through, lows)
        return through, low

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        held = self.low_precision
        return held if held is not None and held[0].dtype == dtype else self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In a compute dtype, outside autograd: A, with those of the layers beside below it, and B with its mask."""
        layers = self.beside if self.beside[0] is self else [self]
        each_A = [each.spread_A().detach() for each in layers]
        low_A = torch.cat(each_A) if len(each_A) > 1 else each_A[0]
        return low_A.to(dtype), self._masked_B().detach().to(dtype)

    def _drop(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """What `dropped` wants beside the values; None where nothing drops."""
        if not (self.training and self.dropout):
            return None
        if self.token_keys is None or self.token_keys.numel() * x.shape[-1] != x.numel():
            raise LoraError(
                "dropout is not possible in a layer that sees only some of the tokens, such as an expert",
                fix="write adapter.dropout: 0, or leave such layers out with adapter.exclude_modules",
            )
        return self.token_keys, self.feature_keys, self.dropout  # type: ignore[return-value]

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        return {"A": [self.lora_A], "B": [self.lora_B]}

    def is_neutral(self) -> bool:
        return not bool(self.lora_B.any())

    def delta_weight(self, rows: slice = ALL) -> Tensor:
        """Dense update this adapter adds to its base layer, or some rows of it: scaling · B @ A.

        Returns (out_features, in_features) in fp32, whatever the base dtype or storage order.
        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
        """
        return (self._masked_B()[rows] @ self.spread_A()).mul_(self.scaling)

    def merged(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return self.delta_weight(rows).add_(weight)  # in fp32, without a copy of the weight

    @torch.no_grad()
    def update_norm(self, weight: Tensor) -> float:
        """‖scaling · B A‖ without making it: scaling · √ Σ (BᵀB) ⊙ (A Aᵀ), both (rank, rank), in float64.

        For ‖B A‖² is the trace of (B A)ᵀ (B A), and a trace is invariant under cyclic permutation of its factors.
        Against the dense product: 1e-12.
        """
        A, B = (each.detach().cpu().double() for each in (self.spread_A(), self._masked_B()))
        square = ((B.T @ B) * (A @ A.T)).sum().item()
        return abs(self.scaling) * math.sqrt(max(square, 0.0))  # rounding may go below zero where the update is zero

    def to_peft(self, alpha: float) -> dict[str, Tensor]:
        state = self.state()
        A = self.spread_A().detach().cpu()
        return {"lora_A.weight": A.contiguous(), "lora_B.weight": _rescaled(state["lora_B"], self.alpha, alpha)}

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
            self.feature_keys = feature_keys(name, features(self.base_layer)[0]).to(self.lora_A.device)

    def _masked_B(self) -> Tensor:
        return self.lora_B if self.output_mask is None else self.lora_B * self.output_mask  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its module name, rank and alpha, where B may differ from zero, and the kind of adapter.

    group_size: inputs that share a column of A.
    """

    name: str
    rank: int
    alpha: float
    output_mask: Tensor | None = None  # (out_features, rank)
    kind: type[LoRALinear] = LoRALinear
    group_size: int = 1

    def size(self, base_layer: nn.Module) -> int:
        """How many numbers are trained in the place of this layer."""
        inputs, outputs = features(base_layer)
        return self.rank * (inputs // self.group_size + outputs)

    def wrap(self, base_layer: nn.Module, dropout: float, init: str, generator: torch.Generator) -> LoRALinear:
        """A fresh adapter around this layer, in its mode: A as `init_A` draws it, B = 0."""
        layer = self.kind(base_layer, self.rank, self.alpha, dropout, self.output_mask)
        layer.init_A(init, generator)
        return layer.train(base_layer.training)


def _rescaled(B: Tensor, alpha: float, new: float) -> Tensor:
    """B for another alpha, with the same update."""
    return B if alpha == new else (B.double() * (alpha / new)).to(B.dtype)


class _SharedInput(torch.autograd.Function):
    """x for the base layers, and A d(x) for each of the layers that share it.

    Kept for the backward pass: x, or what makes it again (`how_made`); what drops of it is made again too. The
    gradients of x that the base layers give arrive as one sum, and those of the updates are added into it. Where
    nothing drops the A of all layers are one matrix: one product each for A x and its gradients of A and of x. Of a
    master with fewer columns each stands for several inputs, and its gradient is their sum.

    x: (..., in). low_A: the A of all layers below each other, in the dtype of x. drops: for each layer, what `dropped`
    wants beside the values, or None. masters: A in fp32, each (rank, columns). With d what drops, without the factor
    1 / (1 - p), and G the gradient of A d(x): dA = Gᵀ d(x) and dx = d(G A).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low_A: Tensor, drops: list[Any], *masters: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.make, sources = how_made(x)
        ctx.save_for_backward(low_A, *sources)
        ctx.drops, ctx.ranks, ctx.master, ctx.shape = drops, [len(A) for A in masters], masters[0].dtype, x.shape
        ctx.columns = [A.shape[1] for A in masters]
        values = _by_token(x)
        if any(drops):
            each_A = low_A.split(ctx.ranks)
            lows = [_dropped(values, drop) @ A.T for drop, A in zip(drops, each_A, strict=True)]
        else:
            lows = (values @ low_A.T).split(ctx.ranks, 1)
        lows = tuple(low.detach() for low in lows)
        # Compiled, x may be a view, which autograd does not let a function return.
        ctx.passes_x = not torch.compiler.is_compiling()
        return (x.detach(), *lows) if ctx.passes_x else lows  # a view of x would hold it, and x holds these

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:  # type: ignore[override]
        grad_x, *grads = given if ctx.passes_x else (None, *given)
        low_A, *sources = ctx.saved_tensors
        wants_x, _, _, *wants_A = ctx.needs_input_grad
        tokens = next((len(grad) for grad in grads if grad is not None), None)
        if tokens is None:
            return grad_x, *(None,) * (2 + len(wants_A))
        of_low = [low_A.new_zeros(tokens, rank) if G is None else G for G, rank in zip(grads, ctx.ranks, strict=True)]
        drops, each_A = ctx.drops, low_A.split(ctx.ranks)
        if not any(drops):  # all layers as one
            drops, each_A, of_low = [None], [low_A], of_low if len(of_low) == 1 else [torch.cat(of_low, 1)]
        grad_A: tuple[Tensor | None, ...] = (None,) * len(wants_A)
        if any(wants_A):
            values = _by_token(ctx.make(*sources))
            of_A = [(G.T @ _dropped(values, drop)).to(ctx.master) for G, drop in zip(of_low, drops, strict=True)]
            each = of_A[0].split(ctx.ranks) if len(of_A) == 1 else of_A
            made = (_folded(grad, columns) for grad, columns in zip(each, ctx.columns, strict=True))
            grad_A = tuple(grad if wants else None for grad, wants in zip(made, wants_A, strict=True))
        if wants_x:
            grad_x = low_A.new_zeros(ctx.shape) if grad_x is None else grad_x.contiguous()
            total = grad_x.view(-1, grad_x.shape[-1])  # made by the base layers for this place alone
            for G, drop, A in zip(of_low, drops, each_A, strict=True):
                _ = total.addmm_(G, A) if drop is None else total.add_(_dropped(G @ A, drop))
        return grad_x, None, None, *grad_A


class _AddUpdate(torch.autograd.Function):
    """base + scaling · B low, in place of base where nothing else uses it, and the gradients of base, low and B.

    Kept for the backward pass: low = A d(x), which is rank / in_features of the size of x. The base layer has its own
    backward, so its kind does not matter here, and none of its weight is kept in another form.

    base: (..., out). low: (tokens, rank). B: fp32 master, (out, rank). low_B: the same in the dtype of low, with its
    mask. mask: of B. scaling: with the factor 1 / (1 - p) of dropout. With U the gradient of the result: dlow = s · U B
    and dB = s · Uᵀ low.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, base: Tensor, low: Tensor, B: Tensor, low_B: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        ctx.scaling, ctx.mask, ctx.master = scaling, mask, B.dtype
        ctx.save_for_backward(low, low_B)
        if base.dtype != low.dtype:
            return _shaped(_by_token(base) + (scaling * (low @ low_B.T)).to(base.dtype), base)
        if torch.compiler.is_compiling() or base._is_view() or not base.is_contiguous():
            return _shaped(torch.addmm(_by_token(base), low, low_B.T, alpha=scaling), base)
        ctx.mark_dirty(base)
        _by_token(base).addmm_(low, low_B.T, alpha=scaling)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low, low_B = ctx.saved_tensors
        wants_base, wants_low, wants_B = ctx.needs_input_grad[:3]
        grad = _by_token(grad_output).to(low.dtype)
        grad_low = _scaled(grad, low_B, ctx.scaling) if wants_low else None  # (tokens, rank)
        grad_B = None
        if wants_B:
            grad_B = _scaled(grad.T, low, ctx.scaling).to(ctx.master)
            grad_B = grad_B if ctx.mask is None else grad_B.mul_(ctx.mask)
        return grad_output if wants_base else None, grad_low, grad_B, None, None, None


def _by_token(values: Tensor) -> Tensor:
    """(tokens, features)."""
    return values.reshape(-1, values.shape[-1])


def _folded(grad: Tensor, columns: int) -> Tensor:
    return grad if grad.shape[1] == columns else grad.unflatten(1, (columns, -1)).sum(-1)


def _scaled(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor · left @ right, in one kernel."""
    product = left.new_empty(left.shape[0], right.shape[1])
    return product.addmm_(left, right, beta=0, alpha=factor)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """In another's shape, and no view to autograd: the model's code may change it in place."""
    return torch.ops.aten._unsafe_view(values, like.shape)


def _dropped(values: Tensor, drop: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """values where they are kept: the same elements are dropped of the input and of its gradient."""
    return values if drop is None else dropped(values, *drop)
