"""The contract of a feed, which loop, session, check and report rely on without asking where the rows come from."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from conftest import write_rows
from transformers import LlamaConfig

from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.data.feed import Feed, open_feed
from lora_cli.data.prepare import prepare
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe


@pytest.fixture(params=["prepared", "streamed"])
def open_it(request, recipe_file, tiny_llama):
    """Opens a feed of the 24 sums."""
    streaming = request.param == "streamed"

    def opened(**data: Any) -> Feed:
        settings = {"streaming": streaming, "validation": None, "packing": False, **data}
        recipe = load_recipe(recipe_file(data=settings, train={"max_steps": 6}))
        tokenizer = load_tokenizer(find_base(str(tiny_llama)))
        return open_feed(recipe, prepare(recipe, tokenizer), tokenizer)

    return opened


def rows_of(feed: Feed, first: int, last: int) -> list[list[int]]:
    return [[each.row for batch in feed.step(step) for each in batch] for step in range(first, last + 1)]


def test_steps_give_every_row_once_and_are_the_same_for_whoever_asks(open_it):
    steps = rows_of(open_it(), 1, open_it().total_steps)
    size = len(steps[0])
    per_pass = 24 // size
    assert 24 % size == 0, "the rows fill whole steps, so that a pass can be told from the next"
    assert sorted(chain(*rows_of(open_it(), 1, per_pass))) == list(range(1, 25))
    assert rows_of(open_it(), 1, len(steps)) == steps


def test_a_position_leads_to_the_steps_that_come_next(open_it):
    expected = rows_of(open_it(), 1, 6)
    began = open_it()
    rows_of(began, 1, 4)
    resumed = open_it()
    resumed.seek(began.position())
    assert rows_of(resumed, 5, 6) == expected[4:]


@pytest.mark.parametrize("packing", [True, False])
def test_no_micro_batch_has_more_tokens_than_the_largest(open_it, packing):
    feed = open_it(packing=packing)
    largest = sum(len(example.ids) for example in feed.largest())
    batches = [batch for step in range(1, 7) for batch in feed.step(step)]
    assert 0 < max(sum(len(example.ids) for example in batch) for batch in batches) <= largest


def test_what_is_known_of_the_data_is_said(open_it, sums, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": f"{n} and ", "completion": "x"} for n in range(4)])
    feed = open_it(validation=str(held))
    summary = feed.summary
    assert (summary.train.examples, len(feed.validation)) == (24, 4)
    assert [each.row for each in feed.first(3)] == [1, 2, 3]
    assert set(summary.formats) == {str(sums), str(held)}
    assert (summary.prompting, summary.own_template) == ("raw", None)
    assert list(summary.files) == [str(sums), str(held)]
    assert any("tokens of an example" in line for line in feed.lines())


def test_the_fingerprint_is_that_of_the_data(open_it, sums):
    before = open_it().summary.fingerprint
    assert open_it().summary.fingerprint == before
    sums.write_text(sums.read_text().replace("plus", "and", 1))
    assert open_it().summary.fingerprint != before


def test_turns_are_prompted_by_the_template_that_is_kept(open_it, tmp_path):
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3."}]
    summary = open_it(
        train=str(write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)), template="plain"
    ).summary
    assert summary.prompting == "template"
    assert summary.own_template


def test_a_model_that_lacks_a_token_is_refused(open_it):
    feed = open_it()
    feed.require_fit(LlamaConfig(vocab_size=50_000), "large")
    with pytest.raises(LoraError, match="the tokenizer has"):
        feed.require_fit(LlamaConfig(vocab_size=2), "small")
