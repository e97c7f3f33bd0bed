"""The recipe file: what is read, what is refused, and what the message says about it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError, RecipeErrors
from lora_cli.recipe import (
    FIELDS,
    TEMPLATES,
    Recipe,
    SourceRecipe,
    all_keys,
    differences,
    dump_recipe,
    json_schema,
    load_recipe,
)
from lora_cli.recipe.contradictions import TABLE
from lora_cli.recipe.retired import RETIRED

ROOT = Path(__file__).parents[1]
GOOD = "base_model: owner/name\ndata: {train: rows.jsonl}\noutput: run\n"  # three lines: what is added begins on line 4


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Loads a recipe from its text."""

    def from_text(text: str | bytes, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, list(overrides))

    return from_text


@pytest.fixture
def problem(load: Any, tmp_path: Path) -> Any:
    """The message of the one LoraError that a recipe's text gives, with the recipe's path shortened to its name."""

    def of(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(LoraError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{tmp_path}/", "")

    return of


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("added", "where", "unknown", "suggestion"),
    [
        ("quantisation: nf4\n", "4:1", "quantisation", "did you mean quantization?"),
        ("train:\n  lerning_rate: 1\n", "5:3", "train.lerning_rate", "did you mean train.learning_rate?"),
        ("train: {seed: 1, eval_evry: 2}\n", "4:18", "train.eval_evry", "did you mean train.eval_every?"),
        ("learning_rate: 1e-4\n", "4:1", "learning_rate", "did you mean train.learning_rate?"),
        ("train: {rank: 8}\n", "4:9", "train.rank", "did you mean adapter.rank?"),
        ("frobnicate: 1\n", "4:1", "frobnicate", "known keys here: base_model, revision, "),
        ("adapter: {colour: red}\n", "4:11", "adapter.colour", "known keys here: method, rank, "),
        ("1: x\n", "4:1", "1", "known keys here: "),
        ("yes: x\n", "4:1", "yes", "known keys here: "),
        ("~: x\n", "4:1", "~", "known keys here: "),
    ],
)
def test_unknown_key(problem: Any, added: str, where: str, unknown: str, suggestion: str):
    assert problem(GOOD + added).startswith(f"error: recipe.yaml:{where}: unknown key {unknown}\n  fix: {suggestion}")


def test_all_problems_come_at_once_in_the_order_of_the_file(load: Any):
    text = (
        "output: run\n"
        "train:\n"
        "  optimizer: sgd\n"
        "  epochs: true\n"
        "  sede: 1\n"
        "data: {validation: 3, max_seq_len: one}\n"
        "quantization: none\n"
        "output: run2\n"
        "learning_rate: 3\n"
    )
    with pytest.raises(RecipeErrors) as caught:
        load(text, "trackers=[nobody]", "train.seed")
    places = [(p.where or "").rsplit("recipe.yaml", 1)[-1] for p in caught.value.problems]
    assert places == [":3:3", ":4:3", ":5:3", ":6:1", ":6:8", ":6:23", ":8:1", ":9:1", "", "", "--set trackers"]
    said = [problem.what.split(",")[0] for problem in caught.value.problems]
    assert said == [
        'train.optimizer is "sgd"',
        "train.epochs is true",
        "unknown key train.sede",
        "data.train is missing",
        "data.validation is 3",
        'data.max_seq_len is "one"',
        "the key output is set twice",
        "unknown key learning_rate",
        "base_model is missing",
        "--set train.seed is not of the form key.path=value",
        'trackers is "nobody"',
    ]
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)


def test_missing_keys_are_described(problem: Any):
    message = problem("output: run\ndata: {}\nbase_model: a/b\n")
    assert message == (
        "error: recipe.yaml:2:1: data.train is missing\n"
        "  train: Training data: a file, a folder, a glob, `{hub: owner/name, split: train}`, or a list "
        "of these, each with a `weight`, `format`, `columns`, `train_on` or `system` of its own "
        "if wanted.\n"
        "  fix: add, for example, train: data/train.jsonl"
    )


@pytest.mark.parametrize(
    ("added", "where", "key"), [("output: b\n", "4:1", "output"), ("train: {seed: 1, seed: 2}\n", "4:18", "train.seed")]
)
def test_a_key_that_stands_twice_names_both_places(problem: Any, added: str, where: str, key: str):
    message = problem(GOOD + added)
    assert message.startswith(
        f"error: recipe.yaml:{where}: the key {key} is set twice\n  fix: remove one; the other is at "
    )
    assert message.endswith({"output": "recipe.yaml:3:1", "train.seed": "recipe.yaml:4:9"}[key])


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("adapter: &small {rank: 4}\ntrain: *small\n", "5:8: a recipe has no aliases (*small)\n  fix: write out"),
        ("adapter:\n  <<: {rank: 4}\n", "5:3: a recipe has no merge keys (<<)\n  fix: write the keys out"),
        ("adapter: &own {x: *own}\n", "4:19: a recipe has no aliases (*own)"),
    ],
)
def test_aliases_and_merge_keys_are_refused(problem: Any, added: str, says: str):
    assert problem(GOOD + added).startswith(f"error: recipe.yaml:{says}")


def test_an_anchor_alone_is_no_harm(load: Any):
    assert load("base_model: a/b\noutput: run\nadapter: &small {rank: 4}\ndata: {train: x.jsonl}\n").adapter.rank == 4


BOMBS = {  # that the recipe is too large, too deep or too long is said before it costs anything
    "mappings of aliases": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 27)),
    "merge keys of aliases": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 27)),
    "lists of aliases": "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(12)),
    "lists in lists": "x: " + "[" * 250_000,
    "mappings in mappings": "x: " + "{a: " * 60_000,
    "items of items": "- " * 120_000,
    "unknown keys": "".join(f"key{n}: 1\n" for n in range(20_000)),
    "very many values": f"x: [{'1,' * 120_000}]",
    "a long key": f"? {'x' * 250_000}\n: 1\n",
    "long keys": "".join(f"? {'x' * 2000}{n}\n: 1\n" for n in range(100)),
    "a whole number": f"x: {'9' * 250_000}\n",
    "a hexadecimal number": f"x: 0x{'f' * 250_000}\n",
    "a number to the base of 60": f"x: 1{':01' * 80_000}\n",
    "a tagged number": f"x: !!int '{'9' * 250_000}'\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_would_take_all_time_or_memory_is_refused_at_once(problem: Any, bomb: str):
    began = time.thread_time()
    message = problem(BOMBS[bomb] if bomb == "items of items" else GOOD + BOMBS[bomb])
    assert time.thread_time() - began < 5
    assert message.startswith("error: recipe.yaml")
    assert len(message) < 100_000
    if bomb != "items of items":
        value = BOMBS[bomb].replace("x: ", "", 1)
        assert "error: " in problem(GOOD, f"revision={value}")


def test_a_key_of_very_many_parts_is_refused(problem: Any):
    assert "is not of the form key.path=value" in problem(GOOD, ".".join("a" * 5000) + "=1")


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("adapter: {rank: four}\n", '4:11: adapter.rank is "four", but must be a whole number'),
        ("adapter: {rank: 4.0}\n", "adapter.rank is 4.0, but must be a whole number"),
        ("adapter: {rank: 0}\n", "adapter.rank is 0, but must be at least 1"),
        ("adapter: {dropout: 1}\n", "adapter.dropout is 1, but must be below 1"),
        ("adapter: {alpha: 0}\n", "adapter.alpha is 0, but must be above 0"),
        ("adapter: {layers: [1, x]}\n", 'adapter.layers is "x", but must be a whole number'),
        ("adapter: {layers: []}\n", "adapter.layers is [], but must be not empty"),
        ("adapter: {target_modules: 3}\n", "adapter.target_modules is 3, but must be text or a list"),
        ("adapter: {rank_pattern: {q_proj: 0}}\n", "4:26: adapter.rank_pattern.q_proj is 0, but must be at least 1"),
        ("train: {learning_rate: fast}\n", 'train.learning_rate is "fast", but must be a number'),
        ("train: {learning_rate: .inf}\n", "train.learning_rate is Infinity, but must be a finite number"),
        ("train: {learning_rate: .nan}\n", "train.learning_rate is NaN, but must be a finite number"),
        ("train: {min_learning_rate_ratio: 2}\n", "train.min_learning_rate_ratio is 2, but must be at most 1"),
        ("train: {seed: 1e3}\n", 'train.seed is "1e3", but must be a whole number'),
        ("train: {gradient_checkpointing: 1}\n", "train.gradient_checkpointing is 1, but must be one of 'none', "),
        ("train: {optimizer: sgd}\n", "train.optimizer is \"sgd\", but must be one of 'adamw', 'adamw_8bit', "),
        ("train:\n", "train is null, but must be a section with keys of its own"),
        ("train: [1]\n", "train is [1], but must be a section with keys of its own"),
        ("revision: 123456\n", "revision is 123456, but must be text"),
        ("revision: 2024-01-01\n", 'revision is "2024-01-01", but must be text'),
        ("trackers: tensorboard\n", 'trackers is "tensorboard", but must be a list'),
        ("train: {tokens_per_micro_batch: 1}\n", "train.tokens_per_micro_batch is 1, but must be at least 2"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_what_is_allowed(problem: Any, added: str, says: str):
    message = problem(GOOD + added)
    assert says in message
    assert message.startswith("error: recipe.yaml:4:")
    assert added.startswith(("train:\n", "train: [")) or "\n  fix: " in message


def test_data_that_is_a_list_is_no_section(problem: Any):
    text = GOOD.replace("{train: rows.jsonl}", "[train.jsonl]")
    assert 'data is ["train.jsonl"], but must be a section with keys of its own' in problem(text)


@pytest.mark.parametrize("key", ["base_model", "output"])
def test_empty_text_is_no_name(problem: Any, key: str):
    text = GOOD.replace("owner/name" if key == "base_model" else "run", '""')
    assert f'{key} is "", but must be not empty' in problem(text)


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4", "'1e-4'"])
def test_a_number_may_be_written_with_an_exponent(load: Any, written: str):
    assert load(GOOD + f"train: {{learning_rate: {written}}}\n").train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("3", "2:8: data.train is 3, but must be a path, a source such as {hub: owner/name}, or a list of these"),
        ("[a, 3]", '2:8: data.train is ["a", 3], but must be a path, a source such as '),
        ("[]", "2:8: data.train is [], but must be not empty"),
        ('""', '2:8: data.train is "", but must be not empty'),
        ('{path: ""}', '2:16: data.train.path is "", but must be not empty'),
        ("{hub: owner/name, split: 3}", "2:33: data.train.split is 3, but must be text"),
        ("[a, {path: b, weight: 0}]", "2:29: data.train.1.weight is 0, but must be above 0"),
        ("{hub: owner/name, spilt: test}", "2:33: unknown key data.train.spilt\n  fix: did you mean data.train.split?"),
        ("a, columns: {prompt: 3}", "2:28: data.columns.prompt is 3, but must be text"),
        ("a, template: ''", '2:18: data.template is "", but must be not empty'),
        ("a, train_on: user", "2:18: data.train_on is \"user\", but must be one of 'assistant', 'last_assistant', "),
        ("a, allow: [malformed]", "2:18: data.allow is \"malformed\", but must be one of 'too_long', 'overlap', "),
    ],
)
def test_a_wrong_source_or_data_setting(problem: Any, written: str, says: str):
    message = problem(GOOD.replace("rows.jsonl", written))
    assert message.startswith(f"error: recipe.yaml:{says}")
    assert message.count("error: ") == 1
    assert "\n  fix: " in message


def test_a_wrong_source_of_validation_is_one_problem(problem: Any):
    message = problem(GOOD.replace("rows.jsonl", "rows.jsonl, validation: {path: held.jsonl, wieght: 2}"))
    assert message == (
        "error: recipe.yaml:2:58: unknown key data.validation.wieght\n  fix: did you mean data.validation.weight?"
    )


def test_training_data_is_one_source_or_several(load: Any, tmp_path: Path):
    def train(written: str) -> list[SourceRecipe]:
        return load(GOOD.replace("rows.jsonl", written)).data.train

    rows, hub = SourceRecipe(path=str(tmp_path / "rows.jsonl")), SourceRecipe(hub="owner/name", split="test")
    assert train("rows.jsonl") == train("{path: rows.jsonl}") == train("[rows.jsonl]") == [rows]
    assert train("{hub: owner/name, split: test}") == [hub]
    assert train("[rows.jsonl, {hub: owner/name, split: test}]") == [rows, hub]
    assert train("{path: rows.jsonl, weight: 1e-1}") == [rows.model_copy(update={"weight": 0.1})]


def test_a_source_is_written_as_short_as_it_can_be(load: Any, tmp_path: Path):
    def written(train: str) -> Any:
        return yaml.safe_load(dump_recipe(load(GOOD.replace("rows.jsonl", train))))["data"]["train"]

    assert written("rows.jsonl") == str(tmp_path / "rows.jsonl")
    assert written("{path: rows.jsonl, weight: 2}") == {"path": str(tmp_path / "rows.jsonl"), "weight": 2}
    assert written("[a, {hub: owner/name}]") == [str(tmp_path / "a"), {"hub": "owner/name"}]


def test_validation_is_a_fraction_or_a_file(load: Any, problem: Any, tmp_path: Path):
    def validation(written: str) -> Any:
        return load(GOOD.replace("rows.jsonl", f"rows.jsonl, validation: {written}")).data.validation

    assert validation("1e-2") == 0.01
    assert validation("0.5") == 0.5
    assert validation("held.jsonl") == [SourceRecipe(path=str(tmp_path / "held.jsonl"))]
    assert validation("5-6") == [SourceRecipe(path=str(tmp_path / "5-6"))]
    assert validation("{hub: owner/name}") == [SourceRecipe(hub="owner/name")]
    assert validation("null") is None
    message = problem(GOOD.replace("rows.jsonl", "rows.jsonl, validation: 1.5"))
    assert "2:27: data.validation is 1.5, but must be below 1 or a path, a source such as {hub: owner/name}" in message


@pytest.mark.parametrize(
    ("settings", "key", "fix"),
    [
        (
            "adapter: {target_modules: all-linear, projections: [q]}",
            "adapter.projections",
            "remove projections, or write target_modules: attention",
        ),
        (
            "{quantization: int8, double_quantization: true}",
            "double_quantization",
            "remove double_quantization, or write quantization: nf4",
        ),
        ("adapter: {method: qa_lora}", "adapter.method", "write quantization: int4, or method: lora"),
        ("{group_size: 64}", "group_size", "remove group_size, or write quantization: int4"),
        ("{dtype: fp16, device: cpu}", "dtype", "write dtype: auto, or another device"),
        ("train: {eval_every: 5}", "train.eval_every", "set data.validation to a file or a fraction"),
        ("train: {patience: 2}", "train.patience", "set train.eval_every to the steps between evaluations"),
        ("train: {samples: 2}", "train.samples", "set train.sample_every to the steps between samples"),
        ("train: {sample_every: 2}", "train.sample_every", "name a file of prompts in train.samples"),
        (
            "train: {sample_every: 2, samples: a.txt, shard_base: true}",
            "train.sample_every",
            "remove sample_every, or shard_base",
        ),
        ("data: {train: [{path: a, hub: owner/name}]}", "data.train", "write path: data/train.jsonl, or hub: owner/na"),
        (
            "data: {train: a, validation: [{path: b, hub: c/d}]}",
            "data.validation",
            "write path: data/train.jsonl, or hub",
        ),
        (
            "data: {train: a, validation: {path: b, split: test}}",
            "data.validation",
            "remove them, or name the data set with hub: owner/name",
        ),
        (
            "data: {train: {path: a, split: test}}",
            "data.train",
            "remove them, or name the data set with hub: owner/name",
        ),
        (
            "data: {train: rows.jsonl, validation: ./rows.jsonl}",
            "data.validation",
            "name another file or split, or a fraction",
        ),
        ("data: {train: a, validation: {path: b, weight: 2}}", "data.validation", "remove weight"),
        ("data: {train: a, validation: b, group_by: id}", "data.group_by", "set data.validation to a fraction such as"),
        (
            "{data: {train: a, validation: 0.1, streaming: true}, train: {max_steps: 3}}",
            "data.validation",
            "name a validation file or split",
        ),
        ("data: {train: a, streaming: true}", "data.streaming", "set train.max_steps"),
        (
            "{data: {train: a, streaming: true}, train: {max_steps: 3, epochs: 2}}",
            "train.epochs",
            "remove epochs; max_steps says when the run ends",
        ),
        (
            "{data: {train: a, streaming: true, cache: c}, train: {max_steps: 3}}",
            "data.cache",
            "remove cache, or write streaming: false",
        ),
        (
            "data: {train: a, template: alpac}",
            "data.template",
            "choose one of chatml, llama-3, mistral, gemma, alpaca, ",
        ),
        (
            "data: {train: a, template_arguments: {enable thinking: true}}",
            "data.template_arguments",
            "write a name of letters, digits and _",
        ),
        (
            "data: {train: a, columns: {promt: question}}",
            "data.columns",
            f"the left side is one of {', '.join(FIELDS)}, question, user, answer, assistant; ",
        ),
        ("data: {train: a, columns: {prompt: a, question: b}}", "data.columns", "remove question, or the other one"),
        ("data: {train: {path: a, columns: {promt: a}}}", "data.train", "the left side is one of"),
        ("data: {train: {path: a, columns: {prompt: a, user: b}}}", "data.train", "remove user, or the other one"),
        ("data: {train: a, validation: {path: b, columns: {promt: a}}}", "data.validation", "the left side is one of"),
        (
            "data: {train: a, validation: {path: b, columns: {prompt: a, user: b}}}",
            "data.validation",
            "remove user, or",
        ),
        ("data: {train: {path: a, columns: {text: b}}, columns: {text: c}}", "data.columns", "remove columns here, or"),
        ("data: {train: {path: a, format: text}, format: chat}", "data.format", "remove format here, or that of a"),
        ("data: {train: {path: a, system: A}, system: B}", "data.system", "remove system here, or that of a source"),
        ("data: {train: {path: a, train_on: all}, train_on: assistant}", "data.train_on", "remove train_on here, or"),
        ("train: {micro_batch_size: 2, tokens_per_micro_batch: 2048}", "train.micro_batch_size", "remove one of them"),
        (
            "train: {tokens_per_micro_batch: 512}",
            "train.tokens_per_micro_batch",
            "write 1024 or more, or lower data.max",
        ),
        ("train: {micro_batch_size: auto}", "train.micro_batch_size", "set train.batch_size to the rows of a step"),
        ("train: {batch_size: 16}", "train.batch_size", "remove batch_size, or write micro_batch_size: auto"),
        (
            "train: {micro_batch_size: auto, batch_size: 16, gradient_accumulation_steps: 2}",
            "train.gradient_accumulation_steps",
            "remove gradient_accumulation_steps; batch_size says how large a step is",
        ),
        (
            "train: {gradient_checkpointing: full, activation_memory: 4}",
            "train.activation_memory",
            "write gradient_checkpointing: selective, or remove activation_memory",
        ),
        (
            "train: {schedule: constant, min_learning_rate_ratio: 0.1}",
            "train.min_learning_rate_ratio",
            "remove min_learning_rate_ratio, or choose schedule: cosine or linear",
        ),
        (
            "train: {optimizer: schedule_free_adamw, schedule: linear}",
            "train.schedule",
            "remove schedule, or write schedule: constant",
        ),
        (
            "train: {optimizer: schedule_free_adamw, min_learning_rate_ratio: 0.1}",
            "train.min_learning_rate_ratio",
            "remove min_learning_rate_ratio, or choose optimizer: adamw",
        ),
        ("train: {optimizer: schedule_free_adamw, beta1: 0}", "train.beta1", "write a beta1 above 0, such as 0.9"),
        (
            "{quantization: int8, train: {shard_base: true}}",
            "train.shard_base",
            "write quantization: nf4 or int4 or gguf or none, or remove shard_base",
        ),
        (
            "train: {micro_batch_size: auto, batch_size: 8, shard_base: true}",
            "train.shard_base",
            "write a number for micro_batch_size",
        ),
        ("train: {compile: true, shard_base: true}", "train.compile", "remove compile, or shard_base"),
        ("train: {liger_kernel: true, compile: true}", "train.liger_kernel", "remove compile, or liger_kernel"),
        ("train: {liger_kernel: true, shard_base: true}", "train.liger_kernel", "remove liger_kernel, or shard_base"),
        ("data: {train: a, drop: [two_forms], allow: [two_forms]}", "data.drop", "remove it from one of them"),
        (
            "{data: {train: a, drop: [duplicate], streaming: true}, train: {max_steps: 1}}",
            "data.drop",
            "remove it from data.drop, or write streaming: false",
        ),
    ],
)
def test_contradictions(problem: Any, settings: str, key: str, fix: str):
    values = yaml.safe_load(GOOD) | yaml.safe_load(settings)
    message = problem(yaml.safe_dump(values))
    assert f": {key}: " in message
    assert message.startswith("error: recipe.yaml:")
    assert message.count("error: ") == 1
    assert f"\n  fix: {fix}" in message


def test_every_contradiction_is_tested():
    cases = next(mark for mark in test_contradictions.pytestmark if mark.name == "parametrize").args[1]  # type: ignore
    assert not Counter(rule.key for rule in TABLE) - Counter(key for _, key, _ in cases)
    assert len(cases) == len({(key, fix) for _, key, fix in cases})


def test_a_field_under_two_names_is_refused_whichever_they_are(problem: Any):
    for columns in (
        "{user: a, instruction: b}",
        "{input: x, question: a, instruction: b}",
        "{answer: a, completion: b}",
    ):
        assert "means the same as another field" in problem(GOOD + f"data: {{train: a, columns: {columns}}}\n")


def test_contradictions_wait_until_all_values_are_valid(problem: Any):
    text = GOOD + "quantization: none\ndouble_quantization: true\n"
    assert "unknown key trian" in (both := problem(text + "trian: 1\n"))
    assert "double_quantization" not in both
    assert "double_quantization is for nf4" in problem(text)


@pytest.mark.parametrize(
    ("added", "overrides", "dropped"),
    [
        ("adapter: {projections: [q, v]}", ["adapter.target_modules=all-linear"], ["adapter.projections"]),
        ("double_quantization: true", ["quantization=int8"], ["double_quantization"]),
        ("train: {eval_every: 5}", ["data.validation=null"], ["train.eval_every"]),
        ("train: {eval_every: 5, patience: 2}", ["data.validation=null"], ["train.eval_every", "train.patience"]),
        ("train: {sample_every: 5, samples: 2}", ["data.validation=null"], ["train.sample_every", "train.samples"]),
        (
            "train: {micro_batch_size: auto, batch_size: 16}",
            ["train.tokens_per_micro_batch=2048"],
            ["train.micro_batch_size", "train.batch_size"],
        ),
        ("train: {micro_batch_size: auto, batch_size: 16}", ["train.micro_batch_size=4"], ["train.batch_size"]),
        ("train: {schedule: linear}", ["train={optimizer: schedule_free_adamw}"], []),  # the file's train is gone
        ("train: {schedule: linear}", ["train.optimizer=schedule_free_adamw"], ["train.schedule"]),
    ],
)
def test_what_a_set_makes_idle_in_the_file_is_dropped_with_a_line(
    load: Any, capsys: Any, added: str, overrides: list[str], dropped: list[str]
):
    without = yaml.safe_load(GOOD + added)
    for key in dropped:
        section, _, name = key.rpartition(".")
        del (without[section] if section else without)[name]
    expected = load(yaml.safe_dump(without, sort_keys=False), *overrides)
    assert capsys.readouterr().err == ""
    assert load(GOOD + added, *overrides) == expected
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].removesuffix(" is not used") for line in lines] == dropped
    assert all("/recipe.yaml:4:" in line for line in lines)


def test_two_values_of_a_file_or_two_overrides_that_contradict_are_errors(problem: Any):
    text = GOOD + "train: {eval_every: 5}\n"
    assert "eval_every is set" in problem(text)
    assert "eval_every is set" in problem(text, "train.seed=1")
    message = problem(GOOD, "train.eval_every=3", "data.validation=null")
    assert message.startswith("error: --set train.eval_every: train.eval_every: eval_every is set")


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "recipe.yaml: the recipe is empty"),
        ("# only a comment\n", "recipe.yaml: the recipe is empty"),
        ("hello", "recipe.yaml: a recipe is a mapping of keys to values"),
        ("- a\n- b\n", "recipe.yaml: a recipe is a mapping of keys to values"),
        (GOOD + "train:\n\tseed: 1\n", "recipe.yaml:5:1: not valid YAML: found character"),
        (GOOD + "train: {seed: 1\n", "recipe.yaml:5:1: not valid YAML: expected ',' or '}'"),
        (GOOD + "---\nseed: 1\n", "recipe.yaml:4:1: not valid YAML: but found another document"),
        (GOOD + "train: *gone\n", "recipe.yaml:4:8: a recipe has no aliases (*gone)"),
        (GOOD + "[1]: 2\n", "recipe.yaml:4:1: a key must be a plain word"),
        (GOOD + "x: \x01\n", "recipe.yaml:4: not valid YAML: character 0x0001 is not allowed"),
        (GOOD + "revision: 2024-99-99\n", "recipe.yaml: not valid YAML: month must be in 1..12"),
        (GOOD.encode() + b"# caf\xe9\n", "recipe.yaml:4: not UTF-8 text"),
        (GOOD + "revision: !!bool maybe\n", "recipe.yaml: not valid YAML: 'maybe'"),
        (GOOD + "revision: !!int ''\n", "recipe.yaml: not valid YAML: "),
        ("!!set {base_model}\n", "recipe.yaml: a recipe is a mapping, not tag:yaml.org,2002:set"),
        ("[" * 100_000, "recipe.yaml:1:18: this is nested too deeply"),
        (GOOD + "# " + "x" * 300_000, "recipe.yaml: 293 KiB are too much for a recipe"),
        (GOOD + "cache: " + "9" * 5000, "recipe.yaml:4:8: this number is too long"),
    ],
)
def test_what_is_no_recipe(problem: Any, text: str | bytes, says: str):
    assert problem(text).startswith(f"error: {says}")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [made]", "!!python/name:os.system", "!own 3"])
def test_tags_build_no_objects(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str):
    monkeypatch.chdir(tmp_path)
    assert "recipe.yaml:4:11: not valid YAML: could not determine a constructor" in problem(GOOD + f"revision: {tag}\n")
    assert "the value is not valid YAML" in problem(GOOD, f"revision={tag}")
    assert not (tmp_path / "made").exists()


def test_a_byte_order_mark_is_no_key(load: Any):
    assert load("\ufeff" + GOOD).base_model == "owner/name"


def test_a_message_holds_nothing_that_a_terminal_acts_on(problem: Any):
    message = problem(GOOD + '"\\x1b[31mred\\r\\u202e": 1\n')
    assert "unknown key \\x1b[31mred\\r\\u202e\n" in message
    assert max(map(len, problem(GOOD + "revision: [" + "x" * 5000 + "]\n").splitlines())) < 400
    long = problem(GOOD + f"? {'x' * 5000}\n: 1\n")
    assert "fix: known keys here" in long
    assert max(map(len, long.splitlines())) < 900


def test_of_very_many_problems_the_first_are_shown(problem: Any):
    message = problem(GOOD + "".join(f"key{number}: 1\n" for number in range(1000)))
    assert message.count("unknown key") == 50
    assert message.endswith("error: 950 more problems\n  fix: fix those above first")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_loops_are_no_recipes(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in [
        (tmp_path / "pipe", "this is a pipe or a device, not a file"),
        (Path("/dev/zero"), "this is a pipe or a device, not a file"),
        (tmp_path / "loop", "cannot be read: Too many levels of symbolic links"),
    ]:
        with pytest.raises(LoraError, match=says) as refused:
            load_recipe(path)
        assert refused.value.fix


@pytest.mark.parametrize(
    ("path", "says"),
    [("x" * 300, "File name too long"), ("a\\0b", "embedded null"), ("a/" * 900, "more than 255 folders")],
)
def test_what_is_no_path(problem: Any, path: str, says: str):
    for key in ("data.train", "output", "base_model"):
        values: Any = {"base_model": "owner/name", "data": {"train": "rows.jsonl"}, "output": "run"}
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = path.replace("\\0", "\0")
        message = problem(yaml.safe_dump(values))
        assert f"{key}: this path cannot be used here: " in message
        assert says in message


def test_a_recipe_that_is_not_there(tmp_path: Path):
    (tmp_path / "small.yaml").touch()
    with pytest.raises(LoraError, match=r"no such recipe\n  fix: did you mean .*small\.yaml\?"):
        load_recipe(tmp_path / "smal.yaml")
    with pytest.raises(LoraError, match="this is a folder, not a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(LoraError, match=r"this is data, not a recipe\n  fix: .*lora init MODEL .*rows\.jsonl"):
        load_recipe(tmp_path / "rows.jsonl")


# ── retired settings ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", RETIRED, ids=".".join)
def test_a_retired_setting_at_its_old_default_is_dropped_and_any_other_value_says_what_to_write(
    load: Any, problem: Any, key: tuple[str, ...]
):
    """Run folders store every setting, so those from before a setting was retired name it."""

    def text(value: Any) -> str:
        values = yaml.safe_load(GOOD)
        section = values.setdefault(key[0], {}) if len(key) == 2 else values
        section[key[-1]] = value
        return yaml.safe_dump(values, sort_keys=False)

    assert key not in all_keys()
    old = RETIRED[key].default
    assert load(text(old)) == load(GOOD)
    name = ".".join(key)
    message = problem(text("something else"))
    assert message == f"error: recipe.yaml:6:3: {name} is no longer a setting\n  fix: {RETIRED[key].instead}"
    assert problem(GOOD, f"{name}=0.7").startswith(f"error: --set {name}: {name} is no longer a setting\n  fix: ")


# ── overrides ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides_are_yaml_and_reach_into_sections(load: Any):
    recipe = load(
        GOOD + "train: {seed: 1}\n",
        "train.seed=3",
        "train.learning_rate=1e-3",
        "train.gradient_checkpointing=yes",
        "adapter.layers=[0, -1]",  # a section that the file does not have
        "adapter.rank_pattern.q_proj=3",
        "data.validation=null",
        "revision= v1 ",
        "train.epochs=2",
        "train.epochs=3",  # the last one counts
    )
    assert (recipe.train.seed, recipe.train.learning_rate, recipe.train.epochs) == (3, 1e-3, 3.0)
    assert recipe.train.gradient_checkpointing == "full"
    assert (recipe.adapter.layers, recipe.adapter.rank_pattern) == ([0, -1], {"q_proj": 3})
    assert (recipe.data.validation, recipe.revision) == (None, "v1")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.sede=3", "--set train.sede: unknown key train.sede\n  fix: did you mean train.seed?"),
        ("seed=3", "--set seed: unknown key seed\n  fix: did you mean train.seed?"),
        ("trian.seed=3", "--set trian.seed: unknown key trian\n  fix: did you mean train?"),
        ("train.seed=x", '--set train.seed: train.seed is "x", but must be a whole number'),
        ("train.seed", "--set train.seed is not of the form key.path=value"),
        ("=3", "--set =3 is not of the form key.path=value"),
        ("train..seed=3", "--set train..seed=3 is not of the form key.path=value"),
        ("base_model.x=3", "--set base_model.x=3: base_model is not a section"),
        ("adapter.layers=[1", "--set adapter.layers=[1: the value is not valid YAML"),
        ("revision=2024-99-99", "--set revision=2024-99-99: the value is not valid YAML"),
        ("train=", "--set train: train is null, but must be a section"),
        ("train.seed={2024-01-01: 1}", "--set train.seed: train.seed is {datetime.date(2024, 1, 1): 1}, but must be a"),
    ],
)
def test_a_wrong_override_is_named(problem: Any, override: str, says: str):
    message = problem(GOOD, override)
    assert message.startswith(f"error: {says}")
    assert "\n  fix: " in message


# ── paths ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_start_at_the_recipe_and_those_of_overrides_here(load: Any, tmp_path: Path, monkeypatch: Any):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = GOOD.replace("rows.jsonl", "../rows.jsonl, validation: sub/held.jsonl")
    recipe = load(text)
    assert paths(recipe.data.train) == [str(tmp_path.parent / "rows.jsonl")]
    assert paths(recipe.data.validation) == [str(tmp_path / "sub" / "held.jsonl")]
    assert recipe.output == str(tmp_path / "run")
    recipe = load(text, "output=other", "data.train=rows.jsonl")
    assert (recipe.output, paths(recipe.data.train)) == (str(here / "other"), [str(here / "rows.jsonl")])
    assert paths(recipe.data.validation) == [str(tmp_path / "sub" / "held.jsonl")]


def test_every_path_of_the_data_section_starts_there_too(load: Any, tmp_path: Path, monkeypatch: Any):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    sources = "[a, {path: ../b, weight: 2}, {hub: owner/name}], validation: {path: c}, template: own/t.jinja, cache: d"
    text = GOOD.replace("rows.jsonl", sources)
    data = load(text).data
    assert paths(data.train) == [str(tmp_path / "a"), str(tmp_path.parent / "b"), None]
    assert data.train[2].hub == "owner/name"
    assert paths(data.validation) == [str(tmp_path / "c")]
    assert (data.template, data.cache) == (str(tmp_path / "own" / "t.jinja"), str(tmp_path / "d"))
    assert load(text, "data.template=chatml").data.template == "chatml"
    data = load(text, "data.train=[a, {path: ../b}]", "data.validation.path=e", "data.cache=d").data
    assert paths(data.train) == [str(here / "a"), str(tmp_path / "b")]
    assert (paths(data.validation), data.cache) == ([str(here / "e")], str(here / "d"))


def paths(sources: Any) -> list[str | None]:
    return [source.path for source in sources]


def test_home_and_environment_variables_in_paths(load: Any, problem: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RUNS", "/somewhere")
    monkeypatch.setenv("WEIRD", "pay$day")
    monkeypatch.delenv("NOWHERE", raising=False)

    def output(written: str) -> str:
        return load(GOOD.replace("output: run", f"output: {written}")).output

    assert output("~/runs") == "/home/somebody/runs"
    assert output("$RUNS/a") == output("${RUNS}/a") == "/somewhere/a"
    assert output("x${WEIRD}") == str(tmp_path / "xpay$day")  # what a variable holds is not expanded again
    assert output("cost$$5") == str(tmp_path / "cost$5")
    message = problem(GOOD.replace("output: run", "output: $NOWHERE/a"))
    assert message.startswith("error: recipe.yaml:3:1: output: the environment variable NOWHERE is not set\n  fix: ")
    assert "--set data.train: data.train: the environment variable NOWHERE" in problem(GOOD, "data.train=${NOWHERE}")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "PGPASSWORD", "aws_secret_access_key", "AUTH"]
)
def test_no_secret_of_the_environment_gets_into_a_path(problem: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "hf_abc123")
    message = problem(GOOD.replace("output: run", f"output: run-${{{name}}}"))
    assert f"output: the environment variable {name} may hold a secret" in message
    assert "hf_abc123" not in message


def test_the_base_model_is_a_path_only_where_it_looks_like_one(load: Any, tmp_path: Path):
    (tmp_path / "models" / "mine").mkdir(parents=True)

    def base(written: str) -> str:
        return load(GOOD.replace("owner/name", written)).base_model

    assert base("owner/name") == "owner/name"
    assert base("gpt2") == "gpt2"
    assert base("models/mine") == str(tmp_path / "models" / "mine")
    assert base("./absent") == str(tmp_path / "absent")
    assert base("../absent") == str(tmp_path.parent / "absent")
    assert base("/absent") == "/absent"


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

_names = st.text("abc_ äß$.#:'\"-01", min_size=1, max_size=12).map(lambda name: f"x{name}x".replace("$", "$$"))
_positive = st.floats(1e-8, 1e6)
_share = st.floats(0, 0.99)
_counts = st.integers(1, 10**6)
_modules = st.text("abcq_.*()", min_size=1, max_size=8)
_columns = st.text("abc _.$1", min_size=1, max_size=6)


def _sources(path: Any, hubs: list[str], more: dict[str, st.SearchStrategy[Any]] | None = None) -> Any:
    """A path, a file or data set with settings of its own, or a list of these."""
    hub = {
        "config": st.text("ab1"),
        "split": st.sampled_from(["train", "test[:5%]"]),
        "revision": st.sampled_from(["v1"]),
    }
    file = st.fixed_dictionaries({"path": path}, optional=more or {})
    dataset = st.fixed_dictionaries({"hub": st.sampled_from(hubs)}, optional=hub | (more or {}))
    one = path | file | dataset
    return one | st.lists(one, min_size=1, max_size=3)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "base_model": st.sampled_from(["gpt2", "owner/name", "./here", "/models/x y"]),
    "tokenizer": st.none() | _names,
    "revision": st.sampled_from([None, "main", "1e5", "v1.0", "123456"]),
    "adapter.rank": _counts,
    "adapter.alpha": _positive,
    "adapter.dropout": _share,
    "adapter.target_modules": st.sampled_from(["attention", "all-linear"]) | st.lists(_modules, max_size=3) | _modules,
    "adapter.exclude_modules": st.lists(_modules, max_size=2),
    "adapter.layers": st.none() | st.lists(st.integers(-9, 9), min_size=1, max_size=3),
    "adapter.rank_pattern": st.dictionaries(_modules, _counts, max_size=2),
    "adapter.alpha_pattern": st.dictionaries(_modules, _positive, max_size=2),
    "data.train": _sources(_names, ["owner/name", "squad"], {"weight": st.floats(1e-8, 1000)}),
    "data.validation": st.none()
    | st.floats(0.01, 0.99)
    | _sources(_names.map(lambda name: f"{name}.jsonl"), ["owner/held"]),  # other sources than those of data.train
    "data.group_by": st.none() | _columns,
    "data.columns": st.dictionaries(st.sampled_from(FIELDS), st.none() | _columns, max_size=3),
    "data.system": st.none() | st.sampled_from(["You count.", 'Two lines:\nä, # and "b".']),
    "data.template": st.none() | st.sampled_from(TEMPLATES) | _names.map(lambda name: f"./{name}.jinja"),
    "data.template_arguments": st.dictionaries(
        st.sampled_from(["enable_thinking", "reasoning_effort", "_x1"]),
        st.booleans() | st.integers(-9, 9) | st.sampled_from(["low", "high"]),
        max_size=2,
    ),
    "data.max_seq_len": st.integers(2, 10**6),
    "data.general_text": st.none() | _names,
    "data.cache": st.none() | _names,
    "train.epochs": _positive | _counts,
    "train.max_steps": st.none() | _counts,
    "train.micro_batch_size": st.just("auto") | st.integers(1, 99),
    "train.batch_size": st.none() | _counts,
    "train.tokens_per_micro_batch": st.none() | st.integers(2, 10**7),
    "train.learning_rate": _positive,
    "train.gradient_checkpointing": st.sampled_from(["none", "selective", "full", "offload", True, False]),
    "train.lora_plus_ratio": st.floats(1, 100),
    "train.warmup_ratio": _share,
    "train.min_learning_rate_ratio": _share,
    "train.weight_decay": st.floats(0, 1),
    "train.beta1": _share,
    "train.beta2": _share,
    "train.max_grad_norm": _positive,
    "train.z_loss": st.floats(0, 1),
    "train.activation_memory": st.none() | _positive,
    "train.seed": st.integers(0, 2**32 - 1),
    "train.eval_every": st.none() | _counts,
    "train.patience": st.none() | _counts,
    "train.sample_every": st.none() | _counts,
    "train.samples": st.integers(1, 50) | _names,
    "train.checkpoint_every": st.none() | _counts,
    "train.checkpoint_minutes": st.none() | _positive,
    "output": _names,
}
SCHEMA: dict[str, Any] = json.loads(json_schema())


def property_of(key: str) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    holder = SCHEMA["$defs"][f"{section.title()}Recipe"] if section else SCHEMA
    return holder["properties"][name]


def strategy_of(key: str) -> st.SearchStrategy[Any]:
    """From the table above, or, for choices and switches, from the schema."""
    if key in VALUES:
        return VALUES[key]
    field = property_of(key)
    if "anyOf" in field:  # a choice, or nothing
        return st.none() | st.sampled_from(field["anyOf"][0]["enum"])
    if field["type"] == "array":
        return st.lists(st.sampled_from(field["items"]["enum"]), min_size=field.get("minItems", 0), max_size=3)
    if field["type"] == "boolean":
        return st.booleans()
    return st.sampled_from(field["enum"]) if "enum" in field else st.integers(1, 99)


@st.composite
def recipes(draw: Any) -> dict[str, Any]:
    """Values as a person may write them: the required keys, and some of the others."""
    values: dict[str, Any] = {}
    for path in all_keys():
        key = ".".join(path)
        if key in ("base_model", "data.train", "output") or draw(st.booleans()):
            section = values.setdefault(path[0], {}) if len(path) == 2 else values
            section[path[-1]] = draw(strategy_of(key))
    adapter, train = values.get("adapter", {}), values.get("train", {})  # less what would contradict itself
    if adapter.get("target_modules", "attention") != "attention":
        adapter.pop("projections", None)
    if values.get("quantization", "nf4") != "nf4" and values.get("double_quantization"):
        del values["double_quantization"]
    if values.get("quantization") != "int4":
        adapter.pop("method", None)
        values.pop("group_size", None)
    if values.get("device") == "cpu":
        values.pop("dtype", None)
    if train.get("gradient_checkpointing") != "selective":
        train.pop("activation_memory", None)
    data = values["data"]
    if data.get("validation") is None:
        train.pop("eval_every", None)
        if not isinstance(train.get("samples"), str):
            train.pop("sample_every", None)
    if train.get("eval_every") is None:
        train.pop("patience", None)
    if train.get("shard_base"):
        train.pop("sample_every", None)
    if train.get("sample_every") is None:
        train.pop("samples", None)
    if train.get("schedule") == "constant":
        train.pop("min_learning_rate_ratio", None)
    if train.get("optimizer") == "schedule_free_adamw":
        train.pop("min_learning_rate_ratio", None)
        if train.get("schedule") != "constant":
            train.pop("schedule", None)
        if train.get("beta1") == 0:
            del train["beta1"]
    if data.get("streaming"):
        data.pop("cache", None)
        values["train"] = train
        train["max_steps"] = train.get("max_steps") or 1
        train.pop("epochs", None)
        if isinstance(data.get("validation"), float):
            del data["streaming"]
    if data.get("streaming") or data.get("allow"):
        data.pop("drop", None)
    if not isinstance(data.get("validation"), float):
        data.pop("group_by", None)
    if train.get("tokens_per_micro_batch") is not None:
        train.pop("micro_batch_size", None)
        train["tokens_per_micro_batch"] = max(train["tokens_per_micro_batch"], data.get("max_seq_len", 1024))
    if train.get("micro_batch_size") == "auto":
        train["batch_size"] = train.get("batch_size") or 16
        train.pop("gradient_accumulation_steps", None)
    else:
        train.pop("batch_size", None)
    if train.get("micro_batch_size") == "auto" or values.get("quantization") == "int8":
        train.pop("shard_base", None)
    if train.get("shard_base"):
        train.pop("compile", None)
    if train.get("shard_base") or train.get("compile"):
        train.pop("liger_kernel", None)
    return values


@settings(max_examples=60, deadline=None)
@given(values=recipes())
def test_a_resolved_recipe_reads_back_equal(values: dict[str, Any]):
    with TemporaryDirectory() as folder:
        written = Path(folder) / "recipe.yaml"
        written.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        recipe = load_recipe(written)
        resolved = Path(folder) / "elsewhere" / "recipe.yaml"
        resolved.parent.mkdir()
        resolved.write_text(dump_recipe(recipe), encoding="utf-8")
        again = load_recipe(resolved)
    assert again == recipe
    assert differences(recipe, again) == []
    assert dump_recipe(again) == dump_recipe(recipe)
    assert misfits(yaml.safe_load(dump_recipe(recipe)), SCHEMA) == misfits(values, SCHEMA) == []


def test_a_switched_off_double_quantization_survives(load: Any, tmp_path: Path):
    recipe = load(GOOD + "quantization: none\ndouble_quantization: false\n")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_tokens_per_micro_batch_survives(load: Any, tmp_path: Path):
    """It rules out micro_batch_size, which has a default."""
    recipe = load(GOOD + "train: {tokens_per_micro_batch: 4096}\n")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_the_resolved_recipe_holds_every_setting(load: Any):
    resolved = yaml.safe_load(dump_recipe(load(GOOD)))
    for path in all_keys():
        assert path[-1] in (resolved[path[0]] if len(path) == 2 else resolved), path


def test_differences_name_each_setting(load: Any):
    old, new = load(GOOD), load(GOOD, "train.seed=1", "adapter.rank_pattern.q=2", "data.validation=0.5")
    assert sorted(f"{'.'.join(key)}: {before} → {after}" for key, before, after in differences(old, new)) == [
        "adapter.rank_pattern: {} → {'q': 2}",
        "data.validation: None → 0.5",
        "train.seed: 0 → 1",
    ]


@pytest.mark.parametrize(
    "override", ["columns={prompt: question}", "columns={weight: null}", "train={path: a, weight: 2}"]
)
def test_differences_see_into_the_data_section(load: Any, override: str):
    text = GOOD.replace("rows.jsonl", "a")
    assert len(differences(load(text), load(text, f"data.{override}"))) >= 1


# ── the schema ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_schema_describes_every_key_and_forbids_others():
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert [section["additionalProperties"] for section in sections] == [False] * 5
    for section in sections:
        for name, field in section["properties"].items():
            assert field.get("description", "").endswith((".", ")")), name
    assert SCHEMA["required"] == ["base_model", "data", "output"]
    assert property_of("train.learning_rate")["type"] == "number"


def misfits(value: Any, schema: dict[str, Any]) -> list[str]:
    """What a JSON Schema validator would say, for the parts of JSON Schema that this schema uses."""
    if "$ref" in schema:
        return misfits(value, SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in schema:
        found = [misfits(value, option) for option in schema["anyOf"]]
        return [] if [] in found else [f"{value!r} fits none of {len(found)}"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}
    wanted = kinds.get(schema["type"], (int, float))
    if not isinstance(value, wanted) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [f"{value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{value!r} is not in {schema['enum']}"]
    if isinstance(value, list):
        return [problem for item in value for problem in misfits(item, schema["items"])]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    unknown = [f"unknown {key}" for key in value if key not in schema["properties"]]
    missing = [f"missing {key}" for key in schema.get("required", []) if key not in value]
    known = [item for key, item in value.items() if key in schema["properties"]]
    fields = [schema["properties"][key] for key in value if key in schema["properties"]]
    return unknown + missing + [p for v, f in zip(known, fields, strict=True) for p in misfits(v, f)]


def test_the_schema_accepts_a_good_recipe_and_rejects_a_wrong_one(load: Any):
    assert misfits(yaml.safe_load(dump_recipe(load(GOOD))), SCHEMA) == []
    bad = yaml.safe_load(GOOD) | {"frobnicate": 1, "train": {"sede": 1, "epochs": "two", "optimizer": "sgd"}}
    assert [problem.split(" is ")[0] for problem in misfits(bad, SCHEMA)] == [
        "unknown frobnicate",
        "unknown sede",
        "'two'",
        "'sgd'",
    ]


def test_few_settings_each_with_a_meaning():
    keys = all_keys()
    assert 20 < len(keys) <= 80
    assert len(set(keys)) == len(keys)
    for path in keys:
        assert len(property_of(".".join(path))["description"]) > 20, path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_loads_and_fits_the_schema(path: Path):
    assert misfits(yaml.safe_load(dump_recipe(load_recipe(path))), SCHEMA) == []
