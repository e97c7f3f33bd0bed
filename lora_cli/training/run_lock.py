"""One writer for a run folder: a lock that the system takes back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.files import disk_errors

LOCK = ".lock"
_AN_INSTANT = 0.2  # seconds


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone.

    The file says who holds it; that it is held is known to the system (flock), so a holder that was killed leaves no
    lock behind, only its name, which is told. Raises LoraError if another process holds it, DiskError if the folder
    cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    mine = False
    try:
        holder = _holder(handle)
        if not _taken(handle, holder):
            raise LoraError(
                f"another process is writing to this run folder{_described(holder)}",
                where=str(folder),
                fix="wait for it or stop it; for a run of its own choose another output (--set output=…)",
            )
        if holder:
            say(f"the last process here{_described(holder)} ended without a word: its lock was stale and is taken over")
        with disk_errors(folder):
            mine = True
            _write(handle, {"pid": os.getpid(), "host": platform.node(), "since": now()})
        yield
    finally:
        if mine:
            os.ftruncate(handle, 0)
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


def _write(handle: int, holder: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')})"


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
