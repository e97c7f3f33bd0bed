"""How a command is ended from outside: by signals, and what it leaves behind then."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import losses, quiet_console

from lora_cli import boundary, ending
from lora_cli.cli import main
from lora_cli.data.prepare import Preparation
from lora_cli.errors import DiskError, Interrupted, LoraError
from lora_cli.files import whole_output, working_beside, written_whole
from lora_cli.merging.files import require_place
from lora_cli.recipe import load_recipe
from lora_cli.screen import Screen, status
from lora_cli.training import train, writer
from lora_cli.training.progress import Progress
from lora_cli.training.stopping import Stop

IN_THE_IMPORTS = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name == "lora_cli.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from lora_cli.__main__ import main
main()
"""
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """As a process begins, whatever tests before have left."""
    before = {each: signal.getsignal(each) for each in ENDINGS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for each, handler in before.items():
        signal.signal(each, handler)


def test_ctrl_c_while_the_program_is_still_being_imported_shows_no_traceback():
    ended = subprocess.run([sys.executable, "-c", IN_THE_IMPORTS], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "stopped\n")


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def send_in_step(monkeypatch, step: int, *numbers: int) -> None:
    own = writer.RunWriter.append

    def append(self: Any, file: Path, lines: list[dict[str, Any]]) -> None:
        own(self, file, lines)
        if file.name == "metrics.jsonl" and lines[0]["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(writer.RunWriter, "append", append)


@pytest.mark.parametrize("numbers", [[signal.SIGHUP], [signal.SIGHUP] * 3, [signal.SIGHUP, signal.SIGTERM]])
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(numbers, run_recipe, monkeypatch, tmp_path):
    """A shell and the system send SIGHUP one after the other, and what ends a session SIGTERM as well."""
    settings = {"train": {"max_steps": 5}}
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        send_in_step(patch, 2, *numbers)
        with pytest.raises(
            Interrupted, match=r"stopped after step 2 of 5; a checkpoint is written \(it received SIGHUP\)"
        ) as it:
            run_recipe(**settings)
    assert it.value.exit_code == 129
    run = tmp_path / "run"
    assert (run / "checkpoints" / "step_000002").is_dir()
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    train.train(load_recipe(run / "recipe.yaml"), quiet_console(), resume=True)
    assert losses(run) == losses(straight)


def test_sigterm_and_then_sighup_is_one_request(run_recipe, monkeypatch):
    """As systemd ends a session."""
    with monkeypatch.context() as patch:
        send_in_step(patch, 2, signal.SIGTERM, signal.SIGHUP)
        with pytest.raises(Interrupted) as it:
            run_recipe()
    assert it.value.exit_code == 143


def test_under_nohup_a_hang_up_changes_nothing(run_recipe, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send_in_step(monkeypatch, 2, signal.SIGHUP)
    _, report = run_recipe()
    assert report["steps"] == 4
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_hang_up_before_the_first_step_leaves_no_run(run_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "open_session", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(Interrupted, match="SIGHUP before its first step") as it:
        run_recipe()
    assert it.value.exit_code == 129
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_signal_after_the_time_was_up_is_the_first_one():
    stop = Stop(lambda _: None, max_seconds=0.1, processes=1)
    stop.in_steps = True
    with stop.listening():
        stop.watch_the_clock(1.0)
        assert stop.why == "its time was up"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert stop.exit_code == 130, "and the checkpoint is still written"


# ── other commands ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("twice", [False, True])
def test_a_check_that_is_ended_leaves_none_of_the_rows(number, twice, recipe_file, monkeypatch, tmp_path, capsys):
    """The rows lie in a temporary folder while they are looked at."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    own = Preparation.build
    seen: list[str] = []

    def build(self: Any, folder: Path) -> None:
        own(self, folder)
        seen.extend(path.name for path in folder.iterdir())
        for _ in range(2 if twice and number == signal.SIGHUP else 1):
            os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(Preparation, "build", build)
    monkeypatch.setattr(sys, "argv", ["lora", "check", str(recipe_file())])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number
    assert "examples.arrow" in seen, "the folder was in use"
    assert not list(place.iterdir())
    assert capsys.readouterr().err.endswith("stopped\n")


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_while_the_result_is_printed_leaves_none_of_the_rows(number, recipe_file, monkeypatch, tmp_path):
    """The folder then belongs to an object that is still in use."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    def print_checked(*_: Any, **__: Any) -> None:
        assert list(place.iterdir())
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("lora_cli.planning.check.print_checked", print_checked)
    monkeypatch.setattr(sys, "argv", ["lora", "check", str(recipe_file())])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number
    assert not list(place.iterdir())


def test_a_merge_that_is_ended_leaves_no_half_of_it(run_recipe, monkeypatch, tmp_path):
    run, _ = run_recipe()

    def verify(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("lora_cli.merging.job.open_model", verify)
    monkeypatch.setattr(sys, "argv", ["lora", "merge", str(run), "--output", str(tmp_path / "merged" / "model")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 143
    assert not (tmp_path / "merged").exists()


def test_what_is_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ending.end_as_by_ctrl_c()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == ending._on_signal
    ending.let_go(0)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ── places and threads ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose every usual place for temporary files is read-only."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)


def test_without_a_temporary_folder_the_one_that_holds_the_output_serves(no_place, recipe_file, monkeypatch, tmp_path):
    recipe = recipe_file(output=str(tmp_path / "volume" / "deep" / "run"))
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(sys, "argv", ["lora", "check", str(recipe)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert tempfile.tempdir == str(tmp_path / "volume")
    assert not list((tmp_path / "volume").iterdir()), "and nothing is left in it"


def test_without_any_temporary_folder_the_command_says_which_variable_names_one(monkeypatch, tmp_path):
    """And following it makes it run."""
    usual = lambda: [os.environ.get("TMPDIR", "/proc/none")]  # noqa: E731
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", usual)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)
    with pytest.raises(LoraError, match="no folder for temporary files can be written") as told:
        ending.require_temporary_folder(Path("/proc/none"))
    assert "export TMPDIR=" in str(told.value.fix)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ending.require_temporary_folder()
    assert tempfile.gettempdir() == str(tmp_path)


def test_a_system_that_starts_no_thread_is_told_in_words(monkeypatch, capsys):
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert boundary.run(lambda *_, **__: threading.Thread().start(), ["train"]) == 2
    said = capsys.readouterr().err
    assert "no more threads can be started" in said
    assert "ulimit" in said
    assert "bug in lora" not in said


def test_a_terminal_on_a_system_that_starts_no_thread_has_no_live_display(monkeypatch):
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    console = Screen(file=io.StringIO(), force_terminal=True, width=80)
    with status(console, "looking"), Progress(console, 3, 1) as progress:
        progress.say("still told")
    assert "still told" in console.file.getvalue()  # type: ignore[attr-defined]


def test_data_are_prepared_without_a_thread_where_none_can_be_started(run_recipe, monkeypatch, tmp_path):
    straight, _ = run_recipe(output=str(tmp_path / "straight"))
    own = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if "ahead" in getattr(getattr(self, "_target", None), "__qualname__", ""):
            raise RuntimeError("can't start new thread")
        own(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    run, _ = run_recipe()
    assert losses(run) == losses(straight)


def test_temporary_folders_are_for_this_user_alone():
    folder = ending.make_temporary()
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    ending.remove_temporary(folder)
    assert not folder.parent.exists()


def test_what_killed_processes_left_goes_and_what_living_ones_use_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from lora_cli.ending import make_temporary; print(make_temporary(), flush=True); input()"

    def begin() -> tuple[subprocess.Popen[str], Path]:
        words, pipe = [sys.executable, "-c", code], subprocess.PIPE
        process = subprocess.Popen(
            words, env=os.environ | {"TMPDIR": str(tmp_path)}, stdin=pipe, stdout=pipe, text=True
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (killed, left), (living, used) = begin(), begin()
    (left / "rows.bin").write_bytes(b"rows")
    foreign = {tmp_path / f"lora-{each}" for each in ("of-another-program", "env", "notes")}
    for each, name in zip(sorted(foreign), (".lock", "notes.txt", "pyvenv.cfg"), strict=True):
        each.mkdir()
        (each / name).touch()
        (each / (ending._LOCK if name != ".lock" else "locked")).touch()
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    own = ending.make_temporary()
    assert not left.parent.exists()
    assert used.is_dir()
    ending.make_temporary()
    assert own.is_dir()
    assert all(len(list(each.iterdir())) == 2 for each in foreign)
    living.communicate("\n")
    ending._remove_all()
    assert {*tmp_path.iterdir()} == foreign


def test_what_a_killed_command_wrote_is_no_result_and_the_next_one_there_clears_it_away(tmp_path):
    """Of the same disk, as an output takes its place by a rename; what is named otherwise stays."""
    code = (
        "import sys; from pathlib import Path; from lora_cli.files import whole_output\n"
        "with whole_output(Path(sys.argv[1])) as folder: (folder / 'config.json').touch(); print(flush=True); input()"
    )

    def begin(name: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, str(tmp_path / "models" / name)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    killed, living = begin("one"), begin("two")
    killed.kill()
    killed.communicate()
    assert all(each.name.startswith(".lora-") for each in (tmp_path / "models").iterdir())
    (tmp_path / "models" / ".lora-notes").mkdir()
    assert len(list((tmp_path / "models").iterdir())) == 3
    require_place(tmp_path / "models" / "one")
    assert len(list((tmp_path / "models").iterdir())) == 2
    living.communicate("\n")
    assert {each.name for each in (tmp_path / "models").iterdir()} == {".lora-notes", "two"}
    assert [each.name for each in (tmp_path / "models" / "two").iterdir()] == ["config.json"]


def test_every_command_that_names_an_output_writes_it_so():
    """`written_whole` is for places that have one writer, who clears up after a kill."""
    root = Path(ending.__file__).parent
    users = {path.parent.name for path in root.rglob("*.py") if "written_whole" in path.read_text(encoding="utf-8")}
    assert users == {root.name, "training", "data"}  # files.py; run folders; prepared data


@pytest.mark.parametrize("write", [whole_output, working_beside, written_whole])
def test_a_write_that_fails_leaves_no_folders_that_were_made_for_it(write, tmp_path):
    def fail() -> None:
        with write(tmp_path / "was" / "a" / "b" / "model") as folder:
            (folder / "half").touch()
            raise RuntimeError

    (tmp_path / "was").mkdir()
    with pytest.raises(RuntimeError):
        fail()
    assert [each.name for each in tmp_path.rglob("*")] == ["was"]


def test_an_output_that_another_command_wrote_meanwhile_stays(tmp_path):
    place = tmp_path / "merged"

    def both() -> None:
        with whole_output(place) as folder:
            (folder / "ours").touch()
            place.mkdir()
            (place / "theirs").touch()

    with pytest.raises(DiskError, match="something else was written there meanwhile"):
        both()
    assert [each.name for each in tmp_path.rglob("*")] == ["merged", "theirs"]


def test_an_interrupt_that_comes_before_the_hook_is_left_is_sent_again(monkeypatch: pytest.MonkeyPatch):
    """On a busy machine the signal may come before the hook is left, and what is raised there is dropped as well."""
    started: list[float] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            started.append(self.interval)
            if len(started) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("lora_cli.ending.threading.Timer", Timer)
    ending.resend_lost_interrupt(SimpleNamespace(exc_value=KeyboardInterrupt()))
    assert len(started) == 2
