"""Files and folders that somebody else may have made: nothing in them is followed, waited for, or believed unchecked.

A run folder is foreign until proved ours: it may be a stranger's, or hold what the user put there. So no link is
followed inside it, a pipe or a device is never read, every file is read up to a bound, JSON is checked by a schema
before it is used, and only files with the exact names that we write are copied or removed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

from lora_cli.errors import LoraError

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

# What a folder of ours holds: the name of each file → None, of each folder → what that one holds.
Shape = Mapping[str, "Shape | None"]

MOST_JSON_BYTES: Final = 64 * 2**20
MOST_TEXT_BYTES: Final = 2**20
LARGEST: Final = 2**53  # a whole number that every reader of JSON keeps exactly; nothing that we count comes near

# O_NONBLOCK: opening a pipe must not wait for its writer. Windows has neither pipes in folders nor these flags.
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PUT_BACK = "put back the file that was here before, or remove it"
_MOVE = "move it elsewhere, or remove it"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_KIND = re.compile(r"(?:str|int|float|bool|none|(?:dict|list|tuple|literal|function|constrained)\b.*)")  # in a place


class NotOurs(LoraError):
    """Something else is where we expect a file or a folder of ours: a link, a pipe, a device, another kind."""


# ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────


def kind(path: Path) -> str | None:
    """`file`, `folder`, `link` or `pipe or device`, without following a link; None if nothing is there."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(found.st_mode) or _is_junction(found):
        return "link"
    if stat.S_ISDIR(found.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(found.st_mode) else "pipe or device"


def is_real_folder(path: Path) -> bool:
    """Whether a folder is there; False if nothing is. Raises NotOurs for a link to one, or anything else."""
    return _is_there(path, "folder")


def is_real_file(path: Path) -> bool:
    """Whether a regular file is there; False if nothing is. Raises NotOurs for a link to one, or anything else."""
    return _is_there(path, "file")


def _is_there(path: Path, wanted: str) -> bool:
    found = kind(path)
    if found not in (None, wanted):
        raise not_ours(path, found, wanted)
    return found is not None


def not_ours(path: Path, found: str, wanted: str) -> NotOurs:
    if found == "link":
        what = "this is a link, and links are not followed inside a folder that lora writes"
        fix = f"replace it with the {wanted} it points to, if that is yours; or remove the link"
    else:
        what, fix = f"this is a {found} where a {wanted} is expected", _MOVE
    return NotOurs(what, where=path, fix=fix)


def _is_junction(found: os.stat_result) -> bool:
    """Windows' links between folders, which are not symbolic links."""
    tag = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)
    return tag is not None and getattr(found, "st_reparse_tag", 0) == tag


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file, opened without following a link and without waiting. The caller closes it.

    Raises NotOurs for anything but a regular file, and OSError as os.open does.
    """
    found = kind(path)
    if found not in (None, "file"):
        raise not_ours(path, found, "file")
    try:
        handle = os.open(path, flags | _SAFELY, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # it became a link just now
            raise not_ours(path, "link", "file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_ours(path, "pipe or device", "file")
    return handle


def open_binary(path: Path) -> BinaryIO:
    """A regular file for reading, as `open_descriptor` opens it."""
    return os.fdopen(open_descriptor(path), "rb")


def open_to_append(path: Path) -> BinaryIO:
    """A regular file, made if it is missing, for writing at its end; never through a link."""
    return os.fdopen(open_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def read_bytes(path: Path, at_most: int = MOST_JSON_BYTES) -> bytes:
    """All of a regular file. Raises LoraError if it is longer than `at_most` bytes, NotOurs, or OSError."""
    with open_binary(path) as stream:
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise LoraError(f"this file is larger than the limit of {at_most:,} bytes", where=path, fix=_PUT_BACK)
    return content


def read_text(path: Path, at_most: int = MOST_TEXT_BYTES) -> str:
    """All of a regular file as text. Raises LoraError if it is not UTF-8, too long or not a file; OSError."""
    try:
        return read_bytes(path, at_most).decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"this is not text in UTF-8: {error.reason} at byte {error.start}"
        raise LoraError(what, where=path, fix=_PUT_BACK) from None


def parse_json(content: bytes) -> Any:
    """The value of a JSON document whose numbers and characters every program can read.

    Raises ValueError with the reason for anything else: no JSON, nested too deeply, NaN and infinity, whole numbers
    above 2**53, lone surrogates.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\u" in content and _HALF_CHARACTER.search(json.dumps(found, ensure_ascii=False)):
        raise ValueError("it contains a lone surrogate")
    return found


def read_json(path: Path, model: type[Model], *, fix: str, at_most: int = MOST_JSON_BYTES) -> Model:
    """A JSON file, read as `model` says. Raises LoraError with `fix` for whatever else it is, or if it is missing."""
    from pydantic import ValidationError

    try:
        return model.model_validate_json(read_bytes(path, at_most))
    except NotOurs:
        raise
    except ValidationError as error:
        raise LoraError(f"this file is damaged: {reason(error)}", where=path, fix=fix) from None
    except LoraError as error:
        raise LoraError(error.what, where=path, fix=fix) from None
    except OSError as error:
        raise LoraError(f"it cannot be read: {error.strerror or error}", where=path, fix=fix) from None


def reason(error: Any) -> str:
    """The first thing that a schema found wrong, on one line, and how many more.

    Of a value that may be one of several kinds all are tried: where one of them got furthest is the place.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    places = [tuple(str(each)[:40] for each in own["loc"][:6] if not _KIND.fullmatch(str(each))) for own in problems]
    first = max((each for each in places if each[:1] == places[0][:1]), key=len)
    said = [own["msg"] for own, place in zip(problems, places, strict=True) if place == first]
    message = " or ".join(dict.fromkeys(f"{each[:1].lower()}{each[1:]}" if first else each for each in said))
    message = _HALF_CHARACTER.sub("?", message.replace(" or input should be", " or"))[:200]
    others = len({each for each in places if each != first[: len(each)]})
    more = f", and {others} more problem{'s' if others > 1 else ''}" if others else ""
    return f"{'.'.join(first)}{': ' if first else ''}{message}{more}"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"the number {text[:12]}… is too large")
    return int(text)


def _finite(text: str) -> float:
    if (number := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:12]} is too large")
    return number


# ── taking over and removing what has our names ─────────────────────────────────────────────────────────────────


def files_of(folder: Path, shape: Shape) -> list[Path]:
    """The files of a folder that has the names of `shape` and no others, by their paths in the order of names.

    Raises NotOurs for a name that does not belong there, a link, a pipe, or a folder in place of a file.
    """
    found: list[Path] = []
    for name in sorted(os.listdir(folder)):
        path, inner = folder / name, shape.get(name)
        if name not in shape:
            raise NotOurs("this does not belong here", where=path, fix=_MOVE)
        if inner is None:
            is_real_file(path)
            found.append(path)
        elif is_real_folder(path):
            found += files_of(path, inner)
    return found


def copy_file(source: Path, target: Path, *, over: bool = False) -> None:
    """Copy the bytes of a regular file to a name that is still free. over: into a file that this process made."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if over else os.O_EXCL)
    with open_binary(source) as stream, os.fdopen(open_descriptor(target, flags), "wb") as out:
        shutil.copyfileobj(stream, out, 2**20)


def copy_files(source: Path, target: Path, shape: Shape, copy: Callable[[Path, Path], Any] = copy_file) -> None:
    """Copy the files of `shape` that `source` has into the existing folder `target`; nothing else, and no links.

    copy: of one file. Raises NotOurs, or OSError.
    """
    for name, inner in shape.items():
        path = source / name
        if inner is None and is_real_file(path):
            copy(path, target / name)
        elif inner is not None and is_real_folder(path):
            (target / name).mkdir()
            copy_files(path, target / name, inner, copy)


def remove_ours(folder: Path, shape: Shape) -> bool:
    """Remove the files and folders of `shape` from a folder, and the folder if nothing else is in it.

    Whatever has another name or is a link stays, and so does the folder then. Returns whether the folder is gone.
    """
    if kind(folder) != "folder":
        return kind(folder) is None
    for name, inner in shape.items():
        path = folder / name
        if inner is not None:
            remove_ours(path, inner)
        elif (found := kind(path)) == "file":
            path.unlink()
        elif found == "folder":
            with suppress(OSError):
                path.rmdir()  # where it is empty nothing is lost
    with suppress(OSError):
        folder.rmdir()
    return kind(folder) is None
