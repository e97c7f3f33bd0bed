"""Training data that are read as training needs them, and not kept: for what is larger than the disk.

Rows come in windows. Each goes through the same encoder and the same gate as prepared data, is packed and shuffled by
itself, and is then forgotten. A stream has no index: to resume, the rows before the current window are read past, but
not tokenized again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from heapq import merge
from itertools import count, islice, starmap
from operator import itemgetter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.base.text import positions, vocabulary
from lora_cli.data.chat.template import ChatTemplate
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.files.sources import FileSource, Source
from lora_cli.data.gate import Findings, Lengths, Weights, facts_of, shares_of
from lora_cli.data.order import permutation, rows_to_shuffle, split_by_length
from lora_cli.data.prepare import sources_of
from lora_cli.data.report import stream_lines
from lora_cli.data.row_encoder import RowEncoder, fit_length, require_columns, require_template_used, trained_system
from lora_cli.data.store import PreparedData, Summary, by_length, micro_batches_per_step, rows_per_micro_batch
from lora_cli.errors import LoraError, refuse_if
from lora_cli.recipe import Recipe, SourceRecipe
from lora_cli.recipe.schema import OWN

WINDOW_ROWS = 4096
_DROPPED = "dropped."  # in a position, before the kind


class StreamFeed:
    """Steps made of a stream, in order. Opening it reads the first window; raises LoraError for what is wrong in it.

    data: the validation data, which are prepared all the same.
    """

    def __init__(self, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase):
        self._recipe, self.data, self._tokenizer = recipe, data, tokenizer
        self.validation = data.validation
        self._sources, _ = sources_of(recipe)
        require_columns(recipe.data.columns, self._sources)
        self._encoders: dict[int, RowEncoder] = {}
        self._template: ChatTemplate | None = None
        self._largest_id = 2**31
        self.seek({"pass": 0, "rows": 0, "unit": 0, "step": 1})
        require_template_used(recipe.data, self._template)
        self._first, self._found = self._examples, self._findings  # of the first window

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def summary(self) -> Summary:
        """As of prepared data; lengths and weights are of the window in hand, findings of the first one.

        Of rows that data.drop leaves out, all so far are counted, in the first pass. The fingerprint is of the sources'
        sizes and times, and how each is read, in place of the tokens.
        """
        data, encoders, recipe = self.data.summary, sorted(self._encoders.items()), self._recipe.data
        identity: dict[str, str] = {}  # what tells versions apart without reading all of them
        for _, source in self._sources:
            identity |= source.sizes if isinstance(source, FileSource) else source.identity
        read = [recipe.of(own).model_dump(include={*OWN}) for own, _ in self._sources]
        digest = hashlib.sha256(json.dumps([identity, read], sort_keys=True).encode()).hexdigest()
        several = [each for _, each in self._sources if isinstance(each, FileSource) and not each.one]
        listing = {each.name: {"files": dict.fromkeys(map(str, each.paths)), "left": each.left} for each in several}
        template, facts = self._template, facts_of(self._examples)
        dropped = {name.removeprefix(_DROPPED): count for name, count in self._dropped.items()}
        found = replace(self._found, counts=Counter(self._found.counts | dropped))
        system = trained_system(recipe, [encoder.format.system for _, encoder in encoders])
        return replace(
            data,
            formats={self._sources[at][1].name: encoder.said for at, encoder in encoders} | data.formats,
            files={**identity, **data.files},
            findings=found.merged(data.findings),
            listing=listing | data.listing,
            train=Lengths.of(facts["tokens"], facts["targets"]),
            fingerprint=f"{digest} {data.fingerprint}",
            template=data.template if template is None else template.name,
            own_template=data.own_template if template is None else template.own_text(system),
            shares=shares_of([source.name for _, source in self._sources], np.array(self._owners, np.int64), facts),
            system=system,
            weights=Weights.of(facts_of(self._first)),
        )

    @property
    def total_steps(self) -> int:
        assert self._recipe.train.max_steps is not None
        return self._recipe.train.max_steps

    @property
    def epochs(self) -> None:
        """A stream has no known length."""

    def first(self, count: int) -> list[Example]:
        return self._first[:count]

    def lines(self) -> list[str]:
        return stream_lines(self.summary, len(self.validation), self.total_steps)

    def require_fit(self, config: Any, model: str) -> None:
        """Every window from now on must fit the model's vocabulary. Raises LoraError if max_seq_len is too long."""
        self.data.require_fit(config, model)
        seen = positions(config)
        if seen and self._recipe.data.max_seq_len > seen:
            raise LoraError(f"max_seq_len is above what {model} sees", fix=f"write data.max_seq_len: {seen}")
        self._largest_id = vocabulary(config) - 1
        self._require_known_tokens()

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, step: int) -> list[list[Example]]:
        if step != self._step:
            raise ValueError(f"a stream gives step {self._step} next, not {step}")
        self._step += 1
        per_batch = rows_per_micro_batch(self._recipe)
        units = [self._unit() for _ in range(per_batch * micro_batches_per_step(self._recipe))]
        batches = [units[at : at + per_batch] for at in range(0, len(units), per_batch)]
        made = [[example for unit in batch for example in unit] for batch in batches]
        return split_by_length(made, per_batch) if by_length(self._recipe) else made

    def largest(self) -> list[Example]:
        """A micro-batch as large as any can be; of a stream only the limits are known."""
        length = self._recipe.data.max_seq_len
        filled = Example(np.zeros(length, np.int64), [(0, length, 1.0)])
        return [filled] * rows_per_micro_batch(self._recipe)

    def position(self) -> dict[str, int]:
        """For a checkpoint: where the next step begins, and what was left out before its window."""
        return self._place | {"step": self._step}

    def seek(self, position: dict[str, int]) -> None:
        """Go on where a checkpoint stopped. Raises LoraError if it is not of a stream."""
        what = "the checkpoint does not say where in the stream it stopped"
        refuse_if(not position, what, fix="start a new run with another output")
        self._dropped = {name: value for name, value in position.items() if name.startswith(_DROPPED)}
        self._windows = self._windows_from(position["pass"], position["rows"])
        self._units = next(self._windows)
        self._place["unit"], self._step = position["unit"], position["step"]

    def _unit(self) -> list[Example]:
        while self._place["unit"] >= len(self._units):
            self._units = next(self._windows)
        members = self._units[self._place["unit"]]
        self._place["unit"] += 1
        return [self._examples[index] for index in members]

    def _windows_from(self, passed: int, skipped: int) -> Iterator[list[list[int]]]:
        """Makes one window after the other the current one, and gives its units, shuffled, as lists of examples."""
        data, train = self._recipe.data, self._recipe.train
        packed = data.max_seq_len if data.packing else None
        for number in count(passed):
            at, given = skipped, skipped > 0
            placed = merge(*starmap(_placed, enumerate(self._sources)), key=itemgetter(0))
            rows = ((source, row) for (_, source), row in placed)  # once each: always of the source that lags behind
            skipped = 0
            deque(islice(rows, at), maxlen=0)
            self._require_unchanged()
            while window := list(islice(rows, WINDOW_ROWS)):
                self._place = {"pass": number, "rows": at, "unit": 0}  # where the window begins, units already given
                self._place |= self._dropped
                self._examples = self._encoded(window)
                for kind, added in self._findings.counts.items() if number == 0 else ():
                    if kind in data.drop:
                        self._dropped[_DROPPED + kind] = self._dropped.get(_DROPPED + kind, 0) + added
                self._require_known_tokens()
                lengths = facts_of(self._examples)["tokens"]
                units = rows_to_shuffle(lengths, packed, train.tokens_per_micro_batch, train.seed)
                shuffled = permutation(len(units), (train.seed, number, at))
                yield [units[place] for place in shuffled]
                self._require_unchanged()
                at, given = at + len(window), given or len(units) > 0
            fix = "raise data.max_seq_len, or look at what train: false and data.drop leave out"
            refuse_if(not given, "no row of the stream is left to train on", where=self._sources[0][1].name, fix=fix)

    def _encoded(self, rows: list[tuple[int, Row]]) -> list[Example]:
        """Examples of a window's rows, source by source."""
        data = self._recipe.data
        self._findings = findings = Findings(drop=list(data.drop))
        examples: list[Example] = []
        self._owners: list[int] = []  # the source of each example in hand
        for at in sorted({at for at, _ in rows}):
            own = [row for owner, row in rows if owner == at]
            if at not in self._encoders:  # the first window shows a source's format, for all of them
                source, _ = self._sources[at]
                self._encoders[at] = RowEncoder(data, self._tokenizer, own, source, several=len(self._sources) > 1)
                self._template = self._template or self._encoders[at].template
            encoder = self._encoders[at]
            for each in encoder.encode(iter(own), findings):
                if each.example is not None:
                    examples += fit_length(each.example, data.max_seq_len, data.too_long, encoder.format.name, findings)
            self._owners += [at] * (len(examples) - len(self._owners))
        findings.settle_too_long(data.too_long, len(rows))
        findings.require_none(data.allow)
        return examples

    def _require_unchanged(self) -> None:
        """A run that read some rows of one version of a file and some of another could not be repeated."""
        for _, source in self._sources:
            source.require_unchanged()

    def _require_known_tokens(self) -> None:
        for example in self._examples:
            if max(example.ids) > self._largest_id:
                what, fix = "the tokenizer has a token that the model does not", "use the model's own tokenizer"
                raise LoraError(what, where=example.source, fix=fix)


def _placed(at: int, weighted: tuple[SourceRecipe, Source]) -> Iterator[tuple[tuple[float, int], Row]]:
    """The rows of the source `at`, each with where it comes among those of all: by its number over the weight."""
    own, source = weighted
    for number, row in enumerate(source.rows(), 1):
        yield (number / own.weight, at), row
