"""Trackers write into the run, tell nobody else, learn no paths, and can do a run no harm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, losses

from lora_cli.errors import LoraError
from lora_cli.training import trackers

STAND_IN = """
import json, os, threading
told = {"environment": dict(os.environ), "config": {}, "lines": []}
class Run:
    def log(self, values, step=None, **_): told["lines"].append([step, values])
    def finish(self): json.dump(told, open(os.environ["TOLD"], "w"), default=str)
    info = None
class _Config:
    def update(self, values, **_): told["config"].update(values)
config = _Config()
def init(project, **options): told["options"] = options; return Run()
def finish(): Run().finish()
def log(values, step=None, **_): Run().log(values, step)
def search_experiments(**_): return []
def create_experiment(**options): told["options"] = options; return "1"
def start_run(**_):
    run = Run(); run.info = type("Info", (), {"run_id": "1"})()
    return run
class utils:
    class validation: MAX_PARAM_VAL_LENGTH = 6000; MAX_PARAMS_TAGS_PER_BATCH = 100
def log_params(values): told["config"].update(values)
def log_metrics(values, step=None): Run().log(values, step)
def end_run(): Run().finish()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of a tracker's name that notes what it is told; `HOME` is empty."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "MLFLOW", "TRACKIO")) or name == "DO_NOT_TRACK":
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def make(name: str) -> Path:
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / f"{name}.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
        return tmp_path / "told.json"

    yield make
    for name in ("wandb", "mlflow", "trackio"):
        sys.modules.pop(name, None)


def told_by(name: str, stand_in: Any, run_recipe: Any, **settings: Any) -> tuple[Path, dict[str, Any]]:
    import json

    place = stand_in(name)
    run, _ = run_recipe(trackers=[name], **settings)
    return run, json.loads(place.read_text())


PLACES = {
    "wandb": ["WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"],
    "mlflow": ["MLFLOW_TRACKING_URI"],
    "trackio": ["TRACKIO_DIR"],
}
SILENT = {
    "wandb": {"WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_META": "true"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "false"},
}


@pytest.mark.parametrize("name", PLACES)
def test_a_tracker_is_told_to_write_into_the_run_and_to_no_one_else(name, stand_in, run_recipe, tmp_path):
    run, told = told_by(name, stand_in, run_recipe, data={"validation": 0.25})
    environment = told["environment"]
    assert all(str(run) in environment[each] for each in PLACES[name])
    assert {key: environment[key] for key in SILENT[name]} == SILENT[name]
    assert [step for step, _ in told["lines"]] == [1, 2, 3, 4]
    assert not list((tmp_path / "home").iterdir())
    assert not [each for each in PLACES[name] if each in os.environ], "another run in this process has its own"


@pytest.mark.parametrize("name", PLACES)
def test_no_setting_shows_where_things_are_on_this_machine(name, stand_in, run_recipe, tmp_path, tiny_llama):
    _, told = told_by(name, stand_in, run_recipe)
    config = told["config"]
    assert config["base_model"] == tiny_llama.name
    assert config["output"] == "run"
    assert "sums.jsonl" in config["data.train"]
    assert not [key for key, value in config.items() if str(tmp_path.parent) in str(value) or str(ROOT) in str(value)]
    assert config["train.learning_rate"] == 0.01


@pytest.mark.parametrize("name", ["tensorboard", *PLACES])
def test_a_trackers_folder_that_is_a_link_is_refused(name, stand_in, run_recipe, monkeypatch, tmp_path):
    """A run folder may come from a stranger."""
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    else:
        stand_in(name)
    (tmp_path / "elsewhere").mkdir()
    own = trackers.open_trackers

    def open_trackers(recipe: Any, *arguments: Any, **settings: Any) -> Any:
        (Path(recipe.output) / trackers._FOLDERS[name]).symlink_to(tmp_path / "elsewhere")
        return own(recipe, *arguments, **settings)

    monkeypatch.setattr("lora_cli.training.loop.open_trackers", open_trackers)
    with pytest.raises(LoraError, match="this is a link"):
        run_recipe(trackers=[name])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_the_user_set_stays(stand_in, run_recipe, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    _, told = told_by("mlflow", stand_in, run_recipe)
    assert told["environment"]["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert told["environment"]["DO_NOT_TRACK"] == "0"
    assert told["options"]["artifact_location"] is None, "the server's own place"


def test_wandbs_settings_of_the_user_are_still_read(stand_in, run_recipe, tmp_path):
    """They name the server: without them a run would go to another one."""
    settings = tmp_path / "home" / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    _, told = told_by("wandb", stand_in, run_recipe)
    assert "WANDB_CONFIG_DIR" not in told["environment"]


def test_tensorboard_writes_into_the_run_alone_and_knows_no_paths(run_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = set(tmp_path.rglob("*"))
    run, _ = run_recipe(trackers=["tensorboard"])
    written = [path for path in set(tmp_path.rglob("*")) - before if path.is_file() and run not in path.parents]
    assert [path.name for path in written] == ["recipe.yaml"]
    logs = [path for path in (run / "lora").rglob("*") if path.is_file()]
    assert logs
    for path in logs:
        assert str(tmp_path).encode() not in path.read_bytes()


def test_what_a_hanging_tracker_left_behind_cannot_keep_the_program(tmp_path):
    """A thread of its own that is no daemon, and a function for the end: both never return."""
    code = (
        "import atexit, sys, threading, time\n"
        "from lora_cli.ending import exit_within, let_go\n"
        "atexit.register(time.sleep, 100)\n"
        "threading.Thread(target=time.sleep, args=(100,)).start()\n"
        "exit_within(0.5)\n"
        "let_go(3)\n"
        "sys.exit(3)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 3
    assert time.monotonic() - began < 30


def test_several_hanging_trackers_together_delay_a_run_no_longer_than_each(run_recipe, monkeypatch, capsys):
    import threading

    never = threading.Event()

    class Hangs:
        requires_logging_directory = False

        def __init__(self, *_: Any, **__: Any) -> None:
            never.wait()

    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, name, Hangs)
    monkeypatch.setattr(trackers, "require_trackers", lambda _: None)
    monkeypatch.setattr("lora_cli.training.train.require_trackers", lambda _: None)
    monkeypatch.setattr(trackers, "_CALL_SECONDS", 0.5)
    began, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    run, _ = run_recipe(trackers=["tensorboard", "wandb"])
    assert time.monotonic() - began < 20
    assert len(losses(run)) == 4
    assert signal.getsignal(signal.SIGALRM) == handler
