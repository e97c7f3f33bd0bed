"""Liger's RMSNorm, gated products and rotary embeddings in place of a model's own: one kernel each, on a GPU.

Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989; BSD-2) is optional. Each function is tried on the loaded module, with
its gradient, and is used where a gradient is wanted: evaluating and generating run the model's own code. Its kernels
overwrite tensors without autograd knowing. That is kept harmless here: the norm has a gradient of its own, the rotary
embedding works on copies, and the product overwrites gate and up, which belong to this MLP, when its gradient is
computed. By then the layer after it, which makes the product again from them, is done.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.base.linear import features
from lora_cli.base.recompute import eps_of, gated_forward, is_gated, is_rms_norm, norm_forward
from lora_cli.base.rotary import rotary_forward, rotating_modules
from lora_cli.base.surgery import Forward, forward_layers, replace_forward
from lora_cli.base.trials import distance, in_mode, ordinary_tokens, same_function, same_output
from lora_cli.errors import LoraError

VERSION = "0.8.5"
DEVICES = ("cuda",)  # torch calls ROCm so, too


def require_liger(device: torch.device) -> None:
    """Raises LoraError if Liger's kernels cannot run on this device, or are not installed."""
    if device.type not in DEVICES:
        what = f"train.liger_kernel: Liger's kernels need a CUDA or ROCm GPU, and this run is on {device.type}"
        raise LoraError(what, fix="remove train.liger_kernel")
    try:
        import liger_kernel.ops.rms_norm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        what = f"train.liger_kernel: Liger's kernels cannot be imported: {error}"
        raise LoraError(what, fix=f"pip install liger-kernel=={VERSION}, or remove train.liger_kernel") from error


def use_liger(model: Any) -> dict[str, int]:
    """Replace every norm, gated product and rotary embedding that passes its trial; returns how many of each."""
    replaced = {"norms": 0, "gated products": 0, "rotary embeddings": 0}
    rotary = _tried_rotary(model)
    for module in model.modules():
        make, kind = None, ""
        if is_rms_norm(module):
            make, kind = _norm(module), "norms"
        elif names := is_gated(module):
            make, kind = _gated(module, names), "gated products"
        elif module in rotary:
            make, kind = partial(rotary_forward, module, _rotated), "rotary embeddings"
        if make is not None and not forward_layers(module):
            replace_forward(module, "kernel", make)
            replaced[kind] += 1
    return replaced


def _random(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, dtype)


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm(norm: Any) -> Any:
    """What replaces its forward, with the offset of its weight and the order of rounding that come nearest; or None."""
    if eps_of(norm) is None or norm.weight.dim() != 1:
        return None
    x = _random(3, len(norm.weight), like=norm.weight, dtype=norm.weight.dtype)
    found: dict[float, Any] = {}
    for offset, casting in ((0.0, "llama"), (0.0, "gemma"), (1.0, "gemma"), (1.0, "llama")):
        forward = partial(_normalized, norm, norm.forward, offset, casting)
        if same_function(norm, forward, [x]):
            found.setdefault(distance(forward(x), norm(x)), (offset, casting))
    return partial(_norm_forward, norm, *found[min(found)]) if found else None


def _norm_forward(norm: nn.Module, offset: float, casting: str, own: Forward) -> Forward:
    apply = partial(_normalized, norm, own, offset, casting)
    return norm_forward(norm, own, apply, apply)


def _normalized(norm: Any, own: Forward, offset: float, casting: str, x: Tensor) -> Any:
    """Not in place: after a norm before a residual sum, both share one gradient. One row at a time, as in the trial."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    if x.dtype != norm.weight.dtype:
        return own(x)
    return LigerRMSNormFunction.apply(x, norm.weight, eps_of(norm), offset, casting, False, True)


# ── gated products ────────────────────────────────────────────────────────────────────────────────────────────────


def _gated(mlp: Any, names: tuple[str, ...]) -> Any:
    """What replaces its forward, where gate and up are layers of their own: halves of one would be copied. Or None."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return getattr(mlp, names[-1])(gate) * up

    own = gated_forward(mlp, names, mlp.forward, product, product)
    if len(names) != 4 or not same_output(mlp, own, getattr(mlp, names[0])):
        return None
    down = getattr(mlp.down_proj, "base_layer", mlp.down_proj)
    inputs = _random(2, 3, features(down)[0], like=next(down.parameters()), dtype=torch.float32).unbind()
    for kernel in (LigerSiLUMulFunction, LigerGELUMulFunction):
        if same_function(product, kernel.apply, inputs):
            return partial(_gated_forward, mlp, names, kernel.apply)
    return None


def _gated_forward(mlp: Any, names: tuple[str, ...], apply: Forward, own: Forward) -> Forward:
    return gated_forward(mlp, names, own, apply, apply)


# ── rotary embeddings ─────────────────────────────────────────────────────────────────────────────────────────────


class _Rotary(torch.autograd.Function):
    """Queries and keys (batch, heads, tokens, size), rotated by their positions. The kernel overwrites what it gets."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        from liger_kernel.ops.rope import rope_forward  # pyright: ignore[reportMissingImports]

        ctx.save_for_backward(cos, sin)
        return rope_forward(q.clone(), k.clone(), cos, sin)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from liger_kernel.ops.rope import rope_backward  # pyright: ignore[reportMissingImports]

        return *rope_backward(grad_q.clone(), grad_k.clone(), *ctx.saved_tensors), None, None


def _rotated(own: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
    """A call that the trial did not cover goes to the model's own function."""
    if rest or named or not (q.requires_grad and torch.is_grad_enabled()):
        return own(q, k, cos, sin, *rest, **named)
    return _Rotary.apply(q, k, cos, sin)


def _tried_rotary(model: Any) -> set[nn.Module]:
    """Attentions whose rotary embedding is Liger's, tried in fp32 on what they compute of a short row of text."""
    same = dict.fromkeys(rotating_modules(model), False)

    def tried(module: nn.Module, own: Forward, q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        angles = cos.float(), sin.float()
        if not (rest or named) and q.dim() == k.dim() == 4 and cos.shape[-1] == q.shape[-1]:
            with torch.enable_grad():
                pair = [q.float(), k.float()]
                same[module] = same_function(lambda *x: own(*x, *angles), lambda *x: _Rotary.apply(*x, *angles), pair)
        return own(q, k, cos, sin, *rest, **named)

    try:
        for module in same:
            vars(module)["forward"] = rotary_forward(module, partial(tried, module), module.forward)
        with in_mode(model, training=False), torch.no_grad():
            model(input_ids=ordinary_tokens(model, 8, 0).to(model.device)[None], use_cache=False)
    finally:
        for module in same:
            vars(module).pop("forward", None)
    return {module for module, passed in same.items() if passed}
