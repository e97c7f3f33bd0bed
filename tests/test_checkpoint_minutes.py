"""Checkpoints by the clock: a run of any length loses minutes, and is the same run whether it needed one or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import losses, quiet_console
from safetensors.torch import load_file

from lora_cli.recipe import TrainRecipe, load_recipe
from lora_cli.training import loop, micro_batches, writer
from lora_cli.training.run_folder import RunFolder, read_metrics
from lora_cli.training.train import train

ALWAYS = 1e-9  # minutes: after each step


class PowerCut(BaseException):
    pass


def cut_at(patch: pytest.MonkeyPatch, at: int) -> None:
    real = loop.Run._optimize

    def optimize(self: Any, step: int) -> Any:
        if step == at:
            raise PowerCut
        return real(self, step)

    patch.setattr(loop.Run, "_optimize", optimize)


def names(run: Path) -> list[str]:
    return [each.name for each in RunFolder(run).list_checkpoints()]


def without_clocks(run: Path) -> list[dict[str, Any]]:
    measured = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    return [{key: line[key] for key in line if key not in measured} for line in read_metrics(run / "metrics.jsonl")]


def assert_same(run: Path, straight: Path) -> None:
    assert without_clocks(run) == without_clocks(straight)
    one, other = (RunFolder(each).list_checkpoints()[-1] for each in (run, straight))
    assert one.name == other.name
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == (
        straight / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("every", [None, 4])
def test_a_run_that_is_killed_goes_on_from_the_clocks_checkpoint_to_the_same_bytes(
    every, run_recipe, tmp_path, monkeypatch
):
    """E7, and without dropout, validation or a schedule left out."""
    settings = {
        "adapter": {"dropout": 0.1},
        "data": {"validation": 0.25},
        "train": {"max_steps": 8, "eval_every": 3, "checkpoint_every": every},
    }
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    settings["train"]["checkpoint_minutes"] = ALWAYS
    undisturbed, _ = run_recipe(**settings, output=str(tmp_path / "undisturbed"))
    assert_same(undisturbed, straight)
    with monkeypatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(PowerCut):
            run_recipe(**settings)
    run = tmp_path / "run"
    kept = ["step_000004"] if every else []
    best = ["step_000003"] if "step_000003" in names(run) else []
    assert names(run) == [*best, *kept, "step_000006"], "one at a time, beside those of checkpoint_every"
    again: list[int] = []
    real = loop.Run._optimize

    def optimize(self: Any, step: int) -> Any:
        again.append(step)
        return real(self, step)

    monkeypatch.setattr(loop.Run, "_optimize", optimize)
    train(load_recipe(run / "recipe.yaml"), quiet_console(), resume=True)
    assert again == [7, 8]
    assert_same(run, straight)


def test_by_default_a_run_without_any_other_setting_writes_one_each_15_minutes(run_recipe, monkeypatch, tmp_path):
    """On a clock that goes on by four minutes a step."""
    now, written = [0.0], []
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    own_step, own_save = loop.Run._one_step, writer.save_checkpoint

    def one_step(self: Any, step: int, *rest: Any) -> None:
        own_step(self, step, *rest)
        now[0] += 240

    def save(folder: Path, *arguments: Any, **settings: Any) -> None:
        written.append(folder.name)
        own_save(folder, *arguments, **settings)

    monkeypatch.setattr(loop.Run, "_one_step", one_step)
    monkeypatch.setattr(writer, "save_checkpoint", save)
    run_recipe(train={"max_steps": 10})
    assert written == ["step_000004", "step_000008", "step_000010"]
    assert TrainRecipe().checkpoint_minutes == 15


def test_null_turns_it_off(run_recipe, monkeypatch):
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=iter(range(0, 10**9, 10**5)).__next__))
    run, _ = run_recipe(train={"max_steps": 4, "checkpoint_minutes": None})
    assert names(run) == ["step_000004"]


def poison(patch: pytest.MonkeyPatch, row: int) -> None:
    """The loss of one row is nan."""
    real = micro_batches.MicroBatches.run

    def run(self: Any, step: int, batches: Any, *rest: Any, **named: Any) -> tuple[float, float]:
        loss, norm = real(self, step, batches, *rest, **named)
        return float("nan") if any(each.row == row for batch in batches for each in batch) else loss, norm

    patch.setattr(micro_batches.MicroBatches, "run", run)


@pytest.mark.parametrize("killed_at", [None, 3, 7])
def test_rewinding_never_goes_back_to_a_checkpoint_of_the_clock(killed_at, run_recipe, tmp_path, monkeypatch):
    """Or a run would depend on how fast it is, and on when it was interrupted."""
    seen: list[int] = []
    settings = {
        "data": {"packing": False},
        "train": {"max_steps": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
        | {"checkpoint_every": 4, "on_nan": "rewind"},
    }
    with monkeypatch.context() as patch:
        real = micro_batches.MicroBatches.run
        patch.setattr(
            micro_batches.MicroBatches,
            "run",
            lambda self, step, batches, *rest: (seen.append(batches[0][0].row), real(self, step, batches, *rest))[1],
        )
        run_recipe(**settings, output=str(tmp_path / "plain"))
    poison(monkeypatch, seen[6])  # of step 7; the clock's are of 5 and 6, then
    straight, report = run_recipe(**settings, output=str(tmp_path / "straight"))
    assert report["rewound_from_steps"] == [7]
    settings["train"]["checkpoint_minutes"] = ALWAYS
    if killed_at is None:
        run, _ = run_recipe(**settings)
    else:
        with monkeypatch.context() as patch:
            cut_at(patch, killed_at)
            with pytest.raises(PowerCut):
                run_recipe(**settings)
        run = tmp_path / "run"
        assert names(run)[-1] == f"step_{killed_at - 1:06d}"
        train(load_recipe(run / "recipe.yaml"), quiet_console(), resume=True)
    assert losses(run) == losses(straight)
    one, other = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_that_was_written_when_a_run_was_stopped_is_for_resuming_alone_too(run_recipe, tmp_path, monkeypatch):
    """The next life goes back to the planned one."""
    settings = {"train": {"max_steps": 8, "checkpoint_every": 4, "on_nan": "rewind"}}
    run, _ = run_recipe(**settings)
    session = SimpleNamespace(recipe=SimpleNamespace(train=load_recipe(run / "recipe.yaml").train), total_steps=9)
    run_writer = writer.RunWriter(session, RunFolder(run), *[None] * 6)  # type: ignore[arg-type]
    (run / "checkpoints" / "step_000006").mkdir()
    assert [each.name for each in run_writer.planned()] == ["step_000004", "step_000008"]
    run_writer.planned_too = 6
    assert [each.name for each in run_writer.planned()] == ["step_000004", "step_000006", "step_000008"]
