"""Writing files so that a reader, or the next run, finds them complete or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from lora_cli.ending import make_temporary, remove_temporary
from lora_cli.errors import DiskError, LoraError, refuse_if
from lora_cli.foreign import Shape, is_real_folder, kind, remove_ours

_FULL = ("no space left on the disk", "free some space; what was written before is intact")
_CLOSED = ("this place cannot be written", "choose another folder, or change its permissions")
_NO_FOLDER = ("there is a file where a folder is needed", "choose another output")
_LOOK = "look at the disk or the network drive; what was written before is intact"
_DISK_ERRORS: dict[int | None, tuple[str, str]] = {  # what happened, and what to do
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EROFS, errno.EPERM), _CLOSED),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_FOLDER),
    errno.ENOTEMPTY: ("something else was written there meanwhile", "choose another output"),
    errno.EISDIR: ("there is a folder where a file is needed", "move it elsewhere, or remove it"),
    errno.ENOENT: ("the folder is no longer there", "put it back, or choose another output"),
    **{
        code: (f"the disk failed: {os.strerror(code)}", _LOOK)
        for code in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
    },
}
_LEFT_BEHIND = re.compile(r"\.(.+)\.(tmp|old)-\d+(?:-\d+)?", re.DOTALL)


@contextmanager
def written_whole(folder: Path, shown: Path | None = None, *, replaces: Shape | None = None) -> Iterator[Path]:
    """Yields a new temporary folder beside `folder` to fill; at the end it is flushed to disk and takes its place.

    shown: the place as a person knows it, for messages. replaces: what of the folder that is there gives way; whatever
    else it holds stays in it. If the block fails, nothing of it remains and what was in `folder` stays.
    Raises DiskError when the disk is full or the place cannot be written, NotOurs for a link or a file in its place.
    """
    with disk_errors(shown or folder), _parents_made(folder):
        is_real_folder(folder)
        temporary = _free_name(folder, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            _give_usual_modes(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            _take_place(temporary, folder, replaces or {})
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # this process made all of it
            raise


@contextmanager
def whole_output(place: Path) -> Iterator[Path]:
    """As `written_whole`, for a folder that a person named: after a kill the next command that writes beside it clears
    away what was made so far."""
    with working_beside(place) as work:
        with written_whole(work / place.name, place) as temporary:
            yield temporary
        with suppress(OSError):
            place.rmdir()  # an empty folder gives way, and no other
        (work / place.name).rename(place)
        flush(place.parent)


@contextmanager
def working_beside(place: Path) -> Iterator[Path]:
    """A folder beside an output for what is made on the way; nothing of it remains. Raises DiskError."""
    with disk_errors(place), _parents_made(place):
        work = make_temporary(place)
        try:
            yield work
        finally:
            remove_temporary(work)


@contextmanager
def _parents_made(place: Path) -> Iterator[None]:
    """The folders that lead to `place`; where the block fails, those that were missing are missing again."""
    made = [each for each in place.parents if kind(each) is None]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


def _give_usual_modes(folder: Path) -> None:
    """Files as the umask wants them: safetensors from 0.8.1 on makes files that only their owner can read."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # this process has just made the folder
    for path in folder.rglob("*"):
        if kind(path) == "file" and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def _take_place(new: Path, place: Path, replaces: Shape) -> None:
    if not is_real_folder(place):
        new.rename(place)
        return
    old = _free_name(place, "old")
    place.rename(old)  # a folder cannot be exchanged for another in one portable call
    new.rename(place)
    _clear_away(old, place, replaces)


def _clear_away(old: Path, place: Path, shape: Shape) -> None:
    """Remove what is ours of a folder whose successor is in its place; whatever else it holds goes over to that."""
    if remove_ours(old, shape):
        return
    for name in os.listdir(old):
        if kind(place / name) is None:
            (old / name).rename(place / name)
        elif (inner := shape.get(name)) is not None and kind(old / name) == kind(place / name) == "folder":
            _clear_away(old / name, place / name, inner)
    with suppress(OSError):
        old.rmdir()


def _free_name(place: Path, mark: str) -> Path:
    """Where something of this process can be beside `place` for a while."""
    return free_name(place.with_name(f".{place.name}.{mark}-{os.getpid()}"))


def free_name(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-1, wanted-2 … that nothing has: only what is new is surely of this process."""
    names = (wanted.with_name(f"{wanted.name}{f'-{number}' if number else ''}") for number in count())
    return next(path for path in names if kind(path) is None)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one move, so that it is never half written. Every reader of JSON can read it: NaN and infinity
    become null, a lone surrogate a replacement character."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one move, so that it is never half written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new empty file beside `path` to fill; at the end it takes its place in one move. Raises DiskError."""
    with disk_errors(path):
        temporary = _free_name(path, "tmp")
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def remove_folder(folder: Path, shape: Shape) -> None:
    """Remove what is ours of a folder: gone for a reader at once, and not half there after a kill.

    A folder that holds something else stays, with that alone in it. Raises NotOurs for a link.
    """
    if is_real_folder(folder):
        leaving = _free_name(folder, "tmp")
        folder.rename(leaving)
        if not remove_ours(leaving, shape):
            leaving.rename(folder)


def finish_moves(folder: Path, shape_of: Callable[[str], Shape | None], files: Collection[str] = ()) -> None:
    """Clear away what a process that was killed while it wrote left in `folder`; for the only writer there.

    shape_of: what a folder of this name holds, None for a name that is not ours. files: the names that we give to
    files. A folder that had been moved aside to make place for its successor, which never came, is moved back.
    """
    for name in os.listdir(folder) if is_real_folder(folder) else ():
        found = _LEFT_BEHIND.fullmatch(name)
        if found is None:
            continue
        left, place, shape = folder / name, folder / found[1], shape_of(found[1])
        if shape is not None and kind(left) == "folder":
            if found[2] == "old" and kind(place) is None:
                if shape.keys() & set(os.listdir(left)):
                    left.rename(place)
            elif found[2] == "old" and kind(place) == "folder":
                _clear_away(left, place, shape)
            else:
                remove_ours(left, shape)
        elif found[1] in files and found[2] == "tmp" and kind(left) == "file":
            left.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a full, closed or broken place into a DiskError with a fix."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            code = error.errno
        else:  # safetensors and pyarrow wrap OSError in exceptions of their own
            number = re.search(r"(?:os error|errno) (\d+)", str(error))
            code = int(number[1]) if number else None
        if code not in _DISK_ERRORS or (code == errno.ENOENT and path.parent.exists()):
            raise
        what, fix = _DISK_ERRORS[code]
        raise DiskError(what, where=path, fix=fix) from error


def require_regular(path: Path) -> None:
    """Raises LoraError for a pipe or a device: reading one may never end, and a second reading gives something else."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise LoraError("this is a pipe or a device, not a file", where=path, fix="save what it holds as a file")


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises LoraError if the disk of `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    what = f"no disk space: {purpose} needs about {human_bytes(needed_bytes)}, {human_bytes(free)} are free"
    refuse_if(free < needed_bytes, what, where=folder, fix="free some space, or write to another disk")


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk and not only in the system's memory."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
