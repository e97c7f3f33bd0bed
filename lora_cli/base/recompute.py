"""RMSNorm and gated MLPs that save only their input and recompute the rest in backward.

The model's own code computes forward, bit for bit. Only what autograd keeps and how it comes back is replaced, in
modules whose shape is known here, after a trial on the loaded module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.base.linear import features


def keep_inputs_alone(model: nn.Module) -> int:
    """Replace the backward pass of norms and gated products that are known here; returns how many. Values stay.

    Only for frozen norms: their weights get no gradient.
    """
    known: dict[tuple[Any, ...], bool] = {}
    replaced = 0
    for module in model.modules():
        if is_rms_norm(module):
            if (offset := _offset(module)) is not None:
                module.forward = _norm_forward(module, offset)
                replaced += 1
        elif is_gated(module):
            kind = (type(module), _settings(module), *(type(getattr(module, name)) for name in _GATED))
            if kind not in known:
                known[kind] = _is_gated_product(module)
            if known[kind]:
                module.forward = _gated_forward(module)
                replaced += 1
    return replaced


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this is a norm of that kind by its name; a trial decides."""
    weight = getattr(module, "weight", None)
    return "RMSNorm" in type(module).__name__ and isinstance(weight, Tensor) and not [*module.children()]


def is_gated(module: nn.Module) -> bool:
    """Whether this is a gated product by its parts; a trial decides."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What makes modules of one class compute differently, as layers of Gemma 3n do."""
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
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wide = x.to(ctx.scale.dtype)
        above = upstream * ctx.scale
        r = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + ctx.eps)
        along = (above * wide).mean(-1, keepdim=True)
        return above.mul_(r).addcmul_(wide, r**3 * along, value=-1).to(x.dtype), None, None, None


def _norm_forward(norm: nn.Module, offset: float) -> Callable[..., Tensor]:
    """A gate or another width is the module's own affair: what was not tried goes through as it came."""
    own, eps = norm.forward, _eps(norm)

    def forward(*inputs: Any, **named: Any) -> Tensor:
        weight: Any = norm.weight
        x = inputs[0] if len(inputs) == 1 and not named else None
        if x is None or not (x.requires_grad and torch.is_grad_enabled()) or x.shape[-1] != weight.shape[-1]:
            return own(*inputs, **named)
        return _RMSNorm.apply(x, own, weight.detach().to(_wide(weight.dtype)) + offset, eps)  # type: ignore[return-value]

    return forward


def _offset(norm: nn.Module) -> float | None:
    """What is added to the norm's weight: 0, or 1 as in Gemma. None if its gradient is neither's, or it takes more."""
    weight: Any = norm.weight
    if _eps(norm) is None or weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight).requires_grad_()
    upstream = torch.randn(3, weight.shape[-1], generator=generator).to(weight)
    try:
        (expected,) = torch.autograd.grad(norm(x), x, upstream.to(norm(x).dtype))
        for offset in (0.0, 1.0):
            (actual,) = torch.autograd.grad(_norm_forward(norm, offset)(x), x, upstream.to(norm(x).dtype))
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
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (of_gate,) = torch.autograd.grad(activated, leaf, upstream * up)
        return of_gate, upstream * activated.detach(), None


def _gated_forward(mlp: Any) -> Callable[..., Tensor]:
    own = mlp.forward

    def forward(*inputs: Any, **named: Any) -> Tensor:
        if len(inputs) != 1 or named or not torch.is_grad_enabled():
            return own(*inputs, **named)
        (x,) = inputs
        return mlp.down_proj(_GatedProduct.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))

    return forward


def _is_gated_product(mlp: Any) -> bool:
    """Whether the module computes down(activation(gate(x)) ∘ up(x)) and nothing else, in training as well."""
    drops = [mlp, *(module for module in mlp.modules() if isinstance(module, nn.Dropout))]  # its adapters stay as is
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
            actual = _gated_forward(mlp)(x)
    except Exception:  # any architecture's own code: left as it is
        return False
    finally:
        for module, mode in zip(drops, modes, strict=True):
            module.training = mode
    return isinstance(expected, Tensor) and torch.equal(actual, expected)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 16 * torch.finfo(other.dtype).eps
    return bool(torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance))
