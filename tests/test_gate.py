"""The gate: each kind of finding by data that have it and data that just have not, and what a run does about it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
import pytest
from chat_families import FAMILIES, family_tokenizer
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_model import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import TOO_LONG_SHARE, Findings, Lengths, duplicates
from lora_cli.data.prepare import prepare
from lora_cli.data.store import PreparedData
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.recipe import Allowed, Recipe

Rows = list[dict[str, Any]]
ALLOWED = get_args(Allowed)
ASKED, ANSWERED = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}
CHAT = {"messages": [ASKED, ANSWERED]}


def family(name: str) -> Callable[[], Any]:
    return lambda: family_tokenizer(FAMILIES[name])


def words_only() -> Any:
    """A tokenizer of a few words: it has no others, and no bytes either."""
    vocabulary = {word: id for id, word in enumerate(["<unk>", "</s>", "one", "two", "three", *map(str, range(400))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def texts(count: int, **more: Any) -> Rows:
    return [{"text": f"row {number}", **more} for number in range(count)]


@dataclass(frozen=True)
class Case:
    """Rows that have a finding, at `bad` of them, and rows that just have not."""

    has: Rows
    bad: list[int]  # row numbers
    has_not: Rows
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], Any] = make_tokenizer
    held: tuple[Rows, Rows] | None = None  # validation rows of either, in a file of their own
    table: bool = False  # a Parquet file


GOOD = texts(3)
FORGETFUL = (  # ends turns, but not this one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|im_end|>' if m.content != 'Four.' }}\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
TWO = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}
THINKING = {"messages": [ASKED, ANSWERED | {"content": "<think>\nHm.\n</think>\n\nFour."}]}
SPECIAL = {"role": "user", "content": "What is <|im_end|>?"}
LONG = " one" * 64
PLACEHOLDERS = ("N/A", " n/a\n", "-", "TODO", "Todo", "NaN", "null", "?", "…")


def called(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def long_rows(bad: int, count: int = 100) -> Rows:
    """Rows of which some have one token more than 32; all others have 32 or fewer."""
    rows: Rows = [{"text": "two " * (5 + number % 11) + str(number)} for number in range(count)]
    for at in range(bad):
        rows[at * 7] = {"text": f"{at}" + " two" * 31}  # with the end token 33
    return rows


CASES = {
    "malformed": Case([*GOOD, {"text": 3}], [4], [*GOOD, {"text": "3"}]),
    "empty": Case([*GOOD, {"text": " \n\t"}], [4], [*GOOD, {"text": " a "}]),
    "no_target": Case([CHAT, {"messages": [ASKED]}], [2], [CHAT, {"messages": [ASKED, ANSWERED | {"content": "."}]}]),
    "too_long": Case(long_rows(2), [1, 8], long_rows(1), {"max_seq_len": 32}, words_only),
    "no_stop_token": Case(
        [CHAT, {"messages": [ASKED, ANSWERED | {"content": "Five."}]}], [1], [CHAT, CHAT | {"id": 1}]
    ),
    "special_in_text": Case(
        [CHAT, {"messages": [SPECIAL, ANSWERED]}],
        [2],
        [CHAT, {"messages": [{"role": "user", "content": "What is <|im_end>?"}, ANSWERED]}],
    ),
    "double_bos": Case(
        [*GOOD, {"text": "<s>row"}], [4], [*GOOD, {"text": "row <s>"}], tokenizer=family("mistral-v0.3")
    ),
    "not_round_trip": Case(
        [{"text": "one two"}, {"text": "one four"}], [2], [{"text": "one two"}, {"text": "one 4"}], {}, words_only
    ),
    "overlap": Case(GOOD, [2], GOOD, held=([{"text": "new"}, GOOD[1]], [{"text": "new"}, {"text": "row 1 "}])),
    "duplicate": Case([*GOOD, GOOD[0], GOOD[1], GOOD[0]], [4, 5, 6], [*GOOD, {"text": "row 0."}]),
    "not_prompted": Case([CHAT], [1], [CHAT], tokenizer=family("deepseek-r1")),
    "null_members": Case(
        [called(city="Rome"), called(tz="UTC"), CHAT],
        [1, 2],
        [called(city="Rome"), called(city="Oslo"), CHAT],
        tokenizer=family("llama-3.1"),
        table=True,
    ),
    "result_as_json": Case(
        [CHAT, {"messages": [ASKED, {"role": "tool", "content": {"of": [1, None]}}, ANSWERED]}],
        [2],
        [CHAT, {"messages": [ASKED, {"role": "tool", "content": '{"of": [1, null]}'}, ANSWERED]}],
    ),
    "two_forms": Case([CHAT, TWO], [2], [CHAT, CHAT | {"id": 1}], tokenizer=family("qwen3")),
    "empty_question": Case(
        [CHAT, {"messages": [ASKED | {"content": " \n"}, ANSWERED]}],
        [2],
        [CHAT, {"messages": [ASKED | {"content": "?"}, ANSWERED]}],
    ),
    "placeholder": Case(
        [CHAT, *({"messages": [ASKED, ANSWERED | {"content": each}]} for each in PLACEHOLDERS)],
        [*range(2, 2 + len(PLACEHOLDERS))],
        [CHAT, *({"messages": [ASKED, ANSWERED | {"content": each}]} for each in ("N/A here.", "-1", "None", "Na"))],
    ),
    "entities": Case(
        [*GOOD, {"text": "R&amp;D"}, {"text": "it&#39;s"}, {"text": "&#x27;"}, {"text": "a &quot;b&nbsp;"}],
        [4, 5, 6, 7],
        [*GOOD, {"text": "R&D; AT&T; f(&a, &b); &nothing;"}, {"text": "&amp &; #39;"}],
    ),
    "empty_thoughts": Case([CHAT, THINKING], [1], [THINKING], tokenizer=family("qwen3")),
    "forgotten_thoughts": Case(
        [{"messages": [*THINKING["messages"], *CHAT["messages"]]}],
        [1],
        [CHAT],
        {"train_on": "last_assistant"},
        tokenizer=family("qwen3"),
    ),
    "left_out": Case(
        [*GOOD, {"text": "a", "train": False}, {"text": "b", "weight": 0}],
        [4, 5],
        [*GOOD, {"text": "a", "train": True}, {"text": "b", "weight": 0.001}],
    ),
    "stop_not_end": Case([CHAT], [], [CHAT]),
}
HAS_NOT: dict[str, dict[str, Any]] = {  # what else is different there
    "no_stop_token": {"template": "chatml"},
    "not_prompted": {"template": "plain"},
    "stop_not_end": {"template": "plain"},
}


@dataclass(frozen=True)
class Run:
    folder: Path

    def recipe(self, rows: Rows, held: Rows | None = None, **data: Any) -> Recipe:
        values = {"train": str(write_rows(self.folder / "rows.jsonl", rows))} | data
        if held is not None:
            values["validation"] = str(write_rows(self.folder / "held.jsonl", held))
        return Recipe.model_validate(
            {"base_model": "none", "data": values, "output": str(self.folder / "run")} | {"train": {"seed": 3}}
        )

    def of(self, kind: str, *, has: bool, **data: Any) -> tuple[Recipe, Any]:
        case = CASES[kind]
        tokenizer = case.tokenizer()
        if kind == "no_stop_token":
            tokenizer.chat_template = FORGETFUL
        extra = {} if has else HAS_NOT.get(kind, {})
        held = case.held and case.held[not has]
        rows = case.has if has else case.has_not
        if case.table:
            extra = extra | {"train": str(self.folder / "rows.parquet")}
            parquet.write_table(pyarrow.Table.from_pylist(rows), extra["train"])
        return self.recipe(rows, held, **case.data | extra | data), tokenizer

    def findings(self, kind: str, *, has: bool, **data: Any) -> Findings:
        recipe, tokenizer = self.of(kind, has=has, **data)
        return prepare(recipe, tokenizer, keep=False, inspect=True).findings


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_every_kind_has_data_that_have_it():
    assert {*CASES, "not_utf8"} == {*KINDS}  # of a file and not of rows: tests/test_separated.py
    assert set(ALLOWED) < {kind for kind in KINDS if KINDS[kind].stops}


@pytest.mark.parametrize("kind", CASES)
def test_a_finding_is_counted_and_its_rows_are_named(run, kind):
    case, findings = CASES[kind], run.findings(kind, has=True)
    assert findings.counts[kind] == max(len(case.bad), 1)
    file = run.folder / ("held.jsonl" if case.held else "rows.parquet" if case.table else "rows.jsonl")
    assert [place[:2] for place in findings.places[kind]] == [(str(file), row) for row in case.bad]
    (listed,) = [each for each in findings.as_list() if each["kind"] == kind]
    assert listed["rows"] == case.bad
    assert listed["count"] == findings.counts[kind]
    assert set(listed["sources"]) <= {str(file)}
    assert listed["stops"] == KINDS[kind].stops
    assert listed["fix"]
    assert listed["message"]
    assert json.loads(json.dumps(listed)) == listed
    shown = findings.rows(kind)
    assert all(str(row) in shown for row in case.bad[:5])


@pytest.mark.parametrize("kind", CASES)
def test_data_that_just_have_it_not_pass(run, kind):
    recipe, tokenizer = run.of(kind, has=False)
    data = prepare(recipe, tokenizer, keep=True)
    if kind == "too_long":
        assert data.findings.counts[kind] == 1
    else:
        assert kind not in data.findings.counts
    assert data.findings.stopping() == []
    assert len(data.train) == len(CASES[kind].has_not) - (kind == "too_long")


def test_what_exports_leave_in_pairs_is_noted_and_what_is_context_is_not_an_answer(run, tokenizer):
    rows = [{"prompt": " ", "completion": "Thanks!"}, {"prompt": "N/A", "completion": "?"}]
    rows += [{"prompt": "R&amp;D?", "completion": "Yes."}, {"prompt": "-", "completion": "A dash."}]
    findings = prepare(run.recipe(rows), tokenizer, inspect=True).findings
    assert {kind: [row for _, row, _ in places] for kind, places in findings.places.items()} == {
        "empty_question": [1],
        "placeholder": [2],
        "entities": [3],
    }
    chat = {"messages": [ASKED, ANSWERED | {"content": "N/A"}, ASKED, ANSWERED]}
    later = prepare(run.recipe([chat], train_on="last_assistant"), tokenizer, inspect=True).findings
    assert "placeholder" not in later.counts
    assert "placeholder" in prepare(run.recipe([chat], train_on="all"), tokenizer, inspect=True).findings.counts


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_a_run_stops_or_goes_on_as_the_kind_says(run, kind, keep):
    recipe, tokenizer = run.of(kind, has=True)
    if not KINDS[kind].stops:
        data = prepare(recipe, tokenizer, keep=keep)
        assert data.findings.counts[kind] > 0
        return
    with pytest.raises(LoraError) as caught:
        prepare(recipe, tokenizer, keep=keep)
    text = caught.value.render()
    file = run.folder / ("held.jsonl" if CASES[kind].held else "rows.jsonl")
    assert str(file) in text
    assert all(f"row {row}" in text or f", {row}" in text for row in CASES[kind].bad)
    assert "fix: " in text
    assert caught.value.exit_code == (2 if kind == "malformed" else 3)
    assert isinstance(caught.value, CheckFailed) or kind == "malformed"
    assert not (run.folder / "run").exists()


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_is_allowed_goes_through_and_is_still_counted(run, kind):
    recipe, tokenizer = run.of(kind, has=True, allow=[kind])
    data = prepare(recipe, tokenizer, keep=True)
    assert data.findings.counts[kind] == len(CASES[kind].bad)
    assert data.findings.stopping(recipe.data.allow) == []


@pytest.mark.parametrize("kind", [kind for kind in ALLOWED if kind != "too_long"])
def test_rows_with_what_is_allowed_are_trained_on(run, kind):
    """To allow a finding is to say that the rows are meant as they are, not that they may vanish."""
    recipe, tokenizer = run.of(kind, has=True, allow=[kind])
    data = prepare(recipe, tokenizer, keep=True)
    assert {example.row for example in data.train} == set(range(1, len(CASES[kind].has) + 1))
    if kind == "overlap":
        assert len(data.validation) == 2


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_is_allowed_is_that_kind_alone(run, kind):
    others = [other for other in ALLOWED if other != kind]
    recipe, tokenizer = run.of(kind, has=True, allow=others)
    with pytest.raises(LoraError):
        prepare(recipe, tokenizer, keep=True)


def test_all_that_is_wrong_is_told_together(run, tokenizer):
    rows = [{"text": 3}, {"text": ""}, *GOOD, {"text": None}, {"text": " "}]
    with pytest.raises(CheckFailed) as caught:
        prepare(run.recipe(rows), tokenizer, keep=True)
    file, text = run.folder / "rows.jsonl", caught.value.render()
    assert f"{file}: row 1, 6: 2 rows that cannot be read" in text
    assert f"{file}: row 2, 7: 2 empty rows" in text
    assert f"{file}: row 1: text is int, not text" in text
    assert f"{file}: row 6: the row has no text" in text
    assert text.count("fix: ") == 2
    assert caught.value.exit_code == 3


def test_many_findings_are_all_counted_and_the_first_shown(run, tokenizer):
    rows = [{"text": ""} if number % 3 else {"text": f"row {number}"} for number in range(3000)]
    findings = prepare(run.recipe(rows), tokenizer, inspect=True).findings
    assert findings.counts == {"empty": 2000}
    assert [row for _, row, _ in findings.places["empty"]] == [row for row in range(1, 3001) if row % 3 != 1][:1000]
    assert findings.rows("empty") == f"{run.folder / 'rows.jsonl'}: row 2, 3, 5, 6, 8 and 1,995 more"


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.lists(
        st.sampled_from(["good", "good", "empty", "malformed", "left_out", "again"]), min_size=2, max_size=40
    )
)
def test_counts_and_rows_are_those_that_were_put_in(tmp_path_factory, tokenizer, kinds):
    rows: Rows = []
    expected: dict[str, list[int]] = {}
    for number, kind in enumerate(["good", *kinds], 1):
        values: dict[str, Any] = {"good": {"text": f"row {number}"}, "empty": {"text": "\n"}, "malformed": {"other": 1}}
        values |= {"left_out": {"text": "a", "train": False}, "again": {"text": "row 1"}}
        rows.append(values[kind])
        if kind != "good":
            expected.setdefault("duplicate" if kind == "again" else kind, []).append(number)
    run = Run(tmp_path_factory.mktemp("rows"))
    findings = prepare(run.recipe(rows), tokenizer, inspect=True).findings
    assert findings.counts == {kind: len(numbers) for kind, numbers in expected.items()}
    for kind, numbers in expected.items():
        assert [row for _, row, _ in findings.places[kind]] == numbers


# ── length ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rows", "bad", "stops"), [(100, 1, False), (100, 2, True), (99, 1, True), (300, 3, False)])
def test_up_to_one_percent_of_long_rows_are_left_out_and_counted(run, rows, bad, stops):
    recipe = run.recipe(long_rows(bad, rows), max_seq_len=32)
    data = prepare(recipe, words_only(), inspect=True)
    assert data.findings.counts["too_long"] == bad
    assert (data.findings.stopping() == ["too_long"]) == stops
    assert len(data.train) == rows - bad
    assert data.summary.longest[0] == max(len(example.ids) for example in data.train) <= 32
    if stops:
        with pytest.raises(CheckFailed):
            prepare(recipe, words_only(), keep=True)
    else:
        assert len(prepare(recipe, words_only(), keep=True).train) == rows - bad


def test_the_share_is_exact_for_any_number_of_rows():
    for hundreds in range(1, 100_000):
        assert hundreds <= TOO_LONG_SHARE * (100 * hundreds), hundreds


def test_exactly_as_long_as_allowed_is_not_too_long(run):
    rows = [{"text": " ".join(["two"] * count)} for count in (31, 32)]  # the end token comes behind
    findings = prepare(run.recipe(rows, max_seq_len=32), words_only(), inspect=True).findings
    assert [place[:2] for place in findings.places["too_long"]] == [(str(run.folder / "rows.jsonl"), 2)]
    (error,) = findings.errors["too_long"]
    assert error.what == "33 tokens, but max_seq_len is 32"


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split"])
def test_what_the_recipe_says_of_long_rows_is_done_and_counted(run, too_long):
    rows = long_rows(9)
    data = prepare(run.recipe(rows, max_seq_len=32, too_long=too_long), words_only(), keep=True)
    assert data.findings.counts["too_long"] == 9
    assert data.findings.stopping() == []
    long = {1 + 7 * at for at in range(9)}
    of_long = [example for example in data.train if example.row in long]
    assert len([example for example in data.train if example.row not in long]) == 91
    assert all(len(example.ids) <= 32 for example in data.train)
    if too_long == "drop":
        assert of_long == []
    elif too_long == "truncate":
        assert [len(example.ids) for example in of_long] == [32] * 9
    else:  # 33 tokens, of which all but the first are targets once
        assert len(of_long) == 18
        assert sum(example.targets for example in of_long) == 9 * 32


def test_a_row_that_truncation_leaves_nothing_to_train_of_is_a_finding_with_a_length_that_works(run, tokenizer):
    row = {"prompt": LONG, "completion": " two"}
    whole = prepare(run.recipe([row, {"prompt": "a", "completion": "b"}]), tokenizer, keep=True).train[0]
    context = whole.spans[0][0]
    rows = [row, {"prompt": "a", "completion": "b"}]
    with pytest.raises(CheckFailed, match="no target tokens are left") as caught:
        prepare(run.recipe(rows, max_seq_len=context, too_long="truncate"), tokenizer, keep=True)
    assert caught.value.where == f"{run.folder / 'rows.jsonl'}: row 1"
    fix = f"raise data.max_seq_len to {context + 1} or more, or choose data.too_long: drop"
    assert caught.value.fix == f"{fix}; or write data.drop: [no_target] to leave such rows out"
    data = prepare(run.recipe(rows, max_seq_len=context + 1, too_long="truncate"), tokenizer, keep=True)
    assert [example.targets for example in data.train] == [1, 2]


def test_conversations_cannot_be_split(run, tokenizer):
    long = {"messages": [ASKED, ANSWERED | {"content": LONG}]}
    with pytest.raises(LoraError, match="split is for text"):
        prepare(run.recipe([CHAT, long], max_seq_len=40, too_long="split"), tokenizer, keep=True)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=60))
def test_lengths_are_as_numpy_counts_them(pairs):
    lengths, targets = (np.array([pair[at] for pair in pairs], np.int32) for at in (0, 1))
    found = Lengths.of(lengths, targets)
    assert (found.examples, found.tokens, found.target_tokens) == (len(pairs), sum(lengths), sum(targets))
    for name, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("longest", 100)):
        by_hand = sorted(lengths)[math.ceil(percent / 100 * (len(pairs) - 1))] if pairs else 0
        assert found.percentiles[name] == by_hand
        if pairs:
            assert found.percentiles[name] == np.percentile(lengths, percent, method="higher")
    assert list(found.percentiles) == ["p50", "p90", "p95", "p99", "longest"]


def test_lengths_do_not_overflow():
    many = np.full(3_000_000, 1000, np.int32)
    assert (Lengths.of(many, many).tokens, Lengths.of(many, many).target_tokens) == (3 * 10**9, 3 * 10**9)


def test_the_summary_counts_what_an_epoch_sees(run, tokenizer):
    rows = [{"prompt": "a" * (number % 9), "completion": "b" * (number % 5 + 1)} for number in range(40)]
    data = prepare(run.recipe(rows, validation=0.2), tokenizer, keep=True)
    for lengths, examples in ((data.summary.train, data.train), (data.summary.validation, data.validation)):
        counted = [len(example.ids) for example in examples]
        assert lengths == Lengths.of(np.array(counted), np.array([example.targets for example in examples]))
        assert lengths.percentiles["longest"] == max(counted)
    assert data.summary.train.examples + data.summary.validation.examples == 40
    assert data.summary.largest_id == max(max(example.ids) for example in [*data.train, *data.validation])


# ── duplicates and overlap ──────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 12), max_size=40))
def test_duplicates_are_those_that_stood_before(values):
    expected = [at for at, value in enumerate(values) if value in values[:at]]
    assert duplicates(np.array(values, np.uint64)).tolist() == expected


def test_rows_are_equal_by_what_is_trained_on_and_not_by_how_it_is_written(run, tokenizer):
    chat = {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}], "id": 1}
    (run.folder / "more").mkdir()
    more = write_rows(run.folder / "more" / "a.jsonl", [chat, chat | {"id": 2}])
    recipe = run.recipe([CHAT, {"messages": [ASKED, ANSWERED | {"content": "4."}]}])
    values = recipe.model_dump(mode="json") | {"data": {"train": [recipe.data.train[0].path, str(more)]}}
    findings = prepare(Recipe.model_validate(values), tokenizer, inspect=True).findings
    assert [place[:2] for place in findings.places["duplicate"]] == [(str(more), 1), (str(more), 2)]


@pytest.mark.parametrize("weight", [0.5, 3])
def test_a_weight_hides_no_overlap_and_no_duplicate(run, tokenizer, weight):
    """The same text is the same text, however much it counts."""
    rows = [*GOOD, GOOD[0] | {"weight": weight}]
    findings = prepare(
        run.recipe(rows, [GOOD[1] | {"weight": weight}, {"text": "new"}]), tokenizer, inspect=True
    ).findings
    assert [place[:2] for place in findings.places["overlap"]] == [(str(run.folder / "held.jsonl"), 1)]
    assert [place[:2] for place in findings.places["duplicate"]] == [(str(run.folder / "rows.jsonl"), 4)]


def test_an_overlap_of_long_rows_that_are_left_out_is_none(run):
    rows = [*long_rows(1), *long_rows(0)[1:100]]
    findings = prepare(run.recipe(rows, [{"text": "one two"}], max_seq_len=32), words_only(), inspect=True).findings
    assert "overlap" not in findings.counts


# ── what generation does ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stored", "found"),
    [(None, True), ({}, True), ({"eos_token_id": None}, True), (0, True), (2, False), ([0, 2], False), ([0], True)],
    ids=str,
)
def test_the_models_own_end_tokens_end_turns_too(run, stored, found):
    """Llama 3's instruct models stop at <|eot_id|>, which their generation settings name beside the end token."""
    folder = run.folder / "model"
    make_tokenizer().save_pretrained(folder)
    if stored is not None:
        settings = stored if isinstance(stored, dict) else {"eos_token_id": stored}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    findings = prepare(run.recipe([CHAT]), tokenizer, inspect=True).findings
    assert ("stop_not_end" in findings.counts) == found
    if found:
        assert "<|im_end|>" in findings.errors["stop_not_end"][0].what


def test_findings_are_the_same_when_prepared_data_are_opened_again(run, tokenizer):
    rows = [CHAT, CHAT, {"messages": [ASKED, ANSWERED], "train": False}, {"messages": [ANSWERED, ASKED, ANSWERED]}]
    recipe = run.recipe(rows)
    first: PreparedData = prepare(recipe, tokenizer, keep=True)
    again = prepare(recipe, tokenizer, keep=True)
    assert set(first.findings.counts) == {"duplicate", "left_out", "stop_not_end"}
    assert again.findings.as_list() == first.findings.as_list()
    assert [str(error) for error in again.findings.errors["stop_not_end"]] == [
        str(error) for error in first.findings.errors["stop_not_end"]
    ]


def test_where_no_row_is_left_an_inspection_shows_why(run, tokenizer):
    rows = [{"text": ""}, {"text": 3}]
    findings = prepare(run.recipe(rows), tokenizer, inspect=True).findings
    assert findings.counts == {"empty": 1, "malformed": 1}


def test_a_run_without_any_row_left_says_so(run, tokenizer):
    with pytest.raises(LoraError, match="no row is left to train on"):
        prepare(run.recipe([{"text": "a", "train": False}]), tokenizer, keep=True)
    assert not (run.folder / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_a_kind_is_said_as_one(kind):
    """The first noun is what is counted; those behind it may be many."""
    noun = r"(row|turn|conversation|file|token)"
    many, one = KINDS[kind].counted(2000), KINDS[kind].counted(1)
    assert many == f"2,000 {KINDS[kind].title}"
    assert re.match(rf"1 (\w+ )*?{noun}\b", one)
    assert not re.match(rf"1 (\w+ )*?{noun}s\b", one.partition(" with ")[0].partition(" without ")[0])
    assert not re.search(r"\bthat (repeat|train|are)\b|\b(they|their)\b", one)
