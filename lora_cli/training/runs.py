"""`lora runs`: the runs below a folder and their state, read from their files alone. No torch, so it is instant."""

from __future__ import annotations

import operator
import os
import re
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.foreign import kind, open_binary, parse_json, read_bytes

DEFAULT_FOLDER = Path("runs")
MEAN_STEPS = 10  # last lines of metrics.jsonl in the loss that is shown
ELSEWHERE_SECONDS = 900.0  # without news, after which a run on another machine counts as killed

_MOST_BYTES = 8 * 2**20  # of status.json or report.json
_LARGEST = 1e15  # of what is counted or measured
_TAIL_BYTES = 16_384
_LONGEST_LINE = 10_000  # bytes, of metrics.jsonl
# The types of the keys that are read; other keys are ignored.
_STATUS: dict[str, type] = dict.fromkeys(("state", "why", "host", "updated"), str)
_STATUS |= dict.fromkeys(("step", "total_steps", "wall_seconds"), float)
_REPORT: dict[str, type] = dict.fromkeys(("tokens", "steps", "seconds", "best_validation_loss"), float)
_REPORT |= {"learned": bool, "verdict": str}
_DOUBTFUL = ("hardly trained", "not certain", "nothing learned")  # verdicts of a report that are not good
_WORDS = {float: "a number from 0 on", str: "text", bool: "true or false"}
_NUMBER = r"-?\d{1,40}(?:\.\d{1,40})?(?:[eE][-+]?\d{1,4})?"
_VALUES = re.compile(rf'"(step|loss|tokens|seconds|validation_loss)": ?(null|{_NUMBER}) ?[,}}]'.encode())


@dataclass(frozen=True)
class Run:
    """The state of one run. Whatever its files do not say is None.

    state: running, done, nothing learned, interrupted, failed, killed or damaged. why: of the last three.
    loss: training, mean of the last 10 steps; validation_loss: the best; both in nats a target token. tokens: all but
    padding. hours: over all sessions. cost: hours × price of an hour. last_activity: ISO 8601. result: the verdict of a
    finished run's report; with `nothing learned` the run is that instead of done.
    """

    name: str
    folder: str
    state: str
    step: int | None
    total_steps: int | None
    why: str | None
    loss: float | None
    validation_loss: float | None
    tokens: int | None
    hours: float | None
    cost: float | None
    last_activity: str
    result: str | None

    @property
    def progress(self) -> str:
        """State and step in a few words: `done, 114 steps`, `hardly trained, 2 steps`, `killed at step 60/114`."""
        if self.step is None or self.state in ("nothing learned", "damaged"):
            return self.state
        if self.state == "done":
            return f"{self.result if self.doubtful else 'done'}, {self.step} step{'' if self.step == 1 else 's'}"
        of = f"/{self.total_steps}" if self.total_steps else ""
        return f"{self.state} at step {self.step}{of}"

    @property
    def doubtful(self) -> bool:
        """Whether it came to its end, and the report says that this was not enough."""
        return self.state == "done" and self.result in _DOUBTFUL


def list_runs(folder: Path, price: float | None = None) -> list[Run]:
    """Runs in `folder`, up to two levels down, newest activity first; `folder` itself if it is one.

    price: of an hour, in any currency. Files that are damaged or half written count as far as they can be read.
    Raises LoraError if there is no such folder; the default folder may be missing.
    """
    if not folder.is_dir():
        if folder == DEFAULT_FOLDER and not folder.exists():
            return []
        what = "this is a file, not a folder" if folder.exists() else "no such folder"
        raise LoraError(what, where=str(folder), fix="lora runs FOLDER, with the folder that holds your runs")
    found = [_read_run(each, folder, price) for each in _run_folders(folder)]
    return sorted(found, key=lambda run: run.last_activity, reverse=True)


def as_dicts(runs: list[Run]) -> list[dict[str, Any]]:
    """For --json."""
    return [asdict(run) for run in runs]


def print_runs(runs: list[Run], folder: Path, console: Any) -> None:
    """Print a table, or what to do where there are no runs."""
    from lora_cli.screen import fits, say_on

    say = say_on(console)
    if not runs:
        say(f"no runs in the folder {folder}")
        say("lora train RECIPE starts one; lora runs FOLDER looks in another folder")
        return
    spare = ["updated", "tokens", "hours", "loss"]  # left out in this order where a terminal is too narrow
    while not fits(table := _table(runs, console, spare), console) and spare:
        del spare[0]
    console.print(table)
    for run in runs:
        if run.why and run.state in ("failed", "nothing learned", "damaged"):
            say(f"{run.name}: {run.why}")


def _table(runs: list[Run], console: Any, shown: list[str]) -> Any:
    """shown: of the columns that can be left out."""
    from rich.table import Table

    from lora_cli.screen import styled

    styles = {"running": "cyan", "done": "green", "interrupted": "yellow"}
    columns = {
        "loss": lambda run: _decimals(run.loss, 4),
        "valid.": lambda run: _decimals(run.validation_loss, 4),
        "tokens": lambda run: _short(run.tokens),
        "hours": lambda run: _decimals(run.hours, 2),
        "cost": lambda run: _decimals(run.cost, 2),
        "updated": lambda run: _ago(run.last_activity),
    }
    wanted = {"valid.", *shown, *(["cost"] if runs[0].cost is not None else [])}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold", no_wrap=max(len(run.name) for run in runs) < console.width // 2)
    table.add_column("state", overflow="fold", min_width=14 if console.is_terminal else None)
    for name in columns:
        if name in wanted:
            table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        style = "yellow" if run.doubtful else styles.get(run.state, "red")
        cells = [value(run) for name, value in columns.items() if name in wanted]
        table.add_row(styled(run.name), styled(run.progress, style), *cells)
    return table


# ── one run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _run_folders(folder: Path, levels: int = 2) -> Iterator[Path]:
    names = {entry.name for entry in _entries(folder)}
    if "status.json" in names or {"recipe.yaml", "environment.json"} <= names:
        yield folder
    elif levels:
        for entry in _entries(folder):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _run_folders(Path(entry.path), levels - 1)


def _read_run(path: Path, below: Path, price: float | None) -> Run:
    problems: list[str] = []
    status = _read_json(path / "status.json", _STATUS, problems)
    report = _read_json(path / "report.json", _REPORT, problems)
    # The report sums up what a finished run did; of any other the lines have to be added up.
    sums, losses = _add_up(path / "metrics.jsonl", problems, tail="tokens" in report)
    step = _first(status.get("step"), report.get("steps"), sums.get("step"), _newest_checkpoint(path))
    wall = _first(status.get("wall_seconds"), report.get("seconds"), sums.get("seconds"))
    hours = None if wall is None else wall / 3600
    tokens = _first(report.get("tokens"), sums.get("tokens"))
    total = _first(status.get("total_steps"), report.get("steps"))
    state = "damaged" if problems else _state(path, status, report)
    return Run(
        name=_text(path.resolve().name if path == below else str(path.relative_to(below))),
        folder=_text(str(path)),
        state=state,
        step=_whole(step),
        total_steps=_whole(total),
        why="; ".join(problems) if problems else status.get("why"),
        loss=sum(losses) / len(losses) if losses else None,
        validation_loss=_first(report.get("best_validation_loss"), sums.get("validation_loss")),
        tokens=_whole(tokens),
        hours=hours,
        cost=None if price is None or hours is None else hours * price,
        last_activity=_last_activity(path, status).isoformat(timespec="seconds"),
        result=report.get("verdict") if state in ("done", "nothing learned") else None,
    )


def _state(path: Path, status: dict[str, Any], report: dict[str, Any]) -> str:
    state = status.get("state")
    locked = _is_locked(path)
    if state is None:  # of an older version
        if locked:
            return "running"
        if report:
            return "done" if report.get("learned", True) else "nothing learned"
        return "interrupted"
    if state != "running" or locked:
        return state
    if status.get("host") not in (None, socket.gethostname()):  # not every file system shares locks between machines
        silent = datetime.now(UTC) - _last_activity(path, status)
        return "running" if silent.total_seconds() < ELSEWHERE_SECONDS else "killed"
    return "killed"


def _is_locked(path: Path) -> bool:
    if kind(path / ".lock") != "file":
        return False
    from lora_cli.training.run_lock import is_held

    return is_held(path)


def _last_activity(path: Path, status: dict[str, Any]) -> datetime:
    try:
        stated = datetime.fromisoformat(str(status.get("updated")).replace("Z", "+00:00"))
        return (stated if stated.tzinfo else stated.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # not a time, or before the first year
        names = ("metrics.jsonl", "report.json", "environment.json", "status.json")
        times = [os.lstat(path / name).st_mtime for name in names if kind(path / name) == "file"]
    try:
        return datetime.fromtimestamp(max(times, default=0.0), UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0.0, UTC)


def _newest_checkpoint(path: Path) -> float | None:
    steps = [re.fullmatch(r"step_(\d{1,15})", entry.name) for entry in _entries(path / "checkpoints")]
    return max((float(found[1]) for found in steps if found), default=None)


# ── reading files that may be damaged, or a stranger's ────────────────────────────────────────────────────────────────


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name; none if it cannot be opened."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _read_json(path: Path, wanted: dict[str, type], problems: list[str]) -> dict[str, Any]:
    """The wanted values of a file, without those that are null; what is wrong with it is added to `problems`."""
    if kind(path) is None:
        return {}
    try:
        found = parse_json(read_bytes(path, _MOST_BYTES))
    except (LoraError, OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {_reason(error)}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    values = {name: found[name] for name in wanted if found.get(name) is not None}
    for name in [name for name, value in values.items() if not _is_a(wanted[name], value)]:
        problems.append(f"{path.name}: {name} is not {_WORDS[wanted[name]]}")
        del values[name]
    return values


def _is_a(needed: type, value: Any) -> bool:
    if needed is float:
        return (number := _number(value)) is not None and number >= 0
    return type(value) is needed


def _add_up(metrics: Path, problems: list[str], *, tail: bool) -> tuple[dict[str, float], list[float]]:
    """(step: the last; tokens, seconds: of all; validation_loss: the lowest), and the losses of the last 10 steps.

    tail: the losses alone, without reading the lines before. All is found in whole lines, without parsing each.
    """
    found: dict[str, float] = {}
    last: deque[float | None] = deque(maxlen=MEAN_STEPS)
    rules: dict[str, Any] = {"step": max, "tokens": operator.add, "seconds": operator.add, "validation_loss": min}
    try:
        with open_binary(metrics) as stream:
            if tail:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            while content := stream.read(2**20) + stream.readline(_LONGEST_LINE):
                for name, text in _VALUES.findall(content, 0, content.rfind(b"\n") + 1):
                    key, value = name.decode(), None if text == b"null" else _number(float(text))
                    if key == "loss":
                        last.append(value)
                    elif value is not None and not tail:
                        found[key] = rules[key](found[key], value) if key in found else value
    except FileNotFoundError:
        pass
    except (LoraError, OSError) as error:
        problems.append(f"{metrics.name} cannot be read: {_reason(error)}")
    sums = {name: value for name, value in found.items() if abs(value) <= _LARGEST}
    return sums, [loss for loss in last if loss is not None]


def _reason(error: Exception) -> str:
    text = error.what if isinstance(error, LoraError) else getattr(error, "strerror", None) or str(error)
    return _text(text.splitlines()[0][:200]) if text else type(error).__name__


def _text(name: str) -> str:
    """A name of the file system, which may hold any bytes, as text that can be printed."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_LARGEST <= value <= _LARGEST else None


# ── numbers as a person reads them ──────────────────────────────────────────────────────────────────────────────


def _decimals(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _short(count: int | None) -> str:
    """`870`, `57.0k`, `250k`, `1.2M`."""
    if count is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f}{unit}"
    return str(count)


def _ago(moment: str) -> str:
    """`now`, `6 min`, `3 h`, `12 d`: how long it has been."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds / size)} {unit}"
    return "now"
