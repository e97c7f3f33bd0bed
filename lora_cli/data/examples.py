"""From a row to an example: token ids, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat import encode_chat
from lora_cli.data.sources import Row
from lora_cli.errors import LoraError


@dataclass(frozen=True)
class Example:
    """Token ids of one example. trained[i]: whether token i carries loss. source: file and row, for messages."""

    source: str
    ids: list[int]
    trained: list[bool]

    @property
    def targets(self) -> int:
        """Target tokens. The first token of an example has nothing before it to be predicted from."""
        return sum(self.trained[1:])


FORMATS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}


def detect_format(rows: list[Row], wanted: str = "auto") -> str:
    """The format of a data file, by its columns. Raises LoraError if none or more than one fits."""
    columns = {name for row in rows for name in row.values}
    if wanted != "auto":
        return wanted
    fitting = [name for name, needed in FORMATS.items() if columns.issuperset(needed)]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    how_many = "more than one format" if fitting else "no format"
    raise LoraError(
        f"the columns {', '.join(sorted(columns)) or '(none)'} fit {how_many}",
        where=rows[0].where,
        details=[f"formats and their columns: {known}"],
        fix=f"write data.format: {fitting[0]}, or remove a column" if fitting else "rename the columns",
    )


def make_examples(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data_format: str) -> list[Example]:
    """One example a row. Raises LoraError, naming the row, for a missing column or one that trains no token."""
    make = {"text": _text, "completion": _completion, "chat": _chat}[data_format]
    examples = []
    for row in rows:
        example = make(row, tokenizer)
        if not example.targets:
            raise LoraError(
                "no target tokens: nothing in this row would be trained",
                where=row.where,
                fix="give it a completion, an assistant turn or some text, or remove the row",
            )
        examples.append(example)
    return examples


def fit_length(
    examples: Iterable[Example], max_seq_len: int, too_long: str, data_format: str, stride: int | None = None
) -> tuple[list[Example], int]:
    """Examples that fit into max_seq_len, and how many did not at first.

    too_long: `error` stops at the first, `drop` leaves it out, `truncate` cuts its end, `split` cuts text into pieces
    that overlap by max_seq_len - stride tokens, which serve as context and are not trained twice.
    """
    fitting: list[Example] = []
    long = 0
    for example in examples:
        if len(example.ids) <= max_seq_len:
            fitting.append(example)
            continue
        long += 1
        if too_long == "error":
            raise LoraError(
                f"{len(example.ids)} tokens, but max_seq_len is {max_seq_len}",
                where=example.source,
                fix="raise data.max_seq_len, or choose data.too_long: drop, truncate or split",
            )
        if too_long == "split":
            if data_format != "text":
                raise LoraError(
                    "too_long: split is for text; a conversation cannot be cut",
                    where=example.source,
                    fix="choose drop or truncate",
                )
            fitting += windows(example, max_seq_len, stride or max_seq_len)
        elif too_long == "truncate":
            cut = Example(example.source, example.ids[:max_seq_len], example.trained[:max_seq_len])
            if not cut.targets:
                first = example.trained.index(True, 1) + 1
                raise LoraError(
                    "no target tokens are left after truncation",
                    where=example.source,
                    fix=f"raise data.max_seq_len to {first} or more, or choose data.too_long: drop",
                )
            fitting.append(cut)
    if not fitting:
        raise LoraError(f"all {long} rows are longer than max_seq_len ({max_seq_len})", fix="raise data.max_seq_len")
    return fitting, long


def windows(example: Example, length: int, stride: int) -> list[Example]:
    """Windows of `length` tokens, each `stride` further; every token is a target in exactly one window.

    In all but the first, tokens seen before are context. stride = length gives disjoint pieces, each of which starts
    with one token of context so that its first target can be predicted.
    """
    stride = min(stride, length - 1)
    pieces = []
    done = 0  # tokens that have been targets, or were the first
    while done < len(example.ids):
        end = length if done == 0 else min(done + stride, len(example.ids))
        start = max(0, end - length)
        trained = [at >= done and trained for at, trained in enumerate(example.trained[start:end], start)]
        piece = Example(example.source, example.ids[start:end], trained)
        if piece.targets:
            pieces.append(piece)
        done = end
    return pieces


def target_bytes(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the target tokens spell; special tokens spell none."""
    total = 0
    for example in examples:
        run: list[int] = []
        for token, trained in [*list(zip(example.ids, example.trained, strict=True))[1:], (0, False)]:
            if trained:
                run.append(token)
            elif run:
                text: Any = tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                total += len(text.encode())
                run = []
    return total


def _column(row: Row, name: str) -> Any:
    value = row.values.get(name)
    if value is None:
        present = ", ".join(name for name, value in row.values.items() if value is not None)
        fix = f"add it, or remove the row; its columns: {present or 'none'}"
        raise LoraError(f"the row has no {name}", where=row.where, fix=fix)
    return value


def _text_column(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise LoraError(
            f"{name} is {type(value).__name__}, not text", where=row.where, fix="write it as text, in quotes"
        )
    return value


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    text = _text_column(row, "text")
    ids = _ended(_encode(text, tokenizer, special=True), tokenizer)
    return Example(row.where, ids, [bool(text.strip())] * len(ids))


def _completion(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Prompt, completion and the end token; the prompt is tokenized as it will be when it stands alone."""
    prompt, completion = _text_column(row, "prompt"), _text_column(row, "completion")
    context = _unended(_encode(prompt, tokenizer, special=True), tokenizer)
    together = _unended(_encode(prompt + completion, tokenizer, special=True), tokenizer)
    if together[: len(context)] == context:
        answer = together[len(context) :]
    else:  # a token would span the border: keep the prompt as the model will meet it
        answer = _encode(completion, tokenizer, special=False)
    if not answer:
        return Example(row.where, context, [False] * len(context))
    ids = [*context, *answer, tokenizer.eos_token_id]
    return Example(row.where, ids, [False] * len(context) + [True] * (len(answer) + 1))


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end: Any = tokenizer.eos_token_id
    return ids if ids and ids[-1] == end else [*ids, end]


def _unended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and ids[0] != ids[-1] else ids


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    return Example(row.where, *encode_chat(_column(row, "messages"), tokenizer, row.where))
