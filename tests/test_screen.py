"""What is printed: text from anywhere does nothing to a terminal, and no stream's end is the end of a run."""

import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from screens import Terminal

from lora_cli import streams
from lora_cli.errors import LoraError, command, escaped, from_here
from lora_cli.screen import Screen, say_on, status, styled
from lora_cli.streams import _Notes, _Results
from lora_cli.training.progress import Progress
from lora_cli.training.runs import Run, print_runs

HOSTILE = "\x1b]0;title\x07\x9b31m\u202egnp\u2066\u2028\ud800\r\x08 :train: [/b] [red]x[/red]"
LETHAL = [chr(each) for each in (*range(0x20), *range(0x7F, 0xA0)) if chr(each) != "\n"]
LETHAL += ["\u2028", "\u202e", "\u2066", "\u200f", "\u061c", "\ud800", "\U000e0041"]


def printed(show, **options) -> str:
    """What a console writes, as a terminal would get it."""
    stream = io.StringIO()
    show(Screen(file=stream, width=200, force_terminal=False, color_system=None, **options))
    return stream.getvalue()


def _table(console: Screen) -> None:
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_column(styled(HOSTILE, "bold"))
    table.add_row(HOSTILE, Text(HOSTILE))
    console.print(table)


WAYS = {
    "a line": lambda console: say_on(console)(HOSTILE),
    "print": lambda console: console.print(HOSTILE),
    "a Text": lambda console: console.print(Padding(Text(HOSTILE), (0, 2))),
    "a table": _table,
    "a rule": lambda console: console.rule(HOSTILE),
    "a live display": lambda console: Live(styled(HOSTILE), console=console, auto_refresh=False).refresh(),
}


@pytest.mark.parametrize("way", WAYS)
def test_text_from_files_does_nothing_to_a_terminal(way):
    text = printed(WAYS[way])
    assert not [each for each in LETHAL if each in text], ascii(text)
    if way != "a live display":
        assert ":train: [/b] [red]x[/red]" in text, "neither emoji codes nor markup"


def test_a_line_of_a_file_cannot_pass_for_two_of_ours():
    assert printed(lambda console: say_on(console)("name\nerror: not ours")) == "name\\nerror: not ours\n"


@given(st.text(st.characters(), max_size=40))
def test_escaped_text_is_encodable_and_escaping_it_again_changes_nothing(text):
    once = escaped(text)
    once.encode()
    assert escaped(once) == once
    assert not set(once) & {*LETHAL, "\n"}


def test_a_status_with_a_file_name_is_shown_as_it_is():
    stream = io.StringIO()
    console = Screen(file=stream, force_terminal=True, width=100, color_system=None)
    with status(console, f"reading {HOSTILE}"):
        pass
    text = stream.getvalue()
    assert "\x1b]0" not in text
    assert "\x9b" not in text
    assert ":train: [/b]" in text


def test_generated_text_is_escaped_on_a_terminal_and_raw_in_a_pipe(monkeypatch):
    answer = "ok\x1b]0;pwn\x07\n\tend\u202e"
    for terminal, expected in ((True, "ok\\x1b]0;pwn\\x07\n\tend\\u202e"), (False, answer)):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", stream)
        streams.print_piece(answer)
        assert stream.getvalue() == expected


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Failing(io.FileIO):
    """A descriptor whose every write fails in one way."""

    error = OSError(errno.EIO, "broken")

    def write(self, content):
        raise self.error


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EBADF, errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_failing_stderr_is_no_failure_and_a_failing_stdout_is_one(code, monkeypatch, tmp_path):
    class Notes(_Notes, _Failing):
        error = OSError(code, os.strerror(code))

    class Results(_Results, _Failing):
        error = OSError(code, os.strerror(code))

    with Notes(tmp_path / "notes", "w") as notes:
        assert [notes.write(b"said") for _ in range(3)] == [4, 4, 4]
    with Results(tmp_path / "results", "w") as results:
        with pytest.raises(BrokenPipeError if code == errno.EPIPE else LoraError) as told:
            results.write(b"a result")
        if code != errno.EPIPE:
            assert f"stdout: the result cannot be written: {os.strerror(code)}" in str(told.value)
        assert results.write(b"what Python flushes at its end") == 30


def test_a_full_disk_loses_only_what_is_said_meanwhile(tmp_path):
    full = True

    class Disk(io.FileIO):
        def write(self, content):
            if full:
                raise OSError(errno.ENOSPC, "full")
            return super().write(content)

    class Notes(_Notes, Disk):
        pass

    with Notes(tmp_path / "log", "w") as notes:
        notes.write(b"one ")
        full = False
        notes.write(b"two")
    assert (tmp_path / "log").read_bytes() == b"two"


def test_a_reader_that_does_not_read_delays_once(monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_SECONDS", 0.2)
    reading, writing = os.pipe()
    notes = _Notes(writing, "w")
    began = time.monotonic()
    for _ in range(100):
        notes.write(b"x" * 4000)
    assert time.monotonic() - began < 5
    os.set_blocking(reading, False)
    while True:  # it reads again
        try:
            os.read(reading, 2**20)
        except BlockingIOError:
            break
    notes.write(b"and is told again")
    assert os.read(reading, 2**20).endswith(b"and is told again")
    os.close(reading)
    notes.close()


def test_a_result_waits_for_a_slow_reader_that_shares_a_descriptor_without_waiting():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got: list[bytes] = []

    def read() -> None:
        while piece := os.read(reading, 2**16):
            got.append(piece)
            time.sleep(0.002)

    thread = threading.Thread(target=read)
    thread.start()
    results = _Results(writing, "w")
    results.write(b"y" * 10**6)
    results.close()
    thread.join()
    os.close(reading)
    assert b"".join(got) == b"y" * 10**6


@given(st.integers(1, 9), st.integers(40, 90))
def test_an_answer_that_comes_in_pieces_keeps_its_words_whole(size, width):
    text = "It is a subspecies, of the Cabernet Sauvignon grape:\n\n\tpopular for its versatility. " * 4 + "x" * 99
    streamed, terminal = streams._Streamed(), Terminal(width)
    for at in range(0, len(text), size):
        piece = streamed.laid_out(text[at : at + size], width)
        terminal.feed(piece.replace("\n", "\r\n").replace("\t", " " * 8))
    shown = terminal.plain()
    assert shown.split()[: len(text.split()) - 1] == text.split()[:-1]
    assert max(map(len, shown.splitlines())) < width
    assert shown.count("x") == 99
    assert not terminal.cut


def test_a_list_of_runs_leaves_out_columns_before_it_cuts_a_word():
    name = "SmolLM2-135M-Instruct-faq"
    run = Run(
        name, name, "interrupted", 60, 11400, None, 0.5, 0.25, 15_171, 5.2, 2.08, "2026-11-28T19:00:00+00:00", None
    )
    for width, left_out in ((60, "tokens"), (80, "updated"), (150, None)):
        console = Screen(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        print_runs([run], Path("runs"), console)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert {name, "0.2500", "2.08", "interrupted"} <= set(said.split())
        assert (left_out is None) == ("updated" in said)
        assert left_out is None or left_out not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_a_character_gets_a_stand_in(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="lora.stand_in")
    stream.write("6.1 → 5.9 ↵ ⟦trained⟧ ␛ ⠋ 日")
    stream.flush()
    assert raw.getvalue().decode("ascii") == "6.1 -> 5.9 \\n [[trained]] \\x1b * \\u65e5"


# ── the command: without torch, so each takes a moment ──────────────────────────────────────────────────────────


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    lora = f"{sys.executable} -m lora_cli"
    line = command.replace("LORA", lora)
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, env=os.environ | environment, cwd=ROOT, timeout=100, check=False
    )


@pytest.mark.parametrize("command", ["--help", "--version", "runs FOLDER", "runs FOLDER --json", "init --schema"])
def test_a_result_that_cannot_be_written_is_one_line_and_exit_2(command, tmp_path):
    command = command.replace("FOLDER", str(tmp_path))
    for where, why in (("> /dev/full", b"No space left on device"), (">&-", b"it is closed")):
        done = shell(f"LORA {command} {where}")
        assert done.returncode == 2, done
        assert done.stderr.startswith(b"error: stdout: the result cannot be written: " + why), done.stderr
        assert done.stderr.count(b"\n") == 2
    fixed = shell(f"LORA {command} | cat; exit ${{PIPESTATUS[0]}}")  # as the error says
    assert fixed.returncode == 0
    assert fixed.stdout
    assert not fixed.stderr


def test_a_reader_that_left_ends_a_command_without_a_word(tmp_path):
    done = shell("(LORA init --schema; echo rc=$? >&2) | true")
    assert done.stderr == b"rc=1\n"


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)", "<&- 2>&-"])
def test_an_error_that_nobody_can_read_still_has_its_exit_code(stderr, tmp_path):
    assert shell(f"LORA runs {tmp_path}/none {stderr}").returncode == 2


def test_no_file_that_is_opened_later_takes_the_place_of_a_closed_stderr(tmp_path):
    code = (
        "import os, sys; from lora_cli.streams import guard_streams; guard_streams();"
        "opened = open(sys.argv[1], 'w'); assert opened.fileno() > 2, opened.fileno();"
        "print('lost', file=sys.stderr); os.write(2, b'also')"
    )
    done = shell(f"{sys.executable} -c {json.dumps(code)} {tmp_path}/precious 2>&- <&-")
    assert done.returncode == 0
    assert (tmp_path / "precious").read_bytes() == b""


def test_the_list_of_runs_shows_what_strangers_wrote_as_it_is(tmp_path):
    run = tmp_path / "run\x1b]0;pwn\x07\u202e:cat:"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "failed", "why": f"\x9b2J{chr(27)}[31m", "step": 1}))
    for options in ("", "--json"):
        out = shell(f"LORA runs {tmp_path} {options}", PYTHONIOENCODING="utf-8").stdout.decode()
        assert not [each for each in LETHAL if each in out], ascii(out)
        assert ":cat:" in out
    found = json.loads(shell(f"LORA runs {tmp_path} --json").stdout)
    assert found[0]["name"] == run.name, "in JSON nothing is changed"


def test_an_ascii_terminal_is_no_failure(tmp_path):
    (tmp_path / "→ ✓ 日").mkdir()
    (tmp_path / "→ ✓ 日" / "status.json").write_text('{"state": "failed", "why": "6 → 5"}')
    done = shell(f"LORA runs {tmp_path}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"-> ok \\u65e5: 6 -> 5" in done.stdout


def test_on_a_terminal_the_result_and_colours_come_through(tmp_path):
    own, terminal = pty.openpty()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "status.json").write_text('{"state": "done", "step": 3}')
    with subprocess.Popen(
        [sys.executable, "-m", "lora_cli", "runs", str(tmp_path)],
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
        cwd=ROOT,
    ) as process:
        assert process.wait(60) == 0
    os.close(terminal)
    text = os.read(own, 2**16).decode()
    os.close(own)
    assert "\x1b[32mdone, 3 steps" in text


def test_nothing_prints_past_the_screen():
    """One way to print: no bare print, no console of rich's own, no other status."""
    allowed = {"streams.py", "screen.py"}
    for path in sorted((ROOT / "lora_cli").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for word in (" print(", "= Console(", "Text(f", "console.status(", "from_markup"):
            assert path.name in allowed or word not in text, f"{path.relative_to(ROOT)}: {word.strip()}"


def test_paths_below_the_current_folder_are_said_as_one_writes_them_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert from_here(f"error: {here}/runs/a: no such file") == "error: runs/a: no such file"
    assert from_here(f"lora train '{here}/my runs/a' --resume") == "lora train 'my runs/a' --resume"
    for other in (f"/mnt{here}/a", f"{here}-2/a", f"{here}/-a", f"{here}/", here):
        assert from_here(other) == other
    monkeypatch.chdir("/")
    assert from_here("/a/b") == "/a/b"


def test_what_was_quoted_for_the_sake_of_the_current_folder_alone_is_not_quoted_without_it(monkeypatch, tmp_path):
    (here := tmp_path / "my work").mkdir()
    monkeypatch.chdir(here)
    for path, said in (("runs/a", "runs/a"), ("runs/a b", "'runs/a b'"), ("-x", f"'{here}/-x'")):
        assert from_here(command("lora", "chat", here / path)) == f"lora chat {said}"


STEP = {"step": 1200, "loss": 0.01312, "learning_rate": 1.8e-4, "tokens_per_second": 1234.5}
STEP |= {"peak_memory_bytes": 2**31, "seconds": 0.2}


def test_a_line_that_is_said_at_once_takes_the_place_of_the_live_display():
    console = Screen(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console, 3, 1) as progress:
        progress.say("base model")
    frame, _, after = console.file.getvalue().partition("base model")  # type: ignore[attr-defined]
    assert re.search(r"first step ….*\r\x1b\[2K$", frame, re.DOTALL)
    assert after.startswith("\n")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 150])
def test_progress_is_one_line_of_whole_words_at_any_width(width):
    console = Screen(file=io.StringIO(), force_terminal=True, width=width)
    progress = Progress(console, 11_400, 1, epochs=3.0)
    progress.line, progress.started = STEP, time.monotonic()
    (shown,) = console.render_lines(progress._render(), pad=False)
    text = "".join(segment.text for segment in shown)
    whole = progress._plain(None, None).split("  ")
    assert len(text) <= width
    assert text.lstrip("━").split("  ")[1:] == [part for part in whole if part in text]
    needed = {"step 1200/11400", *([] if width < 60 else ["loss 0.0131", "11%"])}
    assert needed <= set(text.split("  "))
    if width == 150:
        assert {"epoch 0.32", "rate 1.8e-04", "1,234 tokens/s", "2.00 GiB"} <= set(text.split("  "))


def test_off_a_terminal_a_step_is_said_whole():
    console = Screen(file=io.StringIO(), width=60)
    progress = Progress(console, 11_400, 1200)
    progress.step(STEP | {"validation_loss": 0.5})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("step 1200/11400  11%  loss 0.0131  validation 0.5000  perplexity 1.65  rate 1.8e-04")
    assert "epoch" not in said
    narrow = Screen(file=io.StringIO(), force_terminal=True, width=60)
    Progress(narrow, 11_400, 1200).step(STEP | {"validation_loss": 0.5})
    said = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("step 1200/11400  11%  loss 0.0131  validation 0.5000\n")


def test_a_line_for_people_is_wrapped_between_words_on_a_terminal_alone():
    line = (
        "packing  examples side by side without padding, by SDPA example by example; each sees only itself /a/long/path"
    )
    for width, terminal in ((60, True), (60, False)):
        console = Screen(file=io.StringIO(), force_terminal=terminal, width=width)
        say_on(console)(line)
        said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        if not terminal:
            assert said == [line]
            continue
        assert len(said) > 1
        assert all(len(each) <= width for each in said)
        assert [each[:9].strip() for each in said] == ["packing"] + [""] * (len(said) - 1)
        assert " ".join(each[9:] for each in said) == line[9:]
    long = "adapter in " + "x" * 100
    console = Screen(file=io.StringIO(), force_terminal=True, width=60)
    say_on(console)(long)
    assert "x" * 100 in console.file.getvalue()  # type: ignore[attr-defined]
