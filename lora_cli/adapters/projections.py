"""Which outputs of an attention's linear layers are queries, keys or values: asked of the model itself.

Fused projections order their outputs differently in every architecture (GPT-2 in three blocks, GPT-NeoX interleaved by
head, Falcon by groups). No list of layouts is kept. Causality tells them apart. With two tokens, for softmax attention:

- out[0] sees only itself, its weights are 1 whatever q and k are: it depends on v[0] alone;
- out[1] looks back at token 0 through k[0] and v[0], but never through q[0].

So the outputs y of a layer are v where d out[0] / d y[0] is not zero, k where only d out[1] / d y[0] is not, q where
only d out[1] / d y[1] is not. A layer whose input already depends on the attention's result is the output projection o.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_cli.base.linear import features
from lora_cli.errors import LoraError


def output_parts(model: Any, names: list[str]) -> dict[str, np.ndarray]:
    """For each named attention layer, (out_features,) of "q", "k", "v" or "o".

    Runs two tokens forward once per layer kind of each attention. Raises LoraError where the parts are unclear.
    """
    modules = dict(model.named_modules())
    attention_of = {name: _enclosing_attention(modules, name) for name in names}
    by_attention: dict[str, list[str]] = defaultdict(list)
    for name, attention in attention_of.items():
        by_attention[attention].append(name)
    known: dict[tuple[Any, ...], np.ndarray] = {}  # blocks of one shape are laid out alike: probe one of them
    found: dict[str, np.ndarray] = {}
    for attention, inside in by_attention.items():
        for name in inside:
            kind = (type(modules[attention]), name[len(attention) :], tuple(features(modules[n]) for n in inside))
            if kind not in known:
                known[kind] = _probe(model, modules[attention], modules[name], name)
            found[name] = known[kind]
    return found


def _enclosing_attention(modules: dict[str, nn.Module], name: str) -> str:
    """The outermost attention module around a layer: the one whose output joins the residual stream."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if "attention" in type(modules[outer]).__name__.lower():
            return outer
    raise LoraError(f"adapter.projections: {name} is not inside an attention module", fix="remove adapter.projections")


class _Probed(Exception):
    """Carries the attention's output out of the forward pass, which need not go on."""


def _probe(model: Any, attention: nn.Module, layer: nn.Module, name: str) -> np.ndarray:
    """The parts of one layer, by the gradients described above.

    The layer's output is replaced by small random numbers: softmax then stays far from saturation, where gradients of
    q and k would underflow.
    """
    leaf: list[Tensor] = []
    result: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def replace_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=generator).to(output) * 0.5
        leaf.append(drawn.requires_grad_())
        return leaf[0]

    def keep_result(_module: nn.Module, _inputs: Any, output: Any) -> None:
        result.append(output[0] if isinstance(output, (tuple, list)) else output)
        raise _Probed

    hooks = [layer.register_forward_hook(replace_output), attention.register_forward_hook(keep_result)]
    tokens = torch.tensor([[1, 2]], device=next(model.parameters()).device)
    # The plain kernel: for one visible token its softmax gradient is exactly zero; the fused ones leave some rounding
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            model(input_ids=tokens)
        except _Probed:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    if not leaf or not result:
        raise LoraError(f"adapter.projections: {name} took no part in a forward pass", fix="remove adapter.projections")
    y = leaf[0].shape[-1]

    def depends(output_token: int, layer_token: int) -> np.ndarray:
        """(out_features,) of bool. Along several random directions: along one, bf16 sums can cancel to zero."""
        out = result[0].reshape(2, -1)[output_token].float()
        found = np.zeros(y, dtype=bool)
        for _ in range(4):
            direction = torch.randn(out.shape, generator=generator).to(out)
            (gradient,) = torch.autograd.grad((out * direction).sum(), leaf[0], retain_graph=True)
            found |= (gradient.reshape(2, y)[layer_token] != 0).cpu().numpy()
        return found

    first, back, last = depends(0, 0), depends(1, 0), depends(1, 1)
    (slope,) = torch.autograd.grad(result[0].sum(), leaf[0], create_graph=True)
    if first.all() and last.all() and not back.any() and not slope.requires_grad:
        return np.full(y, "o")  # linear, on each token alone, after attention has mixed them
    # With attention sinks (gpt-oss) out[0] depends on q and k too: then q is found to be none of these, and refused.
    parts = np.select([first & back, back, last & ~first], ["v", "k", "q"], "?")
    if (parts == "?").any():
        raise LoraError(
            f"adapter.projections: {int((parts == '?').sum())} outputs of {name} are neither q, k, v nor o",
            fix="remove adapter.projections; the whole layer is then adapted",
        )
    return parts
