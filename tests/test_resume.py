"""E7, and what may not be lost: damaged checkpoints, other recipes and data, locks, full disks, steps that go wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, quiet_console, write_rows
from rich.console import Console
from safetensors.torch import load_file

from lora_cli.errors import CheckFailed, DiskError, Interrupted, LoraError
from lora_cli.recipe import load_recipe
from lora_cli.training import checkpoint, loop, micro_batches, opening, run_folder, run_lock, writer
from lora_cli.training.divergence import what_is_wrong
from lora_cli.training.random_states import restore_random_states
from lora_cli.training.run_folder import RunFolder, append, read_metrics
from lora_cli.training.run_lock import locked
from lora_cli.training.stopping import Stop
from lora_cli.training.stored import Random
from lora_cli.training.train import train

MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes")  # of the machine, not of the run


class PowerCut(BaseException):
    """Ends a run as nothing in it can."""


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line, but for what was measured with a clock."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(run / "metrics.jsonl")]


def assert_same_run(run: Path, straight: Path) -> None:
    """Losses, metrics, adapters, optimizer and random states, bit for bit."""
    assert metrics(run) == metrics(straight)
    for name in ("adapter", "adapter_last"):
        for file in sorted((straight / name).glob("*")):
            assert (run / name / file.name).read_bytes() == file.read_bytes(), file.name
    newest = [RunFolder(each).list_checkpoints()[-1] for each in (run, straight)]
    assert newest[0].name == newest[1].name
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.safetensors"):
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name


def resume(run: Path, *overrides: str, console: Console | None = None, **options: Any) -> dict[str, Any]:
    return train(load_recipe(run / "recipe.yaml", list(overrides)), console or quiet_console(), resume=True, **options)


@pytest.fixture
def heard(tmp_path: Path) -> Any:
    """A console, and what was said on it."""

    class Heard(Console):
        @property
        def said(self) -> str:
            self.file.flush()
            return (tmp_path / "said").read_text()

    with (tmp_path / "said").open("w") as stream:
        yield Heard(file=stream, width=300)


@pytest.fixture
def crashed(run_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(run that ended at a step as if the power had gone, the same run without that); more settings as keywords."""

    def make(at: int = 6, **settings: Any) -> tuple[Path, Path]:
        settings = {
            "adapter": {"dropout": 0.1},
            "data": {"validation": 0.25},
            **settings,
            "train": {"max_steps": 8, "checkpoint_every": 2, "eval_every": 2, **settings.get("train", {})},
        }
        straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
        real = loop.Run._optimize

        def optimize(self: Any, step: int) -> Any:
            if step == at:
                raise PowerCut
            return real(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_optimize", optimize)
            with pytest.raises(PowerCut):
                run_recipe(**settings, output=str(tmp_path / "crashed"))
        return tmp_path / "crashed", straight

    return make


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # another file may be a hard link to the same bytes
    path.write_bytes(content)


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def test_any_damage_to_any_file_of_the_newest_checkpoint_is_told_and_the_one_before_it_used(crashed, heard, tmp_path):
    run, straight = crashed()
    files = [
        path.relative_to(run) for path in sorted(RunFolder(run).list_checkpoints()[-1].rglob("*")) if path.is_file()
    ]
    assert len(files) == 8
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    for number, (file, damage) in enumerate((file, each) for file in files for each in (flip, halve, Path.unlink)):
        if number % 5:  # a fifth of them all the way; the rest as far as the choice of the checkpoint
            shutil.copytree(whole / file.parts[0] / file.parts[1], tmp_path / "one")
            damage(tmp_path / "one" / Path(*file.parts[2:]))
            with pytest.raises(checkpoint.Damaged):
                checkpoint.verify(tmp_path / "one")
            shutil.rmtree(tmp_path / "one")
            continue
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        damage(run / file)
        resume(run, console=heard)
        assert_same_run(run, straight)
        assert "set aside as damaged_step_000004" in heard.said
        assert (run / "checkpoints" / "damaged_step_000004").is_dir()


def test_an_intact_checkpoint_verifies_and_one_file_more_does_not(crashed):
    run, _ = crashed()
    newest = RunFolder(run).list_checkpoints()[-1]
    assert checkpoint.verify(newest)["step"] == 4
    (newest / "more").touch()
    with pytest.raises(checkpoint.Damaged, match="more: this does not belong here"):
        checkpoint.verify(newest)


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.safetensors", "best/adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_damage_and_nothing_to_wait_for(crashed, heard, name):
    run, straight = crashed()
    file = RunFolder(run).list_checkpoints()[-1] / name
    file.unlink()
    os.mkfifo(file)
    resume(run, console=heard)
    assert f"{name}: this is a pipe or device where a file is expected" in heard.said
    assert_same_run(run, straight)


@pytest.mark.parametrize("name", ["environment.json", ".lock", "status.json", "metrics.jsonl"])
def test_a_pipe_in_the_run_folder_is_refused_or_replaced(crashed, name):
    run, straight = crashed()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    if name in ("environment.json", ".lock"):
        with pytest.raises(LoraError, match=rf"{name}: "):
            resume(run)
    else:
        resume(run)
        assert_same_run(run, straight)


@pytest.mark.parametrize("checkpointing", ["none", "offload"])
def test_qa_lora_goes_on_bit_for_bit_also_with_offloading_packing_and_dropout(crashed, run_recipe, checkpointing):
    settings: dict[str, Any] = {"quantization": "int4", "dtype": "fp32"}
    settings |= {"adapter": {"method": "qa_lora", "dropout": 0.1}}
    settings |= {"data": {"validation": 0.25, "packing": True, "max_seq_len": 64}}
    own = {"max_steps": 4, "gradient_checkpointing": checkpointing}
    run, straight = crashed(3, **settings, train=own)
    resume(run)
    assert_same_run(run, straight)
    if checkpointing == "offload":  # and it is the run that keeps its blocks' inputs where they are
        plain, _ = run_recipe(**settings, output=f"{run}-full", train=own | {"gradient_checkpointing": "full"})
        assert losses(plain) == losses(run)
        stored = [load_file(each / "adapter" / "adapter_model.safetensors") for each in (plain, run)]
        assert all(torch.equal(stored[0][name], value) for name, value in stored[1].items())


def test_with_every_checkpoint_damaged_the_run_begins_again_and_is_the_same(crashed, heard):
    run, straight = crashed()
    for each in RunFolder(run).list_checkpoints():
        halve(each / "adapter.safetensors")
    resume(run, console=heard)
    assert "resuming after step 0" in heard.said
    assert_same_run(run, straight)


def test_a_checkpoint_has_the_metrics_and_the_best_adapter_so_that_damage_to_these_is_mended(crashed):
    run, straight = crashed()
    (run / "metrics.jsonl").write_text("nonsense\n")
    halve(run / "adapter" / "adapter_model.safetensors")
    resume(run)
    assert_same_run(run, straight)


def test_the_best_checkpoint_stays_beside_the_newest(run_recipe, monkeypatch):
    from lora_cli.training import validation

    scores = iter([9.0, 5.0, 3.0, 4.0, 4.5, 6.0, 7.0])  # of the base and of six steps

    def scored(*_: Any, **__: Any) -> Any:
        return torch.tensor([next(scores)], dtype=torch.float64), torch.tensor([1])

    monkeypatch.setattr(validation, "example_losses", scored)
    train = {"max_steps": 6, "eval_every": 1, "checkpoint_every": 1, "keep_checkpoints": 2}
    run, report = run_recipe(data={"validation": 0.25}, train=train)
    assert report["best_step"] == 2
    names = [path.name for path in RunFolder(run).list_checkpoints()]
    assert names == ["step_000002", "step_000005", "step_000006"]
    trained = load_file(run / "checkpoints" / "step_000002" / "adapter.safetensors")
    for place in (run / "adapter", *(run / "checkpoints" / name / "best" for name in names)):
        shipped = load_file(place / "adapter_model.safetensors")
        assert all(torch.equal(shipped[f"base_model.model.{name}.weight"], each) for name, each in trained.items())


def test_random_states_of_every_generator_go_on(run_recipe, tmp_path):
    import random

    import numpy as np

    run, _ = run_recipe(train={"checkpoint_every": 4})
    newest = RunFolder(run).list_checkpoints()[-1]
    states = load_file(newest / "state.safetensors")
    randoms = Random.model_validate_json(json.dumps(json.loads((newest / "state.json").read_text())["random"]))
    restore_random_states(states, randoms)
    expected = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    restore_random_states(states, randoms)
    again = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    assert again == expected


def test_a_checkpoint_of_an_older_format_is_refused_by_its_number(crashed):
    run, _ = crashed()
    newest = RunFolder(run).list_checkpoints()[-1]
    (newest / "manifest.json").unlink()
    (newest / "state.json").write_text('{"format": 2}')
    with pytest.raises(LoraError, match="checkpoint format 2 is not 4"):
        resume(run)


def test_a_kill_between_two_moves_leaves_no_half_folder(crashed):
    """What a process leaves that dies while it writes: temporary folders, and a place whose successor never came."""
    run, straight = crashed()
    (run / ".adapter.tmp-123").mkdir()
    (run / ".status.json.tmp-9").write_text("{")
    (run / "checkpoints" / ".step_000006.tmp-123").mkdir()
    (run / "checkpoints" / "step_000004").rename(run / "checkpoints" / ".step_000004.old-123")
    resume(run)
    assert_same_run(run, straight)
    assert list(run.rglob(".*")) == []


# ── what changed ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_changed_setting_is_refused_with_a_diff_unless_it_is_allowed(crashed):
    run, straight = crashed()
    changes = ("train.max_steps=10", "train.learning_rate=0.02")
    with pytest.raises(LoraError) as caught:
        resume(run, *changes, allow=["train.max_steps"])
    assert "train.learning_rate: 0.01 → 0.02" in str(caught.value)
    assert "max_steps" not in str(caught.value)
    assert "--allow train.learning_rate" in str(caught.value)
    report = resume(run, *changes, allow=["train"])
    assert report["steps"] == 10
    assert metrics(run)[:4] == metrics(straight)[:4]
    assert metrics(run)[6]["learning_rate"] != metrics(straight)[6]["learning_rate"]
    assert load_recipe(run / "recipe.yaml").train.max_steps == 10
    (history,) = json.loads((run / "environment.json").read_text())["changed"]
    assert history["after_step"] == 4
    assert "train.learning_rate: 0.01 → 0.02" in history["changes"]
    with pytest.raises(LoraError, match="this run is finished"):
        resume(run)


def test_a_finished_run_can_be_given_more_epochs(run_recipe):
    run, _ = run_recipe(train={"max_steps": 3})
    with pytest.raises(LoraError, match=r"--allow train\.max_steps"):
        resume(run, "train.max_steps=5")
    assert resume(run, "train.max_steps=5", allow=["train.max_steps"])["steps"] == 5
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_a_run_from_before_a_setting_was_retired_resumes_where_that_was_off(crashed):
    run, straight = crashed()
    stored = run / "recipe.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("  compile: false\n", "  compile: false\n  offload_activations: true\n"))
    with pytest.raises(
        LoraError, match=r"recipe\.yaml:\d+:3: train\.offload_activations is no longer a setting"
    ) as said:
        resume(run)
    assert "remove it, which does not change the result" in str(said.value)
    stored.write_text(text.replace("  compile: false\n", "  compile: false\n  offload_activations: false\n"))
    resume(run)
    assert_same_run(run, straight)


def test_an_allow_that_names_nothing_is_refused(crashed):
    run, _ = crashed()
    with pytest.raises(LoraError, match=r"did you mean train\.epochs"):
        resume(run, allow=["train.epoch"])


def test_changed_data_are_named_and_can_be_allowed(crashed, sums):
    run, _ = crashed()
    write_rows(sums, [*(json.loads(row) for row in sums.read_text().splitlines()), {"prompt": "a", "completion": "b"}])
    with pytest.raises(LoraError) as caught:
        resume(run)
    assert f"data: {sums} has other contents" in str(caught.value)
    assert resume(run, allow=["data"])["steps"] == 8


def test_another_version_of_what_computes_is_refused_and_other_threads_are_told(crashed, heard):
    run, straight = crashed()
    path = run / "environment.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"search": 1}))
    with pytest.raises(LoraError, match="version of how the base's weights are quantized: 1 → "):
        resume(run)
    path.write_text(json.dumps(own | {"torch": "1.0", "device": "cpu (64 threads)"}))
    with pytest.raises(LoraError, match=r"version of torch: 1\.0 → "):
        resume(run)
    resume(run, console=heard, allow=["versions"])
    assert "the same from here except for rounding" in heard.said
    assert "device: cpu (64 threads) → cpu" in heard.said
    assert_same_run(run, straight)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_environment_is_a_clear_error(crashed, content):
    run, _ = crashed()
    (run / "environment.json").write_text(content)
    with pytest.raises(LoraError, match="what this run was trained on cannot be read"):
        resume(run)


def test_the_largest_micro_batch_is_not_tried_again_unless_something_changed(crashed, monkeypatch):
    """A trial costs as much as a step, and is for finding out what the run has shown already."""
    run, straight = crashed(train={"max_steps": 10})
    tried: list[int] = []
    real = micro_batches.MicroBatches.try_largest

    def try_largest(self: Any, first: int, *rest: Any) -> int:
        tried.append(first)
        return real(self, first, *rest)

    monkeypatch.setattr(micro_batches.MicroBatches, "try_largest", try_largest)
    resume(run)
    assert tried == []
    assert_same_run(run, straight)
    resume(run, "train.max_steps=11", allow=["train.max_steps"])
    assert tried == [11]


# ── signals and time ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_signal_in_the_middle_of_an_evaluation_ends_it_and_the_rest_of_it_comes_first(
    run_recipe, tmp_path, monkeypatch
):
    settings = {"data": {"validation": 0.25}, "train": {"max_steps": 6, "eval_every": 2}}
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    own = loop.Validator.score_step

    def signalled(self: Any, state: Any) -> Any:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Validator, "score_step", signalled)
        with pytest.raises(Interrupted, match="stopped after step 4 of 6") as caught:
            run_recipe(**settings, output=str(tmp_path / "stopped"))
    assert caught.value.exit_code == 143
    run = tmp_path / "stopped"
    assert len(metrics(run)) == 3, "the line of step 4 waits for its evaluation"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    resume(run)
    assert_same_run(run, straight)


def test_a_signal_while_the_base_is_evaluated_ends_the_run_before_it_begins(run_recipe, monkeypatch, tmp_path):
    settings = {"data": {"validation": 0.25}}
    own = loop.Validator.score_base
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Validator, "score_base", lambda self, state: (os.kill(os.getpid(), signal.SIGINT), own(self, state))[1]
        )
        with pytest.raises(Interrupted, match="before step 1") as caught:
            run_recipe(**settings)
    assert caught.value.exit_code == 130
    assert resume(tmp_path / "run")["steps"] == 4


def test_a_signal_while_the_model_is_loaded_ends_the_run_at_once(run_recipe, monkeypatch, tmp_path):
    real = opening.open_session

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr("lora_cli.training.train.open_session", signalled)
    with pytest.raises(Interrupted, match="SIGTERM before its first step") as caught:
        run_recipe()
    assert caught.value.exit_code == 143
    monkeypatch.setattr("lora_cli.training.train.open_session", real)
    run_recipe()  # the folder is not taken


def test_a_signal_that_comes_in_a_finalizer_is_not_lost(run_recipe, monkeypatch):
    """Python drops what is raised there."""

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(10_000))  # the handler runs in here

    def forever(*_: Any) -> None:
        Finalized()
        for _ in range(600):
            time.sleep(0.05)
        pytest.fail("the signal was lost")

    monkeypatch.setattr("lora_cli.training.train.open_session", forever)
    with pytest.raises(Interrupted, match="SIGINT before its first step"):
        run_recipe()


def test_max_hours_ends_a_run_with_a_checkpoint(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(train={"max_steps": 100_000, "epochs": 1_000_000}))
    with pytest.raises(Interrupted, match="its time was up") as caught:
        train(recipe, quiet_console(), max_hours=6 / 3600)
    assert caught.value.exit_code == 130
    (newest,) = RunFolder(tmp_path / "run").list_checkpoints()
    assert newest.name == f"step_{len(losses(tmp_path / 'run')):06d}"


def test_the_clock_leaves_time_for_a_step_and_a_checkpoint(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lora_cli.training.stopping.time.monotonic", lambda: now[0])
    stop = Stop(lambda text: None, max_seconds=60, processes=1)
    for seconds in (10, 20, 10):  # ends at 10, 30, 40; two more of the longest would end at 80
        asked = stop.requested
        now[0] += seconds
        stop.watch_the_clock(seconds)
    assert (asked, stop.requested) == (True, True)
    stop = Stop(lambda text: None, max_seconds=60, processes=1)
    now[0] += 10
    stop.watch_the_clock(10)
    assert not stop.requested


# ── one writer ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(crashed):
    run, straight = crashed()
    with locked(run, print), pytest.raises(LoraError, match=rf"another process .*process {os.getpid()} on"):
        resume(run)
    resume(run)
    assert_same_run(run, straight)


def test_the_lock_of_a_process_that_was_killed_is_stale_and_told(tmp_path):
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "run", lambda text: None):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    told: list[str] = []
    with locked(tmp_path / "run", told.append):
        assert f"process {child} on" in told[0]
        assert "stale" in told[0]
    with locked(tmp_path / "run", told.append):
        assert len(told) == 1, "who ends in order leaves nothing to tell"


def test_of_many_that_want_a_folder_at_once_one_has_it_at_a_time(tmp_path):
    """Each holder removes the file that the others wait for."""
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            done = 0
            while done < 20:
                try:
                    with locked(tmp_path / "run", lambda text: os._exit(2)):
                        (tmp_path / "inside").mkdir()
                        (tmp_path / "inside").rmdir()
                        done += 1
                except LoraError:
                    continue
                except OSError:
                    os._exit(1)  # another one was inside
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert not (tmp_path / "run" / ".lock").exists()


def test_without_locks_of_the_system_a_living_holder_counts_and_a_dead_one_does_not(tmp_path, monkeypatch):
    def no_locks(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock, "lock_descriptor", no_locks)
    with locked(tmp_path, print), pytest.raises(LoraError, match="another process"), locked(tmp_path, print):
        pass
    (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": run_lock.platform.node()}))
    with locked(tmp_path, lambda text: None):
        pass


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def failing(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, when: Any, code: int) -> list[int]:
    """Make a function fail with an operating system's error, as often as `when` says of the number of its call."""
    real, calls = getattr(place, name), []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if when(calls[-1]):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, fail)
    return calls


def test_a_run_that_could_not_begin_leaves_its_place_free(run_recipe, recipe_file, tmp_path, monkeypatch):
    """Whether its disk failed between the first two files, or it was killed there."""

    def fails(place: Path, _: bytes) -> None:
        raise DiskError("the disk failed", where=str(place))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_bytes", fails)
        with pytest.raises(DiskError, match=r"recipe\.yaml: the disk failed"):
            run_recipe()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prepared"]
    run_recipe(output=str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "environment.json", tmp_path / "run")
    with pytest.raises(LoraError, match="already holds other files"):
        run_recipe()  # whose it is nobody knows
    (tmp_path / "run" / ".lock").write_text("{}")
    (tmp_path / "run" / ".recipe.yaml.tmp-77").touch()
    with monkeypatch.context() as patch:  # and what takes its place ends in order before it begins
        patch.setattr("lora_cli.training.train.open_session", lambda *_: (_ for _ in ()).throw(KeyError("stopped")))
        with pytest.raises(KeyError):
            run_recipe()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prepared"]
    run_recipe()
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_stops(crashed, run_recipe, monkeypatch, code):
    run, straight = crashed(at=5)
    with monkeypatch.context() as patch:
        failing(patch, checkpoint, "save_file", lambda call: call > 1, code)
        with pytest.raises(DiskError, match="the last checkpoint is step_000004") as caught:
            resume(run)
    assert "--resume" in str(caught.value)
    assert [path.name for path in RunFolder(run).list_checkpoints()] == ["step_000002", "step_000004"]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    resume(run)
    assert_same_run(run, straight)


def test_a_full_disk_pauses_a_run_that_shall_wait_and_the_result_is_the_same(crashed, heard, monkeypatch):
    monkeypatch.setattr(writer, "_TRY_AGAIN_SECONDS", 0.01)
    run, straight = crashed(train={"on_write_error": "pause"})
    with monkeypatch.context() as patch:
        failing(patch, checkpoint, "save_file", lambda call: call in (2, 5, 6), errno.ENOSPC)
        resume(run, console=heard)
    assert heard.said.count("no space left on the disk; waiting") == 3
    assert_same_run(run, straight)


def test_a_run_that_waits_for_a_disk_can_be_stopped(crashed, monkeypatch):
    monkeypatch.setattr(writer, "_TRY_AGAIN_SECONDS", 60)
    run, straight = crashed(train={"on_write_error": "pause"})
    with monkeypatch.context() as patch:
        failing(patch, checkpoint, "save_file", lambda call: True, errno.ENOSPC)
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Interrupted, match="stopped while waiting: no space left"):
            resume(run)
    resume(run)
    assert_same_run(run, straight)


LINE = {"loss": 1.0, "learning_rate": 0.01, "grad_norm": 1.0, "target_tokens": 7, "tokens": 9, "seconds": 0.5} | {
    "tokens_per_second": 18.0,
    "peak_memory_bytes": 0,
}


def test_half_a_line_of_metrics_is_taken_back(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    append(folder.metrics, [LINE | {"step": 1}])
    real = json.dumps
    monkeypatch.setattr("lora_cli.training.run_folder.json.dumps", lambda value: real(value) + "\udcff")
    with pytest.raises(UnicodeEncodeError):
        append(folder.metrics, [LINE | {"step": 2}])
    monkeypatch.setattr("lora_cli.training.run_folder.json.dumps", real)
    append(folder.metrics, [LINE | {"step": 3}])
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 3]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(run_recipe, tmp_path, monkeypatch):
    def closed(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lora_cli.training.train.open_session", lambda *_: pytest.fail("nothing may be loaded"))
    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(DiskError, match="this place cannot be written"):
        run_recipe()


def test_too_little_space_is_told_before_the_first_step_with_what_the_run_will_write(recipe_file, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(LoraError, match=r"needs about 10 MiB, 977 KiB are free"):
        train(load_recipe(recipe_file()), quiet_console())


def test_what_a_run_writes_is_no_more_than_it_said(run_recipe, heard, recipe_file):
    from lora_cli.training.opening import disk_needed

    recipe = load_recipe(
        recipe_file(data={"validation": 0.25}, train={"max_steps": 12, "checkpoint_every": 2, "eval_every": 1})
    )
    report = train(recipe, heard)
    run = Path(recipe.output)
    written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and "prepared" not in path.parts)
    said = disk_needed(recipe, report["trained_parameters"], report["steps"])
    assert written < said < written + 11_000_000
    assert "disk     up to" in heard.said


# ── steps that go wrong ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_wrong_with_a_step():
    def wrong(loss: float, norm: float | None = 1.0, first: float | None = 3.0, scaled: bool = False) -> str | None:
        return what_is_wrong(loss, norm, first_loss=first, vocabulary=512, scaled=scaled)

    assert wrong(3.0) is None
    assert wrong(12.4) is None  # 2 log 512 = 12.48
    assert "more than 12.48" in str(wrong(12.5))
    assert wrong(19.0, first=10.0) is None
    assert "the loss is nan" in str(wrong(float("nan")))
    assert "the loss is inf" in str(wrong(float("inf")))
    assert "gradient norm is inf" in str(wrong(3.0, float("inf")))
    assert wrong(3.0, float("inf"), scaled=True) is None  # fp16 overflows, and its scaler skips
    assert wrong(3.0, None) is None


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss of some rows no number, wherever they come up: the data are at fault, not the step."""
    real = micro_batches.training_loss

    def poison(rows: set[int]) -> None:
        collated: list[Any] = []
        own = micro_batches.MicroBatches._forward_backward

        def remember(self: Any, piece: Any, *rest: Any) -> Any:
            collated[:] = piece
            return own(self, piece, *rest)

        def loss(model: Any, batch: Any, **settings: Any) -> Any:
            found = real(model, batch, **settings)
            return tuple(each * float("nan") for each in found) if {e.row for e in collated} & rows else found

        monkeypatch.setattr(micro_batches.MicroBatches, "_forward_backward", remember)
        monkeypatch.setattr(micro_batches, "training_loss", loss)

    return poison


SMALL = {"max_steps": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "checkpoint_every": 3}


def steps_with(run: Path, row: int) -> list[int]:
    """Steps whose examples include a row, by the order alone."""
    from lora_cli.data.store import open_prepared

    (place,) = (run / "prepared").iterdir()
    data = open_prepared(place)
    order = data.order(load_recipe(run / "recipe.yaml"))
    return [
        step
        for step in range(1, 9)
        if any(data.train[index].row == row for batch in order.step(step) for index in batch)
    ]


def row_of_step(run: Path, step: int) -> int:
    from lora_cli.data.store import open_prepared

    (place,) = (run / "prepared").iterdir()
    data = open_prepared(place)
    return data.train[data.order(load_recipe(run / "recipe.yaml")).step(step)[0][0]].row


def test_nan_stops_by_default_and_leaves_the_last_checkpoint(run_recipe, poisoned, tmp_path):
    plain, _ = run_recipe(train=SMALL, data={"packing": False}, output=str(tmp_path / "plain"))
    poisoned({row_of_step(plain, 5)})
    with pytest.raises(CheckFailed, match="the loss is nan at step 5") as caught:
        run_recipe(train=SMALL, data={"packing": False})
    assert "step_000003" in str(caught.value)
    assert caught.value.exit_code == 3
    assert losses(tmp_path / "run") == losses(plain)[:4]


def test_skip_leaves_out_the_update_of_that_step_alone(run_recipe, poisoned, tmp_path):
    settings = {"train": SMALL | {"on_nan": "skip"}, "data": {"packing": False}}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    poisoned({row_of_step(plain, 5)})
    run, report = run_recipe(**settings)
    lines = metrics(run)
    assert report["skipped_steps"] == [5]
    assert lines[4]["loss"] is None
    assert "the loss is nan" in lines[4]["skipped"]
    assert losses(run)[:4] == losses(plain)[:4]
    assert losses(run)[5:] != losses(plain)[5:]
    assert all(tensor.isfinite().all() for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values())


def test_skipping_without_end_stops(run_recipe, monkeypatch):
    monkeypatch.setattr(loop, "_SKIPPED_IN_A_ROW", 3)
    monkeypatch.setattr(
        micro_batches, "training_loss", lambda *_, **__: (torch.tensor(float("nan"), requires_grad=True),) * 2
    )
    with pytest.raises(CheckFailed, match="as in each of the last 3 steps"):
        run_recipe(train=SMALL | {"on_nan": "skip"})


def test_rewind_goes_back_and_on_behind_the_data_of_that_step(run_recipe, poisoned, tmp_path):
    """Checkpoint 3, trouble at 5: steps 4, 5 … get the data of steps 6, 7 …; a kill just after it changes nothing."""
    settings = {"train": SMALL | {"on_nan": "rewind"}, "data": {"packing": False}}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    bad = row_of_step(plain, 5)
    assert steps_with(plain, bad) == [5]
    poisoned({bad})
    run, report = run_recipe(**settings)
    lines, as_planned = metrics(run), metrics(plain)
    assert report["rewound_from_steps"] == [5]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in as_planned[:3]]
    assert [line["tokens"] for line in lines[3:6]] == [line["tokens"] for line in as_planned[5:8]]
    state = json.loads((RunFolder(run).list_checkpoints()[-1] / "state.json").read_text())
    assert state["data_offset"] == 2


def test_a_run_killed_after_it_rewound_goes_on_the_same_way(run_recipe, poisoned, tmp_path, monkeypatch):
    settings = {"train": SMALL | {"on_nan": "rewind"}, "data": {"packing": False}}
    plain, _ = run_recipe(**settings, output=str(tmp_path / "plain"))
    poisoned({row_of_step(plain, 5)})
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    real = loop.Run._rewind

    def cut(self: Any, wrong: str, step: int) -> None:
        real(self, wrong, step)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_rewind", cut)
        with pytest.raises(PowerCut):
            run_recipe(**settings)
    resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(straight)
    shipped = [run / "adapter" / "adapter_model.safetensors" for run in (tmp_path / "run", straight)]
    assert shipped[0].read_bytes() == shipped[1].read_bytes()


def test_rewinding_without_end_stops(run_recipe, monkeypatch):
    real = micro_batches.training_loss
    calls: list[int] = []

    def loss(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        found = real(*arguments, **settings)
        return found if len(calls) <= 3 else tuple(each * float("nan") for each in found)

    monkeypatch.setattr(micro_batches, "training_loss", loss)
    with pytest.raises(CheckFailed, match="after going back 3 times"):
        run_recipe(train=SMALL | {"on_nan": "rewind"}, data={"packing": False})


# ── trackers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trouble", ["raises", "hangs", "hangs and catches", "raises later"])
def test_a_tracker_that_fails_or_hangs_never_stops_a_run(
    run_recipe, recipe_file, heard, monkeypatch, trouble, tmp_path
):
    from lora_cli.training import trackers

    never = threading.Event()

    class Unreachable:
        requires_logging_directory = False

        def __init__(self, _name: str):
            if trouble == "raises":
                raise ConnectionError("no route to host")

        def start(self) -> None:
            if trouble == "hangs and catches":
                with contextlib.suppress(BaseException):
                    never.wait()
            if trouble.startswith("hangs"):
                never.wait()

        def store_init_configuration(self, _: Any) -> None: ...

        def log(self, *_: Any, **__: Any) -> None:
            raise SystemExit("the tracker's library gives up")

        def finish(self) -> None: ...

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "tensorboard", Unreachable)
    monkeypatch.setattr(trackers, "_CALL_SECONDS", 0.3)
    plain, _ = run_recipe(output=str(tmp_path / "plain"))
    recipe = load_recipe(recipe_file(trackers=["tensorboard"]))
    train(recipe, heard)
    never.set()
    assert heard.said.count("tracker tensorboard was dropped") == 1
    assert metrics(Path(recipe.output)) == metrics(plain)


def test_a_run_that_was_moved_goes_on_where_it_is_and_is_the_same(recipe_file, run_recipe, tmp_path, monkeypatch):
    """Where a run lies is no part of what it is: --allow output was the advice, and was refused."""
    whole, _ = run_recipe(train={"max_steps": 6}, output=str(tmp_path / "whole"))
    path = recipe_file(train={"max_steps": 6, "checkpoint_every": 2}, output=str(tmp_path / "here"))
    real = loop.Run._one_step

    def dies(self, step, *rest):
        if step == 4:
            raise KeyError("killed")
        return real(self, step, *rest)

    monkeypatch.setattr(loop.Run, "_one_step", dies)
    with pytest.raises(KeyError):
        train(load_recipe(path), quiet_console())
    monkeypatch.setattr(loop.Run, "_one_step", real)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there"
    train(load_recipe(moved / "recipe.yaml", [f"output={moved}"]), quiet_console(), resume=True)
    assert losses(moved) == losses(whole)
    assert not (tmp_path / "here").exists()
    assert load_recipe(moved / "recipe.yaml").output == str(moved)


@pytest.mark.parametrize("setting", ["weight_decay=0.5", "beta1=0.1", "lora_plus_ratio=8"])
def test_a_setting_of_the_optimizer_that_was_allowed_to_change_takes_effect(recipe_file, tmp_path, setting):
    """The stored optimizer brought its old settings back, and --allow was for nothing."""

    def goes_on(name: str, *changes: str, allow: tuple[str, ...] = ()) -> list[float]:
        path = recipe_file(train={"max_steps": 2}, output=str(tmp_path / name))
        train(load_recipe(path), quiet_console())
        more = ["train.max_steps=5", *changes]
        train(load_recipe(path, more), quiet_console(), resume=True, allow=["train.max_steps", *allow])
        return losses(tmp_path / name)

    plain, changed = goes_on("plain"), goes_on("changed", f"train.{setting}", allow=(f"train.{setting.split('=')[0]}",))
    assert changed[:3] == plain[:3]  # the third loss is still that of the weights of step 2
    assert changed[3:] != plain[3:]


def test_a_run_folder_takes_the_place_of_its_recipe(crashed, lora, tmp_path):
    run, straight = crashed()
    said = lora("train", run)
    assert said.code == 2
    assert f"fix: continue it with: lora train {run} --resume\n" in said.text
    moved = run.rename(tmp_path / "moved to $HOME, or: 'here'")
    assert lora("train", moved, "--resume").code == 0
    assert losses(moved) == losses(straight)
    assert not run.exists()
    assert load_recipe(moved / "recipe.yaml").output == str(moved)
    assert "this run is finished" in lora("train", moved, "--resume").text


def test_a_folder_that_is_no_run_says_what_to_train(recipe_file, lora, tmp_path):
    path = recipe_file()
    for words in (["train", tmp_path], ["train", tmp_path, "--resume"]):
        assert f"fix: train it with: lora train {path}\n" in lora(*words).text
    (tmp_path / "empty").mkdir()
    assert "it has no recipe.yaml" in lora("train", tmp_path / "empty").text
