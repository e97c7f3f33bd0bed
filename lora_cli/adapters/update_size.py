"""How large an adapter is beside the weights that it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.adapters.layer import LoRALinear
from lora_cli.base.linear import dense_weight


@dataclass(frozen=True)
class UpdateSize:
    """Frobenius norms of a layer's update ΔW = scaling · B A and of its frozen weight W."""

    update: float
    weight: float

    @property
    def ratio(self) -> float:
        """‖ΔW‖ / ‖W‖; of a weight that is zero, infinite unless the update is zero as well."""
        if self.weight == 0:
            return math.inf if self.update else 0.0
        return self.update / self.weight


def update_sizes(layers: dict[str, LoRALinear]) -> dict[str, UpdateSize]:
    """Sizes by layer name. One weight is dense at a time, so this needs the memory of the largest layer."""
    return {name: UpdateSize(update_norm(layer), weight_norm(layer.base_layer)) for name, layer in layers.items()}


@torch.no_grad()
def update_norm(layer: LoRALinear) -> float:
    """‖scaling · B A‖ without making it: scaling · √ Σ (BᵀB) ⊙ (A Aᵀ), both (rank, rank), in float64.

    For ‖B A‖² is the trace of (B A)ᵀ (B A), and under a trace factors may go round. Against the dense product: 1e-12.
    """
    A, B = (each.detach().cpu().double() for each in (layer.lora_A, layer._masked_B()))
    square = ((B.T @ B) * (A @ A.T)).sum().item()
    return abs(layer.scaling) * math.sqrt(max(square, 0.0))  # rounding may go below zero, where the update is none


@torch.no_grad()
def weight_norm(base_layer: nn.Module) -> float:
    """‖W‖ of the weight that a layer multiplies by, dequantized if need be; relative error 1e-6 beside float64."""
    rows: Tensor = torch.linalg.vector_norm(dense_weight(base_layer), dim=1, dtype=torch.float32)
    return rows.cpu().double().norm().item()
