"""The training loop: E4 (any split of a step), E5 (checkpointing), E6 (evaluation is free of effects), E7 (resume)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import groups_of, losses, quiet_console, write_rows

from lora_cli.data.order import Order
from lora_cli.recipe import TrainRecipe, load_recipe
from lora_cli.studies.equalities import evaluated, runs_apart, split
from lora_cli.training.optimizer import learning_rate
from lora_cli.training.train import train

HARD = {  # everything on that could make a resumed run another run
    "quantization": "nf4",
    "dtype": "auto",
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "train": {"optimizer": "adamw_8bit", "max_steps": 60, "epochs": 100, "checkpoint_every": 3, "eval_every": 4},
}
EIGHT_BIT = {"rank": 64, "projections": ["q", "o"]}  # bitsandbytes keeps tensors of less than 4096 values in 32 bits


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_loss_falls_and_the_run_folder_is_complete(run_recipe, sums):
    run, report = run_recipe(data={"validation": 0.25}, train={"max_steps": 10})
    assert losses(run)[-1] < losses(run)[0] - 0.2
    assert report["best_validation_loss"] < report["base_validation_loss"]
    names = {path.name for path in run.iterdir()}
    assert names == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "adapter_last",
        "report.json",
        "report.html",
        "status.json",
        "prepared",
    }
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "tokens_per_second", "peak_memory_bytes"} <= set(line)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["data_files"].keys() == {str(sums)}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("packing", [False, True])
def test_any_split_of_a_step_is_the_same_step(bench, packing, quantization):
    """E4, with dropout."""
    assert split(bench, data={"packing": packing}, quantization=quantization) <= 1e-5


def test_a_step_of_weighted_rows_is_a_weighted_mean_however_it_is_split(run_recipe, sums, tmp_path):
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    curves = {}
    for name, weights, micro in [
        ("whole", (1, 3), 8),
        ("split", (1, 3), 1),
        ("scaled", (2, 6), 8),
        ("equal", (1, 1), 8),
    ]:
        data = write_rows(
            tmp_path / f"{name}.jsonl", [row | {"weight": weights[at % 2]} for at, row in enumerate(rows)]
        )
        run, _ = run_recipe(
            data={"train": str(data)},
            train={"micro_batch_size": micro, "gradient_accumulation_steps": 8 // micro},
            output=str(tmp_path / f"run-{name}"),
        )
        curves[name] = losses(run)
    assert curves["split"] == pytest.approx(curves["whole"], abs=1e-5)  # E4
    assert curves["scaled"] == pytest.approx(curves["whole"], abs=1e-5)
    assert curves["equal"] != pytest.approx(curves["whole"], abs=1e-3)


def test_first_gradient_norm_does_not_depend_on_the_split(run_recipe, tmp_path):
    norms = []
    for micro, accumulated in [(6, 1), (1, 6)]:
        run, _ = run_recipe(
            data={"packing": False},
            train={"micro_batch_size": micro, "gradient_accumulation_steps": accumulated, "max_steps": 1},
            output=str(tmp_path / f"run-{micro}"),
        )
        norms.append(json.loads((run / "metrics.jsonl").read_text())["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_two_processes_are_one_big_batch(recipe_file, tmp_path):
    curves = []
    for processes in (1, 2):
        recipe = recipe_file(
            adapter={"dropout": 0.2},
            train={"gradient_accumulation_steps": 4, "max_steps": 3},
            output=str(tmp_path / f"run-{processes}"),
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port"]
        command = [*launcher, "29617", "-m", "lora_cli", "train", str(recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        curves.append(losses(tmp_path / f"run-{processes}"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)  # E4
    assert len(curves[1]) == 3  # one process writes


def test_gradient_checkpointing_changes_nothing(bench):
    plain, saved = (bench.run(train={"gradient_checkpointing": each}) for each in (False, True))
    assert runs_apart(saved, plain) <= 1e-5  # E5


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_evaluating_in_between_changes_nothing_in_training_in_nf4(bench, optimizer):
    """E6, bitwise, on a 4-bit base and with dropout: neither weights nor random states may move.

    Schedule-free AdamW has to come back from the weights that are evaluated to those in training.
    """
    assert evaluated(bench, quantization="nf4", dtype="auto", train={"optimizer": optimizer}) == 0


def test_same_recipe_same_bytes_and_the_resolved_recipe_repeats_the_run(run_recipe, tmp_path):
    first, _ = run_recipe(output=str(tmp_path / "first"))
    again = load_recipe(first / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    train(again, quiet_console())
    assert adapter_bytes(first) == adapter_bytes(tmp_path / "again")
    assert losses(first) == losses(tmp_path / "again")


@pytest.mark.parametrize(
    ("own", "adapter"),
    [
        ({"optimizer": "adamw", "lora_plus_ratio": 4}, {}),
        ({"optimizer": "adamw_8bit", "lora_plus_ratio": 4}, EIGHT_BIT),
        ({"optimizer": "schedule_free_adamw", "lora_plus_ratio": 4}, {}),
    ],
    ids=["adamw", "adamw_8bit", "schedule_free_adamw"],
)
def test_resume_from_a_stop_between_steps_is_the_uninterrupted_run(recipe_file, tmp_path, monkeypatch, own, adapter):
    """E7 within one process: the run fails at a step after a checkpoint, as a crash would."""
    from lora_cli.training import loop

    settings = HARD | {"train": HARD["train"] | {"max_steps": 10} | own, "data": {"validation": 0.25}}
    settings["adapter"] = HARD["adapter"] | adapter
    straight = load_recipe(recipe_file(**settings, output=str(tmp_path / "straight")))
    train(straight, quiet_console())
    crashed = load_recipe(recipe_file(**settings, output=str(tmp_path / "crashed")))
    real = loop.Run._optimize

    def crash_at_eight(self, step):
        if step == 8:
            raise RuntimeError("power cut")
        return real(self, step)

    monkeypatch.setattr(loop.Run, "_optimize", crash_at_eight)
    with pytest.raises(RuntimeError, match="power cut"):
        train(crashed, quiet_console())
    monkeypatch.setattr(loop.Run, "_optimize", real)
    train(crashed, quiet_console(), resume=True)
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")
    assert adapter_bytes(tmp_path / "crashed") == adapter_bytes(tmp_path / "straight")
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / "step_000010" / name
        assert (tmp_path / "crashed" / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run did not reach step {steps}: {process.communicate()}")


@pytest.mark.slow
def test_killed_with_sigkill_then_resumed_is_the_uninterrupted_run(recipe_file, tmp_path):
    """E7 across processes. The straight run comes first, so that kill and resume have something to be compared with."""
    settings = HARD | {"data": {"validation": 0.25}}
    straight = recipe_file("straight.yaml", **settings, output=str(tmp_path / "straight"))
    killed = recipe_file("killed.yaml", **settings, output=str(tmp_path / "killed"))
    finish(start(straight))
    process = start(killed)
    wait_for_steps(tmp_path / "killed", 7, process)
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "killed")) < 60, "killed too late to prove anything"
    finish(start(killed, "--resume"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))  # no step twice
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "straight")


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_resume(recipe_file, tmp_path):
    recipe = recipe_file(train={"max_steps": 2000, "epochs": 10000})
    process = start(recipe)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    done = len(losses(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    # and it goes on from there
    changed = load_recipe(recipe)
    with pytest.raises(Exception, match="no longer the run that was started"):
        train(load_recipe(recipe, ["train.seed=5"]), quiet_console(), resume=True)
    assert changed.train.max_steps == 2000


def test_resume_is_refused_for_changed_data(run_recipe, recipe_file, sums, tmp_path):
    run, _ = run_recipe()
    rows = sums.read_text().splitlines()
    sums.write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(Exception, match="has other contents"):
        train(load_recipe(run / "recipe.yaml"), quiet_console(), resume=True)


def test_finished_run_is_not_resumed(run_recipe):
    run, _ = run_recipe()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(Exception, match="this run is finished"):
        train(load_recipe(run / "recipe.yaml"), quiet_console(), resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_learn(run_recipe, optimizer):
    run, _ = run_recipe(train={"optimizer": optimizer, "max_steps": 10})
    assert losses(run)[-1] < losses(run)[0] - 0.2


def test_best_and_last_adapter_are_both_kept(run_recipe):
    run, report = run_recipe(data={"validation": 0.25}, train={"learning_rate": 0.3, "max_steps": 6, "eval_every": 1})
    best, last = run / "adapter" / "adapter_model.safetensors", run / "adapter_last" / "adapter_model.safetensors"
    curve = [json.loads(line)["validation_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert report["best_validation_loss"] == min(curve)
    assert report["best_step"] == curve.index(min(curve)) + 1
    assert (best.read_bytes() == last.read_bytes()) == (report["best_step"] == 6)


def test_order_is_a_permutation_of_every_epoch_and_depends_on_seed_and_step_alone():
    rows = groups_of([[i] for i in range(23)])
    order = Order(rows, rows_per_micro_batch=2, gradient_accumulation_steps=3, seed=5)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch + 1, (epoch + 1) * order.steps_per_epoch + 1)
        seen = [example for step in steps for batch in order.step(step) for example in batch]
        assert sorted(seen) == list(range(23))
    assert order.step(1) != order.step(1 + order.steps_per_epoch)
    assert order.step(9) == Order(order.rows, 2, 3, seed=5).step(9)
    assert order.step(9) != Order(order.rows, 2, 3, seed=6).step(9)
    assert order.total_steps(2.5, None) == 10
    assert order.total_steps(100, 7) == 7


def test_schedules_in_closed_form():
    recipe = TrainRecipe(learning_rate=1.0, warmup_ratio=0.1, schedule="linear", min_learning_rate_ratio=0.2)
    rates = [learning_rate(recipe, step, 20) for step in range(1, 21)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.2 + 0.8 * 0.5)  # nine of eighteen steps after the warm-up
    cosine = TrainRecipe(learning_rate=1.0, warmup_ratio=0.0, schedule="cosine")
    assert learning_rate(cosine, 11, 20) == pytest.approx(0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), T_max=20)
    for step in range(1, 21):
        assert learning_rate(cosine, step, 20) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        reference.optimizer.step()
        reference.step()
    assert learning_rate(TrainRecipe(warmup_ratio=0.0, schedule="constant", learning_rate=3.0), 20, 20) == 3.0


def test_tensorboard_gets_what_metrics_get(recipe_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_file(trackers=["tensorboard"])
    train(load_recipe(recipe), quiet_console())
    (events,) = (tmp_path / "run" / "lora").glob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    logged = [event.value for event in reader.Scalars("loss")]
    assert logged == pytest.approx(losses(tmp_path / "run"), rel=1e-6)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["trackers"] == ["tensorboard"]
