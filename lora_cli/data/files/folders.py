"""Which files of a folder or a pattern are rows, and of which split they are by their names.

Nothing is left out silently, nor trained on though its name says test: what is read and what is not is reported.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from lora_cli.data.files.readers import Row, kind_of, read_file
from lora_cli.errors import LoraError, refuse_if

_MOST_FILES = 100_000  # that are looked at in a folder or for a pattern, data or not
_SHOWN = 5
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_LARGEST_METADATA = 16 * 2**20
_DESCRIBES = "describes data and holds no rows"
_ABOUT = ("readme", "license", "licence", "notice", "changelog", "citation", "contributing", "authors", "requirements")
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "tests", "testing"), "test"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True)
class FileSource:
    """One or more files, read in the order of their names. name: as the recipe has it.

    left: others that look like data → why they are not read. one: the name is that of the one file.
    """

    name: str
    paths: tuple[Path, ...]
    left: dict[str, str] = field(default_factory=dict, kw_only=True)
    one: bool = field(default=False, kw_only=True)

    def rows(self) -> Iterator[Row]:
        for path in self.paths:
            yield from read_file(path)

    @cached_property
    def identity(self) -> dict[str, str]:
        """path → sha256 of its bytes."""
        self._stamps  # taken before the bytes are read  # noqa: B018
        return {str(path): _hash(path) for path in self.paths}

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {path: _stamp(path) for path in self.paths}

    @property
    def sizes(self) -> dict[str, str]:
        """path → its size and time, which tell versions apart without reading them."""
        return {str(path): f"{size} bytes, {written}" for path, (size, written) in self._stamps.items()}

    def require_unchanged(self) -> None:
        """Raises LoraError if a file was written to since its identity was taken: some of it may be new, some old."""
        for path, before in self._stamps.items():
            if not path.exists() or _stamp(path) != before:
                fix = "wait until it is written, then run again"
                raise LoraError("the file was changed while it was read", where=str(path), fix=fix)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_files(name: str, *, held_out: bool = False, written: Sequence[Path] = ()) -> FileSource:
    """The files of a path, a folder or a pattern.

    Of a folder with splits in its names, training takes train, and held-out data validation, else test. held_out:
    these are to be held out. written: folders that the run writes, which are not data.
    Raises LoraError if nothing is there, or if names leave open what to train on.
    """
    path = Path(name)
    if path.is_dir():
        return _of_folder(path, name, held_out, written)
    if not path.exists() and glob.has_magic(name):
        fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        matched = _outside_runs(map(Path, glob.iglob(name, recursive=True)), fixed, written)
        found = [each for each in sorted(matched) if each.is_file()]
        refuse_if(not found, "no file matches this pattern", where=name, fix="check the pattern; ** goes into folders")
        left = {str(each): _DESCRIBES for each in found if _is_metadata(each)}
        return FileSource(name, tuple(each for each in found if str(each) not in left), left=left)
    if not path.exists():
        raise LoraError("no such data file", where=name, fix=_nearby(path))
    refuse_if(_is_metadata(path), f"this file {_DESCRIBES}", where=name, fix=f"name the data files, or {path.parent}")
    return FileSource(name, (path,), one=True)


def split_of(path: Path) -> str | None:
    """train, validation or test, if the name of a file or of a folder above it says one of them; path: relative."""
    for part in (*path.parts[:-1], path.name.split(".")[0]):
        words = [word.lower() for word in _WORD.findall(part)]
        words += [f"{one}{other}" for one, other in pairwise(words)]  # held-out, hold_out
        splits = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
        if len(splits) == 1:
            return splits.pop()
    return None


def _of_folder(folder: Path, name: str, held_out: bool, written: Sequence[Path]) -> FileSource:
    inside = (Path(place, file) for place, _, files in os.walk(folder) for file in files)
    there = [each for each in _outside_runs(inside, folder, written) if not _hidden(each.relative_to(folder))]
    looked_at = sorted(each for each in there if kind_of(each) and each.is_file())
    left = _no_rows(looked_at)
    found = [each for each in looked_at if each not in left]
    if others := [each for each in found if kind_of(each) != ".md"]:
        left |= dict.fromkeys((each for each in found if each not in others), "Markdown beside other data files")
        found = others
    if not found:
        others = sorted({each.suffix for each in there if each.suffix})[:_SHOWN]
        ends = f"; the files there end in {', '.join(others)}" if others and not left else ""
        fix = "name a folder that holds some, or a file (.jsonl, .csv, .parquet, .txt, .md, …)"
        raise LoraError(f"no data files in this folder{ends}", where=name, fix=fix)
    splits: dict[str | None, list[Path]] = {}
    for each in found:
        splits.setdefault(split_of(each.relative_to(folder)), []).append(each)
    wanted = _wanted(splits, name, held_out)
    left |= {each: f"its name says {split}" for split in splits if split not in wanted for each in splits[split]}
    paths = sorted(each for split in wanted for each in splits[split])
    return FileSource(name, tuple(paths), left={str(each): why for each, why in sorted(left.items())})


def _wanted(splits: dict[str | None, list[Path]], name: str, held_out: bool) -> list[str | None]:
    """The splits to read. Raises LoraError where names of files leave it open."""
    others = [split for split in ("validation", "test") if split in splits]
    if held_out:
        return list(others[:1] or splits)
    if not others:
        return list(splits)
    meant, held = " or ".join(others), [each for split in others for each in splits[split]]
    if None in splits:
        beside = f"others name no split: {_shown(held)} beside {_shown(splits[None])}"
        what = f"some files of this folder are for {meant} by their names, and {beside}"
        rest = sorted([*splits.get("train", []), *splits[None]])
        raise LoraError(what, where=name, fix=f"name the files to train on: data.train: {_as_list(rest)}")
    if "train" not in splits:
        what = f"by their names all files of this folder are for {meant}, none to train on: {_shown(held)}"
        raise LoraError(what, where=name, fix=f"if they are intended, name them: data.train: {_as_list(held)}")
    return ["train"]


def _shown(paths: list[Path]) -> str:
    more = len(paths) - _SHOWN
    return ", ".join(each.name for each in paths[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _as_list(paths: list[Path]) -> str:
    """As a recipe has them: one by one, or where they are many as patterns of the folders they lie in."""
    names = [str(each) for each in paths]
    if len(names) > 2 * _SHOWN:
        names = sorted({f"{glob.escape(str(each.parent))}/{each.name[:1]}*{each.suffix}" for each in paths})
    return json.dumps(names, ensure_ascii=False)


# ── files without rows ──────────────────────────────────────────────────────────────────────────────────────────


def _no_rows(paths: Iterable[Path]) -> dict[Path, str]:
    """Data files by their endings that hold no rows → why."""
    left: dict[Path, str] = {}
    saved: dict[Path, Any] = {}  # folder → the names of its data files, where `datasets` wrote them down
    for path in paths:
        if _is_metadata(path):
            left[path] = _DESCRIBES
            if path.name == "state.json":
                files = _object(path).get("_data_files")
                saved[path.parent] = {each.get("filename") for each in files or [] if isinstance(each, dict)}
            elif path.name == "dataset_info.json":
                saved.setdefault(path.parent, None)
        elif path.suffix.lower() in (".txt", ".md") and path.stem.lower() in _ABOUT:
            left[path] = "is about the data, by its name"
    for path in paths:
        if path.suffix.lower() == ".arrow" and path.parent in saved:
            own = saved[path.parent]
            if path.name not in own if own else path.name.startswith("cache-"):
                left[path] = "a cache of `datasets`"
    return left


def _is_metadata(path: Path) -> bool:
    """Whether `datasets` or LLaMA-Factory describe data in this file: by its name, and because it is one object."""
    if path.name not in _METADATA:
        return False
    stored = _object(path)
    return bool(stored) and (path.name != "state.json" or any(key.startswith("_") for key in stored))


def _object(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_METADATA:
            return {}
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # whatever it is, reading it as rows says so
    return stored if isinstance(stored, dict) else {}


# ── the disk ────────────────────────────────────────────────────────────────────────────────────────────────────


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _nearby(path: Path) -> str:
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "check the path (relative paths start at the recipe's folder); a data set of the hub is {hub: owner/name}"


# ── what is not data: the folders of runs, whose files would be read as rows in the next run ──────────────────────────


def _outside_runs(paths: Iterable[Path], top: Path, written: Sequence[Path]) -> Iterator[Path]:
    """The paths that are not in a run folder below `top`, nor in one of `written`, which the run itself writes.

    Raises LoraError where there are too many, as in a home folder or on a whole disk.
    """
    real_top = Path(os.path.realpath(top))
    below = {real for each in written if real_top in (real := Path(os.path.realpath(each))).parents}

    @cache
    def of_a_run(folder: Path) -> bool:
        between = [each for each in (folder, *folder.parents) if top in each.parents]
        if any(all((each / name).exists() for name in ("recipe.yaml", "environment.json")) for each in between):
            return True
        real = Path(os.path.realpath(folder))
        return not below.isdisjoint((real, *real.parents))

    for number, path in enumerate(path for path in paths if not of_a_run(path.parent)):
        if number == _MOST_FILES:
            fix = "name a folder that holds data alone"
            raise LoraError(f"more than {_MOST_FILES:,} files", where=str(top), fix=fix)
        yield path
