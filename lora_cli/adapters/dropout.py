"""Dropout as a function of the token and the layer: without random state, so that no split of a step changes it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK_NUMBERS = 1 << 22  # int32 numbers drawn at a time: 16 MiB


def token_keys(seed: int, step: int, ids: np.ndarray) -> np.ndarray:
    """A random odd number for each token of an example, in one step: (tokens,) int32.

    A function of seed, step and the example's own ids: which examples share a micro-batch, and which process it runs
    in, makes no difference.
    """
    content = np.ascontiguousarray(ids, np.int64).tobytes()
    digest = hashlib.blake2b(content, digest_size=16, key=f"{seed}/{step}".encode()).digest()
    return _odd_numbers(int.from_bytes(digest, "little"), len(ids))


def feature_keys(name: str, features: int) -> Tensor:
    """A random odd number for each input of a layer, from the layer's name: (features,) int32."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return torch.from_numpy(_odd_numbers(int.from_bytes(digest, "little"), features))


def keep_mask(tokens: Tensor, features: Tensor, p: float) -> Tensor:
    """Which inputs are kept, each with probability 1 - p: (tokens, features) of bool.

    The product of two random odd numbers modulo 2**32 is a random odd number again, and products that share one factor
    are independent: one multiplication and one comparison an element, the same on every device, and nothing to keep
    for the backward pass.
    """
    return torch.outer(tokens, features) >= round(p * 2**32) - 2**31


def dropped(values: Tensor, tokens: Tensor, features: Tensor, p: float) -> Tensor:
    """values (tokens, features) where they are kept, zero elsewhere; not scaled by 1 / (1 - p).

    Some rows at a time: the random numbers behind a mask take twice the memory of bf16 values. Compiled, they are
    fused away, and a loop would be compiled again for each number of rows.
    """
    zero = values.new_zeros(())
    if torch.compiler.is_compiling() or len(values) * len(features) <= _MASK_NUMBERS:
        return torch.where(keep_mask(tokens, features, p), values, zero)
    result = torch.empty_like(values)
    rows = max(1, _MASK_NUMBERS // len(features))
    for at in range(0, len(values), rows):
        part = slice(at, at + rows)
        torch.where(keep_mask(tokens[part], features, p), values[part], zero, out=result[part])
    return result


def _odd_numbers(key: int, count: int) -> np.ndarray:
    drawn = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**32, count, np.uint32)
    return (drawn | 1).view(np.int32)
