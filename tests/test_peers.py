"""Recipes of other programs: each name is refused with what it is called here, and following that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, all_keys, load_recipe
from lora_cli.recipe.peers import _HINTS, ANOTHER_VALUE, RENAMED

GOOD = {"base_model": "owner/name", "data": {"train": "rows.jsonl"}, "output": "run"}
# What issue 14 and users of axolotl, LLaMA-Factory, TRL, PEFT and unsloth write
EXPECTED = {
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "sequence_len": "data.max_seq_len",
    "cutoff_len": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "max_length": "data.max_seq_len",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "lr": "train.learning_rate",
    "per_device_train_batch_size": "train.micro_batch_size",
    "bf16": "dtype: bf16",
    "load_in_4bit": "quantization: nf4",
    "load_in_8bit": "quantization: int8",
    "sample_packing": "data.packing",
    "val_set_size": "data.validation",
    "datasets": "data.train",
    "dataset": "data.train",
    "base_model_name_or_path": "base_model",
    "model_name_or_path": "base_model",
    "use_dora": "DoRA is not offered",
    "neftune_noise_alpha": "NEFTune is not offered",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.eval_every",
    "logging_steps": "every step is logged",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
}
VALUES: dict[str, Any] = {  # a value of each setting, as other programs write it
    "base_model": "owner/other",
    "revision": "v1",
    "output": "runs/b",
    "adapter.rank": 8,
    "adapter.alpha": 16,
    "adapter.dropout": 0.05,
    "adapter.rank_stabilized": True,
    "adapter.target_modules": ["q_proj", "v_proj"],
    "adapter.layers": [0, 1],
    "data.train": "other.jsonl",
    "data.validation": 0.1,
    "data.max_seq_len": 512,
    "data.packing": False,
    "data.cache": "cache",
    "train.epochs": 3,
    "train.max_steps": 7,
    "train.learning_rate": "1e-4",
    "train.micro_batch_size": 2,
    "train.gradient_accumulation_steps": 8,
    "train.gradient_checkpointing": True,
    "train.max_grad_norm": 1.0,
    "train.beta1": 0.8,
    "train.beta2": 0.99,
    "train.lora_plus_ratio": 16,
    "train.eval_every": 5,
    "train.checkpoint_every": 50,
    "train.keep_checkpoints": 1,
    "train.seed": 42,
    "train.compile": True,
    "train.liger_kernel": True,
}
KEYS = {".".join(key) for key in all_keys()}


def load(folder: Path, values: dict[str, Any], *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path, list(overrides))


def without_sources(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "train"}


def problem(folder: Path, values: dict[str, Any], *overrides: str) -> LoraError:
    with pytest.raises(LoraError) as caught:
        load(folder, values, *overrides)
    return caught.value


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
@pytest.mark.parametrize("section", ["", "adapter", "data", "train"])
def test_a_name_of_another_program_is_refused_with_ours(tmp_path, name, expected, section):
    inside = {name: 1} if not section else {section: {**GOOD.get(section, {}), name: 1}}  # type: ignore[dict-item]
    found = problem(tmp_path, GOOD | inside)
    full = f"{section}.{name}".lstrip(".")
    assert found.what == f"unknown key {full}"
    assert expected in (found.fix or "")
    by_set = problem(tmp_path, GOOD, f"{full}=1")
    assert (by_set.what, by_set.fix, by_set.where) == (found.what, found.fix, f"--set {full}")


def test_every_setting_in_the_table_exists_and_no_name_is_one_of_ours():
    assert set(RENAMED) <= KEYS
    assert set(VALUES) == set(RENAMED)
    assert {text.partition(":")[0].partition(",")[0] for text in ANOTHER_VALUE} <= KEYS
    assert not set(_HINTS) & {key.rpartition(".")[2] for key in KEYS}
    named = [name for names in RENAMED.values() for name in names.split()]
    assert len(named) == len(set(named))
    assert len(_HINTS) > 150


@pytest.mark.parametrize("name", _HINTS)
def test_each_name_is_refused_with_its_hint(tmp_path, name):
    found = problem(tmp_path, GOOD | {name: 1})
    assert (found.what, found.fix) == (f"unknown key {name}", _HINTS[name])


@pytest.mark.parametrize("key", RENAMED)
def test_following_the_hint_works(tmp_path, key):
    """The value goes to the setting that the hint names, and means there what it meant."""
    name = RENAMED[key].split()[0]
    found = problem(tmp_path, GOOD | {name: VALUES[key]})
    assert found.fix == f"in this program: {key}"
    evaluated = {"data": {"train": "rows.jsonl", "validation": 0.1}} if key == "train.eval_every" else {}
    section, _, leaf = key.rpartition(".")
    own: dict[str, Any] = {section: {**GOOD.get(section, {}), leaf: VALUES[key]}} if section else {leaf: VALUES[key]}  # type: ignore[dict-item]
    recipe: Any = load(tmp_path, GOOD | evaluated | own)
    by_set: Any = load(tmp_path, GOOD | evaluated, f"{key}={VALUES[key]}")
    for part in key.split("."):
        recipe, by_set = getattr(recipe, part), getattr(by_set, part)
    if key not in ("output", "data.train", "data.cache"):  # paths, which begin at the recipe or here
        assert recipe == by_set
        assert recipe == {"train.learning_rate": 1e-4, "train.gradient_checkpointing": "full"}.get(key, VALUES[key])


@pytest.mark.parametrize(
    "written",
    [
        {"dtype": "bf16"},
        {"quantization": "nf4", "double_quantization": True},
        {"quantization": "int8"},
        {"adapter": {"target_modules": "all-linear", "init": "gaussian"}},
        {"data": {"train": {"hub": "owner/name"}, "columns": {"text": "body"}}},
        {"data": {"train": "a.jsonl", "template": "chatml", "format": "chat", "train_on": "assistant"}},
        {"train": {"schedule": "linear", "optimizer": "paged_adamw_8bit", "min_learning_rate_ratio": 0.1}},
        {"train": {"batch_size": 32, "micro_batch_size": "auto", "warmup_ratio": 0.1}},
        {"train": {"shard_base": True}, "trackers": ["wandb"]},
    ],
)
def test_the_values_that_hints_name_are_accepted(tmp_path, written):
    recipe = load(tmp_path, GOOD | written).model_dump()
    for key, value in written.items():
        assert recipe[key] == value or recipe[key].items() >= without_sources(value).items()


def test_names_inside_a_foreign_section_are_hinted_too(tmp_path):
    lora = {"lora_r": 8, "target": {"r": 3}, "more": [{"lr": 1}], "alpha": 3}
    found = problem(tmp_path, GOOD | {"peft_config": lora})
    assert found.what == "unknown key peft_config"
    assert sorted(found.details) == [
        "lora_r: in this program: adapter.rank",
        "lr: in this program: train.learning_rate",
        "r: in this program: adapter.rank",
    ]
    many = problem(tmp_path, GOOD | {"peft_config": [{"r": 1} for _ in range(1000)]})
    assert len(many.details) == 20


def test_a_whole_recipe_of_axolotl_is_translated_in_one_go(tmp_path):
    text = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.2
output_dir: ./outputs/out
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
logging_steps: 1
flash_attention: true
"""
    (tmp_path / "axolotl.yaml").write_text(text)
    with pytest.raises(LoraError) as caught:
        load_recipe(tmp_path / "axolotl.yaml")
    said = str(caught.value)
    assert said.count("unknown key") == 18
    assert "known keys here" not in said
    assert said.count("\n  fix: ") == said.count("error: ")


def test_a_key_written_with_its_section_says_where_it_goes(tmp_path):
    found = problem(tmp_path, GOOD | {"adapter.rank": 8})
    assert found.fix == "write rank in the section adapter:, indented"


def test_values_that_must_be_typos_are_noted(tmp_path):
    from lora_cli.planning.check import unusual

    assert unusual(load(tmp_path, GOOD)) == []
    assert unusual(load(tmp_path, GOOD, "train.learning_rate=1e-3", "train.epochs=20")) == []
    (line,) = unusual(load(tmp_path, GOOD, "train.learning_rate=1e4"))
    assert line.startswith("train.learning_rate is 10000;")
    assert len(unusual(load(tmp_path, GOOD, "train.learning_rate=1e-9", "train.epochs=1e5"))) == 2
