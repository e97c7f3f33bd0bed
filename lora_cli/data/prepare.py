"""The whole way from the recipe's data section to examples on disk, in an order that any step can be asked for.

What is prepared is kept under a key of everything that it depends on; a changed anything is a new key.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from lora_cli.data import cache
from lora_cli.data.chat.template import ChatTemplate, chat_template, generation_ends
from lora_cli.data.files.readers import Row
from lora_cli.data.files.sources import FileSource, Source, open_source
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Findings, Lengths, Weights, duplicates, shares_of
from lora_cli.data.order import hold_out, repeated, rows_to_shuffle
from lora_cli.data.row_encoder import (
    ROWS_TO_DETECT,
    RowEncoder,
    fit_length,
    require_columns,
    require_template_used,
    trained_system,
)
from lora_cli.data.store import ExampleWriter, PreparedData, Summary, open_prepared, write_arrays, write_summary
from lora_cli.ending import make_temporary, remove_temporary
from lora_cli.errors import LoraError, refuse_if
from lora_cli.files import disk_errors, free_name, written_whole
from lora_cli.foreign import kind, remove_ours
from lora_cli.recipe import DataRecipe, Recipe, SourceRecipe

Opened = tuple[SourceRecipe, Source]  # what a recipe says of a source, and the source


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, keep: bool = False, inspect: bool = False
) -> PreparedData:
    """The recipe's data, prepared now or before. keep: leave it in the cache for the next run.

    Raises LoraError, with file and row, for whatever is wrong with the data; with `inspect` only what cannot be read at
    all is raised, and the rest is in `findings`.
    """
    preparation = Preparation.of(recipe, tokenizer)
    own = recipe.data.cache is None
    place = cache.cache_folder(recipe) / preparation.key
    if keep:
        cache.require_no_link(place, own)
    data = _open(place) or (_build_in_place(preparation, place, own) if keep else build_for_now(preparation))
    if not inspect:
        require_trainable(data.summary, recipe.data)
    return data


def _open(place: Path) -> PreparedData | None:
    """What was prepared before, if it is whole and was written where it is: what came from elsewhere is made anew."""
    return open_prepared(place) if kind(place) == "folder" and cache.made_here(place) else None


def build_for_now(preparation: Preparation) -> PreparedData:
    """Prepared in a temporary folder that goes when the data are no longer used."""
    folder = make_temporary()
    try:
        with disk_errors(folder):
            preparation.build(folder)
        data = _open_new(folder)
    except BaseException:
        remove_temporary(folder)
        raise
    weakref.finalize(data, remove_temporary, folder)
    return data


def _open_new(folder: Path) -> PreparedData:
    data = open_prepared(folder)
    assert data is not None, "what was just written can be opened"
    return data


def _build_in_place(preparation: Preparation, place: Path, own: bool) -> PreparedData:
    """Prepared beside its place, which it takes when it is whole; whoever else prepares the same does no harm.

    own: whether the cache is the run folder's, in which only the newest is of use.
    """
    made = [folder for folder in (place.parent, place.parent.parent) if own and kind(folder) is None]
    cache.forget_killed(place.parent)
    building = free_name(place.with_name(f".{place.name}.building-{os.getpid()}"))
    try:
        shown = place.parent.parent if own else place.parent
        with written_whole(building, shown) as temporary:
            preparation.build(temporary)
        data = _open_new(building)
        require_trainable(data.summary, preparation.data)
        if kind(place) is not None and _open(place) is None:  # damaged, or made elsewhere
            cache.remove_damaged(place)
        with suppress(OSError):  # another run may be first; what is open here stays readable
            building.rename(place)
        remove_ours(building, cache.FILES)
    except BaseException:
        remove_ours(building, cache.FILES)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    if own:
        cache.remove_old(place.parent, place)
    return replace(data, folder=place)


def require_trainable(made: Summary, data: DataRecipe) -> None:
    """Raises LoraError for findings that stop a run, or if no row is left, with what became of them."""
    made.findings.require_none(data.allow)
    trains = made.train.examples or data.streaming
    if trains and (made.validation.examples or data.validation is None):
        return
    sources = data.validation if trains and isinstance(data.validation, list) else data.train
    counts, source = made.findings.counts, sources[0].path or sources[0].hub
    details = [KINDS[kind].counted(count) for kind, count in counts.items()]
    fixes = {
        "remove train: false or weight: 0 from some rows": "left_out" in counts,
        "raise data.max_seq_len, or write data.too_long: truncate": "too_long" in counts,
        f"remove {', '.join(data.drop)} from {made.findings.drop_name}": bool(counts.keys() & set(data.drop)),
        "raise the weight of a source": any(each.weight < 1 for each in sources),
    }
    purpose = "validate" if trains else "train"
    fix = "; or ".join(each for each, fits in fixes.items() if fits) or f"name data with rows to {purpose} on"
    raise LoraError(f"no row is left to {purpose} on", where=source, details=details, fix=fix)


def sources_of(recipe: Recipe) -> tuple[list[Opened], list[Opened]]:
    """The sources of the training data, and of the validation data. Raises LoraError for one that is not there."""
    data, written = recipe.data, (Path(recipe.output), cache.cache_folder(recipe))
    training = [(each, open_source(each, streaming=data.streaming, written=written)) for each in data.train]
    return training, [(each, open_source(each, held_out=True, written=written)) for each in data.held_out]


class _Seen:
    """What is kept of every row while rows go by: 28 bytes each, and 8 more where groups are held out."""

    def __init__(self) -> None:
        self.file, self.row = array("i"), array("i")
        self.line = array("q")  # 0: not known
        self.pieces = array("i")  # examples that it became
        self.content, self.group = array("Q"), array("Q")  # hashes


@dataclass
class Preparation:
    """Rows on their way to disk.

    training: sources, with what the recipe says of each; none of a stream, whose rows are read later. held_out: those
    for validation. data: how rows are read, split and packed; its own sources are not looked at. row_tokens:
    without packing, tokens of the groups of similar length that the order shuffles; None: it shuffles single examples.
    """

    training: list[Opened]
    held_out: list[Opened]
    data: DataRecipe
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    row_tokens: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Preparation:
        (training, held_out), train = sources_of(recipe), recipe.train
        training = [] if recipe.data.streaming else training
        return cls(training, held_out, recipe.data, tokenizer, train.seed, train.tokens_per_micro_batch)

    @property
    def sources(self) -> list[Opened]:
        """Of the training data, then of the validation data."""
        return [*self.training, *self.held_out]

    @cached_property
    def key(self) -> str:
        """Of everything that the result depends on: data, tokenizer, template, settings, code."""
        data = self.data
        apart = {"train", "validation", "cache", "allow", "template", "general_text"}
        template: Any = self.tokenizer.chat_template
        if data.template is not None:
            template = chat_template(self.tokenizer, data.template).text  # arguments are among the settings
        parts = {
            "training": [[own.weight, own.own, list(source.identity.items())] for own, source in self.training],
            "held_out": [[own.own, list(source.identity.items())] for own, source in self.held_out],
            "fraction": data.validation if isinstance(data.validation, float) else None,
            "tokenizer": cache.tokenizer_hash(self.tokenizer),
            "template": template,
            "settings": data.model_dump(mode="json", exclude=apart),
            "row_tokens": None if data.packing else self.row_tokens,
            "seed": self.seed,
            "ends": sorted(generation_ends(self.tokenizer)),
            "code": cache.code_hash(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def build(self, folder: Path) -> None:
        """Writes everything into `folder`. Findings that stop a run are written too; who reads them decides."""
        self._files: dict[str, int] = {}  # file → its number in the examples
        self._formats: dict[str, str] = {}
        self._findings = Findings(drop=list(self.data.drop))
        self._known: set[int] = set()  # contents of training rows, where rows that have one of them are left out
        self._rows = 0
        self._template: ChatTemplate | None = None
        self._trained: list[str] = []  # the sources to train on, as they are shown
        self._systems: set[str | None] = set()  # their system prompts
        self._stops: set[int] = set()
        self._listing: dict[str, dict[str, dict[str, Any]]] = {}
        with ExampleWriter(folder / "examples.arrow") as writer:
            train, validation = self._read_all(writer)
        data = self.data
        if not data.streaming:
            require_template_used(data, self._template)
        facts, held = (writer.facts[indices] for indices in (train, validation))
        rows = rows_to_shuffle(facts["tokens"], data.max_seq_len if data.packing else None, self.row_tokens, self.seed)
        write_arrays(folder / "rows.arrow", vars(rows))
        digest = hashlib.sha256(writer.fingerprint.encode())
        for name, indices in {"train": train, "validation": validation}.items():
            write_arrays(folder / f"{name}.arrow", {"indices": indices})
            digest.update(indices.tobytes() + b"|")
        template, system = self._template, trained_system(data, self._systems)
        summary = Summary(
            self._formats,
            {name: value for _, source in self.sources for name, value in source.identity.items()},
            list(self._files),
            self._findings,
            Lengths.of(facts["tokens"], facts["targets"]),
            Lengths.of(held["tokens"], held["targets"]),
            digest.hexdigest(),
            writer.largest_id,
            writer.longest,
            template and template.name,
            template and template.own_text(system),
            [str(self.tokenizer.convert_ids_to_tokens(id)) for id in sorted(self._stops)],
            Weights.of(facts),
            self._listing,
            shares_of(self._trained, np.searchsorted(self._ends, train, side="right"), facts),
            system,
        )
        write_summary(folder, summary)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_all(self, writer: ExampleWriter) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the examples to train on, and of those held out. What was kept of rows is forgotten then."""
        seen, held = _Seen(), _Seen()
        self._ends: list[int] = []  # one behind the last example of each source
        require_columns(self.data.columns, self.sources)
        for at, (own, source) in enumerate(self.sources):
            source.identity  # taken before the rows are read  # noqa: B018
            repeats = "overlap" if at >= len(self.training) else "duplicate"
            self._read(own, source, held if repeats == "overlap" else seen, writer, repeats)
            source.require_unchanged()
            self._ends.append(writer.count)
        self._close_gate(seen, held)
        return self._split(seen)

    def _read(self, own: SourceRecipe, source: Source, seen: _Seen, writer: ExampleWriter, repeats: str) -> None:
        """repeats: what a row is called that has the content of a training row."""
        data, rows = self.data, source.rows()
        head = list(islice(rows, ROWS_TO_DETECT))
        refuse_if(not head, "the source has no rows", where=source.name, fix="check what wrote it")
        reader = RowEncoder(data, self.tokenizer, head, own, several=len(self.sources) > 1)
        self._template = reader.template or self._template
        trained = (own, source) in self.training
        shown = source.name
        if shown in self._formats:
            shown += f" ({len(self._trained) + 1})" if trained else " (validation)"
        if trained:
            self._trained.append(shown)
            self._systems.add(reader.format.system)
        rows_of: Counter[str] = Counter()  # file → its rows
        for encoded in reader.encode(chain(head, rows), self._findings):
            self._rows += 1
            row = encoded.row
            rows_of[row.file] += 1
            file = self._files.setdefault(row.file, len(self._files))
            if encoded.example is None:
                continue
            ids = np.array(encoded.example.ids, np.int32)
            example = replace(encoded.example, ids=ids)
            trained = [(first, last) for first, last, _ in example.spans]
            content = xxhash.xxh3_64_intdigest(ids.tobytes() + repr(trained).encode())
            if repeats in data.drop and content in self._known:
                self._findings.add(repeats, (row.file, row.number, row.line))
                continue
            pieces = fit_length(example, data.max_seq_len, data.too_long, reader.format.name, self._findings)
            if not pieces and data.too_long == "truncate":  # nothing of it can be trained
                continue
            if repeats == "duplicate" and {"duplicate", "overlap"}.intersection(data.drop):
                self._known.add(content)
            seen.file.append(file)
            seen.row.append(row.number)
            seen.line.append(row.line or 0)
            seen.content.append(content)
            if data.group_by is not None:
                seen.group.append(_group(row, data.group_by))
            self._stops.add(int(ids[example.spans[-1][1] - 1]))
            for piece in pieces:
                writer.add(piece, file)
            seen.pieces.append(len(pieces))
        self._formats[shown] = reader.said
        if isinstance(source, FileSource) and not source.one:
            self._listing[shown] = {"files": rows_of, "left": source.left}

    # ── what can only be said when all rows were seen ───────────────────────────────────────────────────────────

    def _find(self, kind: str, seen: _Seen, rows: np.ndarray) -> None:
        """The same finding for several rows, by their indices."""
        names = list(self._files)
        for at in rows.tolist():
            self._findings.add(kind, (names[seen.file[at]], seen.row[at], seen.line[at] or None))

    def _close_gate(self, seen: _Seen, held: _Seen) -> None:
        content = np.asarray(seen.content)
        self._find("duplicate", seen, duplicates(content))
        self._find("overlap", held, np.flatnonzero(np.isin(np.asarray(held.content), content)))
        for id in sorted(self._stops - generation_ends(self.tokenizer)):
            shown = str(self.tokenizer.convert_ids_to_tokens(id))
            error = LoraError(f"trained turns end in {shown}, but the model's end token is another")
            self._findings.add("stop_not_end", None, error)
        self._findings.rows_read = self._rows
        self._findings.settle_too_long(self.data.too_long, self._rows)

    def _split(self, seen: _Seen) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the examples to train on, repeated by the weights of their sources, and of those held out."""
        data, seed, ends = self.data, self.seed, self._ends
        last = ends[len(self.training) - 1] if self.training else 0
        held = scored = np.zeros(last, bool)
        if isinstance(data.validation, float):
            groups = np.asarray(seen.content if data.group_by is None else seen.group)
            kept = np.flatnonzero(np.asarray(seen.pieces))  # rows that are in the data: none that was too long
            rows = np.zeros(len(groups), bool)
            try:
                rows[kept[hold_out(groups[kept], data.validation, seed, self.sources[0][1].name)]] = True
            except LoraError:  # unless a finding, or that no row is left, says why
                if len(kept) and not self._findings.stopping(data.allow):
                    raise
            content = np.asarray(seen.content)
            leaked = rows & np.isin(content, content[~rows])  # into other groups
            self._find("overlap", seen, np.flatnonzero(leaked))
            held, leaked = (np.repeat(each, np.asarray(seen.pieces)) for each in (rows, leaked))
            scored = held & ~leaked if "overlap" in data.drop else held
        train = [np.empty(0, np.int64)]
        for number, ((own, _), start, end) in enumerate(zip(self.training, [0, *ends], ends, strict=False)):
            indices = np.arange(start, end)[~held[start:end]]
            train += repeated(indices, own.weight, [seed, 0x3E16, number])
        validation = np.concatenate([np.flatnonzero(scored), np.arange(last, ends[-1] if ends else 0)])
        return np.concatenate(train), validation.astype(np.int64)


def _group(row: Row, name: str) -> int:
    """Hash of what data.group_by names. Raises LoraError if the row has no such column."""
    if name not in row.values:
        fix = f"its columns: {', '.join(row.values)}"
        raise LoraError(f"data.group_by names {name}, but the row has no such column", where=row.where, fix=fix)
    return xxhash.xxh3_64_intdigest(json.dumps(row.values[name], sort_keys=True, default=str).encode())
