"""Norms, activations and gated MLPs that save only their input and recompute the rest in backward.

The model's own code computes forward, bit for bit. Only what autograd keeps and how it comes back is replaced, in
modules whose shape is known here, after a trial on the loaded module. Their results carry a note of how they are made
again (`base.remade`), so that adapted layers need not save them either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.base.remade import note_how_made
from lora_cli.base.rotary import noting_rotary, rotary_forward, rotating_modules
from lora_cli.base.surgery import Forward, forward_layers, replace_forward
from lora_cli.base.trials import same_again, same_gradient, same_output


def save_only_inputs(model: nn.Module) -> int:
    """Replace the backward pass of every norm, activation and gated MLP that passes its trial; returns how many.

    Where queries and keys are normed, what rotates them passes on how they are made again.
    Forward values do not change. Only for frozen modules: their weights get no gradient. A module whose forward was
    replaced before, as by a fused kernel, is left alone, and so is the activation of a gated MLP that was replaced.
    """
    known: dict[tuple[Any, ...], bool] = {}
    within: set[nn.Module] = set()
    replaced = 0
    for module in model.modules():  # a gated MLP comes before its activation
        make = None
        if forward_layers(module) or module in within:
            continue
        if is_rms_norm(module):
            offset = _offset(module)
            make = None if offset is None else partial(_norm_forward, module, offset)
        elif names := is_gated(module):
            kind = (type(module), _settings(module), *(type(getattr(module, name)) for name in names))
            make = partial(_gated_forward, module, names)
            if kind not in known:
                known[kind] = same_output(module, make(module.forward), getattr(module, names[0]))
            make = make if known[kind] else None
            within |= {getattr(module, names[-1])} if make else set()
        elif is_elementwise(module) and same_again(module, _again_forward(module, module.forward)):
            make = partial(_again_forward, module)
        if make is not None:
            replace_forward(module, "recomputation", make)
            replaced += 1
    for attention in [*rotating_modules(model)]:  # after the norms of its queries and keys
        if rotate := noting_rotary(attention):
            replace_forward(attention, "recomputation", partial(rotary_forward, attention, rotate))
    return replaced


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this looks like an RMSNorm, by its name and weight; a trial decides."""
    weight = getattr(module, "weight", None)
    return "RMSNorm" in type(module).__name__ and isinstance(weight, Tensor) and not [*module.children()]


def is_gated(module: nn.Module) -> tuple[str, ...]:
    """The parts of what looks like a gated MLP: its first layers, the last one, the activation; a trial decides."""
    parts = (names for names in _GATED if all(isinstance(getattr(module, name, None), nn.Module) for name in names))
    return next(parts, ())


def is_elementwise(module: nn.Module) -> bool:
    """Whether this looks like a LayerNorm, or an activation function of transformers or torch; a trial decides."""
    if [*module.children()]:
        return False
    weight = getattr(module, "weight", None)
    norm = "LayerNorm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1
    return norm or (type(module).__module__ in _ACTIVATIONS and not [*module.parameters()])


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
    eps = eps_of(norm)

    def apply(x: Tensor) -> Any:
        weight: Any = norm.weight
        scale = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + offset
        return _RMSNorm.apply(x, own, scale, eps)

    return norm_forward(norm, own, apply, own)


def norm_forward(norm: nn.Module, own: Forward, apply: Forward, make: Forward) -> Forward:
    """A norm's forward that is `apply(x)` where x needs a gradient; `make(x)` makes the same again without one.

    A call that no trial covers, such as one with a gate or another width, goes to the module's own code.
    """

    def forward(*inputs: Any, **named: Any) -> Tensor:
        width: int = norm.weight.shape[-1]  # type: ignore[union-attr]
        x = inputs[0] if len(inputs) == 1 and not named else None
        if x is None or not (x.requires_grad and torch.is_grad_enabled()) or x.shape[-1] != width:
            return own(*inputs, **named)
        return note_how_made(apply(x), make, x)

    return forward


def _offset(norm: nn.Module) -> float | None:
    """What the norm adds to its weight: 0, or 1 as in Gemma. None if neither gives its gradient."""
    weight: Any = norm.weight
    if eps_of(norm) is None or weight.dim() != 1:
        return None
    offsets = (0.0, 1.0)
    return next((each for each in offsets if same_gradient(norm, _norm_forward(norm, each, norm.forward))), None)


def eps_of(norm: Any) -> Any:
    """The ε of an RMSNorm; None where it has none by a name that is known here."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


# ── LayerNorms and activations ────────────────────────────────────────────────────────────────────────────────────

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


class _Again(torch.autograd.Function):
    """What a module computes; the backward pass computes it again, and differentiates it as autograd would have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.forward = forward
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.enable_grad():
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            (grad,) = torch.autograd.grad(ctx.forward(leaf), leaf, grad_output)
        return grad, None


def _again_forward(module: nn.Module, own: Forward) -> Forward:
    """torch's own modules keep only their input by themselves."""
    spare = type(module).__module__.startswith("torch.nn.")

    def forward(*inputs: Any, **named: Any) -> Any:
        if len(inputs) != 1 or named or not (inputs[0].requires_grad and torch.is_grad_enabled()):
            return own(*inputs, **named)
        (x,) = inputs
        y: Any = own(x) if spare else _Again.apply(x, own)
        return note_how_made(y, own, x)

    return forward


# ── gated products ────────────────────────────────────────────────────────────────────────────────────────────────

_GATED = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("gate_up_proj", "down_proj", "activation_fn"))


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


def _gated_forward(mlp: Any, names: tuple[str, ...], own: Forward) -> Forward:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return getattr(mlp, names[-1])(gate) * up

    def apply(gate: Tensor, up: Tensor) -> Any:
        return _GatedProduct.apply(gate, up, getattr(mlp, names[-1]))

    return gated_forward(mlp, names, own, apply, product)


def gated_forward(mlp: Any, names: tuple[str, ...], own: Forward, apply: Forward, make: Forward) -> Forward:
    """A gated MLP's forward with `apply(gate, up)` as its product; `make` makes the same again without a gradient."""
    *first, last, _ = names

    def forward(*inputs: Any, **named: Any) -> Tensor:
        if len(inputs) != 1 or named or not torch.is_grad_enabled():
            return own(*inputs, **named)
        made = [getattr(mlp, name)(inputs[0]) for name in first]
        gate, up = made if len(made) == 2 else made[0].chunk(2, -1)
        y = apply(gate, up)
        return getattr(mlp, last)(note_how_made(y, make, gate, up) if y.requires_grad else y)

    return forward
