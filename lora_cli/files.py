"""Writing files so that a reader, or the next run, finds them complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli.errors import DiskError, LoraError


@contextmanager
def written_whole(folder: Path, shown: Path | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` to fill; at the end it is flushed to disk and takes its place.

    shown: the place as a person knows it, for messages. If the block fails, nothing of it remains and what was in
    `folder` stays. Raises DiskError when the disk is full or the place cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with disk_errors(shown or folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _give_usual_modes(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            _take_place(temporary, folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _give_usual_modes(folder: Path) -> None:
    """Files as the umask wants them: safetensors from 0.8.1 on makes files that only their owner can read."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode != mode:
            path.chmod(stat.S_IMODE(mode))


def _take_place(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    place.rename(old)  # a folder cannot be exchanged for another in one portable call
    new.rename(place)
    shutil.rmtree(old)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one move, so that it is never half written."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one move, so that it is never half written."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            temporary.write_bytes(content)
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def remove_folder(folder: Path) -> None:
    """Gone for a reader at once, and not half there after a kill."""
    leaving = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    folder.rename(leaving)
    shutil.rmtree(leaving)


def finish_moves(folder: Path) -> None:
    """Clear away what a process that was killed while it wrote left in `folder`; for the only writer there.

    A folder that had been moved aside to make place for its successor, which never came, is moved back.
    """
    for left in folder.glob(".*.old-*") if folder.is_dir() else ():
        place = left.with_name(left.name[1:].rpartition(".old-")[0])
        shutil.rmtree(left) if place.exists() else left.rename(place)
    for left in folder.glob(".*.tmp-*") if folder.is_dir() else ():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a full, closed or broken place into a DiskError with a fix."""
    try:
        yield
    except LoraError:
        raise
    except OSError as error:
        problem = _disk_error(error.errno, path)
        if problem is None:
            raise
        raise problem from error
    except Exception as error:  # safetensors and pyarrow wrap OSError in exceptions of their own
        number = re.search(r"(?:os error|errno) (\d+)", str(error))
        problem = _disk_error(int(number[1]) if number else None, path)
        if problem is None:
            raise
        raise problem from error


def _disk_error(code: int | None, path: Path) -> DiskError | None:
    where = str(path)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            "no space left on the disk", where=where, fix="free some space; what was written before is intact"
        )
    if code in (errno.EACCES, errno.EROFS, errno.EPERM):
        return DiskError(
            "this place cannot be written", where=where, fix="choose another folder, or change its permissions"
        )
    if code in (errno.ENOTDIR, errno.EEXIST):
        return DiskError("a file stands where a folder is needed", where=where, fix="choose another output")
    if code in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT):
        fix = "look at the disk or the network drive; what was written before is intact"
        return DiskError(f"the disk failed: {os.strerror(code)}", where=where, fix=fix)
    if code == errno.ENOENT and not path.parent.exists():
        return DiskError("the folder is no longer there", where=where, fix="put it back, or choose another output")
    return None


def require_regular(path: Path) -> None:
    """Raises LoraError for a pipe or a device: reading one may never end, and a second reading gives something else."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise LoraError("this is a pipe or a device, not a file", where=str(path), fix="save what it holds as a file")


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises LoraError if the disk of `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise LoraError(
            f"no disk space: {purpose} needs about {human_bytes(needed_bytes)}, {human_bytes(free)} are free",
            where=str(folder),
            fix="free some space, or write to another disk",
        )


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
