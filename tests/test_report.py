"""The report of a run: its measurements are those of the adapter that is shipped, found a second way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, quiet_console
from safetensors.torch import load_file

from lora_cli.errors import CheckFailed, LoraError
from lora_cli.evaluation.evaluate import evaluate_run
from lora_cli.recipe import load_recipe
from lora_cli.training import loop, validation
from lora_cli.training.run_folder import read_metrics
from lora_cli.training.train import train


@pytest.fixture
def quick_reports() -> None:
    """Here reports are made in full."""


LEARNS = {"data": {"validation": 0.25}, "train": {"max_steps": 8, "eval_every": 2}}


def test_the_gain_is_what_lora_eval_finds_on_the_same_rows(run_recipe):
    run, report = run_recipe(**LEARNS)
    scores = evaluate_run(run, None, stride=None, device=None)
    found = report["validation"]
    assert found["before"] == pytest.approx(scores["base"].loss, abs=1e-5)
    assert found["after"] == pytest.approx(scores["adapter"].loss, abs=1e-5)
    assert found["gain"] == pytest.approx(found["before"] - found["after"])
    assert found["low"] < found["gain"] < found["high"]
    assert (found["examples"], found["targets"]) == (6, scores["base"].target_tokens)
    assert found["before"] == report["base_validation_loss"]
    assert found["after"] == report["best_validation_loss"]


def test_update_sizes_are_those_of_the_adapter_that_is_shipped_and_not_of_the_last(run_recipe, monkeypatch, tiny_llama):
    own, scores = validation.example_losses, iter([1.0, 0.1, 0.5, 0.6, 0.7])  # of base and steps: the first is best

    def scored(*arguments: Any, **options: Any) -> Any:
        found, targets = own(*arguments, **options)
        return torch.full_like(found, next(scores)), targets

    monkeypatch.setattr(validation, "example_losses", scored)
    run, report = run_recipe(data={"validation": 0.25}, train={"max_steps": 4, "eval_every": 1})
    assert report["best_step"] == 1
    weights = load_file(tiny_llama / "model.safetensors")
    sizes = {}
    for place in ("adapter", "adapter_last"):
        stored = load_file(run / place / "adapter_model.safetensors")
        modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in stored}
        sizes[place] = {
            each: (
                2  # alpha 8 over rank 4
                * stored[f"base_model.model.{each}.lora_B.weight"]
                @ stored[f"base_model.model.{each}.lora_A.weight"]
            )
            .norm()
            .item()
            / weights[f"{each}.weight"].norm().item()
            for each in modules
        }
    assert report["update_sizes"]["layers"] == pytest.approx(sizes["adapter"], rel=1e-4)
    assert report["update_sizes"]["layers"] != pytest.approx(sizes["adapter_last"], rel=1e-2)


@pytest.fixture
def scored(monkeypatch):
    """Makes the validation losses of a run: those of its base and its evaluations."""

    own = validation.example_losses

    def make(*losses: float) -> None:
        scores = iter(losses)

        def found(*arguments: Any, **options: Any) -> Any:
            _, targets = own(*arguments, **options)
            return targets * next(scores), targets

        monkeypatch.setattr(validation, "example_losses", found)

    return make


WAITS = {
    "data": {"validation": 0.25},
    "train": {"max_steps": 30, "eval_every": 2, "checkpoint_every": 3, "patience": 2},
}


def test_patience_ends_a_run_with_its_best_adapter_and_the_schedule_of_the_whole(run_recipe, scored, tmp_path):
    scored(9.0, 5.0, 4.0, 4.5, 4.1)
    run, report = run_recipe(**WAITS)
    rates = [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl")]
    assert (report["steps"], report["best_step"], report["best_validation_loss"]) == (8, 4, pytest.approx(4.0))
    assert report["ended_early"] == {"evaluations_since_best": 2, "planned_steps": 30}
    assert "ended early, after step 8 of 30: 2 evaluations in a row" in (run / "report.html").read_text()
    scored(*[9.0 - step / 10 for step in range(20)])
    whole, report = run_recipe(**WAITS, output=str(tmp_path / "whole"))
    assert (report["steps"], report["ended_early"]) == (30, None)
    assert [line["learning_rate"] for line in read_metrics(whole / "metrics.jsonl")][:8] == rates
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 8)


def test_a_run_that_ended_early_is_finished_and_goes_on_with_more_patience(run_recipe, recipe_file, scored):
    scored(9.0, 5.0, 6.0, 6.0)
    run, _ = run_recipe(**WAITS)
    with pytest.raises(LoraError, match="this run is finished") as caught:
        run_recipe(resume=True, **WAITS)
    assert "--set train.patience=4 --allow train.patience" in str(caught.value)
    scored(6.0, 6.0, 5.5)
    recipe = load_recipe(recipe_file(**WAITS), ["train.patience=4"])
    report = train(recipe, quiet_console(), resume=True, allow=["train.patience"])
    assert (report["steps"], report["ended_early"]["evaluations_since_best"]) == (10, 4)
    assert len(losses(run)) == 10


@pytest.mark.parametrize("killed_at", [4, 6, 8])
def test_a_killed_run_has_the_same_patience_when_it_goes_on(run_recipe, scored, monkeypatch, tmp_path, killed_at):
    scored(9.0, 5.0, 4.0, 4.5, 4.1)
    straight, _ = run_recipe(**WAITS, output=str(tmp_path / "straight"))
    scored(9.0, 5.0, 4.0, 4.5, 4.1)
    real = loop.Run._optimize

    def optimize(self: Any, step: int) -> Any:
        if step == killed_at:
            raise KeyError
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_optimize", optimize)
        with pytest.raises(KeyError):
            run_recipe(**WAITS)
    scored(*[5.0, 4.0, 4.5, 4.1][{4: 1, 6: 1, 8: 3}[killed_at] :])  # from the checkpoint at step 3 or 6 on
    run, report = run_recipe(resume=True, **WAITS)
    assert report["ended_early"] == {"evaluations_since_best": 2, "planned_steps": 30}
    for place in ("adapter", "adapter_last"):
        name = f"{place}/adapter_model.safetensors"
        assert (run / name).read_bytes() == (straight / name).read_bytes()


def test_general_text_is_scored_without_and_with_the_adapter(run_recipe, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("Nothing of this has to do with sums. It is about weather, bread and old houses. " * 20)
    _, report = run_recipe(**LEARNS)
    other, with_own = run_recipe(data={"general_text": str(text)}, output=str(tmp_path / "own"))
    assert report["general_text"]["source"] == "built-in English prose"
    assert with_own["general_text"]["source"] == str(text)
    scores = evaluate_run(other, text, stride=None, device=None)
    assert with_own["general_text"]["before"] == pytest.approx(scores["base"].loss, rel=0.02)  # other windows
    assert with_own["general_text"]["change"] == pytest.approx(scores["adapter"].loss - scores["base"].loss, rel=0.1)


def test_a_general_text_that_cannot_be_used_is_told_before_training(run_recipe, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(Exception, match="too few to measure anything on"):
        run_recipe(data={"general_text": str(tmp_path / "short.txt")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_no_gain_on_held_out_data_ends_with_exit_code_3_and_a_report(recipe_file, monkeypatch):
    own, times_worse = validation.example_losses, iter([1.0, 1.5])  # base, and the adapter after its last step

    def scored(*arguments: Any, **options: Any) -> Any:
        found, targets = own(*arguments, **options)
        return found * next(times_worse), targets

    monkeypatch.setattr(validation, "example_losses", scored)
    recipe = load_recipe(recipe_file(data={"validation": 0.25}))
    with pytest.raises(CheckFailed, match="no better than its base model") as caught:
        train(recipe, quiet_console())
    assert caught.value.exit_code == 3
    report = json.loads((Path(recipe.output) / "report.json").read_text())
    assert report["verdict"] == "nothing learned"
    assert report["learned"], "B is not zero; it is just no good"
    assert report["validation"]["gain"] <= 0
    assert json.loads((Path(recipe.output) / "status.json").read_text())["state"] == "nothing learned"


def test_page_and_picture_are_written_and_the_page_shows_the_verdict(run_recipe):
    run, report = run_recipe(**LEARNS)
    page = (run / "report.html").read_text()
    assert "The adapter is hardly trained: it had 8 optimizer steps." in page
    assert f"{math.exp(report['base_validation_loss']):.2f}" in page
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(losses(run)) == 8


def test_nothing_is_left_in_the_home_folder(recipe_file, tmp_path):
    """Of matplotlib above all, which keeps a list of fonts there."""
    import os
    import subprocess
    import sys

    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "HF_HOME")}
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(recipe_file(train={"max_steps": 2}))],
        env=environment | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == []
    left = [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert left == []


@pytest.mark.parametrize(("limit", "clipped"), [(1e-9, 4), (1e9, 0)])
def test_steps_whose_gradients_were_clipped_are_counted_also_over_a_resume(run_recipe, monkeypatch, limit, clipped):
    settings = {"train": {"max_grad_norm": limit, "checkpoint_every": 1}}
    own = loop.Run._one_step

    def dies(run, step, *rest):
        if step == 3:
            raise KeyError("killed")
        return own(run, step, *rest)

    monkeypatch.setattr(loop.Run, "_one_step", dies)
    with pytest.raises(KeyError):
        run_recipe(**settings)
    monkeypatch.setattr(loop.Run, "_one_step", own)
    run, report = run_recipe(**settings, resume=True)
    assert report["clipped_steps"] == clipped
    page = (run / "report.html").read_text()
    assert f"{clipped} of 4 steps ({25 * clipped} %)" in page
    assert ("gradients were clipped in" in page) is (clipped > 2)
