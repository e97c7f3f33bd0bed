"""RMSNorm and gated MLPs that save only their input and recompute the rest in backward.

The model's own code computes forward, bit for bit. Only what autograd keeps and how it comes back is replaced, in
modules whose shape is known here, after a trial on the loaded module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.base.surgery import Forward, forward_layers, replace_forward
from lora_cli.base.trials import same_gradient, same_output


def save_only_inputs(model: nn.Module) -> int:
    """Replace the backward pass of every RMSNorm and gated MLP that passes its trial; returns how many.

    Forward values do not change. Only for frozen norms: their weights get no gradient. A module whose forward was
    replaced before, as by a fused kernel, is left alone.
    """
    known: dict[tuple[Any, ...], bool] = {}
    replaced = 0
    for module in model.modules():
        if forward_layers(module):
            continue
        if is_rms_norm(module):
            if (offset := _offset(module)) is not None:
                replace_forward(module, "recomputation", partial(_norm_forward, module, offset))
                replaced += 1
        elif is_gated(module):
            kind = (type(module), _settings(module), *(type(getattr(module, name)) for name in _GATED))
            if kind not in known:
                known[kind] = same_output(module, _gated_forward(module, module.forward), module.gate_proj)
            if known[kind]:
                replace_forward(module, "recomputation", partial(_gated_forward, module))
                replaced += 1
    return replaced


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this looks like an RMSNorm, by its name and weight; a trial decides."""
    weight = getattr(module, "weight", None)
    return "RMSNorm" in type(module).__name__ and isinstance(weight, Tensor) and not [*module.children()]


def is_gated(module: nn.Module) -> bool:
    """Whether this looks like a gated MLP, by its parts; a trial decides."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Plain settings by which modules of one class may compute differently, as layers of Gemma 3n do."""
    return tuple(sorted((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str)))


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _RMSNorm(torch.autograd.Function):
    """w ∘ x̂ with x̂ = x · r and r = (mean x² + ε)^-½ (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    With G the gradient of the result times w: dx = r · (G - x̂ · mean(G ∘ x̂)), computed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], scale: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.scale, ctx.eps = scale, eps
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        x_fp32 = x.to(ctx.scale.dtype)
        scaled = grad_output * ctx.scale  # G
        r = torch.rsqrt((x_fp32 * x_fp32).mean(-1, keepdim=True) + ctx.eps)
        mean = (scaled * x_fp32).mean(-1, keepdim=True)
        return scaled.mul_(r).addcmul_(x_fp32, r**3 * mean, value=-1).to(x.dtype), None, None, None


def _norm_forward(norm: nn.Module, offset: float, own: Forward) -> Forward:
    """A call that the trial did not cover, such as one with a gate or another width, goes to the module's own code."""
    eps = _eps(norm)

    def forward(*inputs: Any, **named: Any) -> Tensor:
        weight: Any = norm.weight
        x = inputs[0] if len(inputs) == 1 and not named else None
        if x is None or not (x.requires_grad and torch.is_grad_enabled()) or x.shape[-1] != weight.shape[-1]:
            return own(*inputs, **named)
        return _RMSNorm.apply(
            x, own, weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + offset, eps
        )  # type: ignore[return-value]

    return forward


def _offset(norm: nn.Module) -> float | None:
    """What the norm adds to its weight: 0, or 1 as in Gemma. None if neither gives its gradient."""
    weight: Any = norm.weight
    if _eps(norm) is None or weight.dim() != 1:
        return None
    offsets = (0.0, 1.0)
    return next((each for each in offsets if same_gradient(norm, _norm_forward(norm, each, norm.forward))), None)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


# ── gated products ────────────────────────────────────────────────────────────────────────────────────────────────

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _GatedProduct(torch.autograd.Function):
    """activation(gate) ∘ up, without keeping the activated gate (Shazeer 2020, arXiv:2002.05202, equation 5)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad_output * up)
        return grad_gate, grad_output * activated.detach(), None


def _gated_forward(mlp: Any, own: Forward) -> Forward:
    def forward(*inputs: Any, **named: Any) -> Tensor:
        if len(inputs) != 1 or named or not torch.is_grad_enabled():
            return own(*inputs, **named)
        (x,) = inputs
        return mlp.down_proj(_GatedProduct.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))

    return forward
