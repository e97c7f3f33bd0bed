"""Prompts whose answers show what a run teaches: of validation examples, or of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.base.text import positions
from lora_cli.data.chat.template import ChatTemplate, chat_template
from lora_cli.data.columns import is_turns
from lora_cli.data.example import Example
from lora_cli.data.feed import Feed
from lora_cli.data.files.readers import Row, kind_of
from lora_cli.data.files.sources import open_source
from lora_cli.data.store import Summary
from lora_cli.data.turns import Reader, decoded
from lora_cli.errors import LoraError, refuse_if, shortened
from lora_cli.evaluation.generation import prompt_ids, stop_id
from lora_cli.recipe import MOST_SAMPLES, Recipe, SourceRecipe

MOST_NEW_TOKENS = 128
_OF_A_TEXT = 32  # tokens that prompt for the rest of an example without a prompt, or half of it
MOST_CHARACTERS = 2000  # of a text that is kept
_PROBE = "zqxj"


@dataclass(frozen=True)
class Prompt:
    """shown: the prompt for a person, without what the template writes around it. ids: what the model reads.

    wanted: the answer of the data, if they have one. stop: a token that ends an answer, beside the model's own.
    """

    shown: str
    ids: list[int]
    wanted: str | None
    stop: int | None


def sample_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, feed: Feed, config: Any) -> list[Prompt]:
    """What train.samples names; nothing without train.sample_every. config: of the model.

    Raises LoraError for a file without prompts, and for one that does not fit.
    """
    samples = recipe.train.samples
    if recipe.train.sample_every is None:
        return []
    template = _template(feed.summary, tokenizer)
    stop = stop_id(tokenizer, template)
    if isinstance(samples, str):
        found = [_of_row(row, tokenizer, template, stop, positions(config)) for row in _rows(samples)]
        what = f"{len(found)} prompts, but samples are made of {MOST_SAMPLES} at most"
        refuse_if(len(found) > MOST_SAMPLES, what, where=samples, fix="keep those that say most")
        return found
    examples, frame = feed.validation, _frame(template)
    count = min(samples, len(examples))
    return [_of_example(examples[at * len(examples) // count], tokenizer, frame, stop) for at in range(count)]


def _prompt(text: str, ids: list[int], wanted: str | None, stop: int | None) -> Prompt:
    wanted = None if wanted is None else shortened(wanted, MOST_CHARACTERS)
    return Prompt(shortened(text, MOST_CHARACTERS), ids, wanted, stop)


def _template(summary: Summary, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """What training renders rows with, arguments and BOS included; None if no source goes through a template."""
    if summary.template is None:
        return None
    own = summary.own_template
    return chat_template(tokenizer, None) if own is None else ChatTemplate(own, tokenizer, summary.template)


# ── of a file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(file: str) -> Iterator[Row]:
    """Of a text, a row for each line that is not blank."""
    for row in open_source(SourceRecipe.model_validate({"path": file})).rows():
        if kind_of(Path(row.file)) not in (".txt", ".md"):
            yield row
            continue
        for number, line in enumerate(row.values["text"].splitlines(), 1):
            if line.strip():
                yield Row(row.file, number, {"prompt": line.strip()})


def _of_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, stop: int | None, seen: int | None
) -> Prompt:
    turns, wanted = turns_of(row, template)
    ids = prompt_ids(turns, tokenizer, template, row.where)
    if seen and len(ids) >= seen:
        what = f"the prompt has {len(ids):,} tokens, but the model sees {seen:,} at most"
        raise LoraError(what, where=row.where, fix="shorten or remove this row")
    return _prompt(turns[-1]["content"], ids, wanted, stop)


def turns_of(row: Row, template: ChatTemplate | None) -> tuple[list[dict[str, Any]], str | None]:
    """(the turns to answer, the answer that the row has). Raises LoraError for a row without a prompt."""
    given, prompt = decoded(row.values.get("messages")), row.values.get("prompt")
    given = given or (decoded(prompt) if is_turns(prompt) else prompt)  # a text may be JSON of something else
    if isinstance(given, str) and given.strip():
        wanted = row.values.get("completion")
        return [{"role": "user", "content": given}], wanted if isinstance(wanted, str) else None
    if not isinstance(given, list) or not given:
        fix = 'write {"prompt": "…"}, or {"messages": [{"role": "user", "content": "…"}]}'
        raise LoraError("the row has neither prompt nor messages", where=row.where, fix=fix)
    what = "messages are for a model that is prompted through a chat template, and this one is not"
    refuse_if(template is None, what, where=row.where, fix="write its text as prompt")
    reader = Reader({}, row.where, filled=row.filled)
    turns = [reader.turn(each, f"turn {number}")[0] for number, each in enumerate(given, 1)]
    wanted = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    refuse_if(not turns, "the row has an answer alone", where=row.where, fix="write the turns before it, too")
    return turns, wanted


# ── of a validation example ───────────────────────────────────────────────────────────────────────────────────────────


def _frame(template: ChatTemplate | None) -> tuple[str, str]:
    """What the template writes before and behind the text of a lone message."""
    if template is None:
        return "", ""
    try:
        text = template.render([{"role": "user", "content": _PROBE}], template.name, generation_prompt=True)
    except LoraError:
        return "", ""
    before, _, behind = text.partition(_PROBE)
    return before, behind


def _of_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, frame: tuple[str, str], stop: int | None
) -> Prompt:
    """The tokens before the first target, and those that are trained behind them."""
    ids = [int(each) for each in example.ids]
    start, end, _ = example.spans[0]
    if start <= 1:  # all of it is trained
        start, end = min(_OF_A_TEXT, (len(ids) + 1) // 2), len(ids)
    framed = any(frame)
    text = str(tokenizer.decode(ids[:start], skip_special_tokens=not framed))
    text = text.removeprefix(frame[0]).removesuffix(frame[1])
    cut = "…" if end - start > MOST_NEW_TOKENS else ""
    wanted = str(tokenizer.decode(ids[start:end][:MOST_NEW_TOKENS], skip_special_tokens=True)) + cut
    return _prompt(text, ids[:start], wanted, stop)
