"""Micro-batches: how a step is cut changes nothing in its result, and what does not fit into memory is cut smaller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_tensors, losses
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.training import micro_batches, writer
from lora_cli.training.micro_batches import cut, is_out_of_memory

DROPOUT = {"adapter": {"dropout": 0.3}}


class Memory:
    """Stands in for a GPU's memory: a micro-batch of more than `tokens` tokens does not fit, from step `since` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, since: int = 0):
        self.tokens, self.since, self.trials, self.step = tokens, since, [], 0
        loss, run = micro_batches.training_loss, micro_batches.MicroBatches.run

        def limited(model: Any, batch: Any, **options: Any) -> Any:
            self.trials.append(batch.tokens)
            if batch.tokens > self.tokens and self.step >= self.since:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return loss(model, batch, **options)

        def noted(runner: Any, step: int, *rest: Any) -> float:
            self.step = step
            return run(runner, step, *rest)

        monkeypatch.setattr(micro_batches, "training_loss", limited)
        monkeypatch.setattr(micro_batches.MicroBatches, "run", noted)


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)  # E4
    assert_close(adapter_tensors(one), adapter_tensors(other), rtol=0, atol=2e-5)  # Adam divides by small numbers


@given(
    batches=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=4),
    splits=st.integers(1, 12),
)
def test_cutting_loses_no_example_and_balances_tokens(batches, splits):
    made = [[Example(np.full(length, at), []) for at, length in enumerate(batch)] for batch in batches]
    pieces = cut(made, splits)
    sizes = [sum(len(example.ids) for example in piece) for piece in pieces]
    assert sorted(id(e) for piece in pieces for e in piece) == sorted(id(e) for batch in made for e in batch)
    assert sizes == sorted(sizes, reverse=True), "the largest comes first"
    assert all(pieces)
    for batch in made:
        own = {id(example) for example in batch}
        total, longest = sum(len(e.ids) for e in batch), max(len(e.ids) for e in batch)
        mine = [size for piece, size in zip(pieces, sizes, strict=True) if id(piece[0]) in own]
        assert len(mine) <= splits
        assert max(mine) <= total / splits + longest


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_split_gives_the_same_run_also_with_dropout(run_recipe, tmp_path, packing, size):
    """E4: dropout is a function of the token, so that not even it depends on the split."""
    whole, split = (
        run_recipe(
            **DROPOUT,
            output=str(tmp_path / name),
            data={"packing": packing},
            train={"micro_batch_size": rows, "gradient_accumulation_steps": 24 // rows, "max_steps": 3},
        )[0]
        for name, rows in (("whole", 24), ("split", size))
    )
    if not packing:
        assert_same_run(whole, split)
    else:  # steps of packed rows hold the same rows only if they hold all
        assert losses(whole)[0] == pytest.approx(losses(split)[0], abs=1e-5)


def test_what_does_not_fit_late_is_cut_smaller_and_changes_nothing(run_recipe, tmp_path, monkeypatch, capsys):
    steps: dict[str, Any] = {"max_steps": 5, "micro_batch_size": 6}
    settings = {**DROPOUT, "data": {"packing": False}, "train": steps}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    memory = Memory(monkeypatch, tokens=120, since=3)
    written: list[str] = []
    save = writer.save_checkpoint
    monkeypatch.setattr(
        writer, "save_checkpoint", lambda at, *rest, **more: (written.append(at.name), save(at, *rest, **more))
    )
    short, _ = run_recipe(**settings, output=str(tmp_path / "short"))
    assert_same_run(short, plain)
    assert any(trial > 120 for trial in memory.trials[: len(memory.trials) // 2])
    assert max(memory.trials[-8:]) <= 120
    assert written == ["step_000002", "step_000005"], "written when memory ran out in step 3"
    for run in (short, plain):  # what was for resuming alone has been of use
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]


def test_a_run_resumed_after_that_begins_with_the_smaller_ones(run_recipe, tmp_path, monkeypatch):
    settings = {**DROPOUT, "data": {"packing": False}, "train": {"micro_batch_size": 6, "max_steps": 5}}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    memory = Memory(monkeypatch, tokens=120, since=2)
    real = micro_batches.MicroBatches.run

    def dies(runner: Any, step: int, *rest: Any) -> float:
        if step == 4:
            raise KeyError("killed")
        return real(runner, step, *rest)

    monkeypatch.setattr(micro_batches.MicroBatches, "run", dies)
    checkpointed = {**settings, "train": settings["train"] | {"checkpoint_every": 1}}
    with pytest.raises(KeyError):
        run_recipe(**checkpointed, output=str(tmp_path / "killed"))
    monkeypatch.setattr(micro_batches.MicroBatches, "run", real)
    memory.trials.clear()
    killed, _ = run_recipe(**checkpointed, output=str(tmp_path / "killed"), resume=True)
    assert_same_run(killed, plain)
    assert max(memory.trials) <= 120


def test_the_largest_micro_batch_is_tried_before_the_first_step(run_recipe, tmp_path, monkeypatch):
    """Rows of one step are short, of another long: what does not fit shows in the first seconds or never."""
    memory = Memory(monkeypatch, tokens=10**9)
    run_recipe(data={"packing": False}, train={"micro_batch_size": 2}, output=str(tmp_path / "ample"))
    in_steps = len(memory.trials)
    assert in_steps == 8, "this machine has memory enough to do without a trial"
    memory.trials.clear()
    monkeypatch.setattr(micro_batches, "_AMPLE", 10**9)
    monkeypatch.setattr(micro_batches, "_HARDLY_LARGER", 1.0)
    run_recipe(data={"packing": False}, train={"micro_batch_size": 2}, output=str(tmp_path / "one"))
    assert len(memory.trials) == in_steps + 1
    assert memory.trials[0] >= max(memory.trials[1:])
    memory.trials.clear()
    run_recipe(train={"micro_batch_size": 2}, output=str(tmp_path / "packed"))
    assert max(memory.trials[1:]) <= memory.trials[0]


@pytest.mark.parametrize("limit", [60, 130, 10**6])
def test_auto_takes_the_largest_that_fits_and_keeps_the_result(run_recipe, tmp_path, monkeypatch, limit):
    train = {"max_steps": 3, "micro_batch_size": 24, "gradient_accumulation_steps": 1}
    plain, _ = run_recipe(**DROPOUT, data={"packing": False}, train=train, output=str(tmp_path / "plain"))
    memory = Memory(monkeypatch, tokens=limit)
    train = {"max_steps": 3, "micro_batch_size": "auto", "batch_size": 24}
    auto, _ = run_recipe(**DROPOUT, data={"packing": False}, train=train, output=str(tmp_path / "auto"))
    assert_same_run(auto, plain)
    in_training = memory.trials[-3 * round(len(memory.trials) / 4) :]
    assert max(in_training[-3:]) <= limit
    if limit == 10**6:
        assert memory.trials == [memory.trials[0]] * 4, "one trial, then each step at once"
    else:
        assert max(trial for trial in memory.trials if trial <= limit) > limit / 2, "not needlessly small"


def test_a_single_example_that_does_not_fit_is_an_error_with_its_place(run_recipe, monkeypatch):
    Memory(monkeypatch, tokens=5)
    with pytest.raises(LoraError, match=r"a single example of \d+ tokens does not fit into memory") as error:
        run_recipe()
    assert "sums.jsonl" in (error.value.where or "")
    assert "gradient_checkpointing" in (error.value.fix or "")


def test_an_allocation_that_fails_is_known_for_what_it_is():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    for said in (
        "CUDA error: out of memory",  # of the driver, also for page-locked host memory
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8.",
        "std::bad_alloc",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(said)), said
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_are_not_taken_for_it(run_recipe, monkeypatch):
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(micro_batches, "training_loss", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_recipe()


LIMITED = """
import os, sys, torch
from lora_cli.training import micro_batches
real, seen = micro_batches.training_loss, []
def limited(model, batch, **options):
    if batch.tokens > 110 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(model, batch, **options)
micro_batches.training_loss = limited
sys.argv = ["lora", "train", sys.argv[1]]
from lora_cli.cli import main
main()
"""


def test_when_one_process_runs_out_all_cut_smaller(recipe_file, run_recipe, tmp_path):
    settings: dict[str, Any] = {**DROPOUT, "data": {"packing": False}, "train": {"micro_batch_size": 6, "max_steps": 3}}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    recipe = recipe_file(**settings, output=str(tmp_path / "two"))
    (tmp_path / "limited.py").write_text(LIMITED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "limited.py"), str(recipe)],
        capture_output=True, text=True, env=environment, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out of memory (in another process): each micro-batch is now cut into 2" in done.stderr
    assert_same_run(tmp_path / "two", plain)


def test_a_step_reads_its_losses_and_norm_back_once(run_recipe, monkeypatch):
    """A GPU works ahead of the program, until somebody asks for a number: then everything waits for it."""
    returned, read = [], []
    forward_backward, stack = micro_batches.MicroBatches._forward_backward, torch.stack

    def counted(self, *given):
        loss = forward_backward(self, *given)
        returned.append(loss)
        return loss

    def stacked(tensors, *rest):
        if tensors and any(tensors[0] is each for each in returned):
            read.append(len(tensors))
        return stack(tensors, *rest)

    monkeypatch.setattr(micro_batches.MicroBatches, "_forward_backward", counted)
    monkeypatch.setattr(torch, "stack", stacked)
    run, _ = run_recipe(train={"max_steps": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 4})
    assert all(isinstance(loss, torch.Tensor) and loss.ndim == 0 for loss in returned)
    assert read == [5, 5, 5]
    sums = [sum(each.item() for each in returned[at : at + 4]) for at in (0, 4, 8)]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] * line["target_tokens"] for line in lines] == pytest.approx(sums, rel=1e-12)
