"""What makes the host wait for a GPU: reads of values, counted on a CPU, and data that are made one step ahead."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, adapter_tensors, losses
from torch.testing import assert_close

from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.data.feed import PreparedFeed
from lora_cli.errors import LoraError
from lora_cli.training import loop, micro_batches

sys.path.insert(0, str(ROOT / "benchmarks"))
from host_reads import HostReads, reads_of_steps

STEPS = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4}


def of_here(read: Any) -> list[str]:
    with HostReads(under=Path(__file__).parent) as reads:
        read(torch.arange(6.0))
    return [place.split()[1] for place in reads.places]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 2).any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 2], "index"),
        (lambda x: x.to("meta"), "_to_copy"),
        (torch.unique, "_unique2"),
        (lambda x: x[torch.tensor([1, 2])] + x[1:3] * 2, None),
        (lambda x: torch.where(x > 2, x, 0), None),
    ],
)
def test_a_read_is_noticed_and_nothing_else(read, name):
    assert of_here(read) == ([] if name is None else [name])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": {"dropout": 0.2, "target_modules": "all-linear"}},
        {"dtype": "fp16"},
        {"quantization": "nf4", "dtype": "bf16"},
        {"data": {"packing": False}},
        {"train": {"gradient_checkpointing": "full", "optimizer": "adamw_8bit"}},
        {"train": {"optimizer": "schedule_free_adamw", "z_loss": 1e-4, "lora_plus_ratio": 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_a_step_of_many_micro_batches_reads_once(run_recipe, request, base, settings):
    """Loss and norm together. It takes the way of a GPU, with a stand-in for its attention kernel."""
    settings = settings | {"train": settings.get("train", {}) | STEPS, "base_model": str(request.getfixturevalue(base))}
    with reads_of_steps() as steps:
        run_recipe(**settings)
    # The first step also makes what later ones keep, and the last one writes a checkpoint.
    assert [step.total() for step in steps[1:-1]] == [1, 1], steps[1]


def test_the_places_are_said(run_recipe, monkeypatch):
    monkeypatch.setattr(loop.Run, "_clip", lambda run: torch.tensor(run.micro_batches.parameters[0].grad.sum().item()))
    with reads_of_steps() as steps:
        run_recipe(train=STEPS)
    assert sorted(place.split()[1] for place in steps[1]) == ["_local_scalar_dense", "tolist"]
    assert all("micro_batches.py:" in place for place in steps[1])


# ── one step ahead ──────────────────────────────────────────────────────────────────────────────────────────────


def at_once(items: Any, _most: int) -> Any:
    """Stands in for `ahead`: each item when it is asked for."""
    yield from items


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": {"dropout": 0.2}},
        {"data": {"packing": False}},
        {"data": {"streaming": True, "validation": None}},
    ],
    ids=str,
)
def test_data_made_ahead_are_the_same_to_the_bit(run_recipe, tmp_path, monkeypatch, settings):
    run, _ = run_recipe(**settings, output=str(tmp_path / "ahead"))
    monkeypatch.setattr(loop, "ahead", at_once)
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    assert losses(run) == losses(plain)
    assert_close(adapter_tensors(run), adapter_tensors(plain), rtol=0, atol=0)


def test_the_next_step_is_made_while_one_computes_and_none_behind_the_last(run_recipe, monkeypatch):
    asked: list[int] = []
    step, run = PreparedFeed.step, micro_batches.MicroBatches.run

    def noted(feed: Any, number: int) -> Any:
        asked.append(number)
        return step(feed, number)

    def waits(runner: Any, number: int, *rest: Any) -> Any:
        until = time.monotonic() + 20
        while number < 4 and number + 1 not in asked and time.monotonic() < until:
            time.sleep(0.01)
        assert asked[-1] == min(number + 1, 4)
        assert len(rest[-1]) == len(rest[0]), "its micro-batches are there"
        return run(runner, number, *rest)

    monkeypatch.setattr(micro_batches.MicroBatches, "try_largest", lambda *given: given[2])
    monkeypatch.setattr(PreparedFeed, "step", noted)
    monkeypatch.setattr(micro_batches.MicroBatches, "run", waits)
    before = set(threading.enumerate())
    run_recipe(train={"max_steps": 4})
    assert asked == [1, 2, 3, 4]
    assert_ended(before)


@pytest.mark.parametrize("error", [LoraError("no such row", fix="mend it"), KeyError("a mistake of ours")])
def test_what_goes_wrong_in_the_data_is_raised_in_the_step_that_has_them(run_recipe, tmp_path, monkeypatch, error):
    step = PreparedFeed.step

    def fails(feed: Any, number: int) -> Any:
        if number == 3:
            raise error
        return step(feed, number)

    monkeypatch.setattr(PreparedFeed, "step", fails)
    before = set(threading.enumerate())
    with pytest.raises(type(error)) as raised:
        run_recipe()
    assert raised.value is error
    assert len(losses(tmp_path / "run")) == 2
    assert_ended(before)


def assert_ended(before: set[threading.Thread]) -> None:
    until = time.monotonic() + 20
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


def test_a_gpu_gets_pinned_micro_batches_without_waiting(monkeypatch):
    examples = [Example([1, 2, 3], [(1, 3, 0.5)])]
    batch = collate(examples, packed=True, pad_id=0, device=torch.device("cpu"), dropout=(0, 1))
    moves: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: moves.append((id(tensor), how)) or tensor)
    pinned = batch.pinned()
    own = [each for each in [*vars(pinned).values(), *pinned.inputs.values()] if isinstance(each, torch.Tensor)]
    assert len(own) == 8, "ids, positions, twice the ends; positions and ids of targets, weights, keys of dropout"
    there = pinned.to(torch.device("cuda"))
    assert [move for move, _ in moves] == [id(each) for each in own]
    assert all(how == {"non_blocking": True} for _, how in moves)
    assert there.inputs["max_length_q"] == 3
    batch.to(torch.device("mps"))
    assert moves[-1][1] == {"non_blocking": False}, "where a copy without waiting may read what has changed since"
