"""E8: the merged model is base + adapter, opened by transformers alone; a merge that is not, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import open_base, with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.opened import open_model
from lora_cli.base.source import find_base
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.merging.merge import merge
from lora_cli.studies import equalities

TOKENS = torch.tensor([[5, 9, 2, 77, 301, 40, 8, 8, 19, 250]])


def saved_adapter(base: Path, folder: Path, quantization: str, dtype: torch.dtype = torch.float32, **targets) -> Path:
    model = with_adapter(open_base(base, quantization, dtype), **({"target_modules": "all-linear"} | targets))
    folder.mkdir()
    save_adapter(model, folder, find_base(str(base)), quantization=quantization, double_quantization=True)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def tiny_neox(tmp_path_factory) -> Path:
    from tiny_model import save_tiny

    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_tiny(config, tmp_path_factory.mktemp("neox") / "tiny-neox")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2", "tiny_neox"])
def test_merged_model_is_base_plus_adapter(kind, quantization, tmp_path, request):
    base = request.getfixturevalue(kind)
    adapter = saved_adapter(base, tmp_path / "adapter", quantization)
    report = merge(adapter, tmp_path / "merged", dtype="fp32")
    assert equalities.merged(tmp_path / "merged", adapter) <= 1e-5
    assert report.kept > 0.99
    assert report.adapter_effect > 1e-3  # the adapter is not inert, or nothing is proved


def test_bf16_holds_what_it_can_and_says_how_much(tiny_llama, tmp_path):
    adapter = saved_adapter(tiny_llama, tmp_path / "adapter", "nf4", torch.bfloat16)
    report = merge(adapter, tmp_path / "merged", dtype="bf16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert 0.9 < report.kept <= 1
    assert report.onto == "trained"


def test_merge_onto_the_original_weights_is_original_plus_delta(tiny_llama, tmp_path):
    adapter = saved_adapter(tiny_llama, tmp_path / "adapter", "nf4")
    report = merge(adapter, tmp_path / "merged", dtype="fp32", onto="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    delta = open_model(None, adapter, dtype="fp32").model.model.layers[1].mlp.up_proj.delta_weight()
    expected = plain.model.layers[1].mlp.up_proj.weight + delta
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, expected, rtol=0, atol=1e-6)
    assert report.onto == "original"
    assert report.kl < 1e-6  # it is original weights + adapter
    assert report.kept > 0.99
    assert report.kl_trained > 1e-4  # it is another model than the trained one, and the report says so
    assert "from the model that was trained: KL" in report.lines()[1]


def test_merged_folder_is_ordinary(tiny_gpt2, tmp_path):
    adapter = saved_adapter(tiny_gpt2, tmp_path / "adapter", "nf4")
    merge(adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    } <= names
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    own = json.loads((tiny_gpt2 / "config.json").read_text())
    assert "quantization_config" not in config
    assert {key: config[key] for key in own if key not in ("dtype", "transformers_version")} == {
        key: own[key] for key in own if key not in ("dtype", "transformers_version")
    }
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_gpt2, tmp_path / "merged"))
    assert ours.chat_template == theirs.chat_template
    assert ours("select name")["input_ids"] == theirs("select name")["input_ids"]
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left


def test_merge_of_a_peft_adapter(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_rslora=True
    )
    peft = get_peft_model(model, config).eval()
    peft.save_pretrained(tmp_path / "peft")
    expected = logits(peft)
    merge(tmp_path / "peft", tmp_path / "merged", base=str(tiny_llama), dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_wrong_merge_is_refused_and_nothing_is_written(tiny_llama, tmp_path, monkeypatch):
    adapter = saved_adapter(tiny_llama, tmp_path / "adapter", "none")
    monkeypatch.setattr(
        LoRALinear, "delta_weight", lambda self, rows: -self.scaling * (self.lora_B[rows] @ self.lora_A)
    )
    with pytest.raises(CheckFailed, match=r"the merged model keeps \d+% of what the adapter changes"):
        merge(adapter, tmp_path / "merged", dtype="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_output_that_exists_is_left_alone(tiny_llama, tmp_path):
    adapter = saved_adapter(tiny_llama, tmp_path / "adapter", "none")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("mine")
    with pytest.raises(LoraError, match="already exists"):
        merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "precious.txt").read_text() == "mine"


def test_run_folder_merges_from_its_best_adapter(run_recipe, tmp_path):
    run, _ = run_recipe(quantization="nf4", dtype="auto", data={"validation": 0.25}, train={"max_steps": 6})
    report = merge(run, tmp_path / "merged")
    assert report.kept > 0.9
    assert report.layers == 8


def test_tied_embeddings_stay_tied(tiny_gpt2, tmp_path):
    adapter = saved_adapter(tiny_gpt2, tmp_path / "adapter", "nf4")
    merge(adapter, tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
