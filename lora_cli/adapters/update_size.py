"""How large an adapter is beside the weights that it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.adapters.trained import Trained
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


@torch.no_grad()
def update_sizes(modules: Mapping[str, Trained]) -> dict[str, UpdateSize]:
    """Sizes by module name. One weight is dense at a time, so this needs the memory of the largest layer."""
    sizes = {}
    for name, module in modules.items():
        weight = dense_weight(module.base_layer)
        sizes[name] = UpdateSize(module.update_norm(weight), weight_norm(weight))
    return sizes


def weight_norm(weight: Tensor) -> float:
    """‖W‖ of an (out_features, in_features) weight; relative error 1e-6 beside float64."""
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return rows.cpu().double().norm().item()
