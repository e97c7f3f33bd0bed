"""From the rows of one source to examples: what format they have, which template renders them, and what is too long."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat.template import ChatTemplate, chat_template
from lora_cli.data.columns import applicable
from lora_cli.data.encode import TRAIN_ON, Encoder, Prepared
from lora_cli.data.example import Example, cut, windows
from lora_cli.data.files.readers import Row, encoding_said
from lora_cli.data.files.sources import Source
from lora_cli.data.formats import Format, detect_format, require_present
from lora_cli.data.gate import Encoded, Finding, Findings
from lora_cli.data.turns import Columns
from lora_cli.errors import LoraError, reading, refuse_if
from lora_cli.recipe import DataRecipe, SourceRecipe

ROWS_TO_DETECT = 1000  # that show a source's format
_ROWS_AT_ONCE = 512


class RowEncoder:
    """Rows of one source → examples. head: its first rows, which show the format.

    source: what it says for itself. several: there are other sources, so of the recipe's columns, unless they are the
    source's own, only those count that these rows have.
    """

    def __init__(
        self,
        data: DataRecipe,
        tokenizer: PreTrainedTokenizerBase,
        head: list[Row],
        source: SourceRecipe | None = None,
        *,
        several: bool = False,
    ):
        own = source.own if source else {}
        data = data.of(source) if source else data
        columns = applicable(data.columns, head) if several and "columns" not in own else data.columns
        form = detect_format(head, data.format, columns)
        _require_train_on(data, form, head[0].file)
        self._group_by = data.group_by
        template, train_on = None, data.train_on
        if form.name in ("chat", "instruction"):
            wanted = data.template
            if wanted is None and not tokenizer.chat_template and form.name == "instruction":
                wanted = "alpaca"  # the layout that these columns come from
            template = chat_template(tokenizer, wanted, head[0].where, data.template_arguments)
            form.keys.template = template
            if data.system:
                template.require_system(data.system)
                form = replace(form, system=data.system)
        elif own.get("system"):
            what = f"system is set for a source of the format {form.name}, which goes through no chat template"
            fix = "remove it, or give the rows as instructions or messages"
            raise LoraError(what, where=head[0].file, fix=fix)
        self._no_system = bool(data.system) and template is None
        if form.pair:
            form = replace(form, context=train_on not in ("all", "assistant"))
            train_on = None if train_on == "completion" else train_on
        self.format, self.template = form, template
        self._encoder = Encoder(form, tokenizer, template, train_on)

    @property
    def said(self) -> str:
        """The format, why it was taken, and what nothing reads in the rows so far."""
        unread = [column for column in self.format.unread() if column != self._group_by]
        said = [f"{self.format.name} ({self.format.reason}"]
        if weighed := self.format.weighed():
            fix = "if it means something else, write data.columns: {weight: null}"
            said.append(f"{weighed[0]} weighs the loss; {fix}")
        if self.format.system:
            said.append(f"where a row has none, the system prompt is {quoted(self.format.system)}")
        if self._no_system:
            said.append("data.system is not used: these rows go through no chat template")
        if unread:
            said.append(f"columns not used: {', '.join(unread)}")
        if keys := self.format.keys.unread():
            said.append(f"keys of turns that the template does not read: {', '.join(keys)}")
        if self.format.preference():
            said.append("preference data are not supported: only what these columns hold is trained, as it is")
        return f"{'; '.join(said)})"

    def encode(self, rows: Iterator[Row], findings: Findings) -> Iterator[Encoded]:
        """One result a row, in order; problems of a row go to the findings too.

        Rows are read and rendered in one thread and tokenized in another, while those before are masked and written.
        """
        file = None
        chunks = iter(lambda: [self._encoder.prepare(row) for row in islice(rows, _ROWS_AT_ONCE)], [])
        for tokenized in ahead(map(self._tokenize, ahead(chunks, 2)), 2):
            for encoded in self._encoder.encode(tokenized):
                if file != encoded.row.file and (said := encoding_said(file := encoded.row.file)):
                    findings.add("not_utf8", None, said)
                left_out = findings.add_row(encoded.row, [*map(Finding, encoded.notes), *encoded.findings])
                yield replace(encoded, example=None) if left_out else encoded

    def _tokenize(self, prepared: list[Prepared | Encoded]) -> Sequence[Prepared | Encoded]:
        ends = (prepared[0], prepared[-1])
        first, last = (each.row if isinstance(each, Encoded) else each.document.row for each in ends)
        where = first.where if first is last else f"{first.where} to {last.number}"
        with reading("the tokenizer cannot read these rows", where, "download the model's tokenizer.json again"):
            return self._encoder.tokenize(prepared)


def quoted(text: str, longest: int = 60) -> str:
    """On one line, cut where it is long."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= longest else f'"{line[: longest - 1]}…"'


def trained_system(data: DataRecipe, systems: Iterable[str | None]) -> str | None:
    """The system prompt that generation begins with: the only one of all sources, or of several the recipe's own."""
    used = {each for each in systems if each}
    return next(iter(used)) if len(used) == 1 else data.system if data.system in used else None


def require_template_used(data: DataRecipe, template: ChatTemplate | None) -> None:
    """Raises LoraError if the recipe says something of a chat template, but no source goes through one."""
    for name, empty in (("template", "null"), ("template_arguments", "{}"), ("system", "null")):
        what = f"data.{name} is set, but no row goes through a chat template"
        fix = f"remove it (--set data.{name}={empty}), or give the rows as messages or instructions"
        refuse_if(getattr(data, name) and template is None, what, fix=fix)


def fit_length(
    example: Example, max_seq_len: int, too_long: str, data_format: str, findings: Findings, stride: int | None = None
) -> list[Example]:
    """The example, or if it is above max_seq_len (a finding): nothing, its start, or pieces of it."""
    if len(example.ids) <= max_seq_len:
        return [example]
    short = cut(example, 0, max_seq_len)
    if too_long == "truncate" and not short.targets:
        first = max(example.spans[0][0], 1) + 1
        fix = f"raise data.max_seq_len to {first} or more, or choose data.too_long: drop"
        error = LoraError("no target tokens are left after truncation", where=example.source, fix=fix)
        findings.add("no_target", (example.file, example.row, example.line), error)
        return []
    where, fix = example.source, "raise data.max_seq_len, or choose data.too_long: drop, truncate or split"
    error = LoraError(f"{len(example.ids)} tokens, but max_seq_len is {max_seq_len}", where=where, fix=fix)
    findings.add("too_long", (example.file, example.row, example.line), error)
    if too_long == "split":
        what = "too_long: split is for text; a conversation cannot be cut"
        refuse_if(data_format != "text", what, where=where, fix="choose drop or truncate")
        return windows(example, max_seq_len, stride or max_seq_len)
    return [short] if too_long == "truncate" else []


def require_columns(columns: Columns, sources: Sequence[tuple[SourceRecipe, Source]]) -> None:
    """Raises LoraError for one of the recipe's columns that none of several sources has, by its first rows.

    Sources with columns of their own are not looked at. Of a single source its encoder says the same.
    """
    missing = dict(columns)
    rows: list[Row] = []
    shared = [each for own, each in sources if own.columns is None] if len(sources) > 1 else []
    for source in shared if any(missing.values()) else ():
        head = list(islice(source.rows(), ROWS_TO_DETECT))
        missing = {name: column for name, column in missing.items() if name not in applicable(columns, head)}
        if not missing:
            return
        rows += head
    if rows:
        require_present(rows, missing, "the sources have")


def _require_train_on(data: DataRecipe, form: Format, where: str) -> None:
    known = ("completion", *TRAIN_ON["chat"]) if form.pair else TRAIN_ON[form.name]
    what = f"data.train_on: {data.train_on} has no meaning for the format {form.name}"
    fix = f"write one of {', '.join(known)}, or remove it; a source may have a train_on of its own"
    refuse_if(data.train_on is not None and data.train_on not in known, what, where=where, fix=fix)


# ── working ahead ─────────────────────────────────────────────────────────────────────────────────────────────────────


Item = TypeVar("Item")


def ahead(items: Iterator[Item], most: int) -> Generator[Item, None, None]:
    """The same items in the same order; up to `most` are made in another thread before they are asked for.

    An exception of the iterator is raised where its item would have come. Leaving early waits for nothing.
    """
    end: Any = object()
    pool = ThreadPoolExecutor(1)
    try:
        made = deque([pool.submit(next, items, end) for _ in range(most)])
    except RuntimeError:  # the system starts no further thread: then each item is made when it is asked for
        yield from items
        return
    try:
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
