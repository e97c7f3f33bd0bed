"""What a source says for itself: the run is the one on files that were converted by hand, id for id."""

from __future__ import annotations

import csv
import io
import json

import pytest
from conftest import refusal, write_rows

from lora_cli.data.feed import open_feed
from lora_cli.data.prepare import prepare
from lora_cli.data.report import counted
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate import _reading
from lora_cli.recipe import Recipe, differences, dump_recipe, load_recipe

QA = [(f"How long does part {n} last?", f"Part {n} lasts {n % 7 + 1} years; keep the receipt.") for n in range(12)]
CHAT = [[("Hi, are you open?", "We open at nine."), ("And on Sunday?", f"From {n} to five.")] for n in range(6)]
NOTES = [f"Note {n}: rinse the tank, then let it dry." for n in range(5)]


def said(pairs):
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def recipe_of(folder, train, *, validation=None, **data):
    values = {"base_model": "none", "data": {"train": train, "validation": validation, "template": "chatml", **data}}
    return Recipe.model_validate(values | {"train": {"max_steps": 2}, "output": str(folder / "run")})


@pytest.fixture
def files(tmp_path):
    """As people have them, and converted by hand."""
    (tmp_path / "own").mkdir()
    out = io.StringIO()
    csv.writer(out).writerows([("Ticket", "Frage", "Antwort"), *((n, *pair) for n, pair in enumerate(QA))])
    (tmp_path / "faq.csv").write_text(out.getvalue(), encoding="utf-8-sig")
    write_rows(
        tmp_path / "chats.jsonl",
        [{"dialog": [{"who": t["role"], "says": t["content"]} for t in said(c)]} for c in CHAT],
    )
    (tmp_path / "notes.txt").write_text("\n".join(NOTES), encoding="utf-8")
    write_rows(tmp_path / "own" / "faq.jsonl", [{"instruction": q, "output": a} for q, a in QA])
    write_rows(tmp_path / "own" / "chats.jsonl", [{"messages": said(c)} for c in CHAT])
    return tmp_path


def as_they_are(files):
    return [
        {"path": str(files / "faq.csv"), "columns": {"instruction": "Frage", "output": "Antwort"}, "weight": 2},
        {"path": str(files / "chats.jsonl"), "train_on": "last_assistant"}
        | {"format": "chat", "columns": {"messages": "dialog", "role": "who", "content": "says"}},
        str(files / "notes.txt"),
    ]


def by_hand(files):
    """Earlier answers are context, as train_on: last_assistant makes them."""
    rows = [{"messages": said(c)} for c in CHAT]
    for row in rows:
        row["messages"][1]["train"] = False
    write_rows(files / "own" / "chats.jsonl", rows)
    faq = {"path": str(files / "own" / "faq.jsonl"), "weight": 2}
    return [faq, str(files / "own" / "chats.jsonl"), str(files / "notes.txt")]


def tokens(examples):
    return [([int(id) for id in each.ids], each.spans) for each in examples]


def test_a_run_is_the_one_on_files_converted_by_hand(files, tokenizer):
    one, two = (prepare(recipe_of(files, train), tokenizer) for train in (as_they_are(files), by_hand(files)))
    assert len(one.train) == 2 * 12 + 6 + 1
    assert tokens(one.train) == tokens(two.train)
    assert one.fingerprint == two.fingerprint
    assert len({tuple(spans) for _, spans in tokens(one.train)}) > 3


def test_validation_sources_say_for_themselves_too(files, tokenizer):
    faq, chats, notes = as_they_are(files)
    own = [{key: value for key, value in each.items() if key != "weight"} for each in (faq, chats)]
    one = prepare(recipe_of(files, notes, validation=own), tokenizer)
    hand = by_hand(files)
    two = prepare(recipe_of(files, notes, validation=[hand[0]["path"], hand[1]]), tokenizer)
    assert tokens(one.validation) == tokens(two.validation)
    assert len(one.validation) == 18


def test_a_stream_reads_sources_in_the_same_way(files, tokenizer):
    def examples(train):
        recipe = recipe_of(files, train, streaming=True)
        feed = open_feed(recipe, prepare(recipe, tokenizer), tokenizer)
        return sorted(tokens(each for step in range(1, 3) for batch in feed.step(step) for each in batch)), feed.summary

    one, two = examples(as_they_are(files)), examples(by_hand(files))
    assert one[0] == two[0]
    other = as_they_are(files)
    other[1]["train_on"] = "assistant"
    assert examples(other)[1].fingerprint != one[1].fingerprint


@pytest.mark.parametrize(
    ("key", "value"), [("format", "completion"), ("train_on", "all"), ("columns", {"output": None})]
)
def test_a_change_of_an_own_key_is_other_data(files, tokenizer, key, value):
    rows = [{"prompt": q, "completion": a, "text": q, "output": "x"} for q, a in QA]
    path = str(write_rows(files / "rows.jsonl", rows))
    plain = {"path": path, "format": "text" if key == "format" else "completion"}
    before, after = (recipe_of(files, each, template=None) for each in (plain, plain | {key: value}))
    if key != "columns":  # which changes nothing here, but is another recipe
        assert prepare(before, tokenizer).fingerprint != prepare(after, tokenizer).fingerprint
    ((changed, _, _),) = differences(before, after)
    assert changed == ("data", "train")


def test_a_source_s_own_key_replaces_the_recipe_s_whole(files, tokenizer):
    """Of the recipe's columns nothing is left for a source that has its own."""
    rows = [{"Frage": q, "Antwort": a, "prompt": "p", "extra": "e"} for q, a in QA]
    path = str(write_rows(files / "rows.jsonl", rows))
    columns = {"instruction": "Frage", "output": "Antwort", "input": "extra"}
    own = {"path": path, "columns": {"prompt": "Frage", "completion": "Antwort"}}
    data = prepare(recipe_of(files, [own, {"path": path}], columns=columns), tokenizer)
    assert [form.partition(" ")[0] for form in data.summary.formats.values()] == ["completion", "instruction"]


def test_the_recipe_s_columns_are_for_the_sources_that_have_them(files, tokenizer):
    faq = str(files / "faq.csv")
    columns = {"instruction": "Frage", "output": "Antwort"}
    data = prepare(recipe_of(files, [faq, str(files / "notes.txt")], columns=columns), tokenizer)
    assert [form.partition(" ")[0] for form in data.summary.formats.values()] == ["instruction", "text"]
    own = {"path": faq, "columns": columns}
    error = refusal(lambda: prepare(recipe_of(files, [own, str(files / "notes.txt")], columns=columns), tokenizer))
    assert "data.columns names Frage, but the sources have no such column" in error.what


@pytest.mark.parametrize(
    ("columns", "form", "canonical"),
    [
        ({"question": "Q", "answer": "A"}, None, {"prompt": "Q", "completion": "A"}),
        ({"user": "Q", "assistant": "A"}, "instruction", {"instruction": "Q", "output": "A"}),
        ({"question": "Q", "answer": "A", "system": "S"}, None, {"instruction": "Q", "output": "A", "system": "S"}),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_names_of_meanings_become_canonical(files, columns, form, canonical, everywhere):
    """everywhere: the format is that of the recipe."""
    own = {"path": "a.csv", "columns": columns} | ({} if everywhere or form is None else {"format": form})
    data = recipe_of(files, [own, "b.csv"], **({"format": form} if everywhere and form else {})).data
    assert data.train[0].columns == canonical
    assert data.train[1].columns is None


def test_a_recipe_with_own_keys_is_written_and_read_back(files, recipe_file):
    recipe = load_recipe(recipe_file(data={"train": as_they_are(files), "template": "chatml"}))
    path = files / "again.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"template": "chatml"},
            "unknown key data.train.template\n  fix: write data.template: a run has one chat template",
        ),
        ({"colums": {}}, "did you mean data.train.columns?"),
        ({"columns": {"frage": "Q"}}, "data.train: unknown field frage"),
        ({"columns": {"question": "Q", "prompt": "P"}}, "data.train: question means the same as another field"),
        ({"format": "csv"}, "must be one of 'auto', 'text', 'completion', 'instruction' or 'chat'"),
        ({"train_on": "answers"}, "must be one of 'assistant'"),
    ],
)
def test_what_a_source_cannot_say_is_refused_in_words(recipe_file, own, words):
    path = recipe_file(data={"train": {"path": "faq.csv"} | own})
    assert words in refusal(lambda: load_recipe(path)).render()


def test_eval_reads_a_file_as_the_source_with_its_columns(files):
    own = recipe_of(files, as_they_are(files)).data
    rows = [type("Row", (), {"values": values})() for values in ({"Frage": "q", "Antwort": "a"},)]
    assert _reading(own, files / "faq.csv", rows).columns == {"instruction": "Frage", "output": "Antwort"}
    values = json.loads((files / "chats.jsonl").read_text().splitlines()[0])
    conversations = [type("Row", (), {"values": values})()]
    assert _reading(own, files / "chats.jsonl", conversations).train_on == "last_assistant"


def test_a_column_of_its_own_that_a_source_lacks_is_named(files, tokenizer):
    own = {"path": str(files / "faq.csv"), "columns": {"instruction": "Frag", "output": "Antwort"}}
    with pytest.raises(LoraError, match="columns names Frag, but the rows have no such column") as caught:
        prepare(recipe_of(files, [own, str(files / "notes.txt")]), tokenizer)
    assert caught.value.fix == "did you mean Frage?"


def counts(shares):
    return [(each.source, each.examples, each.tokens, each.target_tokens) for each in shares]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_each_source_gives_is_counted(files, tokenizer, streaming):
    """Of an epoch, as its weights and the hold-out make it; of a stream, in the first window."""
    recipe = recipe_of(files, as_they_are(files), validation=None if streaming else 0.2, streaming=streaming)
    feed = open_feed(recipe, prepare(recipe, tokenizer), tokenizer)
    summary, by_file = feed.summary, {}
    for each in feed.first(99):
        given = by_file.setdefault(each.file, [0, 0, 0])
        given[:] = given[0] + 1, given[1] + len(each.ids), given[2] + each.targets
    assert counts(summary.shares) == [(name, *given) for name, given in by_file.items()]
    assert sum(each.target_tokens for each in summary.shares) == summary.train.target_tokens
    for each in summary.shares:
        assert each.share == pytest.approx(each.target_tokens / summary.train.target_tokens)
    shown = "\n".join(feed.lines())
    for each in summary.shares:
        assert f"  {counted(each.examples, 'example')}, {each.tokens:,} tokens, {each.target_tokens:,} target" in shown


def test_a_file_that_is_two_sources_is_counted_as_two(files, tokenizer):
    path = str(write_rows(files / "rows.jsonl", [{"prompt": q, "completion": a} for q, a in QA]))
    both = [{"path": path}, {"path": path, "train_on": "all", "weight": 0.5}]
    shares = prepare(recipe_of(files, both, template=None), tokenizer).summary.shares
    assert [(each.source, each.examples) for each in shares] == [(path, 12), (f"{path} (2)", 6)]
