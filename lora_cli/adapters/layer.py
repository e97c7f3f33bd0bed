"""LoRALinear: a frozen linear layer plus a trained low-rank update. The mathematics is written here, once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.base.linear import features


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
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.register_buffer("output_mask", None if output_mask is None else output_mask.to(device), persistent=False)

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
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., rank)
        update = F.linear(low * self.scaling, self._masked_B().to(x.dtype))
        return base + update.to(base.dtype)

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
