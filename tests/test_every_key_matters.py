"""No key of the recipe is inert: for each, a change of its value changes something that can be observed.

The table below holds, for every key: settings that both runs share, the value that changes, and what is looked at.
A key of the schema that is not in the table, or in the list of those with a test of their own, fails the first test.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import quiet_console, write_rows
from safetensors.torch import load_file
from transformers import AttentionInterface

from lora_cli.adapters.layer import LoRALinear
from lora_cli.base.attention import PER_EXAMPLE, per_example_attention
from lora_cli.data.store import PreparedData, open_prepared
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.recipe import Allowed, SourceRecipe, all_keys, load_recipe
from lora_cli.training.run_folder import read_metrics, read_samples
from lora_cli.training.train import train

Observe = Callable[[Path], Any]


# ── what can be looked at in a run folder ───────────────────────────────────────────────────────────────────────


def losses(run: Path) -> Any:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def first_loss(run: Path) -> Any:
    """Before anything was learned: it shows the base model and the data, and nothing of the optimizer."""
    return losses(run)[0]


def tensors(run: Path) -> Any:
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in sorted(stored.items())}


def shapes(run: Path) -> Any:
    return {name: tensor.shape for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def adapter_config(run: Path) -> Any:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())


def steps(run: Path) -> Any:
    return len(losses(run))


def tokens_per_step(run: Path) -> Any:
    return [line["tokens"] for line in read_metrics(run / "metrics.jsonl")]


def target_tokens_per_step(run: Path) -> Any:
    return [line["target_tokens"] for line in read_metrics(run / "metrics.jsonl")]


def learning_rates(run: Path) -> Any:
    return [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl")]


def evaluations(run: Path) -> Any:
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line]


def sample_steps(run: Path) -> Any:
    return [each.step for each in read_samples(run / "samples.jsonl")]


def sample_prompts(run: Path) -> Any:
    return [each.prompt for each in read_samples(run / "samples.jsonl")]


def checkpoints(run: Path) -> Any:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def data_files(run: Path) -> Any:
    return json.loads((run / "environment.json").read_text())["data_files"]


def adapter_files(run: Path) -> Any:
    return {path.name: path.read_text() for path in (run / "adapter").iterdir() if path.suffix == ".jinja"}


def prepared(run: Path) -> PreparedData:
    (place,) = (run / "prepared").iterdir()
    data = open_prepared(place)
    assert data is not None
    return data


def held_out(run: Path) -> Any:
    return [example.row for example in prepared(run).validation]


def kept_examples(run: Path) -> Any:
    return len(prepared(run).train)


def general_text(run: Path) -> Any:
    return json.loads((run / "report.json").read_text())["general_text"]


def optimizer_state(run: Path) -> Any:
    (newest,) = (run / "checkpoints").iterdir()
    return {name: str(tensor.dtype) for name, tensor in load_file(newest / "optimizer.safetensors").items()}


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """`key` is set to `value` in one of two runs. shared: settings of both, as {"train.max_steps": 3}.

    without: the value in the other run, where that is not the default. folder in a value: FOLDER of the fixtures.
    """

    key: str
    value: Any
    look: Observe
    shared: dict[str, Any] = field(default_factory=dict)
    without: Any = None


VALIDATION = {"data.validation": 0.25}
NF4 = {"quantization": "nf4"}
FOUR_STEPS = {"train.max_steps": 4}
SMALL_STEPS = {"train.gradient_accumulation_steps": 1, "train.micro_batch_size": 2, "train.max_steps": 99}
ONE_STEP_AN_EPOCH = {"train.micro_batch_size": 99, "data.packing": False}
SOME_TOO_LONG = ONE_STEP_AN_EPOCH | {"data.max_seq_len": 30}
CHAT = ONE_STEP_AN_EPOCH | {"data.train": "{chat}", "data.max_seq_len": 256}
TOKENS_A_BATCH = {"train.max_steps": 2, "data.max_seq_len": 40}
AUTO = {"train.micro_batch_size": "auto", "train.max_steps": 1, "data.max_seq_len": 40}
LARGE = {"adapter.rank": 64, "adapter.projections": ["q", "o"]}  # bitsandbytes keeps small tensors in 32 bits

CASES = [
    Case("base_model", "{gpt2}", first_loss, {"adapter.layers": [0]}),
    Case("quantization", "nf4", first_loss),
    Case("quantization", "int8", first_loss),
    Case("quantization", "int4", first_loss),
    Case("group_size", 64, first_loss, {"quantization": "int4"}),
    Case("double_quantization", False, first_loss, NF4),
    Case("dtype", "bf16", first_loss),
    Case("adapter.method", "qa_lora", losses, {"quantization": "int4"}),
    Case("adapter.rank", 2, shapes),
    Case("adapter.alpha", 1, losses),
    Case("adapter.alpha", 1, adapter_config),
    Case("adapter.rank_stabilized", True, losses),
    Case("adapter.rank_stabilized", True, adapter_config),
    Case("adapter.dropout", 0.5, losses),
    Case("adapter.target_modules", "all-linear", shapes),
    Case("adapter.target_modules", ["q_proj"], shapes),
    Case("adapter.target_modules", r".*\.0\..*mlp.*", shapes),
    Case("adapter.projections", ["q", "v"], shapes),
    Case("adapter.exclude_modules", ["k_proj"], shapes),
    Case("adapter.layers", [-1], shapes),
    Case("adapter.rank_pattern", {"v_proj": 2}, shapes),
    Case("adapter.alpha_pattern", {"v_proj": 1}, losses),
    Case("adapter.init", "gaussian", tensors),
    Case("data.train", "{other}", first_loss),
    Case("data.train", "{other}", data_files),
    Case("data.train", ["{sums}", "{other}"], kept_examples),
    Case("data.validation", 0.5, evaluations),
    Case("data.validation", "{other}", data_files, {}, 0.5),
    Case("data.group_by", "dialogue", held_out, VALIDATION | {"data.train": "{grouped}"}),
    Case("data.format", "text", first_loss, {"data.train": "{both}"}, "completion"),
    Case("data.columns", {"prompt": "completion", "completion": "prompt"}, first_loss),
    Case("data.template", "alpaca", tokens_per_step, CHAT),
    Case("data.template", "{template}", first_loss, CHAT),
    Case("data.template", "{template}", adapter_files, CHAT),
    Case("data.system", "You count.", first_loss, CHAT),
    Case("data.system", "You count.", adapter_files, CHAT),
    Case("data.template_arguments", {"tone": "warm"}, first_loss, CHAT | {"data.template": "{toned}"}),
    Case("data.template_arguments", {"tone": "warm"}, adapter_files, CHAT | {"data.template": "{toned}"}),
    Case("data.train_on", "all", target_tokens_per_step, ONE_STEP_AN_EPOCH),
    Case("data.train_on", "last_assistant", target_tokens_per_step, CHAT),
    Case("data.train_on", "all", target_tokens_per_step, CHAT),
    Case("data.train_on", "completion", target_tokens_per_step, CHAT | {"data.train": "{alpaca}"}),
    Case("data.max_seq_len", 40, tokens_per_step),
    Case("data.packing", False, tokens_per_step),
    Case("data.too_long", "truncate", tokens_per_step, SOME_TOO_LONG, "drop"),
    Case("data.too_long", "split", tokens_per_step, SOME_TOO_LONG | {"data.train": "{text}"}, "drop"),
    Case("data.streaming", True, kept_examples),
    Case("data.streaming", True, data_files),
    Case("data.general_text", "{prose}", general_text),
    Case("train.epochs", 2, steps, ONE_STEP_AN_EPOCH, 1),
    Case("train.epochs", 0.5, steps, SMALL_STEPS, 1),
    Case("train.max_steps", 1, steps),
    Case("train.micro_batch_size", 1, tokens_per_step),
    Case("train.batch_size", 8, tokens_per_step, AUTO, 4),
    Case("train.batch_size", 8, tokens_per_step, AUTO | {"data.packing": False}, 4),
    Case("train.tokens_per_micro_batch", 160, tokens_per_step, TOKENS_A_BATCH, 40),
    Case("train.tokens_per_micro_batch", 160, tokens_per_step, TOKENS_A_BATCH | {"data.packing": False}, 40),
    Case("train.gradient_accumulation_steps", 1, tokens_per_step),
    Case("train.learning_rate", 0.02, losses),
    Case("train.schedule", "linear", learning_rates, FOUR_STEPS),
    Case("train.schedule", "constant", losses, FOUR_STEPS),
    Case("train.warmup_ratio", 0.9, losses),
    Case("train.min_learning_rate_ratio", 1.0, tensors),
    Case("train.optimizer", "adamw_8bit", optimizer_state, LARGE),
    Case("train.optimizer", "paged_adamw", optimizer_state),
    Case("train.optimizer", "paged_adamw_8bit", optimizer_state, LARGE),
    Case("train.optimizer", "schedule_free_adamw", optimizer_state),
    Case("train.optimizer", "schedule_free_adamw", learning_rates),
    Case("train.lora_plus_ratio", 16, losses),
    Case("train.weight_decay", 0.5, losses),
    Case("train.beta1", 0.1, tensors),
    Case("train.beta2", 0.1, tensors),
    Case("train.max_grad_norm", 1e-8, losses),
    Case("train.z_loss", 0.5, tensors),
    Case("train.z_loss", 0.5, losses),
    Case("train.seed", 1, losses),
    Case("train.eval_every", 1, evaluations, VALIDATION),
    Case("train.sample_every", 1, sample_steps, VALIDATION),
    Case("train.samples", 2, sample_prompts, VALIDATION | {"train.sample_every": 1}),
    Case("train.samples", "{prompts}", sample_prompts, VALIDATION | {"train.sample_every": 1}),
    Case("train.checkpoint_every", 1, checkpoints),
    Case("train.keep_checkpoints", 1, checkpoints, FOUR_STEPS | {"train.checkpoint_every": 1}),
    Case("output", "{folder}/elsewhere", lambda run: run.name),
]
TESTED_BELOW = {
    "revision": "test_revision",
    "tokenizer": "test_tokenizer",
    "trust_remote_code": "test_trust_remote_code",
    "device": "test_device",
    "data.columns": "test_columns",
    "data.allow": "test_allow",
    "data.drop": "test_drop",
    "data.cache": "test_cache",
    "train.micro_batch_size": "test_micro_batch_size_auto",
    "train.gradient_checkpointing": "test_gradient_checkpointing",
    "train.activation_memory": "test_activation_memory",
    "train.compile": "test_compile",
    "train.liger_kernel": "test_liger_kernel",
    "train.checkpoint_minutes": "test_checkpoint_minutes",
    "train.patience": "test_patience",
    "train.on_nan": "test_on_nan",
    "train.on_write_error": "test_on_write_error",
    "train.shard_base": "test_shard_base",
    "trackers": "test_trackers",
}


def test_every_key_has_a_case():
    keys = {".".join(path) for path in all_keys()}
    covered = {case.key for case in CASES} | set(TESTED_BELOW)
    assert sorted(keys - covered) == [], "these keys need a case: what do they change?"
    assert sorted(covered - keys) == [], "these keys are no longer in the recipe"
    assert [name for name in TESTED_BELOW.values() if name not in globals()] == []


# ── running the cases ───────────────────────────────────────────────────────────────────────────────────────────


class Runs:
    """Trains tiny recipes, each once: runs with equal settings share a run folder."""

    def __init__(self, folder: Path, models: dict[str, Path]):
        self.folder, self.done = folder, {}
        rows = [
            (f"What is {a} plus {b}?{' Think.' * (a % 3)}\n", f"{a} plus {b} is {a + b}.")
            for a in range(4)
            for b in range(3)
        ]
        completions = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
        files = {
            "sums": completions,
            "other": [{"prompt": row["completion"], "completion": row["prompt"]} for row in completions[:8]],
            "text": [{"text": prompt + completion} for prompt, completion in rows],
            "both": [row | {"text": row["prompt"]} for row in completions],
            "renamed": [{"question": row["prompt"], "answer": row["completion"]} for row in completions],
            "grouped": [row | {"dialogue": f"number {at // 3}"} for at, row in enumerate(completions)],
            "chat": [{"messages": turns(rows[at : at + 2])} for at in range(0, len(rows), 2)],
            "alpaca": [
                {"instruction": prompt, "output": completion, "history": [rows[0]]} for prompt, completion in rows
            ],
        }
        self.names = {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in files.items()}
        self.names |= {name: str(path) for name, path in models.items()} | {"folder": str(folder)}
        self.names["prose"] = str(folder / "prose.txt")
        Path(self.names["prose"]).write_text("All is quiet on the river, and the ferry has not come yet. " * 20)
        self.names["prompts"] = str(folder / "prompts.txt")
        Path(self.names["prompts"]).write_text("What is 9 plus 9?\n")
        self.names["template"] = str(folder / "own.jinja")
        Path(self.names["template"]).write_text(
            "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
        )

        self.names["toned"] = str(folder / "toned.jinja")
        Path(self.names["toned"]).write_text(
            "{{ tone }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        )

    def __call__(self, changes: dict[str, Any]) -> Path:
        wanted = json.dumps(changes, sort_keys=True)
        if wanted not in self.done:
            self.done[wanted] = self._train(changes)
        return self.done[wanted]

    def _train(self, changes: dict[str, Any]) -> Path:
        values: dict[str, Any] = {
            "base_model": self.names["llama"],
            "quantization": "none",
            "dtype": "fp32",
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": self.names["sums"], "max_seq_len": 64},
            "train": {"max_steps": 3, "epochs": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
            | {"learning_rate": 0.01, "warmup_ratio": 0.0},
            "output": str(self.folder / f"run{len(self.done)}"),
        }
        for key, value in changes.items():
            *section, name = key.split(".")
            (values[section[0]] if section else values)[name] = self._filled(value)
        if "tokens_per_micro_batch" in values["train"]:
            del values["train"]["micro_batch_size"]
        if values["train"].get("micro_batch_size") == "auto":
            del values["train"]["gradient_accumulation_steps"]
        if values["data"].get("streaming"):
            del values["train"]["epochs"]
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        recipe = load_recipe(path)
        train(recipe, quiet_console())
        return Path(recipe.output)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, list | dict):
            return [self._filled(each) for each in value] if isinstance(value, list) else self._filled_values(value)
        return value.format_map(self.names) if isinstance(value, str) and value.startswith("{") else value

    def _filled_values(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: self._filled(value) for key, value in values.items()}


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation of questions and answers."""
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_gpt2: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), {"llama": tiny_llama, "gpt2": tiny_gpt2})


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key}={case.value}-{case.look.__name__}")
def test_key_changes_what_is_observed(case: Case, runs: Runs):
    other = case.shared if case.without is None else case.shared | {case.key: case.without}
    assert case.look(runs(case.shared | {case.key: case.value})) != case.look(runs(other))


def test_equal_recipes_look_equal(runs: Runs, tmp_path: Path):
    """Or else a difference above would prove nothing."""
    settings = {"data.validation": 0.25, "train.checkpoint_every": 4, "adapter.dropout": 0.5}
    one, two = runs(settings), runs(settings | {"output": f"{tmp_path}/again/{runs(settings).name}"})
    assert one != two
    for look in {case.look for case in CASES}:
        assert look(one) == look(two), look.__name__


# ── keys that take a test of their own ──────────────────────────────────────────────────────────────────────────


def environment(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())


def test_tokenizer(runs: Runs):
    """What it does with a GGUF file: tests/test_gguf.py."""
    with pytest.raises(LoraError, match="tokenizer is for a GGUF file"):
        runs({"tokenizer": "elsewhere"})


def test_revision(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    asked: list[str | None] = []

    def snapshot_download(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append(revision)
        return runs.names["llama"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    runs({"base_model": "owner/name"})
    run = runs({"base_model": "owner/name", "revision": "v1"})
    assert asked == [None, "v1"]
    assert environment(run)["base_revision"] == Path(runs.names["llama"]).name  # the commit, not the branch
    with pytest.raises(LoraError, match="revision v1 is for hub models"):
        runs({"revision": "v1"})


def test_trust_remote_code(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "own"
    shutil.copytree(runs.names["llama"], own)
    config = json.loads((own / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto_map}))
    (own / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoraError, match=r"trust_remote_code: true"):
        runs({"base_model": str(own)})
    run = runs({"base_model": str(own), "trust_remote_code": True})
    assert losses(run) == pytest.approx(losses(runs({})), rel=1e-5)  # the same model, but attention through a mask


def test_device(runs: Runs):
    assert environment(runs({"device": "cpu"}))["device"].startswith("cpu")
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(LoraError, match=f"device: {absent} was asked for"):
        runs({"device": absent})


def test_columns(runs: Runs):
    """What could not be read is read, as if its columns had the usual names."""
    renamed = {"data.train": "{renamed}"}
    with pytest.raises(LoraError, match="columns answer, question fit no format"):
        runs(renamed)
    run = runs(renamed | {"data.columns": {"prompt": "question", "completion": "answer"}})
    assert losses(run) == losses(runs({}))


def with_lower_case(model: Path) -> None:
    settings = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": {"type": "Lowercase"}}))


def with_bos(model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|im_start|>"}))


def with_one_stop_token(model: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
    )


def with_another_last_turn(model: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ 'So: ' if loop.last and m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )


ALLOW: dict[str, tuple[list[dict[str, Any]], Callable[[Path], None] | None, dict[str, Any]]] = {
    "too_long": ([{"text": "one"}, {"text": "one " * 99}], None, {}),
    "overlap": ([{"text": "one"}, {"text": "two"}], None, {"data.validation": "{same}"}),
    "no_stop_token": ([{"messages": turns([("a", "b")] * count)} for count in (1, 2)], with_one_stop_token, {}),
    "double_bos": ([{"text": "one"}, {"text": "<|im_start|><|im_start|>two"}], with_bos, {}),
    "special_in_text": ([{"messages": turns([("a", each)])} for each in ("b", "c <|im_end|> d")], None, {}),
    "not_round_trip": ([{"text": "one"}, {"text": "TWO"}], with_lower_case, {}),
    "two_forms": ([{"messages": turns([("a", "b")] * count)} for count in (1, 2)], with_another_last_turn, {}),
}


@pytest.mark.parametrize("kind", get_args(Allowed))
def test_allow(runs: Runs, tmp_path: Path, kind: str):
    """A run that the data gate stops goes on when that finding, and no other, is allowed."""
    rows, change, settings = ALLOW[kind]
    runs.names["same"] = str(write_rows(tmp_path / "same.jsonl", rows))
    shared = {"data.train": str(write_rows(tmp_path / "rows.jsonl", rows)), "data.max_seq_len": 64} | settings
    if change is not None:
        shutil.copytree(runs.names["llama"], tmp_path / "model")
        change(tmp_path / "model")
        shared["base_model"] = str(tmp_path / "model")
    others = [other for other in get_args(Allowed) if other != kind]
    for allowed in ([], others):
        with pytest.raises(CheckFailed):
            runs(shared | {"data.allow": allowed})
    run = runs(shared | {"data.allow": [kind]})
    assert prepared(run).findings.stopping() == [kind]
    assert steps(run) == 3


def test_drop(runs: Runs, tmp_path: Path):
    """A run goes on without the rows of what is dropped; each kind by itself is in tests/test_drop.py."""
    rows = [{"text": text} for text in ("one", "", "two", "one")]
    shared = {"data.train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    with pytest.raises(CheckFailed):
        runs(shared | {"data.drop": ["duplicate"]})
    for dropped, left in ((["empty"], [1, 3, 4]), (["empty", "duplicate"], [1, 3])):
        assert [each.row for each in prepared(runs(shared | {"data.drop": dropped})).train] == left


def test_cache(runs: Runs, tmp_path: Path):
    shared = {"data.cache": str(tmp_path / "cache")}
    run = runs(shared)
    (place,) = (tmp_path / "cache").iterdir()
    assert (place / "examples.arrow").is_file()
    assert not (run / "prepared").exists()
    written = (place / "examples.arrow").stat().st_mtime_ns
    other = runs(shared | {"train.learning_rate": 0.02})  # nothing of the data: it is there already
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("examples.arrow")] == [written]
    assert losses(run) == losses(runs({})) != losses(other)


def test_every_key_of_a_source(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Sources are no settings of their own: their keys are tested here."""
    import datasets
    from huggingface_hub import HfApi

    own = ["format", "columns", "train_on", "system"]
    assert list(SourceRecipe.model_fields) == ["path", "hub", "config", "split", "revision", "weight", *own]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_json(runs.names["sums"])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "c0ffee"}))
    sources = [
        {"hub": "owner/name"},
        {"hub": "owner/name", "config": "small"},
        {"hub": "owner/name", "split": "test"},
        {"hub": "owner/name", "revision": "v1"},
    ]
    hub = [runs({"data.train": source}) for source in sources]
    assert asked == [
        ("owner/name", None, "train", None),
        ("owner/name", "small", "train", None),
        ("owner/name", None, "test", None),
        ("owner/name", None, "train", "v1"),
    ]
    assert data_files(hub[1]) == {"owner/name[small]:train": "c0ffee"}
    assert all(losses(run) == losses(runs({})) for run in hub)  # the same rows, from a file
    assert kept_examples(runs({"data.train": {"path": "{sums}"}})) == 12
    assert kept_examples(runs({"data.train": {"path": "{sums}", "weight": 2}})) == 24
    assert kept_examples(runs({"data.train": {"path": "{sums}", "weight": 0.5}})) == 6
    both = {"path": "{both}", "format": "completion"}
    assert losses(runs({"data.train": both})) == losses(runs({}))
    assert first_loss(runs({"data.train": both | {"format": "text"}})) != first_loss(runs({}))
    renamed = {"path": "{renamed}", "columns": {"prompt": "question", "completion": "answer"}}
    assert losses(runs({"data.train": renamed})) == losses(runs({}))
    everything = runs({"data.train": {"path": "{sums}", "train_on": "all"}})
    assert losses(everything) == losses(runs({"data.train_on": "all"})) != losses(runs({}))
    told = {"path": "{chat}", "system": "You count."}
    wide = {"data.max_seq_len": 256}
    alone = runs(wide | {"data.train": told})
    assert losses(alone) == losses(runs(wide | {"data.train": "{chat}", "data.system": "You count."}))
    assert first_loss(alone) != first_loss(runs(wide | {"data.train": "{chat}"}))
    held = [{"path": "{other}"} | own for own in ({}, {"train_on": "all"})]
    scored = [json.loads((runs({"data.validation": each}) / "report.json").read_text()) for each in held]
    assert scored[0]["validation"] != scored[1]["validation"]


def test_z_loss_is_not_in_the_loss_that_is_shown(runs: Runs):
    """It pulls on the weights, so that of the first step, before it could, nothing shows."""
    plain, pulled = runs({}), runs({"train.z_loss": 0.5})
    assert first_loss(pulled) == first_loss(plain)
    assert losses(pulled)[1:] != losses(plain)[1:]


def test_micro_batch_size_auto(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """The step and its result stay; it is cut into as few micro-batches as fit."""
    from lora_cli.training import micro_batches

    own = micro_batches.training_loss
    sizes: list[int] = []

    def recorded(model: Any, batch: Any, **settings: Any) -> Any:
        sizes.append(batch.tokens)
        return own(model, batch, **settings)

    monkeypatch.setattr(micro_batches, "training_loss", recorded)
    settings = {"data.packing": False, "train.seed": 7}
    halves = runs(settings)
    assert len(sizes) == 3 * 2
    largest = {}
    for name, free_bytes in (("plenty", 2**40), ("little", 400_000)):
        sizes.clear()
        monkeypatch.setattr(micro_batches, "free_memory_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        auto = {"train.micro_batch_size": "auto", "train.batch_size": 4, "output": "{folder}/" + name}
        run = runs(settings | auto)
        assert tokens_per_step(run) == tokens_per_step(halves)
        assert losses(run) == pytest.approx(losses(halves), rel=1e-5)  # fp32: sums in another order
        assert sum(sizes[1:]) == sum(tokens_per_step(run))  # the first is a trial
        largest[name] = max(sizes)
        assert len(sizes) == 1 + 3 * (1 if name == "plenty" else 2)
    assert largest["little"] < 0.75 * largest["plenty"]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each LoRA layer that is computed with gradients, in micro-batches: evaluations and trials are none."""
    from lora_cli.training.micro_batches import MicroBatches

    forward, run, calls, within = LoRALinear.forward, MicroBatches.run, [], []

    def counted(self: LoRALinear, x: torch.Tensor) -> torch.Tensor:
        calls.extend([x.shape[1]] if within and torch.is_grad_enabled() else [])
        return forward(self, x)

    def running(self: MicroBatches, *args: Any) -> float:
        within.append(True)
        try:
            return run(self, *args)
        finally:
            within.pop()

    monkeypatch.setattr(LoRALinear, "forward", counted)
    monkeypatch.setattr(MicroBatches, "run", running)
    return calls


def test_gradient_checkpointing(runs: Runs, computed: list[int]):
    """Same result, but what lies inside a block is computed a second time in the backward pass."""
    settings = {"data.packing": False, "train.seed": 5}
    plain = runs(settings)
    once = len(computed)
    for mode in (True, "full", "selective", "offload"):
        computed.clear()
        shared = settings | {"train.gradient_checkpointing": mode}
        run = runs(shared | {"train.activation_memory": 1e-9} if mode == "selective" else shared)
        assert len(computed) == 2 * once, mode
        assert losses(run) == losses(plain)
        assert tensors(run) == tensors(plain)


def test_activation_memory(runs: Runs, computed: list[int], monkeypatch: pytest.MonkeyPatch):
    """Of two blocks none, one or both are computed again, as its GiB allow."""
    from lora_cli.base.activations import ActivationPlan

    plans: list[ActivationPlan] = []
    own = ActivationPlan.apply
    monkeypatch.setattr(ActivationPlan, "apply", lambda plan, blocks: (plans.append(plan), own(plan, blocks)))
    settings = {"train.gradient_checkpointing": "selective", "train.seed": 6}
    plain = runs(settings)
    once, each = len(computed), plans[0].bytes_per_token
    tokens = 2 * 64  # two packed rows at once, of at most max_seq_len
    assert not any(plans[0].recomputed), "80 % of what is free is more than enough"
    for gib, blocks in ((1, 0), (0.75 * tokens * sum(each) / 2**30, 1), (1e-9, 2)):
        computed.clear()
        run = runs(settings | {"train.activation_memory": gib})
        assert sum(plans[-1].recomputed) == blocks
        assert len(computed) == once + blocks * once // 2
        assert losses(run) == losses(plain)
        assert tensors(run) == tensors(plain)


def test_shard_base(runs: Runs):
    """One process has nobody to share with, which is said; what several do is in tests/test_processes.py."""
    with pytest.raises(LoraError, match=r"train\.shard_base spreads the base model over several processes"):
        runs({"train.shard_base": True})


def test_liger_kernel(runs: Runs):
    """There is nothing to run them on, which is said; what they do is in tests/test_liger.py."""
    with pytest.raises(LoraError, match=r"train\.liger_kernel: Liger's kernels need a CUDA or ROCm GPU"):
        runs({"train.liger_kernel": True, "device": "cpu"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch about its own tracing
def test_compile(runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The same but for rounding, from code that lies in the user's cache."""
    from torch._inductor.utils import clear_caches

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # which a run sets, and this gives back
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(AttentionInterface._global_mapping, PER_EXAMPLE, per_example_attention)
    torch.compiler.reset()
    clear_caches()  # what another test has compiled in this process would not be compiled again
    plain, compiled = runs({}), runs({"train.compile": True})
    torch.compiler.reset()
    assert [path for path in (tmp_path / "cache" / "lora" / "compiled").rglob("*.so")] != []
    assert {path.name for path in plain.iterdir()} == {path.name for path in compiled.iterdir()}
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)  # fused kernels sum in another order


def test_checkpoint_minutes(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Of three steps, those after which one is written; the last has its own anyway."""
    from lora_cli.training import writer

    own, after = writer.save_checkpoint, []

    def save(folder: Path, *arguments: Any, **settings: Any) -> None:
        after.append(folder.name)
        own(folder, *arguments, **settings)

    monkeypatch.setattr(writer, "save_checkpoint", save)
    seen = {}
    for minutes in (1e-9, 15, None):
        after.clear()
        runs({"train.checkpoint_minutes": minutes})
        seen[minutes] = list(after)
    last = ["step_000003"]
    assert seen == {1e-9: ["step_000001", "step_000002", *last], 15: last, None: last}


def test_patience(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Only the first of three evaluations is the best so far."""
    from lora_cli.training import validation

    own = validation.example_losses
    ran = {}
    for patience in (1, 2, 3, None):
        scores = iter([1.0, 0.5, 0.6, 0.6])  # of the base and of each step

        def scored(*arguments: Any, scores: Any = scores, **options: Any) -> Any:
            found, targets = own(*arguments, **options)
            return torch.full_like(found, next(scores)), targets

        monkeypatch.setattr(validation, "example_losses", scored)
        ran[patience] = len(losses(runs(VALIDATION | {"train.eval_every": 1, "train.patience": patience})))
    assert ran == {1: 2, 2: 3, 3: 3, None: 3}


def test_on_nan(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """The second of three steps has no loss: the run stops, or goes on without it, or without its data."""
    from lora_cli.training import micro_batches

    own, calls = micro_batches.training_loss, []

    def no_number(*arguments: Any, **settings: Any) -> Any:
        calls.append(True)
        found = own(*arguments, **settings)
        return tuple(each * float("nan") for each in found) if len(calls) == 3 else found

    monkeypatch.setattr(micro_batches, "training_loss", no_number)
    with pytest.raises(CheckFailed, match="the loss is nan at step 2"):
        runs({"output": "{folder}/stops"})
    seen = {}
    for choice in ("skip", "rewind"):
        calls.clear()
        run = runs({"train.on_nan": choice})
        seen[choice] = ["skipped" in line for line in read_metrics(run / "metrics.jsonl")]
    assert seen == {"skip": [False, True, False], "rewind": [False, False, False]}


def test_on_write_error(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """The first checkpoint finds no space: the run stops, or tries again."""
    from lora_cli.training import checkpoint, writer

    monkeypatch.setattr(writer, "_TRY_AGAIN_SECONDS", 0.01)
    own, calls = checkpoint.save_file, []

    def full_once(*arguments: Any, **settings: Any) -> None:
        calls.append(True)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        own(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save_file", full_once)
    with pytest.raises(LoraError, match="no space left on the disk"):
        runs({"output": "{folder}/full"})
    calls.clear()
    assert steps(runs({"train.on_write_error": "pause"})) == 3
    assert len(calls) == 1 + 3


def test_trackers(runs: Runs):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(LoraError, match="tensorboard is not installed"):
            runs({"trackers": ["tensorboard"]})
        return
    assert list(runs({}).rglob("events.out.*")) == []
    assert list(runs({"trackers": ["tensorboard"]}).rglob("events.out.*")) != []
