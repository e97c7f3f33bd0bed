"""One writer for a run folder: a lock that the system takes back when its holder dies, however it dies."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from lora_cli.errors import LoraError
from lora_cli.files import disk_errors
from lora_cli.foreign import open_descriptor, parse_json

LOCK = ".lock"
_AN_INSTANT = 0.2  # seconds
_LONGEST = 1000  # bytes that a holder writes of itself
_PLAIN = re.compile(r"[\w.+:?-]{1,255}", re.ASCII)  # the name of a machine, a time


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone. What was made goes again if nothing came into it.

    The lock is known to the system, so a holder that is killed leaves only its name behind, which is told.
    Raises LoraError if another process holds it or .lock is not a lock of ours, DiskError if the folder cannot be
    written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with disk_errors(folder):
        handle = _acquire(folder)
    try:
        if holder := _holder(handle):
            say(f"the last process here{_described(holder)} ended without a word: its lock was stale and is taken over")
        with disk_errors(folder):
            _write_holder(handle, {"pid": os.getpid(), "host": _host(), "since": now()})
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open, so it is emptied at least
            os.ftruncate(handle, 0)
        with suppress(OSError):  # the folder may be gone, or hold what it has to keep
            (folder / LOCK).unlink()
            for each in made:
                each.rmdir()
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a living process holds the folder's lock; it goes with the process, however that ends."""
    try:
        handle = _open(folder / LOCK)
    except (OSError, LoraError):
        return False
    try:
        return not _locks(handle)  # closing the file releases it
    except OSError:
        return False
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return open_descriptor(path, os.O_RDWR)  # some network drives lock only what may be written
    except PermissionError:
        return open_descriptor(path)


def _acquire(folder: Path) -> int:
    """The lock's file, opened and held. Its last holder removes it, so it may be gone from its place meanwhile."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = open_descriptor(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # its last holder has just removed the folder, too
            continue
        try:
            holder = _holder(handle)
            if not _taken(handle, holder):
                raise LoraError(
                    f"another process is writing to this run folder{_described(holder)}",
                    where=str(folder),
                    fix="wait for it or stop it; for a run of its own choose another output (--set output=…)",
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK)):
                    _require_ours(handle, folder / LOCK)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _require_ours(handle: int, path: Path) -> None:
    """Raises LoraError for a file with contents of its own, or with a second name elsewhere: both would be lost."""
    if os.fstat(handle).st_nlink > 1:
        raise LoraError("this file has a second name (a hard link), so it is not a lock", where=str(path), fix=_MOVE)
    if _said(handle) is None:
        raise LoraError("this file is not a lock that lora wrote", where=str(path), fix=_MOVE)


_MOVE = "move it elsewhere, or choose another output (--set output=…)"


def _taken(handle: int, holder: dict[str, Any]) -> bool:
    try:
        if _locks(handle):
            return True
        time.sleep(_AN_INSTANT)  # `lora runs` looks whether a folder is held by holding it for a moment
        return _locks(handle)
    except OSError:  # a network drive without locks: then the holder counts, as long as it lives
        return not (holder and (holder["host"] != _host() or _alive(holder["pid"])))


def _locks(handle: int) -> bool:
    return lock_descriptor(handle, blocking=False)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _write_holder(handle: int, holder: dict[str, Any]) -> None:
    """Behind the first byte, which Windows keeps from all others while it is locked."""
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, f" {json.dumps(holder)}".encode())


def _text(handle: int) -> bytes:
    with suppress(OSError):
        os.lseek(handle, 1, os.SEEK_SET)
        behind = os.read(handle, _LONGEST + 1)
        with suppress(OSError):
            os.lseek(handle, 0, os.SEEK_SET)
            return os.read(handle, 1) + behind
        return behind
    return b""


def _holder(handle: int) -> dict[str, Any]:
    """pid, host, since: who wrote its name into the file and did not take it out again; {} if nobody did."""
    found = _said(handle)
    if found is None or type(pid := found.get("pid")) is not int or not 0 < pid < 2**31:
        return {}
    texts = {name: found.get(name, "?") for name in ("host", "since")}
    plain = all(isinstance(text, str) and _PLAIN.fullmatch(text) for text in texts.values())
    return {"pid": pid, **texts} if plain else {}


def _said(handle: int) -> dict[str, Any] | None:
    """What is in the file, {} if nothing is; None if lora did not write it."""
    text = _text(handle).strip(b" \n\0")
    try:
        found = parse_json(text) if text else {}
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() <= {"pid", "host", "since"} else None


def _host() -> str:
    return re.sub(r"[^\w.+:-]", "-", platform.node(), flags=re.ASCII)[:255] or "?"


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
