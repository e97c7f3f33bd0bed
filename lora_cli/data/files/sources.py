"""Where rows come from: files, folders and globs on this machine, and data sets of the hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.data.files.folders import find_files, require_text
from lora_cli.data.files.readers import Row, read_file, require_kind
from lora_cli.data.files.tables import rows_of
from lora_cli.errors import LoraError
from lora_cli.recipe import SourceRecipe

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class FileSource:
    """One or more files, read in the order of their names. name: as the recipe has it.

    left: other files there that are not read → why. one: the name is that of the one file.
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
        return {str(path): file_hash(path) for path in self.paths}

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {path: _stamp(path) for path in self.paths}

    def require_unchanged(self) -> None:
        """Raises LoraError if a file was written to since its identity was taken: some of it may be new, some old."""
        for path, before in self._stamps.items():
            if not path.exists() or _stamp(path) != before:
                raise LoraError(
                    "the file was changed while it was read",
                    where=str(path),
                    fix="wait until it is written, then run again",
                )


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class HubSource:
    """One split of a data set; downloaded once into the Hugging Face cache, or read as it is needed."""

    hub: str
    config: str | None
    split: str
    revision: str | None
    streaming: bool

    @property
    def name(self) -> str:
        """Such as owner/name[config]:split."""
        return f"{self.hub}{f'[{self.config}]' if self.config else ''}:{self.split}"

    def rows(self) -> Iterator[Row]:
        """As Arrow, like those of a file: `datasets` itself would open pictures, and make dates of what is text."""
        number = 0
        try:
            for batch in self._loaded.with_format("arrow").iter(_ROWS_AT_ONCE):
                for values in rows_of(batch, self.name):
                    number += 1
                    yield Row(self.name, number, values, filled=True)
        except LoraError:
            raise
        except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
            raise self._unreadable(error) from None

    @cached_property
    def identity(self) -> dict[str, str]:
        """name → what tells this version of the data from another: the commit, or the fingerprint of what is cached."""
        return {self.name: self._commit() or str(getattr(self._loaded, "_fingerprint", self.revision))}

    @cached_property
    def _loaded(self) -> Any:
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log is in the exception
        try:
            return load_dataset(
                self.hub, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
            raise self._unreadable(error) from None

    def require_unchanged(self) -> None:
        """A commit does not change."""

    def _commit(self) -> str | None:
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.hub, revision=self.revision).sha
        except Exception:  # no network: what `datasets` has cached is as good, and it has a fingerprint
            return None

    def _unreadable(self, error: Exception) -> LoraError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return LoraError(
            f"the data set cannot be read from the hub: {reason}",
            where=self.name,
            fix="check name, config and split; for a private or gated one run `hf auth login` or set HF_TOKEN; "
            "without network, name local files",
        )


Source = FileSource | HubSource


def open_source(
    recipe: SourceRecipe, *, streaming: bool = False, held_out: bool = False, written: Sequence[Path] = ()
) -> Source:
    """The source that a recipe names. held_out: it is for validation, so of a folder's splits that one is taken.

    written: folders that the run itself writes; where they lie among the data, they are not data.
    Raises LoraError if nothing is there, or not of a kind that can be read.
    """
    if recipe.hub is not None:
        _require_hub_id(recipe.hub)
        return HubSource(recipe.hub, recipe.config, recipe.split, recipe.revision, streaming)
    assert recipe.path is not None
    found = find_files(recipe.path, held_out=held_out, written=written)
    for path in found.paths:
        require_text(path)
        require_kind(path)  # before its bytes are hashed
    return FileSource(recipe.path, found.paths, left=found.left, one=found.one)


# What `datasets` reads files of this machine with, when it is given as the name of a data set
_BUILDERS = (
    *("arrow", "audiofolder", "cache", "csv", "eval", "hdf5", "imagefolder", "json", "lance", "nifti", "pandas"),
    *("parquet", "pdffolder", "sql", "text", "tsfile", "videofolder", "webdataset", "xml"),
)


def _require_hub_id(name: str) -> None:
    """Raises LoraError for what `datasets` takes for files of this machine."""
    if name in _BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise LoraError(
            f"{name} is not a data set of the hub", where="data", fix="write {hub: owner/name}, or name local files"
        )


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, a folder or a glob. Raises LoraError for whatever is wrong with it."""
    return list(FileSource(str(path), find_files(str(path)).paths).rows())


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
