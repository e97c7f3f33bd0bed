"""How a command ends early: by SIGTERM or SIGHUP as by Ctrl+C, and without leaving copies of the user's rows behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError, command

SIGHUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
_ENDINGS = tuple(each for each in (signal.SIGTERM, SIGHUP) if each is not None)

_PREFIX, _LOCK, _FILES = "lora-", "of-a-lora-process.lock", "files"
_received: list[int] = []
_temporary: dict[Path, int | None] = {}  # with the lock that says that its process lives
_exit_code = 0


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, unless they are ignored: nohup and trap '' go on working."""
    for each in _ENDINGS:
        if signal.getsignal(each) == signal.SIG_DFL:
            signal.signal(each, _on_signal)
    listen_anew()
    sys.unraisablehook = resend_lost_interrupt


def listen_anew() -> None:
    """Forget earlier signals, which belong to another run in this process."""
    _received.clear()


def signal_received() -> int:
    """The signal that ended this command; SIGINT if no other did."""
    return _received[0] if _received else signal.SIGINT


def signalled() -> bool:
    """Whether a signal has come that a run listens to, since it began."""
    return bool(_received)


def interrupted_by_ctrl_c() -> bool:
    """Whether a KeyboardInterrupt was a person's, and not a signal that ends the program."""
    return not _received


def exit_within(seconds: float) -> None:
    """End the program at the latest after `seconds` of what libraries do at exit, such as waiting for their threads."""

    def begin() -> None:
        last = threading.Timer(seconds, lambda: os._exit(_exit_code))
        last.daemon = True
        with suppress(RuntimeError):  # no more threads can be started
            last.start()

    # Before Python waits for threads, which atexit is not.
    getattr(threading, "_register_atexit", atexit.register)(begin)


def let_go(exit_code: int) -> None:
    """At the very end: remove what is temporary. After it signals end the program at once."""
    global _exit_code  # noqa: PLW0603 - for the end of the interpreter
    _exit_code = exit_code
    _remove_all()
    for each in (signal.SIGINT, *_ENDINGS):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__


def make_temporary(beside: Path | None = None) -> Path:
    """A folder that only this user can open; removed when the program ends, at the latest. What processes that were
    killed left of theirs goes now.

    beside: an output that will be made of it, so that both are on one disk. Raises OSError.
    """
    remove_leftovers(beside)
    made = Path(tempfile.mkdtemp(prefix=_prefix(beside), dir=beside and beside.parent)).resolve()
    handle, folder = _held(made), made / _FILES
    folder.mkdir(mode=0o700)
    _temporary[folder] = handle
    return folder


def remove_temporary(folder: Path) -> None:
    if folder in _temporary:
        if (handle := _temporary.pop(folder)) is not None:
            os.close(handle)
        _remove(folder.parent)


def _remove(made: Path) -> None:
    """The lock last: what is left after a kill in here is found again."""
    for each in (made / _FILES, made):
        shutil.rmtree(each, ignore_errors=True)


@atexit.register
def _remove_all() -> None:
    for folder in list(_temporary):
        remove_temporary(folder)


def _held(made: Path) -> int | None:
    """Its lock, which is there from the start as one that is held. None on Windows, where folders stay after a kill."""
    if os.name == "nt":
        return None
    handle = os.open(made / "new", os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):  # a drive without locks: as on Windows
        if _lock(handle):
            (made / "new").rename(made / _LOCK)
    return handle


def _prefix(beside: Path | None) -> str:
    return _PREFIX if beside is None else f".{_PREFIX}"


def remove_leftovers(beside: Path | None = None) -> None:
    """Temporary folders of this user whose lock nobody holds, and that hold nothing else: others keep locks, too."""
    place = Path(tempfile.gettempdir()) if beside is None else beside.parent
    for lock in place.glob(f"{_prefix(beside)}*/{_LOCK}"):
        with suppress(OSError):
            if lock.parent.lstat().st_uid != os.geteuid():  # another's folder, or link
                continue
            if not {each.name for each in lock.parent.iterdir()} <= {_LOCK, _FILES}:
                continue
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            if _lock(handle):
                _remove(lock.parent)
            os.close(handle)


def _lock(handle: int) -> bool:
    from filelock import lock_descriptor

    return lock_descriptor(handle, blocking=False)


def require_temporary_folder(*others: Path) -> None:
    """Make sure that there is a folder for temporary files, which libraries ask for as soon as they are imported.

    others: places to use where the system has none, such as the output; for a folder that does not exist yet, the one
    that it will be in. Raises LoraError if nothing can be written.
    """
    with suppress(FileNotFoundError):
        tempfile.gettempdir()
        return
    for place in others:
        existing = next((each for each in (place, *place.absolute().parents) if each.is_dir()), None)
        with suppress(OSError):
            if existing is not None:
                tempfile.TemporaryFile(dir=existing).close()
                tempfile.tempdir = str(existing.absolute())
                return
    fix = f"name one that can: {command('export', 'TMPDIR=/path/to/a/folder')}, and start it again"
    raise LoraError("no folder for temporary files can be written", where="/tmp", fix=fix)


def note_signal(number: int) -> bool:
    """Remember that a signal came; whether it asks for something new: a closed terminal sends SIGHUP more than once."""
    again = number == SIGHUP and bool(_received)
    _received.append(number)
    return not again


def _on_signal(number: int, _frame: Any) -> None:
    if note_signal(number):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise KeyboardInterrupt


def resend_lost_interrupt(lost: Any) -> None:
    """sys.unraisablehook: Python drops a KeyboardInterrupt raised in a finalizer, so the signal is sent again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    try:
        threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,)).start()
    except KeyboardInterrupt:  # on a busy machine it came while still in here, where it is dropped as well
        resend_lost_interrupt(lost)
