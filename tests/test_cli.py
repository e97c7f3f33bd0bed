"""The command line as a person meets it: help, exit codes, --json, the smoke recipe, generate."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.main import get_command

from lora_cli.cli import app

LORA = [sys.executable, "-m", "lora_cli"]


def process(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [*LORA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200, check=False)


@pytest.mark.parametrize("command", ["", *get_command(app).commands])  # type: ignore[attr-defined]
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nsys.argv = ['lora', *%r.split(), '--help']\nfrom lora_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'bitsandbytes', 'numpy', 'pyarrow', 'jinja2'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code % command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_a_mistyped_recipe_costs_no_heavy_import(tmp_path):
    (tmp_path / "r.yaml").write_text("base_modl: x\n")
    code = (
        f"import sys\nsys.argv = ['lora', 'train', {str(tmp_path / 'r.yaml')!r}]\nfrom lora_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean base_model?" in done.stderr


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    """The README's smoke command, on a copy of what it needs, from another working folder."""
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ROOT / "tests" / "data", place / "tests" / "data")
    done = process("train", "configs/smoke-tiny-gpt2.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one document and nothing else
    assert report["learned"]
    assert "perplexity" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["configs", "runs", "tests"]
    return place / "runs" / "smoke-tiny-gpt2"


def test_smoke_run_learns(smoke_run):
    curve = [json.loads(line)["loss"] for line in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.2


def test_smoke_run_is_the_golden_one(smoke_run):
    """The loss curve of the smoke recipe, as scripts/golden.py stored it. Only for CPUs that compute in bf16."""
    import torch

    golden = json.loads((ROOT / "tests" / "golden" / "smoke.json").read_text())
    if json.loads((smoke_run / "environment.json").read_text())["dtype"] != golden["dtype"]:
        assert torch.get_default_dtype() == torch.float32  # another arithmetic: the curve is close, not equal
    curve = [json.loads(line)["loss"] for line in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    # bf16 rounds to 3 digits, and CPUs add in different orders: 20 steps keep the curves within a hundredth
    assert curve == pytest.approx(golden["losses"], abs=0.03)


def test_second_run_into_the_same_folder_is_refused(lora, smoke_run, monkeypatch):
    monkeypatch.chdir(smoke_run.parents[1])
    done = lora("train", "configs/smoke-tiny-gpt2.yaml")
    assert done.code == 2
    assert "already holds a finished run" in done.text
    assert "--resume" in done.text


def test_merge_then_eval_and_generate_with_the_merged_model(lora, smoke_run, tmp_path):
    done = lora("merge", smoke_run, "--output", tmp_path / "merged", "--json")
    assert done.code == 0, done.text
    assert json.loads(done.out)["kept"] > 0.9
    data = ROOT / "tests" / "data" / "smoke.jsonl"
    merged = json.loads(lora("eval", tmp_path / "merged", "--data", data, "--json").out)
    adapted = json.loads(lora("eval", smoke_run / "adapter", "--data", data, "--json").out)
    assert merged["base"]["loss"] == pytest.approx(adapted["adapter"]["loss"], abs=0.01)
    assert adapted["adapter"]["loss"] < adapted["base"]["loss"]
    shown = lora("eval", smoke_run, "--data", data)
    assert f"next: lora chat {smoke_run}\n      lora merge {smoke_run} --output " in shown.text


def test_generate_from_argument_and_stdin(lora, smoke_run, monkeypatch):
    by_argument = lora("generate", smoke_run, "ann has", "--max-new-tokens", "8", "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("ann has"))
    by_stdin = lora("generate", smoke_run, "--max-new-tokens", "8", "--json")
    assert by_argument.code == 0, by_argument.text
    assert json.loads(by_argument.out) == json.loads(by_stdin.out)
    streamed = lora("generate", smoke_run, "ann has", "--max-new-tokens", "8")
    assert streamed.out.strip() == json.loads(by_argument.out)["completion"].strip()


def test_sampling_is_seeded(lora, smoke_run):
    def sample(seed: int) -> str:
        options = ["--temperature", "1.5", "--max-new-tokens", "12", "--seed", str(seed), "--json"]
        return json.loads(lora("generate", smoke_run, "ann", *options).out)["completion"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "nothing to evaluate"),
        (["eval", "--model", "x"], "nothing to evaluate"),
        (["eval", "runs/x"], "nothing to evaluate"),
        (["eval", "tests", "--stride", "8"], "--stride is for long text"),
        (["eval", "tests", "--data", "tests/data/smoke.jsonl"], "neither a run nor an adapter nor a model"),
        (["eval", "tests/dta", "--data", "tests/data/smoke.jsonl"], "did you mean tests/data?"),
        (["eval", "tests/data/tiny-gpt2"], "this is not a run"),
        (["generate"], "which model?"),
        (["generate", "how are you?"], "this names no run, adapter or model"),
        (["generate", "x", "hi", "--model", "y"], "the model is named twice"),
        (["generate", "hi", "--model", "x", "--top-p", "0.5"], "--temperature 0 is greedy"),
        (["generate", "hi", "--model", "x", "--no-adapter"], "--no-adapter without an adapter"),
        (["generate", "hi", "--model", "/no/such/model"], "no such model folder"),
        (["merge", "/no/such/run", "--output", "/tmp/never"], "no such folder"),
        (["train", "configs/no-such.yaml"], "no such recipe"),
        (["init"], "--schema"),
    ],
)
def test_mistakes_exit_2_with_a_fix_and_no_traceback(lora, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    done = lora(*arguments)
    assert done.code == 2
    assert message in done.text
    assert "fix:" in done.text
    assert done.out == ""


def test_schema_is_json(lora):
    done = lora("init", "--schema")
    assert json.loads(done.out)["properties"]["base_model"]["description"]


def test_ctrl_c_while_the_interpreter_ends_is_quiet():
    code = "import atexit, os, signal, sys; signal.signal(2, signal.default_int_handler); "  # it may be ignored here
    code += "atexit.register(os.kill, os.getpid(), 2); sys.argv = ['lora', '--version']; "
    code += "from lora_cli.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("lora ")
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
