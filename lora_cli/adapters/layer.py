"""LoRALinear: a frozen linear layer plus a trained low-rank update. The mathematics is written here, once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.adapters.dropout import dropped, feature_keys
from lora_cli.base.linear import features
from lora_cli.errors import LoraError


class LoRALinear(nn.Module):
    """base_layer(x) + scaling · B A dropout(x), with scaling = alpha / rank.

    Wraps any layer of `lora_cli.base.linear`; the base layer is never changed. A (rank, in_features) and B
    (out_features, rank) are fp32 masters, cast to the input's dtype where they are applied. B starts at zero, so a
    fresh adapter changes nothing.

    output_mask: (out_features, rank) of bool; where it is False B stays zero. It confines an adapter to some outputs
    of a fused layer, for example to q and v of a query-key-value projection.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0, output_mask: Tensor | None = None
    ):
        super().__init__()
        in_features, out_features = features(base_layer)
        device = next(base_layer.parameters()).device
        self.base_layer = base_layer
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = alpha / rank
        self.active = True
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
        out: Any = _AddUpdate.apply(  # the model's code may change what it gets in place: no view of what is saved
            *(base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1]), self.lora_A, self.lora_B, low_A, low_B),
            *(self.output_mask, self.scaling, dropout, tokens, inputs),
        )
        return out.view(base.shape)

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

    def delta_weight(self) -> Tensor:
        """Dense update this adapter adds to its base layer: scaling · B @ A.

        Returns (out_features, in_features) in fp32, whatever the base dtype or storage order.
        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
        """
        return self.scaling * (self._masked_B() @ self.lora_A)

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


class _AddUpdate(torch.autograd.Function):
    """base + scaling · B A dropout(x), and the gradients of base, x, A and B.

    Kept for the backward pass: x, which layers beside each other share, and low = A d(x), which is rank /
    in_features of its size. The dropped input is made again. The base layer has its own backward, so its kind does not
    matter here, and none of its weight is kept in another form.

    base: (tokens, out). x: (tokens, in). A, B: fp32 masters, (rank, in) and (out, rank). low_A, low_B: the same in the
    dtype of x, B with its mask. mask: of B. tokens, inputs: keys of dropout. With U the gradient of the result, d what
    drops without the factor 1 / (1 - p), which is part of the scaling s here, and G = s · U B: dA = Gᵀ d(x),
    dB = s · Uᵀ low, dx = d(G A) beside what the base layer gives.
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
        ctx.master = A.dtype
        low = _dropped(ctx, x) @ low_A.T  # (tokens, rank)
        ctx.save_for_backward(x, low, low_A, low_B)
        if base.dtype == x.dtype:
            return torch.addmm(base, low, low_B.T, alpha=scaling)
        return base + (scaling * (low @ low_B.T)).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, low_A, low_B = ctx.saved_tensors
        wants_base, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        above = upstream.to(low.dtype)
        through = (above @ low_B).mul_(ctx.scaling)  # (tokens, rank)
        grad_x = grad_A = grad_B = None
        if wants_A:
            grad_A = (through.T @ _dropped(ctx, x)).to(ctx.master)
        if wants_B:
            grad_B = (above.T @ low).to(ctx.master).mul_(ctx.scaling)
            grad_B = grad_B if ctx.mask is None else grad_B.mul_(ctx.mask)
        if wants_x:
            grad_x = _dropped(ctx, through @ low_A)
        return upstream if wants_base else None, grad_x, grad_A, grad_B, *(None,) * 7


def _dropped(ctx: Any, values: Tensor) -> Tensor:
    """values where they are kept: the same elements are dropped of the input and of its gradient."""
    return dropped(values, ctx.tokens, ctx.inputs, ctx.dropout) if ctx.dropout else values


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapted layers by the module name they have in the base model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes as its base model."""
    layers = list(lora_layers(model).values())
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


@contextmanager
def dropout_keys(layers: dict[str, LoRALinear], tokens: Tensor | None) -> Iterator[None]:
    """Within this block dropout is drawn for a micro-batch with these token keys: (tokens,) int32, padding included.

    The block must hold the backward pass as well when activations are recomputed in it.
    """
    if tokens is None:  # nothing drops
        yield
        return
    for name, layer in layers.items():
        layer.token_keys = tokens
        if layer.dropout and layer.feature_keys is None:
            layer.feature_keys = feature_keys(name, layer.lora_A.shape[1]).to(layer.lora_A.device)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.token_keys = None


@contextmanager
def cast_once(layers: dict[str, LoRALinear], dtype: torch.dtype) -> Iterator[None]:
    """Within this block A and B must not change: they are cast to the compute dtype here, and not in every forward."""
    for layer in layers.values():  # past nn.Module.__setattr__, which costs as much as the rest of a small step's cast
        vars(layer)["low_precision"] = layer.cast(dtype)
    try:
        yield
    finally:
        for layer in layers.values():
            vars(layer)["low_precision"] = None
