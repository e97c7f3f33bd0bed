"""Streamed training data: windows that are encoded, checked and forgotten, and a position to resume from."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import losses, write_rows

from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.data import stream
from lora_cli.data.feed import open_feed
from lora_cli.data.prepare import prepare
from lora_cli.data.stream import StreamFeed
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.recipe import load_recipe

STREAM = {"data": {"streaming": True}, "train": {"max_steps": 6}}


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 10)


@pytest.fixture
def feed(recipe_file, tiny_llama, small_windows):
    def make(**settings) -> StreamFeed:
        merged = {key: STREAM[key] | settings.get(key, {}) for key in STREAM}
        recipe, tokenizer = load_recipe(recipe_file(**merged)), load_tokenizer(find_base(str(tiny_llama)))
        feed = open_feed(recipe, prepare(recipe, tokenizer), tokenizer)
        assert isinstance(feed, StreamFeed)
        return feed

    return make


def rows_of(steps) -> list[int]:
    return [example.row for step in steps for batch in step for example in batch]


def test_a_pass_gives_every_row_once_and_then_begins_again(feed):
    given = feed()
    seen = []
    while len(seen) < 48:
        seen += rows_of([given.step((len(seen) and given._step) or 1)])
    first_pass = seen[:24]
    assert sorted(first_pass) == list(range(1, 25))
    assert first_pass != sorted(first_pass)  # shuffled within windows
    assert max(first_pass[:10]) <= 10  # the first window comes first


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_seek_gives_the_steps_that_come_next(feed, packing, stop):
    settings = {"data": {"packing": packing}}
    whole = feed(**settings)
    expected = [rows_of([whole.step(step)]) for step in range(1, 8)]
    until = feed(**settings)
    for step in range(1, stop + 1):
        until.step(step)
    position = json.loads(json.dumps(until.position()))
    later = feed(**settings)
    later.seek(position)
    assert [rows_of([later.step(step)]) for step in range(stop + 1, 8)] == expected[stop:]


def test_rows_before_the_window_are_not_tokenized_again(feed, monkeypatch):
    given = feed()
    for step in range(1, 5):
        given.step(step)
    position = given.position()
    later = feed()
    encoded = []
    real = stream.RowEncoder.encode
    monkeypatch.setattr(
        stream.RowEncoder, "encode", lambda self, rows, findings: real(self, spied(rows, encoded), findings)
    )
    later.seek(position)
    assert encoded == list(range(position["rows"] + 1, position["rows"] + len(encoded) + 1))


def spied(rows, seen):
    for row in rows:
        seen.append(row.number)
        yield row


def test_steps_come_in_order_alone(feed):
    with pytest.raises(ValueError, match="gives step 1 next"):
        feed().step(2)


def test_sources_are_mixed_by_weight(feed, tmp_path):
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {at}", "completion": "x"} for at in range(40)])
        for name in ("often", "seldom")
    ]
    given = feed(data={"train": [{"path": str(paths[0]), "weight": 3}, {"path": str(paths[1])}]})
    seen = Counter(example.file for example in given.first(99))
    assert seen[str(paths[0])] in (7, 8)
    assert sum(seen.values()) == 10


def test_what_is_wrong_stops_in_the_window_that_holds_it(feed, tmp_path):
    rows = [{"prompt": f"{at}", "completion": "x"} for at in range(12)] + [{"prompt": "a", "completion": ""}]
    given = feed(data={"train": str(write_rows(tmp_path / "rows.jsonl", rows))})
    with pytest.raises(CheckFailed, match="no target tokens") as stopped:
        [given.step(step) for step in range(1, 7)]
    assert stopped.value.where == f"{tmp_path / 'rows.jsonl'}: row 13"


def test_the_first_window_is_checked_before_the_model_is_loaded(run_recipe, tmp_path, monkeypatch):
    from lora_cli.training import opening

    monkeypatch.setattr(opening, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(LoraError, match="no target"):
        run_recipe(**STREAM | {"data": {"train": str(data), "streaming": True}})


def test_a_stream_of_nothing_but_left_out_rows_ends(feed, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "train": False}] * 3)
    with pytest.raises(LoraError, match="no row of the stream"):
        feed(data={"train": str(data)}).step(1)


def test_resumed_stream_is_bitwise_the_uninterrupted_one(run_recipe, small_windows, tmp_path, monkeypatch):
    from lora_cli.training import loop

    whole, _ = run_recipe(**STREAM)
    expected = losses(whole)
    real = loop.Run._one_step

    def interrupted(self, step, progress, track):
        real(self, step, progress, track)
        if step == 3:
            self.stop.ask("a test", 130)

    monkeypatch.setattr(loop.Run, "_one_step", interrupted)
    other = {"output": str(tmp_path / "stopped")}
    with pytest.raises(LoraError, match="stopped after step 3"):
        run_recipe(**STREAM | other)
    monkeypatch.setattr(loop.Run, "_one_step", real)
    resumed, _ = run_recipe(resume=True, **STREAM | other)
    assert losses(resumed) == expected
    assert (whole / "adapter" / "adapter_model.safetensors").read_bytes() == (
        resumed / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_stream_keeps_no_tokens(run_recipe):
    run, _ = run_recipe(**STREAM)
    sizes = [path.stat().st_size for path in (run / "prepared").rglob("examples.arrow")]
    assert all(size < 2000 for size in sizes)


def test_resuming_with_changed_files_is_refused(run_recipe, sums):
    run_recipe(**STREAM)
    sums.write_text(sums.read_text() + '{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(LoraError, match="has other contents"):
        run_recipe(resume=True, **STREAM)


def test_the_first_window_says_what_the_columns_mean_for_all(feed, tmp_path):
    rows = [{"text": f"row {at}"} | ({"score": 0.5} if at < 10 else {}) for at in range(30)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "columns": {"weight": "score"}}
    given = feed(data=data)
    seen = {e.row: e.spans[0][2] for step in range(1, 5) for batch in given.step(step) for e in batch}
    assert seen == {at: 0.5 if at <= 10 else 1.0 for at in range(1, 31)}
