"""Cross-entropy of an output head, in chunks of targets: logits of all of them never exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of logits in fp32, beside the same in the compute dtype


@dataclass(frozen=True)
class LogitRule:
    """What an architecture does to the output of its head: multiplies it, then soft-caps it to ±cap.

    cap · tanh(multiplier · head(hidden) / cap). Cohere and Granite multiply; Gemma soft-caps (Gemma team 2024,
    arXiv:2408.00118, section 2).
    """

    multiplier: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        if self.multiplier != 1:
            logits.mul_(self.multiplier)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """From the gradient of the logits, which `apply_` made, to that of the head's output."""
        if self.cap is not None:
            assert logits is not None
            gradient.mul_(1 - (logits / self.cap) ** 2)
        return gradient if self.multiplier == 1 else gradient.mul_(self.multiplier)


def linear_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    rule: LogitRule,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """(loss, cross-entropy alone), both summed over the targets, in nats, fp32; only the first has a gradient.

    head: turns hidden states into logits; if it or its adapter is trained, it gets its gradients. hidden:
    (targets, hidden). targets: (targets,) ids. weights: (targets,) of the loss of each. z_loss: adds z_loss · log² Z of
    each target, which keeps logits from drifting (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Forward and backward happen chunk by chunk in one pass: of a chunk's logits only the gradient of `hidden` is left.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    settings = _Settings(head, rule, z_loss, chunk_bytes, torch.is_grad_enabled(), parameters)
    return _LinearCrossEntropy.apply(hidden, targets, weights, settings, *parameters)  # type: ignore[return-value]


@torch.no_grad()
def cross_entropy_of_each(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, rule: LogitRule, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Cross-entropy of every target, in nats: (targets,) in fp32; without a gradient, so no logits are kept.

    head, hidden, targets, rule: as in `linear_cross_entropy`.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    buffer = _buffer(head, hidden, wide, chunk_bytes)
    losses = hidden.new_empty(len(targets), dtype=wide)
    for start in range(0, len(targets), len(buffer)):
        part = slice(start, start + len(buffer))
        raw = head(hidden[part].unsqueeze(0))[0]  # (chunk, vocabulary)
        logits = rule.apply_(buffer[: len(raw)].copy_(raw))
        losses[part] = _cross_entropy_(logits, targets[part])[0].squeeze(1)
    return losses


@dataclass(frozen=True)
class _Settings:
    head: nn.Module
    rule: LogitRule
    z_loss: float
    chunk_bytes: int
    differentiate: bool
    parameters: list[nn.Parameter]

    @cached_property
    def plain_weight(self) -> Tensor | None:
        """(vocabulary, hidden) of a plain frozen layer: its backward pass is one product, and needs no autograd."""
        return self.head.weight if type(self.head) is nn.Linear and not self.parameters else None


def _buffer(head: nn.Module, hidden: Tensor, dtype: torch.dtype, chunk_bytes: int) -> Tensor:
    """For the logits of a chunk: (targets of a chunk, vocabulary)."""
    if type(head) is nn.Linear:
        vocabulary = head.weight.shape[0]
    else:
        with torch.no_grad():
            vocabulary = head(hidden[:0].unsqueeze(0)).shape[-1]
    size = max(1, min(chunk_bytes // (vocabulary * dtype.itemsize), len(hidden)))
    return hidden.new_empty(size, vocabulary, dtype=dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, targets: Tensor, weights: Tensor | None, settings: _Settings, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        wanted = settings.differentiate and any(ctx.needs_input_grad)
        of_hidden = torch.empty_like(hidden) if wanted and hidden.requires_grad else None
        totals = [torch.zeros_like(p, dtype=sums.dtype) for p in settings.parameters] if wanted else []
        buffer = _buffer(settings.head, hidden, sums.dtype, settings.chunk_bytes)
        plain = settings.plain_weight
        for start in range(0, len(targets), len(buffer)):
            part = slice(start, start + len(buffer))
            with torch.set_grad_enabled(wanted and plain is None):
                state = hidden[part].detach().requires_grad_(of_hidden is not None)
                raw = settings.head(state.unsqueeze(0))[0]  # (chunk, vocabulary)
            weight = None if weights is None else weights[part]
            sums += _losses_(raw.detach(), targets[part], weight, buffer[: len(raw)], settings, wanted)
            if of_hidden is not None and plain is not None:
                of_hidden[part] = raw @ plain
            elif wanted:
                inputs = [*([] if of_hidden is None else [state]), *settings.parameters]
                found = list(torch.autograd.grad(raw, inputs, raw.detach()))
                if of_hidden is not None:
                    of_hidden[part] = found.pop(0)
                for total, one in zip(totals, found, strict=True):
                    total.add_(one)
        ctx.of_hidden, ctx.totals, ctx.kinds = of_hidden, totals, [p.dtype for p in settings.parameters]
        loss, cross_entropy = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * grad_output.to(ctx.of_hidden.dtype)
        of_parameters = ((t * grad_output).to(kind) for t, kind in zip(ctx.totals, ctx.kinds, strict=True))
        return of_hidden, None, None, None, *of_parameters


def _losses_(
    raw: Tensor, targets: Tensor, weights: Tensor | None, buffer: Tensor, settings: _Settings, wanted: bool
) -> Tensor:
    """(loss, cross-entropy) summed over a chunk; `raw`, the head's output, is overwritten by its gradient if wanted.

    Everything happens in `buffer`, or in `raw` itself if it is as precise: passes over the logits are what a chunk
    costs beside its matrix products.
    """
    rule, z_loss = settings.rule, settings.z_loss
    logits = rule.apply_(raw if raw.dtype == buffer.dtype else buffer.copy_(raw))
    capped = logits.clone() if wanted and rule.cap is not None else None
    cross_entropy, log_partition, highest, partition = _cross_entropy_(logits, targets)
    loss, weight = cross_entropy, torch.ones_like(partition)
    slope = weight  # of the loss by log Z
    if z_loss:
        log_z = log_partition + highest
        loss, slope = cross_entropy + z_loss * log_z**2, 1 + 2 * z_loss * log_z
    if weights is not None:
        weight = weights[:, None].to(partition.dtype)
        loss, cross_entropy, slope = loss * weight, cross_entropy * weight, slope * weight
    if wanted:
        gradient = logits.mul_(slope / partition)
        gradient.scatter_add_(1, targets[:, None], -weight)
        raw.copy_(rule.backward_(gradient, capped))
    return torch.stack([loss.sum(), cross_entropy.sum()])


def _cross_entropy_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cross-entropy, log of the partition, highest logit, partition) of each target: (chunk, 1) each.

    The partition is the sum of exp(logit - highest); `logits` is overwritten by partition · softmax.
    """
    highest = logits.amax(-1, keepdim=True)
    logits.sub_(highest)
    at_target = logits.gather(1, targets[:, None])
    partition = logits.exp_().sum(-1, keepdim=True)
    log_partition = partition.log()
    return log_partition - at_target, log_partition, highest, partition
