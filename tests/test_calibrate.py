"""`lora calibrate`: weights in 4-bit numbers, chosen on a text so that layers' outputs change least."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import open_base, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli import boundary
from lora_cli.base.linear import dense_weight
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import Int4Linear, dequantize, quantize
from lora_cli.cli import app
from lora_cli.errors import LoraError
from lora_cli.merging.calibrate import calibrate, compensated
from lora_cli.studies.tiny import save_tiny, tiny_llama_config

CPU = torch.device("cpu")


def layer(inputs: int = 128, outputs: int = 48) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that depend on each other and differ in size: (tokens, inputs)."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(600, inputs // 2, generator=draw) @ torch.randn(inputs // 2, inputs, generator=draw)
    x = (mixed + torch.randn(600, inputs, generator=draw)) * torch.randn(inputs, generator=draw).exp()
    return torch.randn(outputs, inputs, generator=draw) * 0.05, x


@pytest.mark.parametrize("group_size", [32, 64])
def test_outputs_change_less_than_by_the_best_search_and_weights_lie_on_grids(group_size: int):
    weight, x = layer()

    def lost(made: Tensor) -> float:
        return ((made - weight) @ x.T).square().sum().item()

    products = x.T @ x
    made = compensated(weight, products.clone(), group_size)
    searched = dequantize(*quantize(weight, group_size, products.diagonal()))
    assert lost(made) < 0.6 * lost(searched)
    assert lost(searched) < lost(dequantize(*quantize(weight, group_size)))
    again = dequantize(*quantize(made.bfloat16(), group_size))
    assert lost(again) < 1.2 * lost(made)  # what int4 finds in the written folder
    assert all(len(each.unique()) <= 16 for each in made.view(-1, group_size))


def test_where_inputs_do_not_depend_on_each_other_it_is_the_weighted_search():
    """Nothing can be taken back by another weight then."""
    weight, x = layer()
    products = torch.diag((x**2).sum(0))
    expected = dequantize(*quantize(weight, 32, products.diagonal()))
    assert torch.equal(compensated(weight, products, 32), expected)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_the_folder_is_an_ordinary_model_that_int4_holds_as_it_was_written(
    base: str, tmp_path: Path, request: Any, capsys: Any
):
    folder: Path = request.getfixturevalue(base)
    assert boundary.run(app, ["calibrate", str(folder), "--output", str(tmp_path / "moved"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"output": str(tmp_path / "moved"), "layers": said["layers"], "left": [], "group_size": 32}
    moved = open_base(tmp_path / "moved")
    held = load_model(find_base(str(tmp_path / "moved")), quantization="int4", dtype=torch.float32, device=CPU)
    plain = open_base(folder)
    layers = {name: each for name, each in held.named_modules() if isinstance(each, Int4Linear)}
    assert len(layers) == said["layers"] > 0
    for name, each in layers.items():
        weight, own = (dense_weight(model.get_submodule(name)) for model in (moved, plain))
        assert not torch.equal(weight, own)
        off = (dense_weight(each) - weight).norm() / weight.norm()
        assert off < 0.05 < (weight - own).norm() / own.norm()  # measured 0.02 and 0.1
    ids = torch.arange(40)[None]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=ids).logits, moved(input_ids=ids).logits, rtol=0, atol=1e-5)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in (tmp_path / "moved").iterdir()} == names
    assert (tmp_path / "moved" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_text_of_the_users_counts_and_what_cannot_be_is_refused(tiny_llama: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("select count(*) from ships; " * 60, encoding="utf-8")
    for name, text in (("prose", None), ("own", tmp_path / "text.txt")):
        calibrate(str(tiny_llama), tmp_path / name, text=text, group_size=64)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("prose", "own"))
    assert one != other
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(LoraError, match="tokens are too few"):
        calibrate(str(tiny_llama), tmp_path / "short", text=tmp_path / "short.txt")
    with pytest.raises(LoraError, match="inside the base model's folder"):
        calibrate(str(tiny_llama), tiny_llama / "inside")
    assert not (tmp_path / "short").exists()


def test_layers_that_stay_as_they_were_are_told(tmp_path: Path, capsys: Any):
    """Those whose inputs are not whole groups: of the MLP back, 96 inputs."""
    config = tiny_llama_config()
    config.intermediate_size = 96
    folder = save_tiny(config, tmp_path / "base")
    command = ["calibrate", str(folder), "--group-size", "64", "--output", str(tmp_path / "moved")]
    assert boundary.run(app, command) == 0
    said = capsys.readouterr().err
    assert "2 other layers stay as they were, the first is model.layers.0.mlp.down_proj: their inputs are not" in said
    assert "12 layers moved" in said


def test_what_int4_could_not_hold_is_refused_and_nothing_is_left(tiny_llama: Path, tmp_path: Path):
    def refused(key: str, value: float, group_size: int = 32) -> str:
        folder = shutil.copytree(tiny_llama, tmp_path / f"{key}-{value}-{group_size}")
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[7] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        problem = refusal(lambda: calibrate(str(folder), tmp_path / "moved", group_size=group_size))
        assert not (tmp_path / "moved").exists()
        return problem.what

    q_proj = "model.layers.0.self_attn.q_proj"
    for value in (float("nan"), 1e6):
        assert refused(f"{q_proj}.weight", value).startswith(f"{q_proj} holds NaN, infinity or a number too large")
    assert refused("model.norm.weight", 1.0, 256) == (
        "no linear layer of this model has inputs that are whole groups of 256, as int4 needs"
    )
    norm = "model.layers.0.input_layernorm.weight"
    assert refused(norm, float("inf")).startswith(f"what {q_proj} is given holds NaN")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refusal(lambda: calibrate(str(tiny_llama), tmp_path / "moved", text=tmp_path / "pipe")).what
