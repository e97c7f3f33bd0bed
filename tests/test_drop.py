"""data.drop: leaving rows out is the same as having removed them from the file by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
import yaml
from conftest import write_rows
from pyarrow import parquet
from test_gate import CASES, FORGETFUL, Run

from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.prepare import prepare
from lora_cli.data.store import PreparedData
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe.schema import Droppable

DROPPABLE = get_args(Droppable)


def examples(data: PreparedData) -> Any:
    """What a run is given, without the numbers of rows: tokens and targets of each side, and the order's sequences."""
    sides = [[(list(each.ids), list(each.spans)) for each in side] for side in (data.train, data.validation)]
    return sides, [data.rows[at] for at in range(len(data.rows))]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def removed(run: Run, recipe: Recipe, bad: list[int], *, held: bool) -> Recipe:
    """The recipe on files from which these rows are gone; a Parquet file becomes another."""
    values = recipe.model_dump(mode="json")
    data = values["data"] | {"drop": []}
    source = data["validation" if held else "train"]
    source = source if isinstance(source, str) else source[0]
    if source.endswith(".parquet"):
        rows = parquet.read_table(source).to_pylist()
        table = pyarrow.Table.from_pylist([row for at, row in enumerate(rows, 1) if at not in bad])
        parquet.write_table(table, new := run.folder / "by-hand.parquet")
    else:
        lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
        new = run.folder / "by-hand.jsonl"
        new.write_text("".join(line for at, line in enumerate(lines, 1) if at not in bad), encoding="utf-8")
    return Recipe.model_validate(values | {"data": data | {"validation" if held else "train": str(new)}})


@pytest.mark.parametrize("kind", DROPPABLE)
def test_dropped_rows_are_gone_as_if_they_were_removed_by_hand(run, kind):
    case = CASES[kind]
    recipe, tokenizer = run.of(kind, has=True, drop=[kind])
    if kind == "no_stop_token":
        tokenizer.chat_template = FORGETFUL
    if len(case.bad) == len(case.has):
        with pytest.raises(LoraError, match="no row is left to train on") as refused:
            prepare(recipe, tokenizer)
        assert f"remove {kind} from data.drop" in str(refused.value.fix)
        return
    data = prepare(recipe, tokenizer)
    by_hand = prepare(removed(run, recipe, case.bad, held=bool(case.held)), tokenizer)
    assert examples(data) == examples(by_hand)
    assert data.findings.counts.pop(kind) == len(case.bad)
    assert data.findings.counts == by_hand.findings.counts
    assert [row for _, row, _ in data.findings.places[kind]] == case.bad


@pytest.mark.parametrize("kind", [kind for kind in DROPPABLE if KINDS[kind].stops])
def test_the_fix_of_what_stops_names_the_line_that_helps(run, kind):
    recipe, tokenizer = run.of(kind, has=True)
    if len(CASES[kind].bad) == len(CASES[kind].has):
        return
    with pytest.raises(LoraError) as stopped:
        prepare(recipe, tokenizer)
    line = str(stopped.value.fix).split("write data.drop: ")[1].split("]")[0] + "]"
    values = recipe.model_dump(mode="json")
    values["data"]["drop"] = yaml.safe_load(line)
    data = prepare(Recipe.model_validate(values), tokenizer)
    assert data.findings.counts[kind] == len(CASES[kind].bad)


def test_the_fix_of_several_kinds_leaves_out_all_of_them_and_keeps_what_was_dropped(run, tokenizer):
    rows = [{"text": 3}, {"text": ""}, {"text": "one"}, {"text": "two"}, {"text": "two"}]
    with pytest.raises(LoraError) as stopped:
        prepare(run.recipe(rows, drop=["duplicate"]), tokenizer)
    assert stopped.value.fix == "write data.drop: [duplicate, malformed, empty] to leave such rows out"
    assert stopped.value.fix in stopped.value.render()
    data = prepare(run.recipe(rows, drop=["duplicate", "malformed", "empty"]), tokenizer)
    assert [each.row for each in data.train] == [3, 4]


def damaged(rng: random.Random, count: int) -> tuple[list[dict[str, Any]], dict[str, set[int]]]:
    """Random rows, some with a problem, and which have which."""
    rows: list[dict[str, Any]] = []
    problems: dict[str, set[int]] = {}
    for number in range(1, count + 1):
        kind = rng.choice(["good"] * 6 + ["malformed", "empty", "no_target", "again"])
        good = {"prompt": f"What is {number}?" + " Think." * rng.randrange(4), "completion": f"It is {number}."}
        kept = [row for at, row in enumerate(rows, 1) if not any(at in those for those in problems.values())]
        if kind == "again" and kept:
            rows.append(rng.choice(kept))
            problems.setdefault("duplicate", set()).add(number)
            continue
        worse = {"malformed": {"completion": 3}, "empty": {"prompt": "", "completion": ""}}
        rows.append(good | (worse | {"no_target": {"completion": ""}}).get(kind, {}))
        if kind in ("malformed", "empty", "no_target"):
            problems.setdefault(kind, set()).add(number)
    return rows, problems


@pytest.mark.parametrize("seed", range(6))
def test_random_rows_split_and_packed_as_the_file_without_them(run, tokenizer, seed):
    rng = random.Random(seed)
    rows, problems = damaged(rng, rng.randrange(40, 120))
    settings: dict[str, Any] = {"validation": rng.choice([0.1, 0.2, 0.3]), "packing": rng.random() < 0.5}
    dropped = ["malformed", "empty", "no_target", *(["duplicate"] if rng.random() < 0.7 else [])]
    bad = set().union(*(problems.get(kind, set()) for kind in dropped))
    data = prepare(run.recipe(rows, drop=dropped, **settings), tokenizer)
    by_hand = prepare(run.recipe([r for at, r in enumerate(rows, 1) if at not in bad], **settings), tokenizer)
    assert examples(data) == examples(by_hand)
    assert {kind: data.findings.counts.get(kind, 0) for kind in dropped} == {
        kind: len(problems.get(kind, ())) for kind in dropped
    }


def test_leaving_rows_out_is_no_fix_where_none_would_be_left(run, tokenizer):
    rows = [{"prompt": 5, "completion": each} for each in range(3)]
    with pytest.raises(LoraError) as stopped:
        prepare(run.recipe(rows, drop=[]), tokenizer)
    assert "drop" not in stopped.value.render()


def test_nothing_is_dropped_that_was_not_asked_for(run, tokenizer):
    rows, problems = damaged(random.Random(3), 60)
    bad = problems["malformed"] | problems["empty"] | problems["no_target"]
    kept = [row for at, row in enumerate(rows, 1) if at not in bad]
    assert len(prepare(run.recipe(kept, drop=["empty"]), tokenizer).train) == len(kept)
    with pytest.raises(LoraError):
        prepare(run.recipe(rows, drop=["malformed", "empty", "duplicate"]), tokenizer)


def test_overlap_drops_the_validation_rows_also_across_groups(run, tokenizer):
    rows = [{"text": f"row {number % 54}", "group": number % 10 + number // 54} for number in range(60)]
    settings = {"validation": 0.2, "group_by": "group"}
    whole = prepare(run.recipe(rows, allow=["overlap"], **settings), tokenizer)
    data = prepare(run.recipe(rows, drop=["overlap"], **settings), tokenizer)
    leaked = {row for _, row, _ in whole.findings.places["overlap"]}
    assert leaked
    assert [each.row for each in data.train] == [each.row for each in whole.train]
    assert [each.row for each in data.validation] == [e.row for e in whole.validation if e.row not in leaked]


def test_a_validation_file_of_which_no_row_is_left_is_an_error(run, tokenizer):
    rows = [{"text": "one"}, {"text": "two"}]
    with pytest.raises(LoraError, match="no row is left to validate on") as refused:
        prepare(run.recipe(rows, rows[:1], drop=["overlap"]), tokenizer)
    assert refused.value.where == str(run.folder / "held.jsonl")
    assert refused.value.fix == "remove overlap from data.drop"


def test_the_share_of_long_rows_is_of_those_that_are_kept(run, tokenizer):
    rows = [{"text": f"{at}"} for at in range(99)] + [{"text": " one two" * 40}] + [{"text": ""}] * 20
    assert len(prepare(run.recipe(rows, drop=["empty"], max_seq_len=64), tokenizer).train) == 99
    with pytest.raises(LoraError, match="max_seq_len"):
        prepare(run.recipe(rows[1:], drop=["empty"], max_seq_len=64), tokenizer)


def test_rows_cut_to_nothing_can_be_dropped(run, tokenizer):
    rows = [{"prompt": " one" * 40, "completion": " two"}] * 2 + [{"prompt": "a", "completion": "b"}]
    data = prepare(run.recipe(rows, drop=["no_target"], max_seq_len=16, too_long="truncate"), tokenizer)
    assert [each.row for each in data.train] == [3]
    assert data.findings.counts == {"no_target": 2}


def test_what_excludes_itself_is_refused(recipe_file):
    for data, says in (
        ({"drop": ["overlap"], "allow": ["overlap"]}, "overlap is in data.allow too"),
        ({"drop": ["duplicate"], "streaming": True}, "duplicate takes all rows to be found"),
        ({"drop": ["too_long"]}, "must be one of 'malformed'"),
    ):
        with pytest.raises(LoraError, match=says):
            load_recipe(recipe_file(data=data))


# ── on the screen, in the report, in a stream ─────────────────────────────────────────────────────────────────────────


BAD = {"prompt": "What?", "completion": ""}


@pytest.fixture
def mixed(tmp_path, sums):
    """24 good rows and three without an answer."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    return write_rows(tmp_path / "mixed.jsonl", [BAD, *rows[:12], BAD, *rows[12:], BAD])


def test_check_counts_and_names_them(lora, recipe_file, mixed):
    stopped = lora("train", recipe_file(data={"train": str(mixed)}))
    assert stopped.code == 3
    assert "data.drop: [no_target]" in stopped.error
    recipe = recipe_file(data={"train": str(mixed), "drop": ["no_target"]})
    said = lora("check", recipe, "--show", "0")
    assert said.code == 0
    assert "left out" in said.out
    assert "1, 14, 27" in said.out
    document = json.loads(lora("check", recipe, "--json").out)
    (found,) = [each for each in document["findings"] if each["kind"] == "no_target"]
    assert (found["count"], found["rows"], found["stops"], found["dropped"]) == (3, [1, 14, 27], False, True)
    assert document["ok"]


def test_init_names_an_option_that_works_and_writes_it(lora, tiny_llama, mixed, tmp_path):
    bad = json.dumps({"prompt": "a", "completion": 3})
    mixed.write_text(f"{mixed.read_text().strip()}\n{bad}\n")
    refused = lora("init", tiny_llama, mixed, "--output", tmp_path / "new.yaml")
    assert refused.code == 3
    assert "or add --drop malformed,no_target to leave such rows out" in refused.error
    assert "data.drop" not in refused.error
    again = lora("init", tiny_llama, mixed, "--drop", "malformed,no_target", "--output", tmp_path / "new.yaml")
    assert again.code == 0, again.text
    assert load_recipe(tmp_path / "new.yaml").data.drop == ["malformed", "no_target"]
    assert lora("check", tmp_path / "new.yaml").code == 0
    unknown = lora("init", tiny_llama, mixed, "--drop", "emptyness", "--output", tmp_path / "other.yaml")
    assert "--drop: unknown problem 'emptyness'" in unknown.error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_is_that_of_the_file_without_them_and_its_report_lists_them(run_recipe, mixed, sums, tmp_path, streaming):
    more = {"streaming": True} if streaming else {"validation": 0.2}
    folder, report = run_recipe(data={"train": str(mixed), "drop": ["no_target"], **more})
    (found,) = report["dropped"]
    assert (found["kind"], found["count"], found["rows"]) == ("no_target", 3, [1, 14, 27])
    assert "3 rows with no target token" in (folder / "report.html").read_text()
    _, by_hand = run_recipe(data={"train": str(sums), **more}, output=str(tmp_path / "by-hand"))
    assert by_hand["dropped"] == []
    for name in ("steps", "last_loss", "tokens", "best_validation_loss"):
        assert report[name] == by_hand[name], name


def test_another_drop_is_another_run(lora, recipe_file, mixed):
    assert lora("train", recipe_file(data={"train": str(mixed), "drop": ["no_target"]})).code == 0
    again = recipe_file(data={"train": str(mixed), "drop": ["no_target", "duplicate"]}, train={"max_steps": 6})
    refused = lora("train", again, "--resume")
    assert "data.drop" in refused.text
