"""Matrix products in bf16 at a bearable speed on CPUs without bf16 instructions, for runs whose losses alone count."""

from __future__ import annotations

from typing import Any

import torch

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_kept: list[torch.library.Library] = []  # a library that is collected takes its kernels along


def products_by_fp32() -> None:
    """From now on torch multiplies bf16 matrices on the CPU as fp32 ones and rounds the result, in this process.

    That is what bf16 instructions do: products of two bf16 numbers are exact in fp32, sums are fp32, rounding comes
    last. torch's own way without such instructions takes 5 to 20 times as long.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in _PRODUCTS:
        library.impl(name, _by_fp32(getattr(torch.ops.aten, name).default), "CPU", with_keyset=True)
    _kept.append(library)


def has_bf16_instructions() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _by_fp32(operator: Any) -> Any:
    own = torch.library.get_kernel(operator, "CPU")

    def product(keys: Any, *tensors: torch.Tensor, **factors: Any) -> torch.Tensor:
        if tensors[-1].dtype != torch.bfloat16:
            return own.call_boxed(keys, *tensors, **factors)
        return own.call_boxed(keys, *(each.float() for each in tensors), **factors).to(torch.bfloat16)

    return product
