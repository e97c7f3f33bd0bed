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

from lora_cli.base.linear import features
from lora_cli.base.surgery import Forward, forward_layers, replace_forward


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
                known[kind] = _is_gated_product(module)
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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight).requires_grad_()
    upstream = torch.randn(3, weight.shape[-1], generator=generator).to(weight)
    try:
        (expected,) = torch.autograd.grad(norm(x), x, upstream.to(norm(x).dtype))
        for offset in (0.0, 1.0):
            (actual,) = torch.autograd.grad(_norm_forward(norm, offset, norm.forward)(x), x, upstream.to(norm(x).dtype))
            if _same(actual, expected):
                return offset
    except Exception:  # any architecture's own code, such as a norm that wants a gate: left as it is
        return None
    return None


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


def _is_gated_product(mlp: Any) -> bool:
    """Whether the module computes down(activation(gate(x)) ∘ up(x)) and nothing else, in training as well."""
    drops = [mlp, *(module for module in mlp.modules() if isinstance(module, nn.Dropout))]  # adapters keep their mode
    modes = [module.training for module in drops]
    try:
        for module in drops:
            module.training = True
        weight = next(mlp.down_proj.parameters())
        width = features(getattr(mlp.gate_proj, "base_layer", mlp.gate_proj))[0]
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            expected = mlp(x)
            actual = _gated_forward(mlp, mlp.forward)(x)
    except Exception:  # any architecture's own code: left as it is
        return False
    finally:
        for module, mode in zip(drops, modes, strict=True):
            module.training = mode
    return isinstance(expected, Tensor) and torch.equal(actual, expected)


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 16 * torch.finfo(other.dtype).eps
    return bool(torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance))
