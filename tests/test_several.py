"""Several adapters on one base: a batch whose rows use different ones is exactly each row alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_base, refusal, with_adapter, write_rows

from lora_cli.adapters.file import read_adapter, save_adapter
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.several import Several
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.source import find_base

IDS = torch.randint(1, 500, (5, 7), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "attention"},
    "wide": {"target_modules": "all-linear", "rank": 7, "alpha": 3.0},
    "one": {"target_modules": ["down_proj"], "rank": 2, "alpha": 16.0},
    "stable": {"target_modules": ["q_proj", "up_proj"], "rank": 5, "alpha": 4.0},  # rank-stabilized, see below
}


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random B that differ in all that may differ."""
    found = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        model = with_adapter(open_base(tiny_llama), **settings)
        with torch.no_grad():
            for layer in trained_modules(model).values():
                for each in layer.parameters(recurse=False):
                    each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        found[name] = tmp_path_factory.mktemp(name)
        base = find_base(str(tiny_llama))
        save_adapter(model, found[name], base, quantization="none", double_quantization=False, prompting="raw")
    config = found["stable"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    return found


def held(base: Path, adapters: dict[str, Path], quantization: str = "none") -> tuple[Any, Several]:
    model = open_base(base, quantization)
    several = Several(model, find_base(str(base)))
    names = list(adapters)
    several.add({names[0]: read_adapter(adapters[names[0]])})  # the others later, as in a chat
    several.add({name: read_adapter(adapters[name]) for name in names[1:]})
    return model, several


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8", "int4"])
def test_a_batch_of_rows_with_different_adapters_is_each_row_alone(quantization, adapters, tiny_llama):
    model, several = held(tiny_llama, adapters, quantization)
    rows = [{"stable": 1.0}, {}, {"wide": 1.0}, {"one": 1.0}, {"plain": 1.0}]
    several.use(rows)
    together = logits(model)
    for at, row in enumerate(rows):
        adapter = adapters[next(iter(row))] if row else None
        one = open_model(str(tiny_llama), adapter, quantization=quantization, dtype="fp32", device="cpu").model
        expected = logits(one, IDS[at : at + 1])
        torch.testing.assert_close(together[at : at + 1], expected, rtol=0, atol=1e-5)
        several.use([row])
        torch.testing.assert_close(logits(model, IDS[at : at + 1]), expected, rtol=0, atol=1e-5)
        assert not row or (expected - logits(open_base(tiny_llama, quantization), IDS[at : at + 1])).abs().max() > 0.1


def test_stacked_adapters_are_the_weighted_sum_of_their_updates(adapters, tiny_llama):
    model, several = held(tiny_llama, adapters)
    several.use([{"plain": 0.7, "wide": -0.3}, {"stable": 0.5, "one": 1.0}, {}, {"plain": 1.0}, {"one": 2.0}])
    mixed = logits(model)
    dense = open_base(tiny_llama)
    for name, weight in (("plain", 0.7), ("wide", -0.3)):
        one = open_model(str(tiny_llama), adapters[name], dtype="fp32", device="cpu").model
        layers: dict[str, Any] = dict(trained_modules(one))
        for layer, module in layers.items():
            dense.get_submodule(layer).weight.data += weight * module.delta_weight()
    torch.testing.assert_close(mixed[:1], logits(dense, IDS[:1]), rtol=0, atol=1e-5)


def test_a_layer_that_sees_only_some_of_the_tokens_is_not_guessed_at(adapters, tiny_llama):
    model, several = held(tiny_llama, adapters)
    layer = model.model.layers[0].mlp
    several.use([{"wide": 1.0}] + [{}] * 4)
    logits(model)
    with pytest.raises(Exception, match="only some of the tokens"):
        layer.down_proj(torch.zeros(3, 128))  # as an expert gets them
    several.use([{"wide": 1.0}])
    layer.down_proj(torch.zeros(3, 128))


def test_a_model_whose_rows_change_each_other_is_found_out(adapters, tiny_llama):
    from lora_cli.evaluation.requests import _rows_stay_apart

    model, several = held(tiny_llama, adapters)
    assert _rows_stay_apart(model, several)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + out.mean(0, keepdim=True))
    assert not _rows_stay_apart(model, several)
    hook.remove()
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[:9],))
    assert not _rows_stay_apart(model, several)


def test_each_row_of_a_file_is_answered_as_lora_generate_answers_it_alone(adapters, tiny_llama, lora, tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": "question answer user", "adapter": str(adapters["wide"])},
        {"prompt": "one", "adapter": None, "max_new_tokens": 3},
        {"prompt": "one two question " * 3, "adapter": str(adapters["stable"]), "temperature": 0.9, "seed": 4},
        {"prompt": "user", "adapter": str(adapters["wide"]), "temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"prompt": "one one one", "adapter": str(adapters["plain"]), "repetition_penalty": 1.4},
        {"messages": [{"role": "user", "content": "two"}], "adapter": str(adapters["one"])},
    ]
    options = ("--dtype", "fp32", "--max-new-tokens", 8, "--json")
    alone = []
    for row in rows:
        own = [(f"--{key.replace('_', '-')}", value) for key, value in row.items() if key not in ("prompt", "adapter")]
        own = [("--template", "--max-new-tokens", 8)] if "messages" in row else own
        words = [word for pair in own for word in pair]
        prompt = row.get("prompt", "two")
        alone.append(json.loads(lora("generate", row["adapter"] or tiny_llama, prompt, *options, *words).out))
    for size in (8, 1):
        file = write_rows(tmp_path / "rows.jsonl", rows[:5])
        said = lora("generate", "--adapters", file, "--batch-size", size, *options)
        assert said.code == 0, said.text
        found = json.loads(said.out)
        assert [each["completion"] for each in found] == [each["completion"] for each in alone[:5]]
        assert [each["adapter"] for each in found] == [row["adapter"] for row in rows[:5]]
        assert [each["new_tokens"] for each in found] == [each["new_tokens"] for each in alone[:5]]
    numbers = json.loads(lora("generate", tiny_llama, "[1, 2]", *options).out)["completion"]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "[1, 2]"}])  # JSON, and a text all the same
    said = lora("generate", "--model", tiny_llama, "--adapters", file, *options)
    assert json.loads(said.out)[0]["completion"] == numbers
    chat = write_rows(tmp_path / "rows.jsonl", rows[5:])
    (found,) = json.loads(lora("generate", "--model", tiny_llama, "--adapters", chat, "--template", *options).out)
    assert (found["prompt"], found["completion"]) == ("two", alone[5]["completion"])


def test_a_row_may_stack_adapters_and_is_answered_as_their_combination(adapters, tiny_llama, lora, tmp_path):
    mix = {str(adapters["plain"]): 0.7, str(adapters["wide"]): -0.5, str(adapters["stable"]): 1}
    options = ("--dtype", "fp32", "--max-new-tokens", 12, "--json")
    lora("combine", *(f"{name}:{weight}" for name, weight in mix.items()), "--output", tmp_path / "sum")
    alone = json.loads(lora("generate", tmp_path / "sum", "one two", *options).out)["completion"]
    rows = [{"prompt": "one two", "adapter": each} for each in (mix, str(adapters["plain"]), None)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = json.loads(lora("generate", "--adapters", file, *options).out)
    assert found[0]["completion"] == alone
    assert found[0]["adapter"] == mix
    assert alone not in (found[1]["completion"], found[2]["completion"])
    said = lora("generate", "--adapters", file, "--max-new-tokens", 2).out
    assert f"row 1, {adapters['plain']}:0.7 {adapters['wide']}:-0.5 {adapters['stable']}:" in said
    config = tmp_path / "other" / "adapter_config.json"
    shutil.copytree(adapters["wide"], config.parent)
    (config.parent / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    write_rows(file, [{"prompt": "one", "adapter": {str(adapters["plain"]): 1, str(config.parent): 1}}])
    assert "prompted as the base" in lora("generate", "--adapters", file, *options).text


def test_every_bad_row_is_named_before_a_model_is_loaded(adapters, tiny_llama, tiny_gpt2, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_cli.evaluation.requests.open_base", lambda *_, **__: pytest.fail("it was loaded"))
    rows = [
        {"prompt": "one", "adapter": str(adapters["one"])},
        {"prompt": "one", "adaptor": None},
        {"prompt": "one", "adapter": str(tmp_path / "nowhere")},
        {"prompt": "one", "temperature": 0.0, "top_k": 3},
        {"prompt": "one", "messages": []},
        {"prompt": "one", "temperature": "warm"},
        {"prompt": "one", "adapter": {}},
        {"prompt": "one", "adapter": {str(adapters["one"]): 0}},
        {"prompt": "one", "adapter": {str(adapters["one"]): "much"}},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    said = lora("generate", "--adapters", file)
    assert said.code == 2
    wrong = ("adaptor", "no such adapter", "greedy", "both prompt", "temperature", "empty", "weight", "adapter")
    for number, what in enumerate(wrong, 2):
        assert any(f"row {number}" in line and what in line for line in said.text.splitlines()), said.text
    assert "row 1:" not in said.text
    assert (
        f"row 9: the row is not a request: adapter.{str(adapters['one'])[:40]}: input should be a valid number"
        in said.text
    )
    write_rows(file, [rows[0], {"messages": [{"role": "user", "content": "one"}], "adapter": str(adapters["one"])}])
    assert "row 2: messages are for a model that is prompted through" in lora("generate", "--adapters", file).text
    write_rows(file, rows[:1])
    assert "row 1" in (text := lora("generate", "--model", tiny_gpt2, "--adapters", file).text)
    assert "trained on another base model" in text
    assert lora("generate", "runs/one", "--adapters", file).code == 2


def test_adapters_that_do_not_agree_on_their_base_are_refused(adapters, tiny_llama, tmp_path, lora):
    from lora_cli.adapters.opened import open_base as opening

    found = [read_adapter(adapters[name]) for name in ("one", "plain")]
    other = found[1].metadata.model_copy(update={"quantization": "nf4"})
    files = [found[0], replace(found[1], metadata=other)]
    assert "--quantization none" in str(refusal(lambda: opening(None, files)).fix)
    assert opening(None, files, quantization="none", device="cpu").quantization == "none"
    renamed = found[1].metadata.model_copy(update={"base_model": "other", "base_fingerprint": None})
    files = [found[0], replace(found[1], metadata=renamed)]
    assert "different base models" in refusal(lambda: opening(None, files)).what


def test_adapters_are_scored_on_the_same_tokens_with_paired_intervals(adapters, lora, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"one {n} question answer two {n * n}"} for n in range(6)])
    names = [str(adapters[name]) for name in ("wide", "stable", "plain")]
    words = [word for name in names for word in ("--adapter", name)]
    said = lora("eval", *words, "--data", data, "--dtype", "fp32", "--json")
    assert said.code == 0, said.text
    found = json.loads(said.out)
    assert set(found) == {"base", "adapters", "pairs"}
    for name in names:
        alone = json.loads(lora("eval", name, "--data", data, "--dtype", "fp32", "--json").out)
        assert found["base"] == pytest.approx(alone["base"], rel=1e-6)
        both = {**alone["adapter"], "gain": alone["gain"], "low": alone["low"], "high": alone["high"]}
        assert found["adapters"][name] == pytest.approx(both, rel=1e-6, abs=1e-6)
    assert [(pair["of"], pair["to"]) for pair in found["pairs"]] == list(combinations(names, 2))
    for pair in found["pairs"]:
        difference = found["adapters"][pair["of"]]["loss"] - found["adapters"][pair["to"]]["loss"]
        assert pair["gain"] == pytest.approx(difference, rel=1e-6)
        assert pair["low"] < pair["gain"] < pair["high"]
    best = min(names, key=lambda name: found["adapters"][name]["loss"])
    table = " ".join(lora("eval", *words, "--data", data, "--dtype", "fp32").out.split())
    assert table.count("nats a token better than") == 3
    assert f"{best} is" in table
    assert "no validation data" in lora("eval", *words).text
    monkeypatch.chdir(tmp_path)  # an adapter may be called as the table calls the base, and be worse than it
    shutil.copytree(names[0], "base")
    table = lora("eval", "--adapter", "base", "--adapter", names[1], "--data", data, "--dtype", "fp32").out
    for loss in (found["base"]["loss"], found["adapters"][names[0]]["loss"]):
        assert f"{loss:.4f}" in table
    assert [found["adapters"][best]["gain"] > 0] == ["worse than the base" not in " ".join(table.split())]
    assert "named twice" in lora("eval", *words, "--adapter", names[0], "--data", data).text


def test_runs_are_compared_on_the_validation_data_of_the_first(run_recipe, lora, tmp_path):
    run, _ = run_recipe(data={"validation": 0.25})
    other, _ = run_recipe(data={"validation": 0.25}, adapter={"rank": 2}, output=str(tmp_path / "other"))
    found = json.loads(lora("eval", "--adapter", run, "--adapter", other, "--json").out)
    alone = json.loads(lora("eval", run, "--json").out)
    assert found["adapters"][str(run)]["loss"] == pytest.approx(alone["adapter"]["loss"], abs=1e-5)
    assert found["base"]["target_tokens"] == alone["base"]["target_tokens"]
    stored = other / "recipe.yaml"
    stored.write_text(stored.read_text().replace("seed: 0", "seed: 1"))  # which draws other rows
    assert "may have been trained on those of the first" in lora("eval", "--adapter", run, "--adapter", other).error


def test_qa_lora_lies_beside_others_on_int4(run_recipe, tiny_llama, tmp_path):
    settings: dict[str, Any] = {"quantization": "int4", "adapter": {"method": "qa_lora"}}
    run, _ = run_recipe(**settings, output=str(tmp_path / "qa"))
    other, _ = run_recipe(quantization="int4", output=str(tmp_path / "lora"))
    model, several = held(tiny_llama, {"qa": run / "adapter", "lora": other / "adapter"}, "int4")
    several.use([{"lora": 1.0}, {"qa": 1.0}])
    together = logits(model, IDS[:2])
    for at, each in enumerate((other, run)):
        alone = open_model(None, each, dtype="fp32", device="cpu").model
        torch.testing.assert_close(together[at : at + 1], logits(alone, IDS[at : at + 1]), rtol=0, atol=1e-5)
