"""`lora convert`: other layouts hold the same numbers, and the way back brings every bit."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_base, refusal, save_tiny, with_adapter
from environments import environment
from safetensors.torch import load_file, save_file
from test_combine import assert_same, theirs, updates
from torch.testing import assert_close
from transformers import AutoConfig

from lora_cli.adapters.file import read_adapter, save_adapter
from lora_cli.base.source import find_base
from lora_cli.studies.convert import _renamed


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    model = with_adapter(open_base(tiny_llama), "all-linear", rank=3, alpha=7.0)
    options: Any = {"prompting": "template", "chat_template": "{{ messages }}"}
    base = find_base(str(tiny_llama))
    save_adapter(model, tmp_path / "adapter", base, quantization="none", double_quantization=True, **options)
    return tmp_path / "adapter"


def content(folder: Path) -> tuple[dict[str, torch.Tensor], Any, str]:
    found = read_adapter(folder)
    config = {key: value for key, value in found.config.items() if value not in (None, [], {}, "none", False)}
    return load_file(folder / "adapter_model.safetensors"), config, found.metadata.model_dump_json()


def test_there_and_back_every_bit_is_the_same(adapter: Path, tmp_path: Path, lora: Any):
    assert lora("convert", adapter, "--to", "mlx", "--output", tmp_path / "mlx").code == 0
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 3
    assert config["lora_parameters"]["scale"] == pytest.approx(7 / 3)
    assert config["num_layers"] == -1
    stored, right = load_file(tmp_path / "mlx" / "adapters.safetensors"), updates(adapter)
    assert len(stored) == 2 * len(right)
    for name, update in right.items():  # as mlx-lm computes it: x @ a @ b
        product = (
            config["lora_parameters"]["scale"] * stored[f"{name}.lora_a"].double() @ stored[f"{name}.lora_b"].double()
        )
        assert_close(product.T, update, rtol=1e-6, atol=1e-7)
        assert name.removeprefix("model.layers.")[2:] in config["lora_parameters"]["keys"]
    assert lora("convert", tmp_path / "mlx", "--to", "peft", "--output", tmp_path / "back").code == 0
    (one, settings, metadata), (other, *same) = content(adapter), content(tmp_path / "back")
    assert [settings, metadata] == same
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert lora("merge", tmp_path / "back", "--output", tmp_path / "merged", "--proof", "none").code == 0


def test_gpt2_there_and_back(tiny_gpt2: Path, tmp_path: Path, lora: Any):
    (tmp_path / "gpt2").mkdir()
    model = with_adapter(open_base(tiny_gpt2), "all-linear", rank=2)
    save_adapter(model, tmp_path / "gpt2", find_base(str(tiny_gpt2)), quantization="none", double_quantization=True)
    assert lora("convert", tmp_path / "gpt2", "--to", "mlx", "--output", tmp_path / "mlx").code == 0
    assert {name[:8] for name in load_file(tmp_path / "mlx" / "adapters.safetensors")} == {"model.h."}
    keys = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert lora("convert", tmp_path / "mlx", "--to", "peft", "--output", tmp_path / "back").code == 0
    (one, *settings), (other, *same) = content(tmp_path / "gpt2"), content(tmp_path / "back")
    assert settings == same
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["transformer.h.0.attn.q_proj", "transformer.h.12.mlp.fc_in"], "model.h"),
        (["gpt_neox.layers.3.attention.query_key_value"], "model.h"),
        (["gpt_neox.layers.3.mlp.dense_4h_to_h"], "model.h"),
        (["model.layers.0.linear_attn.in_proj_qkv", "model.layers.3.mlp.up_proj"], "language_model.model.layers"),
        (["model.language_model.layers.7.mlp.up_proj"], "language_model.model.layers"),
        (["model.layers.0.linear_attn.in_proj_qkvz"], "model.layers"),
    ],
)
def test_names_of_layers_there_and_back(names: list[str], start: str):
    there = _renamed(names, 0, Path(), "{}", "")
    assert all(there[name] == start + name[re.search(r"\.\d", name).start() :] for name in names)  # type: ignore[union-attr]
    assert [*_renamed([*there.values()], 1, Path(), "{}", "").values()] == names


@pytest.mark.parametrize(
    "odd",
    [
        "transformer.h.0.attn.attention.q_proj",  # Exaone, whose name it is in mlx-lm, too
        "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.0.mlp.switch_mlp.up_proj",
        "model.language_model.per_layer_model_projection",
        "backbone.layers.0.mixer.x_proj",  # Mamba, which mlx-lm 0.32 computes otherwise
        "lm_head",
    ],
)
def test_a_name_that_is_not_known_is_refused_with_it(odd: str):
    one = "model.language_model.layers.0.q" if "language" in odd else "model.layers.0.mlp.up_proj"
    for names, source in (([odd], 0), ([odd], 1), ([one, odd], 0), ([odd, one], 0)):
        assert refusal(lambda n=names, s=source: _renamed(n, s, Path(), "{}", "merge it")).what == odd


def test_several_ranks_and_scales_are_one_in_mlx(tiny_llama: Path, tmp_path: Path, lora: Any):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}, "layers_to_transform": [1]}
    one = theirs(
        tiny_llama, tmp_path / "one", target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True, **patterns
    )
    said = lora("convert", one, "--to", "mlx", "--output", tmp_path / "mlx").out
    assert "one rank for all layers" in said
    assert "one scale for all layers" in said
    assert lora("convert", tmp_path / "mlx", "--to", "peft", "--output", tmp_path / "back").code == 0
    assert_same(updates(tmp_path / "back"), updates(one))


def test_what_others_leave_in_names_is_read(tiny_llama: Path, tmp_path: Path, lora: Any):
    one = theirs(tiny_llama, tmp_path / "one", target_modules=["q_proj"], use_rslora=True)
    right, path = load_file(one / "adapter_model.safetensors"), one / "adapter_model.safetensors"
    for number, rename in enumerate(
        (
            lambda name: name.replace(".weight", ".default.weight"),  # a state dict saved whole
            lambda name: name.removeprefix("base_model.model."),
            lambda name: f"module.{name}".replace("model.layers", "model._orig_mod.layers"),
        )
    ):
        save_file({rename(name): tensor for name, tensor in right.items()}, path)
        assert lora("convert", one, "--to", "peft", "--output", tmp_path / f"{number}").code == 0
        made = load_file(tmp_path / f"{number}" / "adapter_model.safetensors")
        assert made.keys() == right.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in right.items())
        assert json.loads((tmp_path / f"{number}" / "adapter_config.json").read_text())["use_rslora"] is True


def test_mistakes(adapter: Path, tmp_path: Path, lora: Any):
    out = ["--output", tmp_path / "x"]
    assert lora("convert", adapter, "--to", "mlx", "--output", tmp_path / "mlx").code == 0
    refused = lora("merge", tmp_path / "mlx", *out).error
    assert "this adapter is in mlx-lm's layout" in refused
    assert f"lora convert {tmp_path / 'mlx'} --to peft" in refused
    path, tensors = tmp_path / "mlx" / "adapters.safetensors", load_file(tmp_path / "mlx" / "adapters.safetensors")
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    name = next(iter(tensors))
    for change, said in (
        ({"fine_tune_type": "dora"}, "mlx-lm's dora"),
        ({"lora_parameters": {"rank": 3}}, "scale is None"),
        ({"lora_parameters": {"scale": math.inf}}, "scale is inf"),
        ({"lora_parameters": {"scale": True}}, "scale is True"),
        ({"lora_parameters": {"scale": 2.0, "dropout": "half"}}, "dropout is 'half'"),
        ({"peft": settings["peft"] | {"modules_to_save": ["x"]}}, "modules_to_save"),
    ):
        (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings | change))
        assert said in lora("convert", tmp_path / "mlx", "--to", "peft", *out).error
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    for wrong, said in (
        ({name: torch.full_like(tensors[name], math.nan)}, "holds NaN"),
        ({"model.embed_tokens.lora_a": torch.ones(3, 3)}, "is not the A or B"),
        ({"model.layers.0.mlp.switch_mlp.x.lora_a": torch.ones(2, 3, 3)}, "is not the A or B"),
        ({f"model.y.lora_{part}": torch.ones(3, 3) for part in "ab"}, "what transformers calls mlx-lm's model.y"),
        ({"model.layers.0.x.lora_a": torch.ones(3, 3)}, "has only one of lora_A and lora_B"),
        ({"model.layers.0.x.lora_a": torch.ones(8, 2), "model.layers.0.x.lora_b": torch.ones(2, 8)}, "several ranks"),
    ):
        save_file(tensors | wrong, path)
        assert said in lora("convert", tmp_path / "mlx", "--to", "peft", *out).error
    assert not (tmp_path / "x").exists()


READ = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
from mlx_lm.tuner.utils import load_adapters
base, adapter = map(Path, sys.argv[1:])
model, _ = load_model(base)
ids = mx.array([list(range(3, 19))])
before = model(ids)
after = load_adapters(model, str(adapter))(ids)
print(json.dumps({"base": before.tolist(), "adapter": after.tolist()}))
"""


def model_of(kind: str, folder: Path) -> Path:
    """A tiny random one."""
    sizes: dict[str, Any] = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    gpt: dict[str, Any] = {"vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    more: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
    linear: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32}
    linear |= {"linear_value_head_dim": 32, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    settings = {
        "gpt2": gpt,
        "gptj": gpt | {"rotary_dim": 16, "tie_word_embeddings": False},
        "gpt_neox": sizes | {"intermediate_size": 256},
        "gemma3": {"text_config": sizes | more | {"sliding_window_pattern": 2}},
        "qwen3_5_text": sizes | more | linear,
    }
    return save_tiny(AutoConfig.for_model(kind, **settings[kind]), folder)


def for_mlx(kind: str, folder: Path) -> None:
    """What mlx-lm asks for in published models of this kind, and transformers 5 does not write."""
    config = json.loads((folder / "config.json").read_text())
    published: dict[str, Any] = {
        "gpt2": {"n_ctx": 64},
        "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
        "gemma3": {"vocab_size": 600},
        "qwen3_5_text": {"model_type": "qwen3_5", "text_config": config, "tie_word_embeddings": False},
    }
    if kind in published:
        (folder / "config.json").write_text(json.dumps(config | published[kind]))
    if kind == "gpt2":
        tensors = load_file(folder / "model.safetensors")
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(plain, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first time an environment is made
@pytest.mark.parametrize(
    ("kind", "patterns"),
    [
        ("llama", {}),
        ("llama", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "layers": [1]}),
        *((kind, {}) for kind in ("gpt2", "gptj", "gpt_neox", "gemma3", "qwen3_5_text")),
    ],
)
def test_mlx_lm_computes_the_same(kind: str, patterns: Any, tiny_llama: Path, tmp_path: Path, lora: Any):
    folder = tiny_llama if kind == "llama" else model_of(kind, tmp_path / kind)
    (tmp_path / "adapter").mkdir()
    model = with_adapter(open_base(folder), "attention" if patterns else "all-linear", scale=0.3, **patterns)
    save_adapter(model, tmp_path / "adapter", find_base(str(folder)), quantization="none", double_quantization=True)
    assert lora("convert", tmp_path / "adapter", "--to", "mlx", "--output", tmp_path / "mlx").code == 0
    for_mlx(kind, folder)
    python = environment("mlx", "mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [python, "-c", READ, folder, tmp_path / "mlx"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=own | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    said = {name: torch.tensor(each) for name, each in json.loads(done.stdout.splitlines()[-1]).items()}
    with torch.no_grad():
        right = model(input_ids=torch.arange(3, 19)[None]).logits
    assert (said["base"] - right).abs().max() > 0.05
    assert_close(said["adapter"], right, rtol=0, atol=1e-3)


def test_layers_without_effect_are_no_scale_of_the_others(tiny_llama: Path, tmp_path: Path, lora: Any):
    settings = {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": None}
    folder = theirs(tiny_llama, tmp_path / "zero", **settings)
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {"alpha_pattern": {"q_proj": 0, "model.layers.0.self_attn.k_proj": 0}}
    (folder / "adapter_config.json").write_text(json.dumps(config | pattern))
    said = lora("convert", folder, "--to", "mlx", "--output", tmp_path / "mlx")
    assert said.code == 0, said.text
    assert lora("convert", tmp_path / "mlx", "--to", "peft", "--output", tmp_path / "back").code == 0
    one, other = updates(folder), updates(tmp_path / "back")
    assert sum(bool(each.any()) for each in one.values()) == 1
    for name, update in one.items():
        assert_close(other[name], update)


def test_fp8_is_written_as_bf16_that_holds_it(adapter: Path, tmp_path: Path, lora: Any):
    path = adapter / "adapter_model.safetensors"
    small = {name: each.to(torch.float8_e4m3fn) for name, each in load_file(path).items()}
    save_file(small, path, {"format": "pt"})
    said = lora("convert", adapter, "--to", "peft", "--output", tmp_path / "back")
    assert said.code == 0, said.text
    for name, each in load_file(tmp_path / "back" / path.name).items():
        assert torch.equal(each, small[name].bfloat16())
