"""That the loss is weighted is said, with the range, wherever a person looks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from lora_cli.planning.check import check
from lora_cli.recipe import load_recipe
from lora_cli.screen import Screen
from lora_cli.training.train import train

TEXT = "a text of some words"
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], tuple[float, float, int] | None]] = {
    "kilograms": ([{"text": f"{TEXT} {n}", "weight": w} for n, w in enumerate((70.5, 0.2, 1))], {}, (0.2, 70.5, 2)),
    "text of a table": ([{"text": f"{TEXT} {n}", "weight": w} for n, w in enumerate(("3", "", None))], {}, (1, 3, 1)),
    "under another name": (
        [{"text": f"{TEXT} {n}", "score": n} for n in (2, 3)],
        {"columns": {"weight": "score"}},
        (2, 3, 2),
    ),
    "in messages": (
        [{"messages": [*TURNS, TURNS[0], TURNS[1] | {"weight": 0.5}]}, {"messages": TURNS}],
        {},
        (0.5, 1, 1),
    ),
    "all one": ([{"text": f"{TEXT} {n}", "weight": 1.0} for n in range(3)], {}, None),
    "not used": ([{"text": f"{TEXT} {n}", "weight": 9} for n in range(3)], {"columns": {"weight": None}}, None),
    "of rows that are left out": ([{"text": TEXT}, {"text": f"{TEXT} 2", "weight": 0}], {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_check_says_that_weights_are_in_force_and_their_range(case, recipe_file, tmp_path):
    rows, data, expected = CASES[case]
    path = recipe_file(data={"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "validation": None, **data})
    checked = check(load_recipe(path))
    found = checked.as_dict(0)["weights"]
    lines = checked.feed.lines()
    told = [line for line in lines if "the loss is weighted" in line]
    if expected is None:
        assert (found, told) == (None, [])
        return
    assert (round(found["smallest"], 4), round(found["largest"], 4), found["examples"]) == expected
    (line,) = told
    assert f"{expected[0]:g} to {expected[1]:g}, in {expected[2]} example" in line
    if "messages" not in rows[0]:
        column = data.get("columns", {}).get("weight", "weight")
        assert f"{column} weighs the loss; if it means something else, write data.columns: {{weight: null}}" in lines[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_training_and_its_report_say_that_weights_are_in_force(streaming, recipe_file, tmp_path):
    rows = [{"text": f"{TEXT} {n}", "weight": (70.5, 0.2)[n % 2]} for n in range(8)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "validation": None, "streaming": streaming}
    recipe = load_recipe(recipe_file(data=data, train={"max_steps": 2, "eval_every": None}))
    heard = io.StringIO()
    train(recipe, Screen(file=heard, width=200))
    said = "the loss is weighted: 0.2 to 70.5, in 8 examples"
    assert heard.getvalue().count(said) == 2  # before it begins, and at its end
    report = json.loads((Path(recipe.output) / "report.json").read_text())
    assert round(report["weights"]["largest"], 4) == 70.5
    assert said in (Path(recipe.output) / "report.html").read_text()
