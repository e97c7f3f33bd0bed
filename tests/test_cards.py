"""Recipes by card: what they say of themselves is true, and `lora init --card` copies them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cards as script
import pytest

from lora_cli.planning.cards import cards
from lora_cli.planning.choices import choose_learning_rate
from lora_cli.planning.memory import GIB, parse_size
from lora_cli.recipe import load_recipe

SIZES = list(cards())


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1].replace(",", ""))


def test_there_is_one_for_each_size():
    assert SIZES == ["8GB", "12GB", "16GB", "24GB"]


@pytest.mark.parametrize("size", SIZES)
def test_what_a_recipe_says_of_memory_is_the_estimate(size: str):
    path = script.CARDS / f"{size}.yaml"
    text, recipe = path.read_text(encoding="utf-8"), load_recipe(path)
    shape = script.shape(recipe)
    memory = script.needed(recipe, shape)
    assert memory.total <= 0.85 * parse_size(size)  # what `lora init` plans with
    assert number(r"about ([\d.]+) GiB by the estimate", text) == pytest.approx(memory.total / GIB, abs=0.06)
    without = script.needed(recipe, shape, checkpointing="none").total
    assert without > 0.85 * parse_size(size)  # or gradient checkpointing would only cost time
    assert number(r"without it, about ([\d.]+) GiB", text) == pytest.approx(without / GIB, abs=0.06)
    assert number(r"([\d.]+) billion parameters", text) == pytest.approx(shape.parameters / 1e9, abs=0.06)
    assert number(r"([\d.]+) million trained parameters", text) == pytest.approx(shape.adapter / 1e6, abs=0.06)
    assert number(r"the weights take ([\d.]+) GiB", text) == pytest.approx(memory.weights / GIB, abs=0.06)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_recipe_says_of_steps_is_the_arithmetic(size: str):
    recipe = load_recipe(script.CARDS / f"{size}.yaml")
    text = " ".join((script.CARDS / f"{size}.yaml").read_text(encoding="utf-8").replace("\n#", "").split())
    train, held_out = recipe.train, recipe.data.validation
    tokens = train.micro_batch_size * train.gradient_accumulation_steps * recipe.data.max_seq_len  # type: ignore[operator]
    assert tokens == number(r"a step is ([\d,]+) tokens", text)
    assert isinstance(held_out, float)

    def steps(rows: int, tokens: int, epochs: float, held_out: float) -> float:
        return rows * 250 * (1 - held_out) * epochs / tokens

    assert number(r"rows are about (\d+) steps", text) == pytest.approx(steps(2000, tokens, 2, held_out), rel=0.03)
    assert number(r"would be (\d+) steps", text) == pytest.approx(steps(100, tokens, 2, held_out), rel=0.06)
    assert number(r"100 rows of 250 are about (\d+) steps", text) == pytest.approx(steps(100, 512, 3, 0.1), rel=0.03)


@pytest.mark.parametrize("size", SIZES)
def test_the_rate_is_that_of_init(size: str):
    text, recipe = (
        (script.CARDS / f"{size}.yaml").read_text(encoding="utf-8"),
        load_recipe(script.CARDS / f"{size}.yaml"),
    )
    width = script.shape(recipe).hidden
    assert number(r"width (\d+)", text) == width
    assert recipe.train.learning_rate == choose_learning_rate("qwen3", width, number(r"√\((\d+) examples", text))[0]


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_in_another_folder_is_the_same_recipe_with_its_paths_there(size: str, lora: Any, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = lora("init", "--card", size.lower().removesuffix("b"))
    assert said.code == 0, said.text
    assert (tmp_path / "recipe.yaml").read_text() == (script.CARDS / f"{size}.yaml").read_text()
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert all(Path(source.path or "").is_relative_to(tmp_path) for source in recipe.data.train)
    assert Path(recipe.output).is_relative_to(tmp_path)
    again = lora("init", "--card", size)
    assert again.code == 2
    assert "this file exists" in again.text
    assert lora(*again.text.split("name another: lora ")[1].split()).code == 0
    assert (tmp_path / f"recipe-{size}.yaml").is_file()


def test_the_list(lora: Any):
    said = lora("init", "--list")
    lines = said.out.splitlines()
    assert [line.split()[3] for line in lines] == SIZES
    assert all("Apache-2.0" in line and "GiB" in line for line in lines)
    assert list(json.loads(lora("init", "--list", "--json").out)["cards"]) == SIZES


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--card", "10GB"], "there are recipes for 8GB, 12GB, 16GB and 24GB"),
        (["--card", "large"], "there are recipes for 8GB, 12GB, 16GB and 24GB"),
        (["model", "data", "--card", "12GB"], "--card is used without a model"),
        (["--list", "--card", "12GB"], "--list is used without a model"),
        (["--card", "12GB", "--output", "none/r.yaml"], "no such folder"),
    ],
)
def test_what_does_not_go(words: list[str], what: str, lora: Any, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = lora("init", *words)
    assert said.code == 2
    assert what in said.text
    assert not list(tmp_path.iterdir())


def test_the_fix_of_a_size_between_is_the_largest_below(lora: Any, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "fix: --card 8GB; or" in lora("init", "--card", "10").text
