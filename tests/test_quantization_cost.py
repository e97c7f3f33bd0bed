"""What quantization costs the base: measured on the same rows, kept with the data, said before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows

from lora_cli.base.source import find_base
from lora_cli.base.storage.registry import storage_of
from lora_cli.errors import LoraError
from lora_cli.evaluation import quantization_cost
from lora_cli.evaluation.evaluate import evaluate_model
from lora_cli.evaluation.quantization_cost import Cost, Costs, cost_lines
from lora_cli.planning.check import check, compare
from lora_cli.recipe import load_recipe

ROWS = [{"prompt": f"What is {a} plus {a % 3}?\n", "completion": f"It is {a + a % 3}."} for a in range(24)]


@pytest.fixture
def asked(recipe_file: Any, tmp_path: Path, lora: Any) -> Any:
    """Runs `lora check --compare-quantization` on a recipe in NF4 with 8 validation rows; gives recipe and document."""
    held_out = write_rows(tmp_path / "held-out.jsonl", ROWS[:8])

    def run(**settings: Any) -> tuple[Path, dict[str, Any]]:
        data = {"validation": str(held_out)}
        recipe = recipe_file(**{"quantization": "nf4", "data": data, **settings})
        said = lora("check", recipe, "--compare-quantization", "--json")
        assert said.code == 0, said.text
        return recipe, json.loads(said.out)["quantization"]

    return run


def test_each_loss_is_that_of_eval_and_the_cost_its_difference(asked, tiny_llama, tmp_path):
    _, found = asked()
    assert (found["examples"], found["held_out"]) == (8, True)
    by_kind = {each["quantization"]: each for each in found["costs"]}
    assert by_kind.keys() == {"none", "nf4", "int8", "int4"}
    for kind, each in by_kind.items():
        data = tmp_path / "held-out.jsonl"
        score = evaluate_model(str(tiny_llama), None, data, quantization=kind, dtype="fp32")["base"]
        assert each["loss"] == pytest.approx(score.loss, abs=1e-5)
        assert each["cost"] == pytest.approx(score.loss - by_kind["none"]["loss"], abs=1e-5)
        assert found["target_tokens"] == score.target_tokens
    assert by_kind["nf4"]["low"] < by_kind["nf4"]["cost"] < by_kind["nf4"]["high"]
    assert (
        by_kind["nf4"]["weights"] < by_kind["int4"]["weights"] < by_kind["int8"]["weights"] < by_kind["none"]["weights"]
    )


def test_the_table_is_kept_with_the_data_and_said_by_check_and_train(asked, lora, tmp_path):
    recipe, found = asked()
    cost = next(each for each in found["costs"] if each["quantization"] == "nf4")
    for command in ("check", "train"):
        said = lora(command, recipe)
        assert said.code == 0, said.text
        assert f"nf4              {cost['loss']:.4f}" in said.text + said.out
        assert "is not known" not in said.text + said.out
    assert (tmp_path / "run" / "prepared" / "quantization.json").is_file()


@pytest.mark.parametrize("other", ["damaged", "other base", "never measured"])
def test_a_table_of_something_else_is_not_shown(other, asked, recipe_file, lora, tmp_path):
    recipe, _ = asked()
    table = tmp_path / "run" / "prepared" / "quantization.json"
    if other == "damaged":
        table.write_text(table.read_text()[:-20])
    elif other == "never measured":
        table.unlink()
    else:
        document = json.loads(table.read_text())
        document["base_fingerprint"] = "0" * 64
        table.write_text(json.dumps(document))
    said = lora("check", recipe).out
    assert "loss of the base on" not in said
    assert "what nf4 costs this base is not known: lora check --compare-quantization measures it" in said


def test_a_table_of_the_same_base_and_other_data_is_shown_as_that(asked, recipe_file, lora, tmp_path):
    """Measured once, known to every run in the same folder of runs."""
    asked()
    rows = write_rows(tmp_path / "others.jsonl", ROWS[8:])
    other = recipe_file(quantization="nf4", data={"train": str(rows)}, output=str(tmp_path / "another run"))
    said = lora("check", other).out
    assert "loss of the base on 8 other examples" in said
    assert "is not known" not in said


@pytest.mark.parametrize(
    ("cost", "low", "said"),
    [(0.69, 0.61, True), (0.69, -0.1, False), (0.02, 0.01, False), (0.04, 0.03, True), (-0.2, -0.3, False)],
)
def test_a_cost_that_is_certain_and_large_is_named_with_what_costs_less(cost, low, said):
    def of(kind: str, weights: int, cost: float, low: float) -> Cost:
        return Cost(quantization=kind, loss=2 + cost, weights=weights, cost=cost, low=low, high=2 * cost - low)

    costs = [of("none", 4 * 2**20, 0.0, 0.0), of("nf4", 2**20, cost, low), of("int8", 2 * 2**20, 0.9 * cost, low)]
    table = Costs(
        data_fingerprint="",
        base_fingerprint="",
        dtype="bfloat16",
        held_out=True,
        examples=8,
        target_tokens=9,
        costs=costs,
    )
    last = cost_lines(table, "nf4")[-1]
    assert ("before anything is learned" in last) == said
    if said:
        assert last.endswith("write quantization: none (4 MiB) if the memory allows it")  # int8 costs nearly as much


def check_costs(recipe: Path) -> Costs:
    return compare(check(load_recipe(recipe)), lambda _: None)


def test_a_table_of_other_groups_is_not_taken(asked, recipe_file, tiny_llama):
    recipe, _ = asked(group_size=64, quantization="int4")
    known = load_recipe(recipe)
    source = find_base(str(tiny_llama))
    kept = json.loads(next(Path(known.output).rglob("quantization.json")).read_text())
    assert kept["group_size"] == 64
    for size, found in ((64, True), (32, False)):
        own = known.model_copy(update={"group_size": size})
        assert (quantization_cost.kept_costs(own, source, kept["data_fingerprint"]) is not None) == found
        assert (quantization_cost.found_costs(Path(known.output).parent, source, size) is not None) == found
    file = next(Path(known.output).rglob("quantization.json"))
    file.write_text(
        json.dumps({key: value for key, value in kept.items() if key != "search"})
    )  # of other 4-bit weights
    assert quantization_cost.kept_costs(known, source, kept["data_fingerprint"]) is None
    assert quantization_cost.found_costs(Path(known.output).parent, source, 64) is None


def test_a_way_that_does_not_fit_is_left_out_and_without_the_unquantized_base_nothing_can_be_compared(
    asked, recipe_file, lora, monkeypatch
):
    """Out of memory in a forward pass, as on a card that is too small."""
    whole, refused = quantization_cost.example_losses, ["int8"]

    def too_small(model: Any, *rest: Any) -> Any:
        kinds = {kind.name for kind in map(storage_of, model.modules()) if kind is not None} - {"none"} or {"none"}
        if kinds & {*refused}:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, *rest)

    monkeypatch.setattr(quantization_cost, "example_losses", too_small)
    recipe, found = asked()
    assert [each["quantization"] for each in found["costs"]] == ["none", "nf4", "int4"]
    assert (
        "int8 is left out: it does not fit into the memory of" in lora("check", recipe, "--compare-quantization").text
    )
    for kind in ("none", "nf4"):
        refused[:] = [kind]
        with pytest.raises(LoraError, match=f"the base cannot be measured as {kind}: it does not fit") as error:
            check_costs(recipe)
        assert "add --set device=cpu" in str(error.value)


def test_without_validation_data_the_first_training_rows_are_used_and_that_is_said(asked, lora):
    recipe, found = asked(data={})
    assert (found["held_out"], found["examples"]) == (False, 24)
    assert "24 training examples" in lora("check", recipe).out


def test_an_unquantized_recipe_says_nothing_of_it(recipe_file, lora):
    assert "is not known" not in lora("check", recipe_file()).out


@pytest.fixture
def held_out(recipe_file: Any, tmp_path: Path) -> Any:
    """A recipe in NF4 with as many validation rows as asked, the first of ROWS."""

    def make(rows: int, **settings: Any) -> Path:
        validation = write_rows(tmp_path / "held-out.jsonl", ROWS[:rows])
        return recipe_file(**{"quantization": "nf4", "data": {"validation": str(validation)}, **settings})

    return make


def test_training_measures_what_is_not_known_once_and_trains_the_same_adapter(held_out, lora, tmp_path):
    recipe = held_out(8)
    said = lora("train", recipe)
    assert "base     measuring what nf4 costs it, on 8 validation examples" in said.text
    kept = json.loads((tmp_path / "run" / "prepared" / "quantization.json").read_text())
    by_kind = {each["quantization"]: each for each in kept["costs"]}
    assert by_kind.keys() == {"none", "nf4"}
    score = evaluate_model(json_base(recipe), None, tmp_path / "held-out.jsonl", quantization="nf4", dtype="fp32")
    assert by_kind["nf4"]["loss"] == pytest.approx(score["base"].loss, abs=1e-5)
    again = lora("train", recipe, "--set", f"output={tmp_path / 'again'}")  # known from the run beside it
    assert "measuring" not in again.text
    assert f"nf4              {by_kind['nf4']['loss']:.4f}" in again.text
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again"))
    assert one.read_bytes() == other.read_bytes()


def json_base(recipe: Path) -> str:
    return load_recipe(recipe).base_model


@pytest.mark.parametrize("why", ["too few rows", "does not fit", "slow"])
def test_training_names_the_command_where_measuring_is_not_quick(why, held_out, lora, monkeypatch, tmp_path):
    if why == "does not fit":
        monkeypatch.setattr(quantization_cost, "free_memory_bytes", lambda device: 2**20)
    if why == "slow":
        monkeypatch.setattr(quantization_cost, "_LOADED", 1.0)
    said = lora("train", held_out(7 if why == "too few rows" else 8))
    assert said.code == 0, said.text
    assert "what nf4 costs this base is not known: lora check --compare-quantization measures it" in said.text
    assert not (tmp_path / "run" / "prepared" / "quantization.json").exists()
