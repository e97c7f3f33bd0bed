"""Products B A of low rank, decomposed from their factors: nothing as large as a weight is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_A, _B = "lora_A.weight", "lora_B.weight"


def factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A and B of a module's tensors in an adapter file, if its update is alpha / rank · B A and nothing more."""
    return (parts[_A], parts[_B]) if parts.keys() == {_A, _B} else None


def peft_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A and B of modules as PEFT names them in a file, in fp32."""
    found = {}
    for name, (A, B) in sorted(pairs.items()):
        found[f"base_model.model.{name}.{_A}"] = A.float().contiguous()
        found[f"base_model.model.{name}.{_B}"] = B.float().contiguous()
    return found


def singular_values(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Of scaling · B A, from the largest down, in float64: (min(rank, in, out),).

    A: (rank, in). B: (out, rank). With B = Q R and Aᵀ = P S they are those of scaling · R Sᵀ, as Q and P only rotate.
    """
    R, S = (torch.linalg.qr(each.double(), mode="r").R for each in (B, A.T))
    return torch.linalg.svdvals(scaling * R @ S.T)


def decomposed(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vᵀ with scaling · B A = U diag(s) Vᵀ, in float64: (out, n), (n,), (n, in), n = min(rank, in, out)."""
    (Q, R), (P, S) = (torch.linalg.qr(each.double()) for each in (B, A.T))
    U, values, V = torch.linalg.svd(scaling * R @ S.T, full_matrices=False)
    return Q @ U, values, V @ P.T
