"""Where rows come from: files, folders and globs on this machine, and data sets of the hub."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_cli.data.hub import HubSource
from lora_cli.data.readers import Row, kind_of, read_file, require_kind
from lora_cli.errors import LoraError
from lora_cli.recipe import SourceRecipe

_MOST_FILES = 100_000  # that are looked at in a folder or for a pattern, data or not


@dataclass(frozen=True)
class FileSource:
    """One or more files, read in the order of their names. name: as the recipe has it."""

    name: str
    paths: tuple[Path, ...]

    def rows(self) -> Iterator[Row]:
        for path in self.paths:
            yield from read_file(path)

    @cached_property
    def identity(self) -> dict[str, str]:
        """path → sha256 of its bytes."""
        self._stamps  # taken before the bytes are read  # noqa: B018
        return {str(path): file_hash(path) for path in self.paths}

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {path: _stamp(path) for path in self.paths}

    def require_unchanged(self) -> None:
        """Raises LoraError if a file was written to since its identity was taken: some of it may be new, some old."""
        for path, before in self._stamps.items():
            if not path.exists() or _stamp(path) != before:
                raise LoraError(
                    "the file was changed while it was read", where=str(path), fix="wait for its writer, run again"
                )


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


Source = FileSource | HubSource


def open_source(recipe: SourceRecipe, *, streaming: bool = False) -> Source:
    """The source that a recipe names. Raises LoraError if nothing is there, or not of a kind that can be read."""
    if recipe.hub is not None:
        return HubSource(recipe.hub, recipe.config, recipe.split, recipe.revision, streaming)
    assert recipe.path is not None
    paths = tuple(_files(recipe.path))
    for path in paths:
        require_kind(path)  # before its bytes are hashed
    return FileSource(recipe.path, paths)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, a folder or a glob. Raises LoraError for whatever is wrong with it."""
    return list(FileSource(str(path), tuple(_files(str(path)))).rows())


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(
            each
            for each in _few(map(Path, _inside(path)), name)
            if kind_of(each) and each.is_file() and not _hidden(each, path)
        )
        if not found:
            raise LoraError("no data files in this folder", where=name, fix="name a folder that holds some, or a file")
        return found
    if not path.exists() and glob.has_magic(name):
        found = [each for each in sorted(_few(map(Path, glob.iglob(name, recursive=True)), name)) if each.is_file()]
        if not found:
            raise LoraError("no file matches this pattern", where=name, fix="check the pattern; ** goes into folders")
        return found
    if not path.exists():
        raise LoraError("no such data file", where=name, fix=_nearby(path))
    return [path]


def _inside(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names)


def _few(paths: Iterator[Path], name: str) -> Iterator[Path]:
    """Raises LoraError where there is no end of them, as in a home folder or a whole disk."""
    for number, path in enumerate(paths):
        if number == _MOST_FILES:
            raise LoraError(f"more than {_MOST_FILES:,} files", where=name, fix="name a folder that holds data alone")
        yield path


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _nearby(path: Path) -> str:
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "check the path (relative paths start at the recipe's folder); a data set of the hub is {hub: owner/name}"
