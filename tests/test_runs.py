"""`lora runs`: every state a run folder can be in, read without torch and without falling over what is damaged."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_cli.errors import LoraError
from lora_cli.training.runs import Run, as_dicts, list_runs, print_runs

REPORT = {"steps": 60, "best_validation_loss": 0.5, "tokens": 30_000, "seconds": 120.0, "learned": True}


def metrics_line(step: int, **more: Any) -> str:
    line = {
        "step": step,
        "loss": 1 / step,
        "target_tokens": 7,
        "tokens": 500,
        "seconds": 2.0,
        "tokens_per_second": 250.0,
    }
    return json.dumps(line | more) + "\n"


def make_run(path: Path, *, steps: int = 60, report: dict[str, Any] | None = None, **status: Any) -> Path:
    """A run folder of `steps` steps; status: changes to its status.json, or state=None for a run that has none."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text("base_model: gpt2\n")
    (path / "environment.json").write_text("{}")
    lines = [metrics_line(n, **({"validation_loss": 3 / n} if n % 20 == 0 else {})) for n in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if report is not None:
        (path / "report.json").write_text(json.dumps(report))
    now = datetime.now(UTC)
    full = {
        **{"state": "running", "step": steps, "total_steps": 114, "why": None, "pid": 1, "host": socket.gethostname()},
        **{"started": now.isoformat(), "updated": now.isoformat(), "wall_seconds": 7200.0, "processes": 1},
    } | status
    if full["state"] is not None:
        (path / "status.json").write_text(json.dumps(full))
    return path


def only(folder: Path, price: float | None = None) -> Run:
    (run,) = list_runs(folder, price)
    return run


def shown(runs: list[Run], width: int = 120) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        print_runs(runs, Path("runs"), console)
    return captured.get()


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_lives_is_running_and_one_whose_process_is_gone_was_killed(tmp_path):
    """The lock is what tells: it is held by another process here, which is then killed without a chance to clean up."""
    run = make_run(tmp_path / "run")
    holds = "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\nprint(1, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", holds + "time.sleep(60)", str(run / ".lock")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    assert only(tmp_path).progress == "running at step 60/114"
    process.kill()
    process.communicate()
    assert only(tmp_path).progress == "killed at step 60/114"


def test_looking_makes_no_lock_and_keeps_none(tmp_path):
    run = make_run(tmp_path / "run")
    assert only(tmp_path).state == "killed"
    assert not (run / ".lock").exists()
    (run / ".lock").touch()
    list_runs(tmp_path)
    with (run / ".lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free


@pytest.mark.parametrize(("minutes", "state"), [(1, "running"), (60, "killed")])
def test_a_run_of_another_machine_is_believed_for_a_while(tmp_path, minutes, state):
    updated = datetime.now(UTC) - timedelta(minutes=minutes)
    make_run(tmp_path / "run", host="elsewhere", updated=updated.isoformat())
    assert only(tmp_path).state == state


@pytest.mark.parametrize(
    ("state", "progress"),
    [
        ("done", "done, 60 steps"),
        ("nothing learned", "nothing learned"),
        ("interrupted", "interrupted at step 60/114"),
        ("failed", "failed at step 60/114"),
    ],
)
def test_what_a_run_says_of_its_end_is_shown(tmp_path, state, progress):
    make_run(tmp_path / "run", state=state, why="because")
    run = only(tmp_path)
    assert (run.state, run.progress, run.why) == (state, progress, "because")
    assert ("run: because" in shown([run])) == (state in ("failed", "nothing learned"))


@pytest.mark.parametrize(
    ("verdict", "progress"),
    [
        ("learned", "done, 60 steps"),
        ("hardly trained", "hardly trained, 60 steps"),
        ("not certain", "not certain, 60 steps"),
        ("\x1b[2J a stranger's", "done, 60 steps"),
        (None, "done, 60 steps"),  # of a report made before it held a verdict
    ],
)
def test_a_finished_run_that_is_no_good_is_not_shown_as_done(tmp_path, verdict, progress):
    make_run(tmp_path / "run", state="done", report=REPORT | {"verdict": verdict})
    run = only(tmp_path)
    assert (run.state, run.result, run.progress) == ("done", verdict, progress)
    assert progress in shown([run])


def test_a_run_that_goes_on_has_no_result_yet(tmp_path):
    make_run(tmp_path / "run", state="interrupted", report=REPORT | {"verdict": "hardly trained"})
    assert (only(tmp_path).result, only(tmp_path).progress) == (None, "interrupted at step 60/114")


def test_a_real_run_of_two_steps_is_hardly_trained(recipe_file, lora, tmp_path):
    assert lora("train", recipe_file(train={"max_steps": 2})).code == 0
    listed = lora("runs", tmp_path).out
    assert "hardly trained, 2 steps" in listed
    (run,) = json.loads(lora("runs", tmp_path, "--json").out)
    assert (run["state"], run["result"]) == ("done", "hardly trained")


def test_runs_of_before_there_was_a_status(tmp_path):
    make_run(tmp_path / "done", state=None, report=REPORT)
    make_run(tmp_path / "inert", state=None, report=REPORT | {"learned": False})
    (make_run(tmp_path / "cut", state=None) / "checkpoints" / "step_000040").mkdir()
    bare = make_run(tmp_path / "bare", state=None, steps=1)
    (bare / "metrics.jsonl").unlink()
    (bare / "checkpoints" / "step_000020").mkdir()
    assert {run.name: run.progress for run in list_runs(tmp_path)} == {
        **{"done": "done, 60 steps", "inert": "nothing learned"},
        **{"cut": "interrupted at step 60", "bare": "interrupted at step 20"},
    }


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_of_a_finished_run(tmp_path):
    make_run(tmp_path / "run", state="done", report=REPORT)
    run = only(tmp_path, price=1.5)
    assert run.loss == pytest.approx(sum(1 / n for n in range(51, 61)) / 10)
    assert (run.validation_loss, run.tokens, run.hours, run.cost) == (0.5, 30_000, 2.0, 3.0)
    assert (run.step, run.total_steps) == (60, 114)
    assert datetime.now(UTC) - datetime.fromisoformat(run.last_activity) < timedelta(minutes=1)


def test_figures_of_an_unfinished_run_are_added_up(tmp_path):
    make_run(tmp_path / "run", state=None)
    run = only(tmp_path)
    assert (run.validation_loss, run.tokens) == (3 / 60, 60 * 500)
    assert run.hours == pytest.approx(60 * 2 / 3600)
    assert run.cost is None


def test_newest_come_first_and_names_are_paths_below_the_folder(tmp_path):
    now = datetime.now(UTC)
    for name, hours in [("old", 9), ("sweep/rank-8", 1), ("sweep/rank-16", 3), ("a/b/too-deep", 0)]:
        make_run(tmp_path / name, state="done", updated=(now - timedelta(hours=hours)).isoformat())
    (tmp_path / "notes.txt").write_text("x")
    assert [run.name for run in list_runs(tmp_path)] == ["sweep/rank-8", "sweep/rank-16", "old"]
    assert [run.name for run in list_runs(tmp_path / "old")] == ["old"]
    assert {run.name for run in list_runs(tmp_path / "sweep")} == {"rank-8", "rank-16"}


def test_a_long_run_is_listed_at_once(tmp_path):
    run = make_run(tmp_path / "run", state="done", steps=0, report=REPORT)
    (run / "metrics.jsonl").write_text("".join(metrics_line(n) for n in range(1, 100_001)))
    started = time.perf_counter()
    assert only(tmp_path).loss == pytest.approx(1e-5, rel=1e-3)
    assert time.perf_counter() - started < 0.5  # a few milliseconds; reading all lines takes longer than this


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "torn", [b'{"step": 61, "lo', b'{"step": 61, "loss": 0.0164, "tokens": 51', b"\x00\xff\xfe", b"[]"]
)
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    run = make_run(tmp_path / "run", state=None)
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    found = only(tmp_path)
    assert found.loss == pytest.approx(sum(1 / n for n in range(51, 61)) / 10)
    assert found.tokens == 30_000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"state": 3, "step": "x"}', b"[" * 5000]
)
@pytest.mark.parametrize("name", ["status.json", "report.json", "metrics.jsonl", "environment.json"])
def test_damaged_files_count_as_far_as_they_can_be_read(tmp_path, name, content):
    run = make_run(tmp_path / "run", state="interrupted", report=REPORT)
    (run / name).write_bytes(content)
    found = only(tmp_path, price=1.0)
    assert found.name == "run"
    assert shown([found])
    assert json.loads(json.dumps(as_dicts([found])))


@pytest.mark.parametrize("value", [None, "x", [], {}, True, float("nan"), -1, 1e400])
def test_values_of_the_wrong_kind_are_unknown(tmp_path, value):
    names = ["step", "total_steps", "why", "pid", "host", "started", "updated", "wall_seconds"]
    make_run(tmp_path / "run", **dict.fromkeys(names, value))
    assert shown(list_runs(tmp_path))


HUGE = b"1" * 400
BAD = {
    "an integer of 400 digits": ("status.json", b'{"state": "done", "step": ' + HUGE + b"}", "too large"),
    "a number beyond every float": ("status.json", b'{"state": "done", "wall_seconds": 1e999}', "too large"),
    "NaN": ("status.json", b'{"state": "done", "wall_seconds": NaN}', "NaN is not a number"),
    "half a character": ("status.json", b'{"state": "failed", "why": "\\ud800"}', "a lone surrogate"),
    "text for a number": ("status.json", b'{"state": "done", "step": "x"}', "step is not a number"),
    "less than nothing": ("status.json", b'{"state": "done", "wall_seconds": -1}', "wall_seconds is not a number"),
    "a list": ("status.json", b"[]", "not a JSON object"),
    "deep": ("status.json", b"[" * 100_000, "nested too deeply"),
    "not UTF-8": ("status.json", b"\xff", "utf-8"),
    "large": ("status.json", b" " * 2**24, "larger than"),
    "a report with such an integer": ("report.json", b'{"tokens": ' + HUGE + b"}", "report.json .*too large"),
    "a report that learned maybe": ("report.json", b'{"learned": "maybe"}', "learned is not true or false"),
}


@pytest.mark.parametrize("how", BAD)
def test_one_bad_folder_is_shown_as_bad_with_the_reason_and_all_others_as_they_are(tmp_path, how):
    name, content, reason = BAD[how]
    make_run(tmp_path / "good", state="done", report=REPORT)
    alone = list_runs(tmp_path / "good")[0]
    bad = make_run(tmp_path / "bad", state="done")
    (bad / name).write_bytes(content)
    found = {run.name: run for run in list_runs(tmp_path, price=1.0)}
    assert found["bad"].state == "damaged"
    assert re.search(reason, found["bad"].why or "")
    assert (found["good"].state, found["good"].loss, found["good"].hours) == ("done", alone.loss, alone.hours)
    assert "bad: " in shown(list(found.values()))
    assert len(json.loads(json.dumps(as_dicts(list(found.values()))))) == 2


@pytest.mark.parametrize("name", ["status.json", "report.json", "metrics.jsonl", ".lock", "checkpoints"])
@pytest.mark.parametrize("what", ["pipe", "endless", "link to itself", "folder"])
def test_nothing_in_a_run_folder_is_waited_for_or_followed(tmp_path, name, what):
    make_run(tmp_path / "good", state="done")
    path = make_run(tmp_path / "bad", state="done", report=REPORT) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "endless" else path.name)
    found = {run.name: run for run in list_runs(tmp_path)}
    assert found["good"].state == "done"
    assert found["bad"].state == ("done" if name in (".lock", "checkpoints") else "damaged")


@pytest.mark.parametrize(
    "line", [b'{"step": 1e999, "loss": 1}', b'{"step": ' + HUGE + b', "tokens": ' + HUGE + b"}", b"x" * 2**22]
)
def test_lines_of_metrics_that_no_run_wrote_are_left_out(tmp_path, line):
    run = make_run(tmp_path / "run", state=None, steps=20)
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    found = only(tmp_path)
    assert (found.step, found.tokens) == (20, 10_000)
    assert shown([found])


@pytest.mark.parametrize("updated", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2020", "x"])
def test_a_time_before_or_behind_all_times_is_no_time(tmp_path, updated):
    make_run(tmp_path / "run", state="done", updated=updated)
    assert only(tmp_path).state == "done"
    assert shown(list_runs(tmp_path))


def test_a_folder_whose_name_is_not_text_can_be_printed(tmp_path):
    make_run(tmp_path / "run", state="done").rename(tmp_path / "\udcff")
    found = list_runs(tmp_path)
    assert shown(found).encode()
    assert json.dumps(as_dicts(found), ensure_ascii=False).encode()


def test_a_folder_that_cannot_be_read_is_no_run(tmp_path):
    make_run(tmp_path / "run", state="done")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "closed").mkdir(mode=0o000)
    assert "run" in {run.name for run in list_runs(tmp_path)}


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────


def lora(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    environment = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "lora_cli", "runs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60, check=False)


def test_the_command_prints_a_table_or_one_json_document(tmp_path):
    make_run(tmp_path / "runs" / "demo", state="done", report=REPORT)
    table = lora("--per-hour", "2", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    header, row = table.stdout.splitlines()
    assert header.split() == ["run", "state", "loss", "valid.", "tokens", "hours", "cost", "updated"]
    assert row.split() == ["demo", "done,", "60", "steps", "0.0181", "0.5000", "30.0k", "2.00", "4.00", "now"]
    (printed,) = json.loads(lora("--json", cwd=tmp_path).stdout)
    assert printed["state"] == "done"
    assert printed["cost"] is None


def test_without_runs_it_says_what_to_do(tmp_path):
    done = lora(cwd=tmp_path)
    assert done.returncode == 0
    assert "no runs in the folder runs" in done.stdout
    assert "lora train RECIPE" in done.stdout
    assert json.loads(lora("--json", cwd=tmp_path).stdout) == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "message"), [("missing", "no such folder"), ("file", "a file, not a folder")])
def test_a_folder_that_is_none_is_refused(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraError, match=message):
        list_runs(tmp_path / name)


def test_listing_imports_nothing_heavy(tmp_path):
    make_run(tmp_path / "run", state="done", report=REPORT)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lora_cli.training import runs\n"
        f"assert runs.list_runs(Path({str(tmp_path)!r}))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})


def test_every_run_fits_into_80_columns(tmp_path):
    make_run(tmp_path / "llama-8b-support-tickets-rank-64", state="interrupted", total_steps=11_400)
    lines = shown(list_runs(tmp_path, price=1.5), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
