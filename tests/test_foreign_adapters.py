"""Adapters of other programs, and files that were mixed up: computed as PEFT does, or refused with a true fix."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import open_base, refusal, with_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lora_cli.adapters.file import CONFIG, TENSORS, attach_adapter, put_saved, read_adapter, save_adapter
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.source import find_base

TOKENS = torch.arange(3, 35).reshape(2, 16)


def load(base: Path, quantization: str = "none") -> Any:
    return open_base(base, quantization)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def ours(base: Path, folder: Path, **settings: Any) -> Any:
    model = with_adapter(load(base), scale=0.3, **settings)
    folder.mkdir()
    save_adapter(model, folder, find_base(str(base)), quantization="none", double_quantization=True)
    return model


def theirs(base: Path, folder: Path, *, config: Any = None, **settings: Any) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = config or peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    model: Any = peft.get_peft_model(plain, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model


def rewrite(folder: Path, edit: Any) -> None:
    with safe_open(folder / TENSORS, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(folder / TENSORS)
    tensors = edit(tensors) or tensors
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / TENSORS, metadata)


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


# One alpha


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"o_proj": 0.5, "model.layers.0.self_attn.q_proj": 11.0}},
        {"rank_stabilized": True, "rank_pattern": {"k_proj": 2}},
        {"target_modules": "all-linear", "alpha_pattern": {"down_proj": 64.0}},
    ],
)
def test_several_alphas_are_one_in_the_file(settings, tiny_llama, tmp_path):
    """llama.cpp's converter, SGLang and older vLLM read one alpha: with it alone every layer's update must be right."""
    model = ours(tiny_llama, tmp_path / "adapter", **settings)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    for name, layer in trained_modules(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert_close(config["lora_alpha"] / A.shape[0] * (B @ A), layer.delta_weight(), rtol=1e-5, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")), logits(model), rtol=0, atol=1e-5)
    again = load(tiny_llama)
    attach_adapter(again, read_adapter(tmp_path / "adapter"), find_base(str(tiny_llama)))
    assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    # back into the model that trained it, whose layers have their own alphas
    before = {name: layer.lora_B.clone() for name, layer in trained_modules(model).items()}
    put_saved(model, tmp_path / "adapter")
    for name, layer in trained_modules(model).items():
        assert_close(layer.lora_B, before[name], rtol=1e-6, atol=0)


def test_fused_layers_beside_others_have_one_alpha_too(tiny_gpt2, tmp_path):
    """`projections` doubles rank and alpha of the fused layer alone."""
    model = ours(tiny_gpt2, tmp_path / "adapter", projections=["q", "v", "o"])
    assert len({layer.alpha for layer in trained_modules(model).values()}) == 2
    with torch.no_grad():
        for layer in trained_modules(model).values():
            if layer.output_mask is not None:
                layer.lora_B.mul_(layer.output_mask)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter", find_base(str(tiny_gpt2)), quantization="none", double_quantization=True)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["alpha_pattern"] == {}
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")), logits(model), rtol=0, atol=1e-5)


def test_a_whole_alpha_is_written_as_a_whole_number(tiny_llama, tmp_path):
    ours(tiny_llama, tmp_path / "whole", alpha=16.0)
    ours(tiny_llama, tmp_path / "half", alpha=0.5)
    assert '"lora_alpha": 16,' in (tmp_path / "whole" / CONFIG).read_text()
    assert '"lora_alpha": 0.5,' in (tmp_path / "half" / CONFIG).read_text()


# A configuration of another run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 8}, "8 of 8 layers have another rank"),
        ({"rank_pattern": {"q_proj": 2}}, "2 of 8 layers have another rank"),
        ({"lora_alpha": 16}, "saved for lora_alpha 8, but it has 16"),
        ({"alpha_pattern": {"q_proj": 1}}, "saved for lora_alpha 8"),
    ],
)
def test_a_configuration_of_another_run_is_refused(settings, says, tiny_llama, tmp_path):
    model = ours(tiny_llama, tmp_path / "adapter")
    kept = (tmp_path / "adapter" / CONFIG).read_bytes()
    change(tmp_path / "adapter", **settings)
    error = refusal(lambda: read_adapter(tmp_path / "adapter"))
    assert "adapter_config.json does not belong to these tensors" in error.what
    assert says in error.what
    (tmp_path / "adapter" / CONFIG).write_bytes(kept)  # the fix
    again = load(tiny_llama)
    attach_adapter(again, read_adapter(tmp_path / "adapter"), find_base(str(tiny_llama)))
    assert torch.equal(logits(again), logits(model))


def test_ranks_of_a_peft_adapter_are_compared_too(tiny_llama, tmp_path):
    theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    read_adapter(tmp_path / "theirs")
    change(tmp_path / "theirs", rank_pattern={})
    error = refusal(lambda: read_adapter(tmp_path / "theirs"))
    assert error.details[0] == "model.layers.0.self_attn.v_proj: rank 2, but the configuration says 4"


# Metadata


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization", "evil"),
        ("method", "dora"),
        ("prompting", "yes"),
        ("compute_dtype", "int3"),
        ("adapter_format", "3"),
        ("adapter_format", "["),
        ("base_fingerprint", "../../x"),
        ("unquantized_modules", '{"a": 1}'),
        ("unquantized_modules", "[" * 100_000),
        ("double_quantization", "maybe"),
        ("alpha", "much"),
    ],
)
def test_unknown_values_of_the_metadata_are_refused(key, value, tiny_llama, tmp_path):
    ours(tiny_llama, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / TENSORS, "pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(tmp_path / "adapter" / TENSORS), tmp_path / "adapter" / TENSORS, metadata | {key: value})
    assert key in refusal(lambda: read_adapter(tmp_path / "adapter")).what


def test_metadata_of_the_first_format_are_read_as_made_before(tiny_llama, tmp_path):
    ours(tiny_llama, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / TENSORS, "pt") as stored:
        metadata = stored.metadata()
    old = {key: metadata[key] for key in ("format", "base_model", "base_fingerprint")}
    old |= {"base_revision": "", "quantization": "nf4", "double_quantization": "false"}
    save_file(load_file(tmp_path / "adapter" / TENSORS), tmp_path / "adapter" / TENSORS, old)
    stored_adapter = read_adapter(tmp_path / "adapter")
    said = stored_adapter.metadata
    assert (said.quantization, said.double_quantization) == ("nf4", False)
    assert stored_adapter.base_revision is None
    assert {said.method, said.prompting, said.compute_dtype, said.unquantized_modules is None} == {None, True}


# Names and extra tensors


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._orig_mod."),
        lambda key: "module." + key,
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".layers.", "._checkpoint_wrapped_module.layers."),
    ],
)
def test_what_wrappers_leave_in_the_names_is_read_past(rename, tiny_llama, tmp_path):
    model = theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path / "theirs", lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    again = load(tiny_llama)
    attach_adapter(again, read_adapter(tmp_path / "theirs"), find_base(str(tiny_llama)))
    assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_two_adapters_in_one_file_are_refused(tiny_llama, tmp_path):
    theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"])
    rewrite(
        tmp_path / "theirs",
        lambda tensors: {
            key.replace(".weight", f".{name}.weight"): tensor
            for key, tensor in tensors.items()
            for name in ("one", "two")
        },
    )
    assert "more than one adapter: one, two" in refusal(lambda: read_adapter(tmp_path / "theirs")).what


def test_the_same_tensor_twice_is_not_called_several_adapters(tiny_llama, tmp_path):
    theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"])
    rewrite(tmp_path / "theirs", lambda tensors: tensors | {f"module.{key}": each for key, each in tensors.items()})
    assert "is in the file twice" in refusal(lambda: read_adapter(tmp_path / "theirs")).what


def test_a_use_of_a_newer_peft_is_not_read_past(tiny_llama, tmp_path):
    theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"])
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_new": False}))
    read_adapter(path.parent)
    path.write_text(json.dumps(config | {"use_new": True}))
    assert refusal(lambda: read_adapter(path.parent)).details == ["use_new: True"]
    for change in (
        {"lora_dropout": "half"},
        {"lora_dropout": math.nan},
        {"use_rslora": "false"},
        {"fan_in_fan_out": 1},
    ):
        path.write_text(json.dumps(config | change))
        assert f"is not valid: {next(iter(change))}" in refusal(lambda: read_adapter(path.parent)).what


def test_a_lookahead_in_target_modules_means_what_it_means_to_peft(tiny_llama, tmp_path):
    """PEFT matches the whole name; with a prefix before it the lookahead could be stepped over."""
    pattern = r"(?!.*layers\.0\.).*\.(q|v)_proj"
    model = theirs(tiny_llama, tmp_path / "theirs", target_modules=pattern)
    again = load(tiny_llama)
    layers = attach_adapter(again, read_adapter(tmp_path / "theirs"), find_base(str(tiny_llama)))
    assert set(layers) == {f"model.layers.1.self_attn.{part}_proj" for part in "qv"}
    assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_copies_of_the_bases_head_are_read_past_and_others_refused(tiny_llama, tmp_path):
    """With lm_head among the targets PEFT adds the head's own weights to the file."""
    model = theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in key for key in load_file(tmp_path / "theirs" / TENSORS))
    again = load(tiny_llama)
    attach_adapter(again, read_adapter(tmp_path / "theirs"), find_base(str(tiny_llama)))
    assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    rewrite(tmp_path / "theirs", lambda t: {key: each + 1 if "base_layer" in key else each for key, each in t.items()})
    error = refusal(
        lambda: attach_adapter(load(tiny_llama), read_adapter(tmp_path / "theirs"), find_base(str(tiny_llama)))
    )
    assert "brings weights of its own for lm_head.weight" in error.what


KINDS = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM",
        init_ia3_weights=False,
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
    "dora": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False
    ),
    "embedding": lambda: peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    ),
    "saved head": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_fix_for_what_only_peft_computes_gives_a_model_that_computes_it(
    kind, tiny_llama, tmp_path, monkeypatch, lora
):
    model = theirs(tiny_llama, tmp_path / "their adapter", config=KINDS[kind]())
    error = refusal(lambda: open_model(None, tmp_path / "their adapter", device="cpu"))
    command = shlex.split(re.sub(".*: python", "python", str(error.fix)))
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(command[2])
    opened = open_model("merged", None, device="cpu", dtype="fp32")
    before = logits(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    assert (logits(model) - before).abs().max() > 1e-3, "the adapter does something"
    assert_close(logits(opened.model), logits(model), rtol=0, atol=1e-4)
    assert ("lora diff" in str(error.fix)) == (kind == "dora")
    if kind == "dora":  # its dense update, as an adapter that can be combined
        words = shlex.split(str(error.fix).split("magnitudes: lora ")[1].split("): python")[0])
        assert lora(*words).code == 0
        assert lora("combine", "FOLDER", "--output", tmp_path / "again").code == 0
        again = load(tiny_llama)
        attach_adapter(again, read_adapter(tmp_path / "again"), find_base(str(tiny_llama)))
        assert (logits(again) - logits(model)).abs().max() < 0.3 * (before - logits(model)).abs().max()


def test_prompt_tuning_is_said_to_be_no_change_of_weights(tiny_llama, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "theirs")
    error = refusal(lambda: read_adapter(tmp_path / "theirs"))
    assert "PROMPT_TUNING" in error.what
    assert "use it with PEFT itself" in str(error.fix)


def test_the_fix_for_a_pickled_adapter_makes_one_that_opens(tiny_llama, tmp_path):
    model = theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"])
    torch.save(load_file(tmp_path / "theirs" / TENSORS), tmp_path / "theirs" / "adapter_model.bin")
    (tmp_path / "theirs" / TENSORS).unlink()
    error = refusal(lambda: read_adapter(tmp_path / "theirs"))
    assert "pickles can run code" in error.what
    command = shlex.split(re.sub(".*: python", "python", str(error.fix)))
    exec(command[2])
    again = load(tiny_llama)
    attach_adapter(again, read_adapter(tmp_path / "theirs"), find_base(str(tiny_llama)))
    assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


# The base


def test_a_peft_adapter_that_names_another_model_shows_both_names(tiny_llama, tmp_path):
    theirs(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"])
    change(tmp_path / "theirs", base_model_name_or_path="someone/else-7b")
    opened = open_model(str(tiny_llama), tmp_path / "theirs", device="cpu")
    assert opened.notes == [f"the adapter names someone/else-7b as its base, and is used on {tiny_llama}, as asked"]
    assert open_model(str(tiny_llama), None, device="cpu").notes == []


def test_a_template_of_the_adapter_is_text_of_its_own(tiny_llama, tmp_path):
    ours(tiny_llama, tmp_path / "adapter")
    template = tmp_path / "adapter" / "chat_template.jinja"
    template.write_bytes(b"\xff\xfe{{ messages }}")
    error = refusal(lambda: open_model(None, tmp_path / "adapter", device="cpu"))
    assert "not text in UTF-8" in error.what
    template.unlink()
    (tmp_path / "secret").write_text("private")
    template.symlink_to(tmp_path / "secret")
    assert "leads out of this folder" in refusal(lambda: open_model(None, tmp_path / "adapter", device="cpu")).what


def test_tensors_that_the_class_does_not_use_are_said(tiny_llama, tmp_path):
    """Biases against the configuration: the model computes without them."""
    import shutil

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (note,) = open_model(str(base), None, device="cpu").notes
    assert note.startswith("1 tensors of the checkpoint are not used")
    assert "model.layers.0.self_attn.q_proj.bias" in note
