"""The adapter file: opened by PEFT it computes what we compute, and PEFT's opened by us what PEFT computes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import open_base, refusal, save_tiny, with_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

from lora_cli.adapters.file import CONFIG, TENSORS, attach_adapter, read_adapter, save_adapter
from lora_cli.adapters.trained import trained_modules, trained_parameters
from lora_cli.base.source import BaseSource, find_base
from lora_cli.studies.equalities import by_transformers, opened_by_peft, opened_by_us

IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
WIDE = IDS | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2),
    "phi3": lambda: Phi3Config(**WIDE, num_key_value_heads=2),
    "gpt-neox": lambda: GPTNeoXConfig(**WIDE),
    "gpt2": lambda: GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], BaseSource]:
    root = tmp_path_factory.mktemp("bases")

    def base(name: str) -> BaseSource:
        if not (root / name).exists():
            save_tiny(MODELS[name](), root / name, tokenizer=tokenizer)
        return find_base(str(root / name))

    return base


def load(base: BaseSource, quantization: str = "none") -> Any:
    return open_base(base.folder, quantization)


def trained(base: BaseSource, target_modules: Any = "attention", quantization: str = "none", **settings: Any) -> Any:
    """A model with a random adapter, as after training: B is zero where a mask says so."""
    model = with_adapter(load(base, quantization), target_modules, scale=0.3, **({"alpha": 6.0} | settings))
    with torch.no_grad():
        for layer in trained_modules(model).values():
            if layer.output_mask is not None:
                layer.lora_B.mul_(layer.output_mask)
    return model


def save(model: Any, folder: Path, base: BaseSource, quantization: str = "none") -> Path:
    folder.mkdir()
    save_adapter(model, folder, base, quantization=quantization, double_quantization=True)
    return folder


@pytest.fixture
def saved(base_of, tmp_path) -> Path:
    """An adapter of ours on the tiny Llama."""
    return save(trained(base_of("llama")), tmp_path / "adapter", base_of("llama"))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def change(folder: Path, **settings: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | settings))


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a stored adapter, keeping its metadata."""
    with safe_open(folder / TENSORS, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / TENSORS, metadata)


def refused(act: Callable[[], Any]) -> str:
    return str(refusal(act))


# E9: ours, opened by PEFT


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"projections": ["q", "v"]}),
        ("llama", {"rank_pattern": {"q_proj": 2, "model.layers.1.self_attn.v_proj": 7}}),
        ("llama", {"alpha_pattern": {"o_proj": 0.5, "model.layers.0.self_attn.q_proj": 11.0}}),
        ("llama", {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {r".*\.1\..*": 3.0}}),
        ("llama", {"layers": [-1]}),
        ("llama", {"target_modules": "all-linear", "layers": [0], "exclude_modules": ["up_proj"]}),
        ("llama", {"target_modules": [r".*\.0\.self_attn\.[qk]_proj", r".*\.1\.mlp\.down_proj"]}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": "all-linear"}),  # attn.c_proj and mlp.c_proj
        ("gpt2", {"projections": ["q", "v"]}),
        ("gpt2", {"projections": ["v"], "layers": [1]}),
        ("phi3", {"projections": ["q", "v"]}),
        ("phi3", {"projections": ["q", "v"], "rank_pattern": {".*1.self_attn.qkv_proj": 2}}),
        ("gpt-neox", {"projections": ["q", "v"]}),
        ("gpt-neox", {"projections": ["k", "o"]}),
    ],
)
def test_peft_opens_ours_and_computes_the_same(name, settings, base_of, tmp_path):
    base = base_of(name)
    model = trained(base, **settings)
    folder = save(model, tmp_path / "adapter", base)
    plain = by_transformers(base.folder)
    before = logits(plain)
    theirs: Any = peft.PeftModel.from_pretrained(plain, folder)
    assert (logits(model) - before).abs().max() > 0.1 * before.std(), "the adapter does something"
    assert opened_by_peft(model, theirs) <= 5e-6  # sums in another order
    wrapped = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert wrapped == {f"base_model.model.{name}" for name in trained_modules(model)}
    for path, layer in trained_modules(model).items():
        delta = theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        assert_close(delta.T if name == "gpt2" else delta, layer.delta_weight(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_opens_ours_on_the_quantized_base(name, base_of, tmp_path):
    """Also GPT-2, whose transposed layers bitsandbytes turns into its own."""
    base = base_of(name)
    model = trained(base, quantization="nf4")
    folder = save(model, tmp_path / "adapter", base, "nf4")
    assert opened_by_peft(model, peft.PeftModel.from_pretrained(load(base, "nf4"), folder)) <= 5e-6
    stored = read_adapter(folder)
    assert (stored.metadata.quantization, stored.metadata.double_quantization) == ("nf4", True)


# E9: PEFT's, opened by us


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2, "1.self_attn.k_proj": 7}}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 3, r"0\.self_attn\.q_proj": 9}}),
        (
            "llama",
            {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}
            | {"alpha_pattern": {"v_proj": 5}},
        ),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
        ("llama", {"target_modules": r".*\.1\.(self_attn\.q|mlp\.up)_proj"}),
        ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True, "use_rslora": True}),
        ("phi3", {"target_modules": ["qkv_proj"]}),
        ("gpt-neox", {"target_modules": ["query_key_value", "dense"]}),
    ],
)  # fmt: skip
def test_we_open_what_peft_made_and_compute_the_same(name, settings, base_of, tmp_path):
    base = base_of(name)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    theirs: Any = peft.get_peft_model(by_transformers(base.folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model = load(base)
    before = logits(model)
    assert opened_by_us(theirs, tmp_path / "theirs", model, base) <= 5e-6
    assert (logits(model) - before).abs().max() > 0.1 * before.std()
    for path, layer in trained_modules(model).items():
        scaling = theirs.get_submodule(f"base_model.model.{path}").scaling["default"]
        assert layer.scaling == pytest.approx(scaling, rel=1e-12)
    # Once more through our own file, which has no rslora and no patterns of theirs.
    again = load(base)
    attach_adapter(again, read_adapter(save(model, tmp_path / "ours", base)), base)
    # alpha · √rank / rank may round, and so may B where it carries the ratio of two alphas
    assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-5)


# What is written


def test_the_folder_holds_two_files_with_the_adapter_alone(base_of, saved):
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, TENSORS]
    tensors = load_file(saved / TENSORS)
    expected = {
        f"base_model.model.model.layers.{block}.self_attn.{part}_proj.lora_{side}.weight"
        for block in (0, 1)
        for part in "qkvo"
        for side in "AB"
    }
    assert set(tensors) == expected
    outputs = {"q": 32, "k": 16, "v": 16, "o": 32}
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        part = re.search(r"(.)_proj", key)
        assert part is not None
        assert tensor.shape == ((4, 32) if key.endswith("A.weight") else (outputs[part[1]], 4))
    base = base_of("llama")
    with safe_open(saved / TENSORS, "pt") as stored:
        assert stored.metadata() == {
            "format": "pt",
            "base_model": base.name,
            "base_fingerprint": base.fingerprint,
            "quantization": "none",
            "double_quantization": "true",
            "adapter_format": "2",
            "compute_dtype": "fp32",
            "method": "lora",
            "alpha": "6.0",
        }


def test_the_same_adapter_is_written_with_the_same_bytes(base_of, saved, tmp_path):
    other = save(trained(base_of("llama")), tmp_path / "other", base_of("llama"))
    for name in (TENSORS, CONFIG):
        assert (saved / name).read_bytes() == (other / name).read_bytes()


def test_configuration_is_what_other_programs_read(base_of, tmp_path):
    """vLLM's PEFTHelper and llama.cpp's convert_lora_to_gguf.py, by the fields that they use."""
    base = base_of("llama")
    model = trained(base, projections=["q", "v"])
    folder = save(model, tmp_path / "adapter", base)
    config = config_of(folder)
    # vLLM: r, lora_alpha and target_modules are required; others must be what it can serve.
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6.0, ["q_proj", "v_proj"])
    assert (config["bias"], config["modules_to_save"], config["use_rslora"], config["use_dora"]) == (
        "none", None, False, False,
    )  # fmt: skip
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    # llama.cpp: the scale is lora_alpha / rank, the base is found by its path, tensors by the end of their names.
    assert config["base_model_name_or_path"] == base.name
    for key in load_file(folder / TENSORS):
        name = key.replace("base_model.model.", "")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        layer = name.replace(".lora_A.weight", "").replace(".lora_B.weight", "")
        assert f"{layer}.weight" in load_file(base.folder / "model.safetensors")
    theirs = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(theirs, peft.LoraConfig)
    assert {key for key in config if not hasattr(theirs, key)} == set(), "PEFT knows every key that we write"


@pytest.mark.parametrize(
    ("settings", "rank", "alpha", "ranks", "alphas"),
    [
        ({}, 4, 6.0, {}, {}),
        ({"rank_pattern": {"q_proj": 2}}, 4, 6.0, {0: 2, 1: 2}, {}),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1.0}}, 4, 6.0, {}, {}),
    ],
)
def test_patterns_hold_the_exceptions_by_full_name(settings, rank, alpha, ranks, alphas, base_of, tmp_path):
    settings = {
        key: {name.replace("layers.1", "model.layers.1"): value for name, value in pattern.items()}
        for key, pattern in settings.items()
    }
    config = config_of(save(trained(base_of("llama"), **settings), tmp_path / "adapter", base_of("llama")))
    assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    q = "model.layers.{}.self_attn.q_proj"
    assert config["rank_pattern"] == {q.format(block): value for block, value in ranks.items()}
    assert config["alpha_pattern"] == {q.format(block): value for block, value in alphas.items()}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("llama", {"layers": [1], "target_modules": ["q_proj"]}, ["model.layers.1.self_attn.q_proj"]),
        ("gpt2", {"target_modules": ["attn.c_proj"]}, [f"transformer.h.{block}.attn.c_proj" for block in (0, 1)]),
        ("gpt2", {"target_modules": "all-linear"}, ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_target_modules_are_short_where_that_means_the_same(name, settings, expected, base_of, tmp_path):
    config = config_of(save(trained(base_of(name), **settings), tmp_path / "adapter", base_of(name)))
    assert config["target_modules"] == expected
    assert config["fan_in_fan_out"] == (name == "gpt2")


# Save, then load


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_saved_and_loaded_is_bitwise_the_same(name, quantization, base_of, tmp_path):
    base = base_of(name)
    model = trained(base, quantization=quantization, projections=["q", "v"], rank_pattern={".*1.*": 3})
    folder = save(model, tmp_path / "adapter", base, quantization)
    other = load(base, quantization)
    attach_adapter(other, read_adapter(folder), base)
    pairs = zip(trained_modules(model).items(), trained_modules(other).items(), strict=True)
    for (path, one), (same_path, two) in pairs:
        assert path == same_path
        assert (one.rank, one.alpha, one.scaling) == (two.rank, two.alpha, two.scaling)
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, two.lora_B)
    assert torch.equal(logits(model), logits(other))
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in trained_parameters(other)}


def test_half_precision_adapters_of_others_become_fp32_masters(base_of, saved):
    rewrite(saved, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    model = load(base_of("llama"))
    for layer in attach_adapter(model, read_adapter(saved), base_of("llama")).values():
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


# The right base, and no other


def test_another_base_is_refused_with_both_names(base_of, saved, tmp_path, tokenizer):
    """A fine-tuned sibling: the same names and shapes, so that only its weights tell."""
    folder = shutil.copytree(base_of("llama").folder, tmp_path / "sibling")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sibling, original = find_base(str(folder)), base_of("llama")
    assert sibling.fingerprint != original.fingerprint
    message = refused(lambda: attach_adapter(load(sibling), read_adapter(saved), sibling))
    assert "trained on another base model" in message
    assert original.name in message.split("fix:")[0]
    assert sibling.name in message
    assert f"fix: use the base model {original.name}" in message


def test_every_tensor_of_the_base_counts(base_of, tmp_path):
    """A change of any one tensor's middle, its name or its type is another base."""
    base = base_of("llama")
    tensors = load_file(base.folder / "model.safetensors")
    folder = shutil.copytree(base.folder, tmp_path / "changed")
    seen = {base.fingerprint}
    for key, tensor in tensors.items():
        save_file(tensors | {key: tensor * 1.01}, folder / "model.safetensors", {"format": "pt"})
        seen.add(find_base(str(folder)).fingerprint)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    seen.add(find_base(str(folder)).fingerprint)
    renamed = {key if key != first else "other": t for key, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    seen.add(find_base(str(folder)).fingerprint)
    assert len(seen) == len(tensors) + 3


def test_a_resharded_base_is_the_same_base(base_of, saved, tmp_path):
    base = base_of("llama")
    AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).save_pretrained(
        tmp_path / "sharded", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    sharded = find_base(str(tmp_path / "sharded"))
    assert sharded.fingerprint == base.fingerprint
    # Also with neighbours in different files, in another order.
    tensors, folder = load_file(base.folder / "model.safetensors"), shutil.copytree(base.folder, tmp_path / "mixed")
    (folder / "model.safetensors").unlink()
    files = {key: f"part-{at % 3}.safetensors" for at, key in enumerate(reversed(tensors))}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in files if files[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert find_base(str(folder)).fingerprint == base.fingerprint
    model = load(sharded)
    attach_adapter(model, read_adapter(saved), sharded)
    assert torch.equal(logits(model), logits(trained(base)))


def test_without_a_fingerprint_names_and_shapes_decide(base_of, saved):
    stored = read_adapter(saved)
    stored = replace(stored, metadata=stored.metadata.model_copy(update={"base_fingerprint": None}))
    attach_adapter(load(base_of("llama")), stored, base_of("llama"))
    message = refused(lambda: attach_adapter(load(base_of("gpt2")), stored, base_of("gpt2")))
    assert f"(of {base_of('llama').name}) does not fit {base_of('gpt2').name}: 8 layers differ" in message
    assert "model.layers.0.self_attn.k_proj: A (4, 32), B (16, 4), but there is no such linear layer" in message


# Refusals


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Adapter 'default'. 2 LoRA tensor")
def test_what_peft_can_and_we_cannot_is_refused(settings, base_of, tmp_path):
    """Written by PEFT itself: opened as plain LoRA, each of these would compute something else."""
    plain = AutoModelForCausalLM.from_pretrained(base_of("llama").folder, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "theirs")
    message = refused(lambda: read_adapter(tmp_path / "theirs"))
    (key,) = settings
    assert "the adapter uses what this program cannot compute" in message
    assert f"{key}: {settings[key]}" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5]},
        {"target_parameters": ["experts.down_proj"]},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 2}},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "loftq"},
    ],
)
def test_further_settings_that_change_the_computation_are_refused(settings, saved):
    change(saved, **settings)
    message = refused(lambda: read_adapter(saved))
    assert str(saved / CONFIG) in message
    assert next(iter(settings)) in message
    assert ("PEFT cannot merge it" in message) == ("use_qalora" in settings)


def test_other_kinds_of_adapters_are_refused(base_of, saved, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base_of("llama").folder, dtype=torch.float32)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "ia3")
    assert "this is a IA3 adapter; only LORA can be opened" in refused(lambda: read_adapter(tmp_path / "ia3"))
    change(saved, lora_alpha="16")
    assert "lora_alpha is '16', not a finite number" in refused(lambda: read_adapter(saved))


A, B = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
)  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(A), "model.layers.0.self_attn.q_proj has only one of lora_A and lora_B"),
        (lambda t: t.clear(), "the adapter file holds no tensors of an adapter"),
        (lambda t: t.update({A.replace("lora_A", "lora_embedding_A"): t[A]}), "is not the A or B of a linear layer"),
        (lambda t: t.update({A: t[A].reshape(-1)}), "q_proj.lora_A.weight (128,) is not the A or B of a linear layer"),
    ],
)
def test_a_file_that_is_no_set_of_pairs_is_refused(edit, said, saved):
    rewrite(saved, edit)
    message = refused(lambda: read_adapter(saved))
    assert said in message
    assert str(saved / TENSORS) in message


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: (t.pop(A), t.pop(B)), "model.layers.0.self_attn.q_proj: in target_modules, but not in the file"),
        (
            lambda t: t.update({k.replace("0.self_attn", "7.self_attn"): t[k] for k in (A, B)}),
            "model.layers.7.self_attn.q_proj: A (4, 32), B (32, 4), but there is no such linear layer",
        ),
        (
            lambda t: t.update({k.replace("self_attn.q_proj", "input_layernorm"): t[k] for k in (A, B)}),
            "model.layers.0.input_layernorm: A (4, 32), B (32, 4), but there is no such linear layer",
        ),
        (
            lambda t: t.update({A: torch.ones(4, 31)}),
            "model.layers.0.self_attn.q_proj: A (4, 31), B (32, 4), but the layer is 32 → 32",
        ),
        (
            lambda t: t.update({B: torch.ones(16, 4)}),
            "model.layers.0.self_attn.q_proj: A (4, 32), B (16, 4), but the layer is 32 → 32",
        ),
        (
            lambda t: t.update({B: torch.ones(32, 3)}),
            "model.layers.0.self_attn.q_proj: A (4, 32), B (32, 3), but the layer is 32 → 32",
        ),
    ],
)
def test_missing_extra_and_misshaped_tensors_are_refused(edit, said, base_of, saved):
    rewrite(saved, edit)
    model = load(base_of("llama"))
    before = logits(model)
    message = refused(lambda: attach_adapter(model, read_adapter(saved), base_of("llama")))
    assert "1 layers differ" in message
    assert said in message
    assert not trained_modules(model), "nothing was attached"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(keep, saved):
    path = saved / TENSORS
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(lambda: read_adapter(saved))
    assert "damaged or incomplete adapter file" in message
    assert str(path) in message


def test_what_is_missing_or_unreadable_in_the_folder_is_said(saved):
    (saved / CONFIG).rename(saved / "kept.json")
    assert f"no adapter here: {CONFIG} is missing" in refused(lambda: read_adapter(saved))
    for text in ("{", "[]", ""):
        (saved / CONFIG).write_text(text)
        assert "configuration is not valid" in refused(lambda: read_adapter(saved))
    (saved / "kept.json").rename(saved / CONFIG)
    (saved / TENSORS).unlink()
    assert f"the adapter folder has no {TENSORS}" in refused(lambda: read_adapter(saved))
    (saved / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin is pickled and is not opened" in refused(lambda: read_adapter(saved))
