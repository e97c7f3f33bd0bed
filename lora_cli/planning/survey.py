"""What the data are: how many rows there are, and how long."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data.files.readers import Row, read_file
from lora_cli.data.files.sources import FileSource, Source, open_source
from lora_cli.data.order import pack
from lora_cli.data.prepare import Preparation, build_for_now, require_trainable
from lora_cli.data.row_encoder import ROWS_TO_DETECT
from lora_cli.data.store import PreparedData
from lora_cli.errors import LoraError
from lora_cli.planning.reading import Reading, way_of
from lora_cli.recipe import DataRecipe, SourceRecipe

WHOLE_BYTES = 64 * 2**20  # of data files that are tokenized whole, in well under a minute; of larger ones a sample is
SAMPLE_ROWS = 5_000
READ_BYTES = 2**30  # about, of large data: to count the rows and to choose the sample from
_MOST_APART = 100  # files of a folder that are looked at one by one
_SHARE_ROWS = 20_000  # whose trained tokens are looked at one by one


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RowSample(FileSource):
    """Some rows of files, in memory."""

    kept: tuple[Row, ...] = ()

    def of(self, source: FileSource) -> RowSample:
        """Those rows that come from one of several sources."""
        files = {*map(str, source.paths)}
        return RowSample(source.name, source.paths, tuple(row for row in self.kept if row.file in files))

    def rows(self) -> Iterator[Row]:
        return iter(self.kept)

    @property
    def identity(self) -> dict[str, str]:  # type: ignore[override]  # hashing the files would read all of them
        return {}


@dataclass(frozen=True)
class DataSurvey:
    """What is known of the data before the recipe is.

    rows: that give examples; counted, or where `counted` is false guessed from sizes. sample: the rows that were
    tokenized, of each source; None: all. lengths: tokens of each example of them, uncut. targets: trained tokens of
    every stride-th. distinct: unequal rows. train_on: data.train_on and why, where what usually carries loss cannot.
    """

    source: FileSource
    reading: Reading
    rows: int
    counted: bool
    sample: list[RowSample] | None
    lengths: np.ndarray
    targets: np.ndarray
    stride: int
    target_share: float
    distinct: int
    percentiles: dict[str, int]
    train_on: tuple[str, str] | None = None

    @property
    def exact(self) -> bool:
        return self.sample is None

    @property
    def tokens(self) -> float:
        """Of all rows, those outside the sample being as long as those in it."""
        return float(self.lengths.sum()) * (1 if self.sample is None else self.rows / len(self.lengths))

    @property
    def target_tokens(self) -> float:
        return self.tokens * self.target_share

    def densest_row(self, max_seq_len: int, packed: bool) -> int:
        """Most target tokens on a row of max_seq_len tokens: of the rows that these examples pack to, or of one."""
        lengths = self.lengths[:: self.stride]
        if lengths.max() > max_seq_len:  # some are cut or left out: whatever is left may be trained whole
            return max_seq_len
        if not packed:
            return int(self.targets.max())
        rows = pack(lengths, max_seq_len)
        return int(np.add.reduceat(self.targets[rows.members], [0, *rows.ends[:-1]]).max())


def look_at_rows(path: str) -> tuple[FileSource, list[Row]]:
    """The files and their first rows. Raises LoraError for what cannot be read."""
    source = open_source(SourceRecipe.model_validate({"path": path}))
    assert isinstance(source, FileSource)
    return source, list(islice(source.rows(), ROWS_TO_DETECT))


def look_apart(given: str) -> list[tuple[str, FileSource, list[Row]]]:
    """What `look_at_rows` gives, with its path; of a folder whose files are not all read in one way, for each way."""
    source, rows = look_at_rows(given)
    ways: dict[tuple[str, ...], list[Path]] = {}
    for path in source.paths if 1 < len(source.paths) <= _MOST_APART else ():
        if head := list(islice(read_file(path), ROWS_TO_DETECT)):
            ways.setdefault(way_of(head), []).append(path)
    if len(ways) < 2:
        return [(given, source, rows)]
    parts: list[str] = []
    for files in ways.values():
        alike = Path(given) / f"*{files[0].suffix}"
        whole = len(files) > 1 and [*alike.parent.glob(alike.name)] and {*alike.parent.glob(alike.name)} == {*files}
        parts += [str(alike)] if whole else map(str, files)
    return [(part, *look_at_rows(part)) for part in parts]


def survey_data(
    sources: Sequence[FileSource],
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    system: str | None,
    drop: Sequence[str] = (),
) -> DataSurvey:
    """Tokenizes all rows, or of large data a sample. Raises LoraError with what the gate finds in them."""
    name = ", ".join(source.name for source in sources)
    together = FileSource(name, tuple(path for source in sources for path in source.paths))
    uncut: dict[str, object] = {"max_seq_len": 10**9, "packing": False, "train": together.name}
    uncut |= {"template": template, "system": system, "drop": list(drop)}
    settings = DataRecipe.model_validate(uncut)
    drawn, rows, counted = _sample_of(together)
    sample = drawn and [part for source in sources if (part := drawn.of(source)).kept]
    train_on = None

    def prepared(train_on: str | None) -> PreparedData:
        named = reading.sources([source.name for source in sources], train_on)
        owns = map(SourceRecipe.model_validate, named)
        return prepare_rows(list(zip(owns, sample or sources, strict=True)), settings, tokenizer)

    try:
        data = prepared(None)
    except LoraError as refused:
        if not {"chat", "instruction"}.issuperset(reading.names):
            raise
        train_on = "last_assistant", "the chat template renders earlier answers in another way than they are generated"
        try:
            data = prepared(train_on[0])
        except LoraError:
            raise refused from None
    stride, summary = -(-len(data.train) // _SHARE_ROWS), data.summary.train
    repeated = 0 if "duplicate" in drop else data.findings.counts["duplicate"]
    return DataSurvey(
        source=together,
        reading=reading,
        rows=rows if sample else len(data.train),
        counted=counted,
        sample=sample,
        lengths=data.train.lengths,
        targets=np.array([example.targets for example in data.train[::stride]], np.int64),
        stride=stride,
        target_share=summary.target_tokens / summary.tokens,
        distinct=rows if sample else len(data.train) - repeated,
        percentiles=summary.percentiles,
        train_on=train_on,
    )


def prepare_rows(
    sources: Sequence[tuple[SourceRecipe, Source]],
    settings: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    row_tokens: int | None = None,
) -> PreparedData:
    """The rows of these sources, prepared in a temporary folder. Raises LoraError for what would stop a run."""
    data = build_for_now(Preparation(list(sources), [], settings, tokenizer, seed, row_tokens))
    data.summary.findings.by_option = True
    require_trainable(data.summary, settings)
    return data


def _sample_of(source: FileSource) -> tuple[RowSample | None, int, bool]:
    """Rows to tokenize (None: all), how many there are, and whether that was counted or is a guess by size."""
    packed = any(path.suffix.lower() in (".gz", ".zst", ".parquet") for path in source.paths)
    size = sum(path.stat().st_size for path in source.paths) * (4 if packed else 1)
    if size <= WHOLE_BYTES:
        return None, 0, True
    rows = source.rows()
    first = list(islice(rows, 100))
    most = min(SAMPLE_ROWS, max(1, WHOLE_BYTES * len(first) // sum(map(_characters, first))))
    rng = random.Random(0)
    kept: list[Row] = []
    read, number, counted = 0, 0, True
    for row in chain(first, rows):
        number += 1
        if len(kept) < most:
            kept.append(row)
        elif (place := rng.randrange(number)) < most:  # each row has the same chance: Vitter 1985, algorithm R
            kept[place] = row
        read += _characters(row)
        if read > READ_BYTES:
            number, counted = max(number, round(size * number / read)), False
            break
    order = {str(path): at for at, path in enumerate(source.paths)}
    kept.sort(key=lambda row: (order[row.file], row.number))
    return RowSample(source.name, source.paths, tuple(kept)), number, counted


def _characters(row: Row) -> int:
    """About what the row takes in its file; of JSON, its keys too."""
    keys = sum(len(name) + 6 for name in row.values) if ".json" in row.file else 0
    return 1 + keys + sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row.values.values())
