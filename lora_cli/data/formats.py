"""What a row means: a text, a prompt with its completion, or a conversation, whatever its columns are called."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.data.columns import (
    NEEDED,
    OF_TURNS,
    PREFERENCE,
    Columns,
    applicable,
    canonical,
    column_of,
    first_value,
    guess,
    is_turns,
    read_by,
    require_trainable,
)
from lora_cli.data.files.readers import Row
from lora_cli.data.files.tables import Unreadable
from lora_cli.data.turns import Reader, TurnKeys, bounded, decoded, said_weight
from lora_cli.errors import LoraError


@dataclass(frozen=True)
class Completion:
    """prompt: None for a text, which is trained whole."""

    row: Row
    prompt: str | None
    completion: str
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """turns: as a chat template wants them. weights: of the loss on each. weight: the row's. tools: JSON schemas.

    notes: kinds of findings of the gate, for what had to be changed to read it.
    """

    row: Row
    turns: list[dict[str, Any]]
    weights: list[float]
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()


Document = Completion | Conversation


@dataclass(frozen=True)
class Format:
    """How rows of one source are read.

    wanted: the format that was asked for. taken: what it needs. reason: why it was taken. unused: columns of the first
    rows that nothing reads.
    pair: prompt and completion are lists of turns (TRL's conversational form). context: of a pair, the prompt's turns
    are not trained. system: put before conversations without a system turn. keys: of turns, which are looked at while
    rows are read.
    """

    name: str
    columns: Columns = field(default_factory=dict)
    reason: str = "named in the recipe"
    unused: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    wanted: str = "auto"
    pair: bool = False
    context: bool = True
    system: str | None = None
    keys: TurnKeys = field(default_factory=TurnKeys, compare=False)
    _seen: set[str] = field(default_factory=set, compare=False)  # columns of the rows read so far
    _weighed: set[str] = field(default_factory=set, compare=False)  # the column that weighs the loss
    _used: set[str] = field(default_factory=set, compare=False)  # which of messages and conversations they had

    def read(self, row: Row) -> Document | None:
        """The document of a row; None if it says `train: false`. Raises LoraError for a malformed one, naming it."""
        self._seen.update(row.values)
        weight = said_weight(row.values, self.column("train"), self.column("weight"), row.where)
        if weight == 0:
            return None
        if weight != 1:
            self._weighed.add(str(self.column("weight")))
        require_trainable(row, self.name, self.columns)
        if self.name == "text":
            return Completion(row, None, self.text(row, "text"), weight)
        if self.name == "completion":
            return Completion(row, self.text(row, "prompt"), self.text(row, "completion"), weight)
        document = (_instruction if self.name == "instruction" else _conversation)(self, row, weight)
        if self.system and all(turn["role"] != "system" for turn in document.turns):
            turns = [{"role": "system", "content": self.system}, *document.turns]
            document = replace(document, turns=turns, weights=[0.0, *document.weights])
        return document

    def unread(self) -> list[str]:
        """Columns of the rows read so far that nothing reads."""
        meanings = read_by(self.name, tuple(self._used) or self.taken)
        return sorted(self._seen - {self.column(meaning) for meaning in meanings})

    def weighed(self) -> list[str]:
        """The column that weighs the loss of the rows read so far, if one does."""
        return sorted(self._weighed)

    def preference(self) -> list[str]:
        """Columns of the rows read so far that preference data have."""
        return sorted(self._seen & {*PREFERENCE})

    @property
    def shown(self) -> str:
        """The columns that it needs, such as prompt and completion."""
        return " and ".join(str(self.column(meaning)) for meaning in self.taken)

    def column(self, meaning: str) -> str | None:
        return column_of(self.columns, meaning)

    def value(self, row: Row, meaning: str) -> Any:
        column, value = self.column(meaning), self.optional(row, meaning)
        if value is None:
            present = ", ".join(name for name, value in row.values.items() if value is not None)
            fix = f"add it, or remove the row; its columns: {present or 'none'}"
            raise LoraError(f"the row has no {column or meaning}", where=row.where, fix=fix)
        return value

    def text(self, row: Row, meaning: str) -> str:
        value = self.value(row, meaning)
        if not isinstance(value, str):
            kind = value.why if isinstance(value, Unreadable) else type(value).__name__
            fix = "write it as text: in JSON in quotes, in a table as a column of strings"
            raise LoraError(f"{self.column(meaning)} is {kind}, not text", where=row.where, fix=fix)
        return value

    def optional(self, row: Row, meaning: str) -> Any:
        column = self.column(meaning)
        return None if column is None else row.values.get(column)


class NoFormat(LoraError):
    """The columns of rows fit no format, or more than one. renamed: (column, new name) with which they would fit."""

    renamed: tuple[tuple[str, str], ...] = ()


# ── which format ────────────────────────────────────────────────────────────────────────────────────────────────


def detect_format(rows: Sequence[Row], wanted: str = "auto", columns: Columns | None = None) -> Format:
    """The format of rows, by their columns.

    Raises LoraError if none or more than one fits, or if a column that is named is not there or not read.
    """
    columns = dict(columns or {})
    require_present(rows, columns)
    columns = canonical(columns, rows, wanted)
    found = _fitting(rows, wanted, columns)
    if isinstance(found, Format):
        _require_read(found, rows)
        return found
    raise _no_format(rows, found)


def suggestion(rows: Sequence[Row]) -> Format | None:
    """How rows can be read whose columns have other usual names; None where the names say nothing."""
    guessed = guess(rows)
    if guessed is None:
        return None
    tried = (_fitting(rows, wanted, guessed[1]) for wanted in ("auto", guessed[0]))
    return next((found for found in tried if isinstance(found, Format)), None)


def _fitting(rows: Sequence[Row], wanted: str, columns: Columns) -> Format | list[str]:
    """The format, or the names of all that fit."""
    present = {name for row in rows for name in row.values}

    def has(*meanings: str) -> bool:
        return all(column_of(columns, each) in present for each in meanings)

    # Of several alternatives the first that fits is taken.
    fitting = {name: needed for name, ways in NEEDED.items() for needed in reversed(ways) if has(*needed)}
    name = wanted if wanted != "auto" else next(iter(fitting)) if len(fitting) == 1 else None
    if name is None:
        return list(fitting)
    pair = name in ("completion", "chat") and "chat" not in fitting and has("prompt", "completion")
    pair = pair and all(is_turns(first_value(rows, column_of(columns, each))) for each in ("prompt", "completion"))
    taken = NEEDED["completion"][0] if pair else fitting.get(name, NEEDED[name][0])
    name = "chat" if pair else name
    if unnamed := [meaning for meaning in taken if column_of(columns, meaning) is None]:
        what = f"data.columns says that no column is {unnamed[0]}, but the format {name} needs one"
        raise LoraError(what, where=rows[0].file, fix=f"name its column, or choose another data.format than {name}")
    shown = " and ".join(str(column_of(columns, meaning)) for meaning in taken)
    reason = f"the rows have {shown}" if wanted == "auto" else "named in the recipe"
    reason += f"; {shown} are lists of turns" if pair else ""
    known = {column_of(columns, meaning) for meaning in read_by(name, taken)}
    return Format(name, columns, reason, tuple(sorted(present - known)), tuple(taken), wanted, pair)


def require_present(rows: Sequence[Row], columns: Columns, who: str = "the rows have") -> None:
    """Raises LoraError for a column of the recipe that these rows lack."""
    present = {name for row in rows for name in row.values}
    there = {*applicable(columns, rows), *OF_TURNS}  # a turn without its role is named by its number
    missing = [column for meaning, column in columns.items() if column is not None and meaning not in there]
    if missing:
        near = difflib.get_close_matches(missing[0], sorted(present), n=1)
        fix = f"did you mean {near[0]}?" if near else f"their columns: {', '.join(sorted(present))}"
        raise LoraError(f"data.columns names {missing[0]}, but {who} no such column", where=rows[0].file, fix=fix)


def _require_read(form: Format, rows: Sequence[Row]) -> None:
    """Raises LoraError for a column whose field the format does not read: it would be lost."""
    read = read_by(form.name, form.taken)
    if form.name == "chat" and not form.pair:
        read |= {meaning for names in NEEDED["chat"] for meaning in names}
    unread = [meaning for meaning, column in form.columns.items() if column is not None and meaning not in read]
    if not unread:
        return
    fix = f"remove {unread[0]} from data.columns; {form.name} reads {', '.join(sorted(read))}"
    if form.name == "completion" and unread[0] in ("input", "system", "history"):
        mapped = {"instruction": form.column("prompt"), "output": form.column("completion")}
        mapped |= {meaning: form.columns[meaning] for meaning in unread if meaning in ("input", "system", "history")}
        fix = f"write data.columns: {columns_written(mapped)}, which the format instruction reads"
    what = f"{form.columns[unread[0]]} is {unread[0]}, which the format {form.name} does not read"
    raise LoraError(f"data.columns says that {what}", where=rows[0].file, fix=fix)


def _no_format(rows: Sequence[Row], fitting: list[str]) -> NoFormat:
    present = sorted({name for row in rows for name in row.values})
    known = "; ".join(f"{name}: {' or '.join(', '.join(needed) for needed in NEEDED[name])}" for name in NEEDED)
    fix = "rename the columns, or say what they mean in data.columns"
    found = None if fitting else suggestion(rows)
    if fitting:
        fix = f"write data.format: {fitting[0]}, or remove a column"
    elif found is not None:
        form = "" if found.wanted == "auto" else f"data.format: {found.wanted} and "
        fix = f"write {form}data.columns: {columns_written(found.columns)}"
        if found.name == "completion":
            pair = {"instruction": found.column("prompt"), "output": found.column("completion")}
            fix += f"; or, to go through the model's chat template, {columns_written(pair)}"
    details = [f"formats and their columns: {known}"]
    if preference := [name for name in present if name in PREFERENCE]:
        only = "preference data are not supported; the chosen answers alone can be trained"
        details.append(f"{' and '.join(preference)}: {only}")
    what = f"the columns {', '.join(present) or '(none)'} fit {'more than one' if fitting else 'no'} format"
    error = NoFormat(what, where=rows[0].where, details=details, fix=fix)
    error.renamed = tuple((str(column), meaning) for meaning, column in found.columns.items()) if found else ()
    return error


def columns_written(columns: Columns) -> str:
    """As a recipe has them; names that YAML would read as something else are quoted."""
    import json

    def name(text: str | None) -> str:
        plain = text is not None and text.replace("_", "a").replace("-", "a").isalnum() and not text[0].isdigit()
        return "null" if text is None else text if plain else json.dumps(text, ensure_ascii=False)

    return "{" + ", ".join(f"{meaning}: {name(column)}" for meaning, column in columns.items()) + "}"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _instruction(form: Format, row: Row, weight: float) -> Conversation:
    """Alpaca's columns as a conversation: an input follows its instruction after an empty line."""
    said = [("system", form.text(row, "system"), 0.0)] if form.optional(row, "system") else []
    history = form.optional(row, "history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in history
    ):
        fix = 'write [["instruction", "output"], …], oldest first'
        raise LoraError("history is not a list of pairs", where=row.where, fix=fix)
    instruction = form.text(row, "instruction")
    more = "" if form.optional(row, "input") is None else form.text(row, "input")
    last = (f"{instruction}\n\n{more}" if more else instruction, form.text(row, "output"))
    for asked, answered in (*history, last):
        said += [("user", asked, 0.0), ("assistant", answered, weight)]
    turns = [{"role": role, "content": content} for role, content, _ in said]
    return Conversation(row, turns, [each for _, _, each in said], weight=weight)


def _turn_columns(form: Format, row: Row) -> tuple[str, ...]:
    """Which columns hold a row's turns: messages or conversations, or TRL's conversational prompt and completion."""
    if form.pair:
        return "prompt", "completion"
    given = [name for name in ("messages", "conversations") if form.optional(row, name) is not None]
    form._used.add(name := next(iter(given), "messages"))
    return (name,)


def _conversation(form: Format, row: Row, weight: float) -> Conversation:
    reader = Reader(form.columns, row.where, filled=row.filled)
    turns: list[dict[str, Any]] = []
    weights: list[float] = []
    if (system := form.optional(row, "system")) not in (None, ""):
        turns.append({"role": "system", "content": form.text(row, "system") if system else ""})
        weights.append(0.0)
    for name in _turn_columns(form, row):
        messages = decoded(form.value(row, name))
        if not isinstance(messages, list) or not messages:
            fix = 'write [{"role": "user", "content": "…"}, …]'
            raise LoraError(f"{name} is not a list of turns", where=row.where, fix=fix)
        context = form.pair and form.context and name == "prompt"
        for number, message in enumerate(messages, 1):
            turn, own = reader.turn(message, f"turn {number} of {name}")
            turns.append(turn)
            weights.append(0.0 if context else bounded(weight * own, row.where))
    tools = reader.tools(form.optional(row, "tools"), form.optional(row, "functions"))
    form.keys.look(turns, tools, row.where)
    return Conversation(row, turns, weights, tools, weight, tuple(sorted(reader.notes)))
