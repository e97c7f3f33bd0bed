"""Products B A of low rank, decomposed from their factors: nothing as large as a weight is made."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_cli.adapters.file import AdapterFile
from lora_cli.errors import LoraError, refuse_if

Factors = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)

_A, _B = "lora_A.weight", "lora_B.weight"
_SOUGHT = 64  # directions of an update that are looked at first
_LARGEST_NORM = 1e18  # whose square fp32 holds


def pairs_of(adapter: AdapterFile, *, fix: str) -> dict[str, Factors]:
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


def ranks_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """The rank of each module that has an A, by the module's name, of tensors as `by_module` gives them."""
    return {name: len(each[_A]) for name, each in tensors.items() if _A in each}


def layer_state(factors: Factors) -> dict[str, Tensor]:
    """A and B as an adapted layer takes them (`load`)."""
    return dict(zip(("lora_A", "lora_B"), factors, strict=True))


def peft_tensors(pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
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


def largest(update: Tensor, rank: int, iterations: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest of U, s, Vᵀ of a dense (out, in) matrix: exact for a small one, else by random projection.

    Source: Halko, Martinsson & Tropp 2011, algorithm 4.4, with a fixed seed: what is found is nearly the best, and the
    same every time. A weight, whose singular values fall slowly, needs more iterations than an update.
    """
    width = 2 * rank + 10
    if min(update.shape) <= 2 * width:
        U, values, V = torch.linalg.svd(update, full_matrices=False)
        return U[:, :rank], values[:rank], V[:rank]
    drawn = torch.randn(update.shape[1], width, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(update @ drawn).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(update @ torch.linalg.qr(update.T @ Q).Q).Q
    U, values, V = torch.linalg.svd(Q.T @ update, full_matrices=False)
    return Q @ U[:, :rank], values[:rank], V[:rank]


def factors_of(U: Tensor, values: Tensor, V: Tensor, rank: int) -> Factors:
    """A and B whose product is the `rank` largest directions, which they share equally."""
    root = values[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖, of the sums BᵀB and A Aᵀ alone; below 1e-8 of ‖B‖ ‖A‖ it cannot be told from 0."""
    A, B = A.double(), B.double()
    return math.sqrt(max(0.0, torch.sum((B.T @ B) * (A @ A.T)).item()))


def holding(values: Tensor, energy: float, norm: float) -> int:
    """How many of the largest singular values hold `energy`, a share of norm²; all, if they do not."""
    return min(len(values), int((values.double().square().cumsum(0) < energy * norm**2).sum()) + 1)


def nearest(update: Tensor, rank: int | None, energy: float | None = None) -> tuple[Factors, float, float]:
    """A and B of the `largest` directions of a dense (out, in) matrix, its norm, and that of what they lack.

    rank: how many, at most; energy: as few as hold that share of ‖ΔW‖², sought among twice as many each time.
    Raises LoraError for NaN, and for numbers whose products are too large for fp32.
    """
    norm = torch.linalg.vector_norm(update).item()
    fix = "copy what it is made of again, or choose smaller weights"
    refuse_if(not norm < _LARGEST_NORM, "an update is too large for fp32", fix=fix)
    most = min(rank or len(update), *update.shape)
    tried = most if energy is None else min(_SOUGHT, most)
    U, values, V = largest(update, tried)
    while energy is not None and tried < most and values.double().square().sum() < energy * norm**2:
        tried = min(2 * tried, most)
        U, values, V = largest(update, tried)
    A, B = factors_of(U, values, V, tried if energy is None else holding(values, energy, norm))
    return (A, B), norm, torch.linalg.vector_norm(update - B @ A).item()
