"""How rows are to be read: their format, what their columns mean, and which chat template they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.columns import NEEDED, PREFERENCE, applicable
from lora_cli.data.files.readers import Row
from lora_cli.data.formats import columns_written, detect_format, suggestion
from lora_cli.data.turns import Columns
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import OTHER_FIELDS

_CHOSEN = "of preference data, which are not supported, the chosen answers are trained"


@dataclass(frozen=True)
class Reading:
    """How rows are to be read. wanted: data.format where it has to be said. shown: the columns, for a person.

    unused: columns that nothing reads. each: of several sources that are not read in one way, how each of them is.
    """

    name: str
    shown: str
    wanted: str = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    why: str = ""
    unused: tuple[str, ...] = ()
    each: tuple[Reading, ...] = ()

    def sources(self, paths: Sequence[str], train_on: str | None) -> list[dict[str, Any]]:
        """How a recipe names these sources. train_on: of conversations."""
        found = []
        for path, each in zip(paths, self.each or [self] * len(paths), strict=True):
            own: dict[str, Any] = {"path": path} | ({"format": each.wanted} if each.wanted != "auto" else {})
            own |= {"columns": each.columns} if each.columns else {}
            own |= {"train_on": train_on} if train_on and each.name in ("chat", "instruction") else {}
            found.append(own)
        return found

    @property
    def names(self) -> list[str]:
        """The formats, of several sources each once."""
        return self.name.split(" and ")


def choose_reading(rows: Sequence[Row], named: Columns | None = None, *, template: bool = False) -> Reading:
    """The format of rows: by their columns, else the richest that fits, else by usual other names of columns.

    named: what columns mean, as `lora init --columns` says it. template: whether the model has a chat template; then
    questions and answers go through it, unless their columns are called prompt and completion.
    Raises LoraError, that of detect_format, if nothing fits.
    """
    if named:
        return _named_reading(rows, named, template)
    reading = _usual_reading(rows)
    asked, answer = (reading.columns.get(each, each) for each in ("prompt", "completion"))
    raw = (str(asked).lower(), str(answer).lower()) == ("prompt", "completion")
    if not template or raw or reading.name != "completion":
        return reading
    form = detect_format(rows, "instruction", {"instruction": asked, "output": answer})
    why = "questions and answers go through the model's chat template, as programs will prompt it; without it: format: "
    why += f"completion and columns: {columns_written({'prompt': asked, 'completion': answer})}"
    if any(column in PREFERENCE for column in form.columns.values()):
        why += f"; {_CHOSEN}"
    return Reading(form.name, form.shown, form.name, dict(form.columns), why, form.unused)


def read_together(sources: Sequence[tuple[str, Sequence[Row]]], named: Columns, *, template: bool) -> Reading:
    """How all sources are read: each as `choose_reading` reads it.

    sources: name and first rows of each. Raises Unread where the columns of one do not say what they mean.
    """
    readings, used = [], set()
    for _, rows in sources:
        own = _spelled(named, rows)
        if len(sources) > 1:  # those of the columns that these rows have
            own = applicable(own, rows)
        used |= own.keys()
        try:
            readings.append(choose_reading(rows, own, template=template))
        except LoraError as error:
            raise Unread(error.what.replace("data.columns", "--columns"), rows, error) from None
    if lost := [column for meaning, column in named.items() if meaning not in used]:
        raise Unread(f"--columns names {lost[0]}, but no rows have such a column", sources[0][1])
    first = readings[0]
    if all((each.wanted, each.name, each.columns) == (first.wanted, first.name, first.columns) for each in readings):
        return first
    kinds, shown = (dict.fromkeys(getattr(each, key) for each in readings) for key in ("name", "shown"))
    unused = tuple(dict.fromkeys(name for each in readings for name in each.unused))
    return Reading(" and ".join(kinds), "; ".join(shown), unused=unused, each=tuple(readings))


def way_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """What tells files that are read in one way from others: format and columns, or where nothing fits all columns."""
    try:
        reading = _usual_reading(rows)
        return reading.name, reading.shown
    except LoraError:
        return tuple(sorted({name for row in rows for name in row.values}))


class Unread(LoraError):
    """Rows whose columns do not say what they mean.

    named: what --columns could say; empty if nothing helps. titled: the file, where a title is above the header.
    """

    def __init__(self, what: str, rows: Sequence[Row], error: LoraError | None = None):
        self.named, self.titled = _proposed(rows), rows[0].file if title_above(rows) else None
        details = [*(error.details if error else []), f"columns: {', '.join(_texts(rows)) or 'none with text'}"]
        super().__init__(what, where=error.where if error else rows[0].file, details=details, fix=error and error.fix)


def title_above(rows: Sequence[Row]) -> bool:
    """Whether the first row holds the names of the columns: there is a title, or merged cells, above them."""
    names = [value.strip() for value in rows[0].values.values() if isinstance(value, str) and value.strip()]
    found = suggestion([Row(rows[0].file, 1, dict.fromkeys(names, "x"))]) if len(names) > 1 else None
    return found is not None and found.name != "text"


def _texts(rows: Sequence[Row]) -> dict[str, float]:
    """Columns with text → its mean length, numbers not counted."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row.values):
        values = [value for row in rows if isinstance(value := row.values.get(name), str)]
        found[name] = sum(len(value) for value in values if value.strip("0123456789.,:/- ")) / len(rows)
    return {name: length for name, length in found.items() if length > 0}


def _proposed(rows: Sequence[Row]) -> dict[str, str]:
    """The two columns with the longest texts as question and answer, in their order; or the only one as a text."""
    texts = _texts(rows)
    longest = sorted(texts, key=lambda name: -texts[name])[:2]
    pair = [name for name in texts if name in longest]
    return dict(zip(("question", "answer") if len(pair) > 1 else ("text",), pair, strict=False))


def _spelled(named: Columns, rows: Sequence[Row]) -> dict[str, str | None]:
    """The columns as these rows spell them: upper and lower case, and blanks around a name, make no difference."""
    there = dict.fromkeys(name for row in rows for name in row.values)
    known = {name.strip().lower(): name for name in reversed(there)} | {name: name for name in there}
    return {
        meaning: column and (known.get(column) or known.get(column.strip().lower(), column))
        for meaning, column in named.items()
    }


def _named_reading(rows: Sequence[Row], named: Columns, template: bool) -> Reading:
    """By the columns that a person named. Raises LoraError for one that these rows lack, or that nothing reads."""
    pairs: dict[str, tuple[str, str]] = dict(OTHER_FIELDS)
    if "output" in named and named.keys().isdisjoint(("instruction", "prompt", "question", "user")):
        pairs |= {"input": ("prompt", "instruction"), "output": ("completion", "output")}
    more = {"instruction", "input", "output", "system", "history"} - pairs.keys()
    instruction = template or not named.keys().isdisjoint(more)
    columns = {pairs[name][instruction] if name in pairs else name: column for name, column in named.items()}
    meant = (name for name, needed in NEEDED.items() if any({*each} & columns.keys() for each in needed))
    form = detect_format(rows, next(meant, "auto"), columns)
    there = {name for row in rows for name in row.values}
    if missing := [name for name in form.taken if form.column(name) not in there]:
        raise LoraError(f"no column is said to be the {missing[0]}, which {form.name} needs", where=rows[0].file)
    why = "as --columns says"
    if form.name == "instruction" and template:
        why += "; questions and answers go through the model's chat template, as programs will prompt it"
    return Reading(form.name, form.shown, form.name, columns, why, form.unused)


def _usual_reading(rows: Sequence[Row]) -> Reading:
    try:
        form = detect_format(rows)
        return Reading(form.name, form.shown, unused=form.unused)
    except LoraError:
        present = {name for row in rows for name in row.values}
        fitting = [name for name, alternatives in NEEDED.items() if any({*each} <= present for each in alternatives)]
        if fitting:
            form = detect_format(rows, fitting[0])  # NEEDED begins with the formats that say most
            others = " and ".join(fitting[1:])
            why = f"the columns fit {others} too; {form.name} says where the answers are"
            return Reading(form.name, form.shown, fitting[0], why=why, unused=form.unused)
        found = suggestion(rows)
        if found is None:
            raise
    why = "what your columns mean here"
    if any(column in PREFERENCE for column in found.columns.values()):
        why += f"; {_CHOSEN}"
    return Reading(found.name, found.shown, found.wanted, dict(found.columns), why, found.unused)


def choose_template(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """A built-in chat template and why, where one is needed and the model has none."""
    if tokenizer.chat_template or not {"chat", "instruction"} & {*reading.names}:
        return None
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special >= {"<|im_start|>", "<|im_end|>"}:
        return "chatml", "the model has no chat template, but ChatML's turn marks are among its special tokens"
    name = "alpaca" if "chat" not in reading.names else "plain"
    return name, f"the model has no chat template; {name} needs no special token but the end token"
