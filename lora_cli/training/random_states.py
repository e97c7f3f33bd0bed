"""States of the generators that a model's own code or a library may draw from: kept, checked, restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.training.stored import Random


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the rest in JSON values, of the generators of Python, NumPy, torch and CUDA."""
    version, words, gauss = random.getstate()
    name, key, position, has_number, number = np.random.get_state()
    tensors = {
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.numpy": torch.from_numpy(key.astype(np.int64)),  # type: ignore[union-attr]
        "random.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"random.cuda.{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy = {"bit_generator": name, "has_gauss": has_number, "gauss": number, "pos": position}
    return tensors, {"python": [version, gauss], "numpy": numpy}


def require_random_states(tensors: dict[str, Tensor], values: Random) -> None:
    """Raises what the generators raise for states that are not theirs."""
    _set_states(tensors, values, random.Random(), np.random.RandomState(), torch.Generator())
    for name, each in tensors.items():
        if name.startswith("random.cuda.") and (each.dtype != torch.uint8 or each.shape != (16,)):
            raise ValueError(f"{name[:40]} is not the state of a generator")


def restore_random_states(tensors: dict[str, Tensor], values: Random) -> None:
    """CUDA's only where there are as many devices as there were."""
    _set_states(tensors, values, random, np.random, torch.default_generator)
    cuda = [tensors[f"random.cuda.{at}"] for at in range(len(tensors)) if f"random.cuda.{at}" in tensors]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Whatever is drawn within this block, the generators are afterwards where they were."""
    tensors, values = random_states()
    try:
        yield
    finally:
        restore_random_states(tensors, Random.model_validate(values, strict=False))


def _set_states(tensors: dict[str, Tensor], values: Random, of_python: Any, of_numpy: Any, of_torch: Any) -> None:
    (version, gauss), numpy = values.python, values.numpy
    key = tensors["random.numpy"].numpy().astype(np.uint32)
    of_python.setstate((version, tuple(tensors["random.python"].tolist()), gauss))
    of_numpy.set_state((numpy.bit_generator, key, numpy.pos, numpy.has_gauss, numpy.gauss))
    of_torch.set_state(tensors["random.torch"])
