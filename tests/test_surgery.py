"""Replacing a module's forward: each replacement lies around the ones before it, and none can come out of order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_cli.base.surgery import LAYERS, Forward, forward_layers, replace_forward


def noting(layer: str, calls: list[str], forward: Forward) -> Forward:
    def call(*args: object, **kwargs: object) -> object:
        calls.append(layer)
        return forward(*args, **kwargs)

    return call


def test_each_replacement_lies_around_the_ones_before_it():
    module, calls = nn.Linear(3, 2), []
    x = torch.randn(5, 3)
    expected = module(x)
    for layer in LAYERS:
        replace_forward(module, layer, lambda forward, layer=layer: noting(layer, calls, forward))
    assert torch.equal(module(x), expected)
    assert calls == [*reversed(LAYERS)]
    assert forward_layers(module) == LAYERS
    assert forward_layers(nn.Linear(3, 2)) == ()


@pytest.mark.parametrize("inner", LAYERS)
def test_what_belongs_further_inside_comes_too_late(inner):
    """Also a second time: a block that is checkpointed twice would be computed three times."""
    for outer in LAYERS[LAYERS.index(inner) :]:
        module = nn.Linear(3, 2)
        replace_forward(module, outer, lambda forward: forward)
        with pytest.raises(ValueError, match=f"{inner} comes too late"):
            replace_forward(module, inner, lambda forward: forward)
        assert forward_layers(module) == (outer,)
