"""Writing files so that a reader, or the next run, finds them complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError


@contextmanager
def written_whole(folder: Path, shown: Path | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` to fill; at the end it is flushed to disk and takes its place.

    shown: the place as a person knows it, for messages. If the block fails, nothing of it remains and what was in
    `folder` stays. Raises LoraError when the disk is full or the place cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with disk_errors(shown or folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            _flush(temporary)
            _take_place(temporary, folder)
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a full or closed place into an error with a fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoraError(
                "no space left on the disk", where=str(path), fix="free some space; what was written before is intact"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise LoraError(
                "this place cannot be written", where=str(path), fix="choose another folder, or change its permissions"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise LoraError(
                "a file stands where a folder is needed", where=str(path), fix="choose another output"
            ) from error
        raise
    except Exception as error:  # safetensors wraps OSError in an exception of its own
        if "No space left" in str(error):
            raise LoraError(
                "no space left on the disk", where=str(path), fix="free some space; what was written before is intact"
            ) from error
        raise


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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
