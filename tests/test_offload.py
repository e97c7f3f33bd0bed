"""Inputs of blocks in host memory: nobody reads, or gives away, what a copy is still at work on."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_cli.base.activations import ActivationPlan
from lora_cli.base.offload import HostInputs, copier

BLOCKS = 5


class LateCopies:
    """Stands for a stream beside, at its slowest: a copy is done when somebody waits for it, and not before."""

    def __init__(self):
        self.pending: list[object] = []

    def __call__(self, _: torch.device) -> Any:
        def begin(into: Tensor, source: Tensor) -> Any:
            into.data.fill_(torch.nan)  # what is read by those who do not wait
            token = object()
            self.pending.append(token)

            def wait() -> None:
                if token in self.pending:
                    self.pending.remove(token)
                    into.data.copy_(source)  # .data: without a new version, as on a device

            return wait

        return begin


class Block(nn.Module):
    """Notes how many inputs of blocks are on the device when it is computed, its own among them."""

    inputs: list[StorageWeakRef] = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.most_alive, self.does = 0, lambda x: x
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(StorageWeakRef(x.untyped_storage()))
        alive = {each.cdata for each in self.inputs if not each.expired()}
        self.most_alive = max(self.most_alive, len(alive))
        return (self.does(x) * self.weight).sin() * 2


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    Block.inputs = []
    return [Block() for _ in range(BLOCKS)]


def gradients(blocks: list[Block]) -> tuple[Tensor, ...]:
    hidden = torch.linspace(-1, 1, 42).view(7, 6)
    for block in blocks:
        hidden = block(hidden)
    return torch.autograd.grad(hidden.square().sum(), [block.weight for block in blocks])


def offload(blocks: list[Block], copies: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cli.base.activations.HostInputs", lambda: HostInputs(copies))
        ActivationPlan((True,) * BLOCKS, (1.0,) * BLOCKS, 1.0, offloaded=True).apply(blocks)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_copy_is_waited_for_before_anybody_needs_it(blocks: list[Block]):
    expected, copies = gradients(blocks), LateCopies()
    offload(blocks, copies)
    for _ in range(2):
        assert same(gradients(blocks), expected)
        assert not copies.pending


def test_a_pass_that_is_given_up_waits_for_its_copies(blocks: list[Block]):
    """Or the memory would be used for something else while they are under way. In the forward and the backward pass."""
    expected, copies = gradients(blocks), LateCopies()
    offload(blocks, copies)

    def fails(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise MemoryError
        return x

    for at in (1, 2):  # noqa: B007  computed, and computed again
        calls: list[int] = []
        blocks[3].does = fails
        with pytest.raises(MemoryError):
            gradients(blocks)
        gc.collect()
        assert not copies.pending
        blocks[3].does = lambda x: x
        assert same(gradients(blocks), expected)


@pytest.mark.parametrize(("offloaded", "most"), [(False, BLOCKS), (True, 1)])
def test_a_block_leaves_no_input_on_the_device(blocks: list[Block], offloaded: bool, most: int):
    ActivationPlan((True,) * BLOCKS, (1.0,) * BLOCKS, 1.0, offloaded).apply(blocks)
    gradients(blocks)
    assert max(block.most_alive for block in blocks) == most


@pytest.mark.parametrize("at", [1, BLOCKS - 1])
def test_an_input_that_its_block_changes_in_place_is_an_error(blocks: list[Block], at: int):
    """As without offloading, where autograd sees it."""
    blocks[at].does = lambda x: x.detach().mul_(2) + 0 * x
    offload(blocks, copier)
    with pytest.raises(RuntimeError, match="changed its input in place"):
        gradients(blocks)
