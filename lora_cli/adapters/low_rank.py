"""Products B A of low rank, decomposed from their factors: nothing as large as a weight is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_cli.adapters.file import AdapterFile
from lora_cli.errors import LoraError

_A, _B = "lora_A.weight", "lora_B.weight"


def pairs_of(adapter: AdapterFile, *, fix: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module. Raises LoraError for A and B that do not fit, and, with `fix`, for an adapter with more."""
    found = {}
    for name, parts in adapter.tensors.items():
        if parts.keys() != {_A, _B}:
            raise LoraError(f"{name} holds more than A and B", where=adapter.folder, fix=fix)
        A, B = parts[_A], parts[_B]
        if len(A) != B.shape[1]:
            what = f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit each other"
            raise LoraError(what, where=adapter.folder, fix="copy the adapter again")
        found[name] = A, B
    return found


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
