"""One writer for a run folder: a lock that the system takes back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.files import disk_errors

LOCK = ".lock"
_AN_INSTANT = 0.2  # seconds


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone. What was made goes again if nothing came into it.

    The lock is known to the system (flock), so a holder that is killed leaves only its name behind, which is told.
    Raises LoraError if another process holds it, DiskError if the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with disk_errors(folder):
        handle = _acquire(folder)
    try:
        if holder := _holder(handle):
            say(f"the last process here{_described(holder)} ended without a word: its lock was stale and is taken over")
        with disk_errors(folder):
            os.ftruncate(handle, 0)
            own = {"pid": os.getpid(), "host": platform.node(), "since": now()}
            os.pwrite(handle, json.dumps(own).encode(), 0)
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or hold what it shall keep
            (folder / LOCK).unlink()
            for each in made:
                each.rmdir()
        os.close(handle)


def _acquire(folder: Path) -> int:
    """The lock's file, opened and held. Its last holder removes it, so it may be gone from its place meanwhile."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise LoraError("this is no file, so it is no lock", where=str(folder / LOCK), fix="remove it")
            holder = _holder(handle)
            if not _taken(handle, holder):
                raise LoraError(
                    f"another process is writing to this run folder{_described(holder)}",
                    where=str(folder),
                    fix="wait for it or stop it; for a run of its own choose another output (--set output=…)",
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _taken(handle: int, holder: dict[str, Any]) -> bool:
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_AN_INSTANT)  # `lora runs` looks whether a folder is held by holding it for a moment
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network drive without locks: then the holder counts, as long as it lives
        return not (holder and (holder.get("host") != platform.node() or _alive(holder.get("pid"))))
    return True


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError, OverflowError):
        return False
    return True


def _holder(handle: int) -> dict[str, Any]:
    """Who wrote its name into the file and did not take it out again."""
    try:
        found = json.loads(os.pread(handle, 10_000, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')})"


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
