"""Runs one command line in a forked child, in a folder of its own and within limits, and judges how it ended.

Everything is imported once, before the first fork, so that a case costs what it does and not the seconds of `import`.
No thread may run in this process by then: a fork would leave its locks closed for ever.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 10.0  # of processor time, because other work on the machine is not the case's; or of waiting
_MOST_SECONDS = 120.0  # by the clock, whatever it does
_MORE_MEMORY = 4 << 30  # bytes of address space beyond what the libraries take
_LARGEST_FILE = 256 << 20
_LONGEST_LINE, _LONGEST_MESSAGE = 1000, 20_000  # characters of an error that somebody still reads
_OUTCOMES = {0: "done", 2: "refused", 3: "stopped by a check", 130: "interrupted", -signal.SIGINT: "interrupted"}
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass
class Case:
    """One command on one damaged input, in a folder of its own.

    words: the command line. output: folders that it may write to. interrupt: seconds after which Ctrl+C is pressed,
    twice, because the run is valid and would take hours. requires: says what is wrong with the result of success.
    """

    name: str  # such as recipes/17
    told: str  # what was done to the input
    words: list[str]
    folder: Path
    output: list[Path] = field(default_factory=list)
    interrupt: float | None = None
    requires: Callable[[Result], str | None] = lambda _result: None


@dataclass
class Result:
    case: Case
    code: int  # exit code; -signal where one ended it
    seconds: float
    stdout: str
    stderr: str
    hung: bool
    interrupts: int
    problem: str | None = None

    @property
    def outcome(self) -> str:
        return "failed" if self.problem else _OUTCOMES[self.code]


def import_everything(folder: Path, warm_up: list[list[str]]) -> None:
    """Import what these command lines import, found out in a child that runs them. folder: for what they write."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "COLUMNS": "120",
    }
    import lora_cli.planning.check
    import lora_cli.training.train  # noqa: F401

    listed = folder / "modules.json"
    pid = os.fork()
    if pid == 0:
        with (folder / "warm-up.txt").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        code = 1
        try:
            codes = [_call(words) for words in warm_up]
            listed.write_text(json.dumps(list(sys.modules)))
            code = int(any(codes))
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"the commands fail as they are:\n{(folder / 'warm-up.txt').read_text()}")
    import importlib

    for name in json.loads(listed.read_text()):
        if name.split(".")[0] in ("lora_cli", "transformers", "bitsandbytes", "accelerate", "torch", "pyarrow", "rich"):
            try:
                importlib.import_module(name)
            except Exception:  # a module that only imports as part of another
                continue
    assert threading.active_count() == 1
    import gc

    gc.freeze()  # children then do not copy what they only look at


def run_alone(words: list[str], work: Path, folder: Path, *, interrupt_after: int | None = None, code: int = 0) -> None:
    """One command in a child, in `work`, that must end with `code`; after a step that is logged, Ctrl+C is pressed."""
    said = folder / "alone.txt"
    pid = os.fork()
    if pid == 0:
        ended = 1
        try:
            with said.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.chdir(work)
            if interrupt_after is not None:
                import fuzz_damage

                fuzz_damage.interrupt_after(interrupt_after)
            ended = _call(words)
        finally:
            os._exit(ended)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != code:
        sys.exit(f"lora {' '.join(words)} fails with nothing damaged:\n{said.read_text()}")


def run_all(
    cases: Sequence[Callable[[Path], Case]], folder: Path, done: Callable[[Result], None], workers: int = 2
) -> None:
    """Makes, runs and judges the cases; `workers` at a time, the case's number decides in which of their folders."""
    waiting = {slot: list(range(slot, len(cases), workers)) for slot in range(workers)}
    running: dict[int, _Running] = {}
    while running or any(waiting.values()):
        for slot, numbers in waiting.items():
            if slot not in running and numbers:
                place = folder / f"slot{slot}"
                _empty(place)
                running[slot] = _Running(cases[numbers.pop(0)](place), folder / f"said{slot}")
        for slot in list(running):
            result = running[slot].poll()
            if result is not None:
                del running[slot]
                done(result)
        time.sleep(0.002)


class _Running:
    def __init__(self, case: Case, said: Path):
        self.case, self.said = case, said
        for name in ("home", "tmp", "work"):
            (case.folder / name).mkdir(exist_ok=True)
        self.before = listing(case.folder)
        self.loaded = said.with_suffix(".loaded")
        self.loaded.unlink(missing_ok=True)
        self.interrupts, self.hung = 0, False
        self.looked = self.moved = self.used = 0.0  # seconds: of the last look, of the last one that saw work, of work
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(case, said, self.loaded)

    def poll(self) -> Result | None:
        seconds = time.monotonic() - self.started
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            self._press(seconds)
            return None
        code = os.waitstatus_to_exitcode(status)
        texts = [self.said.with_suffix(end).read_text("utf-8", "backslashreplace") for end in (".out", ".err")]
        result = Result(self.case, code, seconds, texts[0], texts[1], self.hung, self.interrupts)
        result.problem = _wrong(result) or self._written() or (self.case.requires(result) if code == 0 else None)
        return result

    def _press(self, seconds: float) -> None:
        """Ctrl+C where the case asks for it, a second one later; the end where the limit is over."""
        after = self.case.interrupt
        due = None if after is None or self.interrupts == 2 else after * (1 + 0.5 * self.interrupts)
        if due is not None and seconds > due and self._used() > due:
            self.interrupts += 1
            os.kill(self.pid, signal.SIGINT)
        if seconds > self.looked + 0.5 and not self.hung:
            self.looked, used = seconds, self._used()
            if used > self.used:
                self.used, self.moved = used, seconds
            if used > LIMIT_SECONDS or seconds > self.moved + LIMIT_SECONDS or seconds > _MOST_SECONDS:
                self.hung = True
                os.kill(self.pid, signal.SIGUSR1)  # says where it is
                time.sleep(0.3)
                os.kill(self.pid, signal.SIGKILL)

    def _used(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time

    def _written(self) -> str | None:
        """What changed outside the output folder."""
        allowed = list(self.case.output)
        if self.loaded.exists():
            allowed += [Path(each) for each in json.loads(self.loaded.read_text())]
        allowed = [Path(os.path.abspath(each)) for each in allowed]
        after = listing(self.case.folder)
        changed = [
            str(path.relative_to(self.case.folder))
            for path in sorted(self.before.keys() | after.keys())
            if self.before.get(path) != after.get(path)
            and not any(path == each or each in path.parents or path in each.parents for each in allowed)
        ]
        return f"written outside the output folder: {', '.join(changed[:5])}" if changed else None


def listing(folder: Path) -> dict[Path, Any]:
    """Everything in a folder, by what a change of it would change; of folders their names alone."""
    found: dict[Path, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            entry = path.lstat()
            is_folder = stat.S_ISDIR(entry.st_mode)
            found[path] = (entry.st_mode, *(() if is_folder else (entry.st_size, entry.st_mtime_ns)))
    return found


def _child(case: Case, said: Path, loaded: Path) -> None:
    """Never returns."""
    code = 1
    try:
        for number, path in ((1, said.with_suffix(".out")), (2, said.with_suffix(".err"))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"HOME": str(case.folder / "home"), "TMPDIR": str(case.folder / "tmp")}
        tempfile.tempdir = None
        os.chdir(case.folder / "work")
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _MORE_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _note_outputs(loaded)
        code = _call(case.words)
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    finally:
        os._exit(code)


def _call(words: list[str]) -> int:
    from lora_cli.cli import main

    sys.argv = ["lora", *words]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _note_outputs(place: Path) -> None:
    """Writes down which folders a recipe names to be written to, once it is read."""
    from lora_cli import recipe as room

    read = room.load_recipe

    def noting(*given: Any, **named: Any) -> Any:
        recipe = read(*given, **named)
        if not place.exists():  # the first is the user's; what stands in a damaged run folder is another's wish
            place.write_text(json.dumps([recipe.output, *([recipe.data.cache] if recipe.data.cache else [])]))
        return recipe

    room.load_recipe = noting


# ── judging ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _wrong(result: Result) -> str | None:
    """What is wrong with how a command ended, whatever it was asked to do."""
    code, said = result.code, result.stderr
    if result.hung:
        return f"did not end within {LIMIT_SECONDS:.0f} s"
    if "Traceback" in said or "Traceback" in result.stdout:
        return f"a traceback: {said.strip().splitlines()[-1][:200]}"
    if code == -signal.SIGINT and result.interrupts:  # the command itself takes Ctrl+C; this was at the exit
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code not in _OUTCOMES:
        return f"exit code {code}"
    if code == 130:
        return _wrong_interruption(result)
    return _wrong_message(said) if code else None


def _wrong_interruption(result: Result) -> str | None:
    if not result.interrupts:
        return "exit code 130, and nobody interrupted"
    begun = (result.case.folder / "work" / "run" / "metrics.jsonl").exists()
    if result.interrupts == 1 and begun and "a checkpoint is written" not in result.stderr:
        return "interrupted without a word of how to go on"
    return None


def _wrong_message(said: str) -> str | None:
    at = re.search(r"^error: ", said, re.MULTILINE)
    if at is None:
        return "no line begins with error:"
    message = said[at.start() :]
    if len(message) > _LONGEST_MESSAGE or max(map(len, message.splitlines())) > _LONGEST_LINE:
        return f"a message of {len(message):,} characters, {max(map(len, message.splitlines())):,} on one line"
    if found := _UNPRINTABLE.search(message):
        return f"the message holds the control character {found[0]!r}"
    errors = re.split(r"^(?=error: )", message, flags=re.MULTILINE)[1:]
    for error in errors:
        if "\n  fix: " not in error:
            return f"no fix: {error.splitlines()[0][:200]}"
    return None


def wrong_adapter(folder: Path) -> str | None:
    """What is wrong with an adapter folder: it must open, and hold finite numbers alone."""
    from safetensors.numpy import load_file

    try:
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"), parse_constant=_no_number)
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        return f"the adapter does not open: {error}"
    broken = [name for name, tensor in tensors.items() if not bool((abs(tensor) < float("inf")).all())]
    return f"{broken[0]} of the adapter is not finite" if broken else None


def wrong_run(folder: Path) -> str | None:
    """What is wrong with a run folder whose run says that it is done."""
    try:
        json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=_no_number)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line, parse_constant=_no_number)["step"] for line in lines]
    except Exception as error:
        return f"report.json or metrics.jsonl does not parse: {error}"
    if steps != list(range(1, len(steps) + 1)):
        return f"metrics.jsonl has the steps {steps[:20]}"
    return wrong_adapter(folder / "adapter")


def wrong_weights(folder: Path) -> str | None:
    """What is wrong with a merged model: it must open, and hold finite numbers alone."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "model.safetensors")
    except Exception as error:
        return f"the merged model does not open: {error}"
    broken = [name for name, tensor in tensors.items() if not bool(tensor.float().isfinite().all())]
    return f"{broken[0]} of the merged model is not finite" if broken else None


def wrong_json(text: str) -> str | None:
    try:
        json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        return f"stdout is not one JSON document of numbers: {error}"
    return None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _empty(folder: Path) -> None:
    if folder.is_symlink() or folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
