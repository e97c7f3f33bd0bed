"""What a recipe names as data: files of this machine, or a data set of the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lora_cli.data.files.folders import FileSource, find_files
from lora_cli.data.files.readers import Row, require_kind
from lora_cli.data.files.tables import rows_of
from lora_cli.errors import LoraError, reading
from lora_cli.recipe import SourceRecipe

_ROWS_AT_ONCE = 1000
# What `datasets` reads files of this machine with, when it is given as the name of a data set
_BUILDERS = (
    *("arrow", "audiofolder", "cache", "csv", "eval", "hdf5", "imagefolder", "json", "lance", "nifti", "pandas"),
    *("parquet", "pdffolder", "sql", "text", "tsfile", "videofolder", "webdataset", "xml"),
)
_UNREAD = "the data set cannot be read from the hub"
_FIX = "check name, config and split; for a private or gated one run `hf auth login` or set HF_TOKEN; without network, "
_FIX += "name local files"


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
        with reading(_UNREAD, self.name, _FIX):
            tables = self._loaded.with_format("arrow").iter(_ROWS_AT_ONCE)
            rows = chain.from_iterable(rows_of(table, self.name) for table in tables)
            for number, values in enumerate(rows, 1):
                yield Row(self.name, number, values, filled=True)

    @cached_property
    def identity(self) -> dict[str, str]:
        """name → what tells this version of the data from another: the commit, or the fingerprint of what is cached."""
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(self.hub, revision=self.revision).sha
        except Exception:  # no network: what `datasets` has cached is as good, and it has a fingerprint
            commit = None
        return {self.name: commit or str(getattr(self._loaded, "_fingerprint", self.revision))}

    @cached_property
    def _loaded(self) -> Any:
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log is in the exception
        with reading(_UNREAD, self.name, _FIX):
            return load_dataset(
                self.hub, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )

    def require_unchanged(self) -> None:
        """A commit does not change."""


Source = FileSource | HubSource


def open_source(
    recipe: SourceRecipe, *, streaming: bool = False, held_out: bool = False, written: Sequence[Path] = ()
) -> Source:
    """The source that a recipe names. held_out: it is for validation, so of a folder's splits that one is taken.

    written: folders that the run itself writes; where they lie among the data, they are not data.
    Raises LoraError if nothing is there, or not of a kind that can be read.
    """
    if recipe.hub is not None:
        name = recipe.hub  # `datasets` takes all of these for files of this machine
        if name in _BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
            fix = "write {hub: owner/name}, or name local files"
            raise LoraError(f"{name} is not a data set of the hub", where="data", fix=fix)
        return HubSource(name, recipe.config, recipe.split, recipe.revision, streaming)
    assert recipe.path is not None
    found = find_files(recipe.path, held_out=held_out, written=written)
    for path in found.paths:
        require_kind(path)  # before its bytes are hashed
    return found
