"""The checks of the data, before a model is loaded: whatever would change the result stops the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from lora_cli.data.chat.template import ChatTemplate
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row, numbered
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.formats import Conversation, Document
from lora_cli.errors import CheckFailed, LoraError, shown
from lora_cli.recipe.schema import Droppable

TOO_LONG_SHARE = 0.01  # of the rows: up to this many are left out, above it the recipe must say what happens
_KEPT_ROWS = 1000  # of one kind that are named; all are counted
_SHOWN_ROWS = 5


RowPlace = tuple[str, int, int | None]  # file, row, and the line where it begins, if lines are known
_Error = Annotated[
    LoraError,
    PlainValidator(lambda stored: LoraError(**stored)),
    PlainSerializer(lambda error: {"what": error.what, "where": error.where, "fix": error.fix}),
]


@dataclass
class Findings:
    """What the checks found so far, by kind: how often, where, and the first errors in full."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[RowPlace]] = field(default_factory=dict)
    errors: dict[str, list[_Error]] = field(default_factory=dict)
    waived: set[str] = field(default_factory=set)  # kinds that do not stop this run, by its recipe
    drop: list[str] | None = None  # kinds whose rows the recipe leaves out; None: there is no recipe to say so
    rows_read: int = 0  # in all, where that is known
    by_option: bool = False  # whether these are named on the command line, where the recipe is only being made

    def add(self, kind: str, place: RowPlace | None, error: LoraError | None = None) -> None:
        """place: None for a problem that no single row has."""
        self.counts[kind] += 1
        places, errors = self.places.setdefault(kind, []), self.errors.setdefault(kind, [])
        if place is not None and len(places) < _KEPT_ROWS and place not in places[-1:]:
            places.append(place)
        if error is not None and len(errors) < _SHOWN_ROWS:
            errors.append(error)

    def add_row(self, row: Row, found: Sequence[Finding]) -> bool:
        """What was found of a row. Returns whether the recipe leaves it out; then this is all that counts of it."""
        reason = next((each for kind in KINDS for each in found if each.kind == kind and self.drops(kind)), None)
        for each in found if reason is None else [reason]:
            self.add(each.kind, (row.file, row.number, row.line), each.error)
        return reason is not None

    def drops(self, kind: str) -> bool:
        return kind in (self.drop or ())

    def settle_too_long(self, policy: str, rows: int) -> None:
        """Rows above max_seq_len do not stop a run if the recipe says what becomes of them, or if they are few.

        rows: as many as there were, with those that the recipe leaves out.
        """
        kept = rows - sum(self.counts[kind] for kind in self.drop or ())
        if policy != "error" or self.counts["too_long"] <= TOO_LONG_SHARE * kept:
            self.waived.add("too_long")

    def merged(self, other: Findings) -> Findings:
        """What both found, in this order."""
        counts = self.counts + other.counts
        places = {kind: (self.places.get(kind, []) + other.places.get(kind, []))[:_KEPT_ROWS] for kind in counts}
        errors = {kind: (self.errors.get(kind, []) + other.errors.get(kind, []))[:_SHOWN_ROWS] for kind in counts}
        return replace(self, counts=counts, places=places, errors=errors, waived=self.waived | other.waived)

    def stopping(self, allowed: Sequence[str] = ()) -> list[str]:
        waived = self.waived | set(allowed) | set(self.drop or ())
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind].stops and kind not in waived]

    def require_none(self, allowed: Sequence[str] = ()) -> None:
        """Raises LoraError with every finding that stops a run: the rows, and what to do."""
        stopping = self.stopping(allowed)
        if not stopping:
            return
        only = self.errors.get(stopping[0], [])
        if len(stopping) == 1 and self.counts[stopping[0]] == 1 and only:
            fix = f"{only[0].fix}; or {drop}" if (drop := self.drop_fix(stopping)) else only[0].fix
            kind = LoraError if stopping[0] == "malformed" else CheckFailed
            raise kind(only[0].what, where=only[0].where, fix=fix)
        raise GateClosed(self, stopping)

    def as_list(self, allowed: Sequence[str] = ()) -> list[dict[str, Any]]:
        """For --json: kind, count, rows (numbers), sources (the file of each), stops, lines, fix, dropped."""
        stopping = self.stopping(allowed)
        return [
            {
                "kind": kind,
                "count": self.counts[kind],
                "rows": [row for _, row, _ in self.places[kind]],
                "sources": [file for file, _, _ in self.places[kind]],
                "lines": [line for _, _, line in self.places[kind]],
                "stops": kind in stopping,
                "dropped": self.drops(kind),
                "message": self.errors[kind][0].what if self.errors[kind] else KINDS[kind].title,
                "fix": self.fix(kind),
            }
            for kind in KINDS
            if kind in self.counts
        ]

    def dropped(self) -> list[dict[str, Any]]:
        """Of each kind whose rows were left out: kind, title, count, where (for a person), the first rows."""
        return [
            {"kind": kind, "title": KINDS[kind].title, "count": each["count"], "where": self.rows(kind)}
            | {name: each[name][:_SHOWN_ROWS] for name in ("rows", "sources", "lines")}
            for kind, each in ((each["kind"], each) for each in self.as_list() if each["dropped"])
        ]

    def fix(self, kind: str) -> str:
        """What to do about rows of a kind, with the line of a recipe that leaves them out, where that can be said."""
        if self.drops(kind):
            return f"none needed: left out by {self.drop_name}"
        own = self.own_fix(kind)
        return f"{own}; or {drop}" if (drop := self.drop_fix([kind])) else own

    def own_fix(self, kind: str) -> str:
        fixes = {error.fix for error in self.errors.get(kind, [])}
        fix = (fixes.pop() if len(fixes) == 1 else None) or KINDS[kind].fix
        if not self.by_option:
            return fix
        return fix.replace("write data.template:", "add --template").replace("data.template:", "--template")

    def drop_fix(self, kinds: Sequence[str]) -> str | None:
        """The line of a recipe that leaves out the rows of these kinds too; None where it would not help."""
        found = [kind for kind in kinds if kind in get_args(Droppable)]
        most = max((self.counts[kind] for kind in found), default=0)
        none_left = self.rows_read and most >= self.rows_read
        if self.drop is None or not found or none_left:
            return None
        named = dict.fromkeys([*self.drop, *found])
        written = f"add --drop {','.join(named)}" if self.by_option else f"write data.drop: [{', '.join(named)}]"
        return f"{written} to leave such rows out"

    @property
    def drop_name(self) -> str:
        return "--drop" if self.by_option else "data.drop"

    def rows(self, kind: str) -> str:
        """The first rows of a kind, as a person reads them; of files what is said of each."""
        if not self.places[kind]:
            return "; ".join(f"{error.where}: {error.what}" for error in self.errors[kind] if error.where)
        shown: dict[str, list[str]] = {}
        for file, row, line in self.places[kind][:_SHOWN_ROWS]:
            shown.setdefault(file, []).append(numbered(row, line))
        more = self.counts[kind] - sum(map(len, shown.values()))
        text = "; ".join(f"{file}: row {', '.join(rows)}" for file, rows in shown.items())
        return f"{text} and {more:,} more" if more > 0 else text


class GateClosed(CheckFailed):
    """The checks found problems in the data that would change the result."""

    def __init__(self, findings: Findings, stopping: list[str]):
        self.findings, self.stopping = findings, stopping
        if set(stopping) <= {"malformed"}:
            self.exit_code = 2
        kinds = "1 kind" if len(stopping) == 1 else f"{len(stopping)} kinds"
        super().__init__(f"the checks found problems of {kinds} in the data", fix=findings.drop_fix(stopping))

    def render(self) -> str:
        findings, lines = self.findings, []
        for kind in self.stopping:
            lines.append(f"error: {findings.rows(kind)}: {KINDS[kind].counted(findings.counts[kind])}")
            lines += [f"  {f'{error.where}: ' if error.where else ''}{error.what}" for error in findings.errors[kind]]
            lines.append(f"  fix: {findings.own_fix(kind)}")
        lines += [f"  or {self.fix}"] if self.fix else []
        return "\n".join(map(shown, lines))


@dataclass(frozen=True)
class Lengths:
    """How long examples are, in tokens, and how much of them is trained."""

    examples: int
    tokens: int
    target_tokens: int
    percentiles: dict[str, int]

    @classmethod
    def of(cls, lengths: np.ndarray, targets: np.ndarray) -> Lengths:
        at = (50, 90, 95, 99, 100)
        found = np.percentile(lengths, at, method="higher") if len(lengths) else np.zeros(len(at))
        return cls(
            len(lengths),
            int(lengths.sum(dtype=np.int64)),
            int(targets.sum(dtype=np.int64)),
            {("longest" if p == 100 else f"p{p}"): int(x) for p, x in zip(at, found, strict=True)},
        )


@dataclass(frozen=True)
class Share:
    """What one source gives to an epoch, or of a stream to a window. share: of all target tokens."""

    source: str
    examples: int
    tokens: int
    target_tokens: int
    share: float


def shares_of(sources: Sequence[str], owners: np.ndarray, facts: np.ndarray) -> list[Share]:
    """owners: the source of each example, by number. facts: as facts_of gives them."""
    weights = (None, facts["tokens"], facts["targets"])
    counts = np.array([np.bincount(owners, each, len(sources)) for each in weights], np.int64)
    trained = max(1, int(counts[2].sum()))
    of_each = zip(sources, *counts.tolist(), strict=True)
    return [Share(name, examples, tokens, targets, targets / trained) for name, examples, tokens, targets in of_each]


@dataclass(frozen=True)
class Weights:
    """Loss weights other than 1: their range over all trained spans, and how many examples have any."""

    smallest: float
    largest: float
    examples: int

    @classmethod
    def of(cls, facts: np.ndarray) -> Weights | None:
        """facts: as facts_of gives them. None if all weights are 1."""
        smallest, largest = facts["smallest"], facts["largest"]
        weighted = int(((smallest != 1) | (largest != 1)).sum())
        return cls(float(smallest.min()), float(largest.max()), weighted) if weighted else None

    def said(self) -> str:
        weights = " to ".join(dict.fromkeys(f"{each:.4g}" for each in (self.smallest, self.largest)))
        return f"the loss is weighted: {weights}, in {self.examples:,} example{'' if self.examples == 1 else 's'}"


def facts_of(examples: Sequence[Example]) -> np.ndarray:
    """What statistics need of each example: tokens, target tokens, smallest and largest weight of the loss."""
    weights = [[weight for _, _, weight in each.spans] or [1.0] for each in examples]
    facts = [(len(each.ids), each.targets, min(of), max(of)) for each, of in zip(examples, weights, strict=True)]
    return np.array(facts, [("tokens", "i4"), ("targets", "i4"), ("smallest", "f4"), ("largest", "f4")])


def duplicates(hashes: np.ndarray) -> np.ndarray:
    """Indices whose hash has occurred before, in order."""
    _, first = np.unique(hashes, return_index=True)
    return np.delete(np.arange(len(hashes)), first)


# ── what became of a row ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Finding:
    """A problem of a row, or a note about it. kind: one of those in gate.py. error: the same, for a person."""

    kind: str
    error: LoraError | None = None


@dataclass(frozen=True)
class Encoded:
    """The result of encoding a row: an example, findings that reject it, or both, where the recipe can allow all."""

    row: Row
    example: Example | None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    proved: bool = False  # the bytes of its tokens are those of its text


def problem(row: Row, kind: str, what: str, fix: str) -> Finding:
    return Finding(kind, LoraError(what, where=row.where, fix=fix))


def unstopped(document: Conversation, template: ChatTemplate, turn: int, token: str | None) -> Finding:
    how = "without a special token" if token is None else f"in {token!r}, which is not a special token of the tokenizer"
    what = f"the chat template ({template.name}) ends turn {turn + 1} {how}: the model would not learn to stop"
    fix = "use a model whose template ends turns with a stop token, or data.template: alpaca or plain, which end "
    return problem(document.row, "no_stop_token", what, f"{fix}them with the model's end token")


def special_in_text(document: Conversation, template: ChatTemplate) -> Finding | None:
    found = template.special_in_text(document.turns, document.tools)
    if found is None:
        return None
    turn, token = found
    holder = f"turn {turn} holds" if turn else "the tools hold"
    what = f"{holder} {token!r}, which the tokenizer reads as a special token"
    return problem(document.row, "special_in_text", what, "remove or rewrite it")


def refused(document: Document, kind: str, what: str, fix: str) -> Encoded:
    return Encoded(document.row, None, (problem(document.row, kind, what, fix),))


def nothing_trained(document: Document) -> Encoded:
    what = "no target tokens: nothing in this row would be trained"
    fix = "give it a completion, an assistant turn or some text, or remove the row"
    return refused(document, "no_target", what, fix)
