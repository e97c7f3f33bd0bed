"""`lora runs A B`: what differs, and a difference with its interval where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import quiet_console
from safetensors.torch import load_file

from lora_cli.evaluation.evaluate import evaluate_run
from lora_cli.evaluation.gain import paired_gain
from lora_cli.recipe import load_recipe
from lora_cli.training.checkpoint import read_losses
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.train import train
from lora_cli.training.two_runs import compare_runs

SETTINGS = {"data": {"validation": 0.25}, "train": {"max_steps": 4}}


@pytest.fixture
def two(recipe_file, tmp_path: Path) -> tuple[Path, Path]:
    for name, rank in (("a", 4), ("b", 2)):
        path = recipe_file(**SETTINGS, adapter={"rank": rank}, output=str(tmp_path / "runs" / name))
        train(load_recipe(path), quiet_console())
    return tmp_path / "runs" / "a", tmp_path / "runs" / "b"


def test_two_runs_on_the_same_data_have_a_paired_interval(two, lora):
    document = json.loads(lora("runs", *two, "--json").out)
    assert document["settings"] == {"adapter.rank": [4, 2]}
    reports = [json.loads((run / "report.json").read_text()) for run in two]
    for name in ("steps", "tokens", "seconds", "best_validation_loss", "peak_memory_bytes", "verdict"):
        assert document["measured"][name] == [report[name] for report in reports]
    gain = document["gain"]
    scored = [evaluate_run(run, None, stride=None, device=None)["adapter"].loss for run in two]
    assert gain["gain"] == pytest.approx(scored[0] - scored[1], abs=1e-5)
    assert gain["low"] < gain["gain"] < gain["high"]
    losses = [read_losses(RunFolder(run).list_checkpoints()[-1]) for run in two]
    first, second = (each["validation.best"] for each in losses)
    assert gain == vars(paired_gain(first, second, losses[0]["validation.targets"]))
    back = compare_runs(two[1], two[0])["gain"]
    assert (back["gain"], back["low"]) == (pytest.approx(-gain["gain"]), pytest.approx(-gain["high"]))
    assert list(load_file(RunFolder(two[0]).list_checkpoints()[-1] / "state.safetensors"))  # where they are


def test_the_screen_says_which_is_better_and_how_sure(two, lora, monkeypatch):
    said = lora("runs", *two).out
    assert "adapter.rank" in said
    assert "hardly trained" in said
    assert "nats a token " in said
    assert "on the same 6 validation examples" in said
    monkeypatch.chdir(two[0].parents[1])
    assert lora("runs", "a", "b").out == lora("runs", *two).out  # by name, as the list shows them


def test_without_the_same_examples_it_says_why_there_is_no_interval(two, recipe_file, lora, tmp_path):
    shutil.rmtree(two[1] / "checkpoints")
    assert f"no interval of the difference: {two[1]} has no checkpoint" in lora("runs", *two).out
    other = recipe_file(data={"validation": 0.25}, train={"max_steps": 4, "seed": 7}, output=str(tmp_path / "c"))
    train(load_recipe(other), quiet_console())
    document = json.loads(lora("runs", two[0], tmp_path / "c", "--json").out)
    assert document["gain"] is None
    assert "not prepared from the same data" in document["why_no_gain"]
    assert document["settings"] == {"train.seed": [0, 7]}


def test_what_cannot_be_compared_is_said(two, lora, tmp_path):
    assert "this is not the folder of a run" in lora("runs", two[0], tmp_path).text
    assert "lora runs A B compares two" in lora("runs", *two, two[0]).text
    assert "--per-hour is for a list" in lora("runs", *two, "--per-hour", "1").text
