"""One writer for a run folder: a lock that the system releases when its holder dies, however it dies."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor
from pydantic import ValidationError

from lora_cli.errors import LoraError, refuse_if
from lora_cli.files import disk_errors
from lora_cli.foreign import open_descriptor
from lora_cli.training.stored import Holder

LOCK = ".lock"
_AN_INSTANT = 0.1  # seconds
_LONGEST = 1000  # bytes that a holder writes about itself


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder` for this process alone. It is made if it is missing, and removed if nothing was put into it.

    A holder that was killed leaves its name in the file; that is reported. Raises LoraError if another process holds
    the folder or .lock is not a lock of ours, DiskError if the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with disk_errors(folder):
        handle = _acquire(folder)
    try:
        if (last := _holder(handle)) is not None and last.pid:
            say(f"the last process here{_described(last)} was killed: its lock was stale and is taken over")
        with disk_errors(folder):
            _write_holder(handle, Holder(pid=os.getpid(), host=_host(), since=now()))
        yield
    finally:
        with suppress(OSError):  # Windows does not remove an open file, so it is at least emptied
            os.ftruncate(handle, 0)
        with suppress(OSError):  # the folder may be gone, or hold files to keep
            (folder / LOCK).unlink()
            for each in made:
                each.rmdir()
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a living process holds the folder's lock."""
    path = folder / LOCK
    try:
        try:
            handle = open_descriptor(path, os.O_RDWR)  # some network drives lock only files that can be written
        except PermissionError:
            handle = open_descriptor(path)
    except (OSError, LoraError):
        return False
    try:
        return not _lock(handle)  # closing the file releases it
    except OSError:
        return False
    finally:
        os.close(handle)


def _acquire(folder: Path) -> int:
    """The lock's file, opened and held. Its last holder may just have removed it, and the folder: then begin again."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as opened:
            handle = open_descriptor(path, os.O_RDWR | os.O_CREAT)
            opened.callback(os.close, handle)
            holder = _holder(handle)
            if not _taken(handle, holder):
                what = f"another process is writing to this run folder{_described(holder)}"
                fix = "wait for it or stop it; for a separate run choose another output (--set output=…)"
                raise LoraError(what, where=folder, fix=fix)
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                _require_ours(handle, path)
                opened.pop_all()
                return handle


def _require_ours(handle: int, path: Path) -> None:
    """Raises LoraError for a file with contents of its own, or with a second name elsewhere: both would be lost."""
    fix = "move it elsewhere, or choose another output (--set output=…)"
    if os.fstat(handle).st_nlink > 1:
        raise LoraError("this file has a second name (a hard link), so it is not a lock", where=str(path), fix=fix)
    refuse_if(_holder(handle) is None, "this file is not a lock that lora wrote", where=path, fix=fix)


def _taken(handle: int, holder: Holder | None) -> bool:
    """Whether this process holds the lock now."""
    try:
        return _lock(handle)
    except OSError:  # a network drive without locks: the name in the file counts as long as its process lives
        return not (holder and holder.pid) or (holder.host == _host() and not _alive(holder.pid))


def _lock(handle: int) -> bool:
    """Take the lock, if nobody else has it. `lora runs` holds one for a moment to see whether it is free."""
    if lock_descriptor(handle, blocking=False):
        return True
    time.sleep(_AN_INSTANT)
    return lock_descriptor(handle, blocking=False)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _write_holder(handle: int, holder: Holder) -> None:
    """From the second byte on: while the first is locked, Windows lets nobody else read it."""
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, f" {holder.model_dump_json()}".encode())


def _holder(handle: int) -> Holder | None:
    """The process that wrote its name into the file and did not remove it; its pid is None if nobody did.

    Returns None for a file that lora did not write.
    """
    os.lseek(handle, 1, os.SEEK_SET)
    text = os.read(handle, _LONGEST)
    with suppress(OSError):  # Windows, while another process holds the lock
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, 1) + text
    try:
        return Holder.model_validate_json(text.strip(b" \n\0") or b"{}")
    except ValidationError:
        return None


def _host() -> str:
    return re.sub(r"[^\w.+:-]", "-", platform.node(), flags=re.ASCII)[:255] or "?"


def _described(holder: Holder | None) -> str:
    if holder is None or holder.pid is None:
        return ""
    return f" (process {holder.pid} on {holder.host}, since {holder.since})"


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
