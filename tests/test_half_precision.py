"""fp16, the dtype of GPUs without bf16: no autocast, a scaled loss, skipped updates that are told. On a CPU alike."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from conftest import losses, quiet_console

from lora_cli.recipe import load_recipe
from lora_cli.training import loop
from lora_cli.training.train import train


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_fp16_follows_fp32_also_with_layer_norms(model, request, run_recipe, tmp_path):
    """Autocast computes LayerNorm in fp32, so what follows got two dtypes: GPT-2 crashed in its first backward pass."""
    settings = {"base_model": str(request.getfixturevalue(model)), "adapter": {"target_modules": "all-linear"}}
    single, _ = run_recipe(**settings, dtype="fp32", output=str(tmp_path / "fp32"))
    half, report = run_recipe(**settings, dtype="fp16", output=str(tmp_path / "fp16"))
    assert losses(half) == pytest.approx(losses(single), abs=0.02)  # fp16 keeps three digits
    assert losses(half) != losses(single)
    assert report["skipped_steps"] == []


def test_updates_that_the_scaler_leaves_out_are_told(run_recipe, monkeypatch, recipe_file, capsys):
    """From a scale of 2^30 gradients of fp16 overflow (65,504 is its largest) until halving it has helped."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30))
    run, report = run_recipe(dtype="fp16", train={"max_steps": 24})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = [line["step"] for line in lines if "skipped" in line]
    assert left_out
    assert left_out == list(range(1, len(left_out) + 1)), "halving the scale comes to an end"
    assert report["skipped_steps"] == left_out
    assert [line["grad_norm"] is None for line in lines] == ["skipped" in line for line in lines]
    assert f"at a loss scale of {2.0**30:g}" in lines[0]["skipped"]
    assert f"at a loss scale of {2.0**29:g}" in lines[1]["skipped"]


def test_gradients_that_overflow_without_any_scale_stop_the_run():
    wrong = partial(loop.what_is_wrong, 3.0, first_loss=3.0, vocabulary=100)
    assert wrong(float("inf"), scaled=True) is None
    assert wrong(float("inf"), scaled=False) == "the gradient norm is inf"


def test_a_resumed_fp16_run_has_the_loss_scale_of_the_uninterrupted_one(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30))

    def run(name: str, *overrides: str, resume: bool = False) -> list[float]:
        path = recipe_file(dtype="fp16", train={"max_steps": 24, "checkpoint_every": 4}, output=str(tmp_path / name))
        train(load_recipe(path, list(overrides)), quiet_console(), resume=resume)
        return losses(tmp_path / name)

    whole = run("whole")
    real, calls = loop.Run._one_step, []

    def dies(self, step, *rest):
        if step == 10 and not calls:
            calls.append(step)
            raise KeyboardInterrupt
        return real(self, step, *rest)

    monkeypatch.setattr(loop.Run, "_one_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert run("killed", resume=True) == whole
