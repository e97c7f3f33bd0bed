"""Data sets of the Hugging Face hub, through `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_cli.data.readers import Row
from lora_cli.data.tables import rows_of
from lora_cli.errors import LoraError

_ROWS_AT_ONCE = 1000


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
