"""`lora diff`: base + adapter is the fine-tune as far as an adapter of that rank can be, and what it lacks is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_cli.adapters.file import read_adapter
from lora_cli.adapters.low_rank import nearest

MLP = "model.layers.0.mlp.up_proj.weight"


def tuned(base: Path, folder: Path, edit: Any) -> Path:
    """A copy of the base whose tensors `edit` changed."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def add(tensors: dict[str, torch.Tensor], name: str, rank: int | None = None) -> None:
    shape = tensors[name].shape
    change = torch.randn(shape) if rank is None else torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    tensors[name] = tensors[name] + (0.1 * change).to(tensors[name].dtype)


def test_a_change_of_low_rank_is_held_whole_and_merges_back(tiny_llama: Path, tmp_path: Path, lora: Any):
    torch.manual_seed(0)
    names = [MLP, "model.layers.1.self_attn.q_proj.weight"]
    other = tuned(tiny_llama, tmp_path / "tuned", lambda tensors: [add(tensors, name, rank=2) for name in names])
    said = json.loads(lora("diff", tiny_llama, other, "--rank", 3, "--output", tmp_path / "out", "--json").out)
    assert said["not_held"] == {}
    assert said["error"] < 1e-5
    assert sorted(each["name"] for each in said["layers"]) == [name.removesuffix(".weight") for name in names]
    assert lora("merge", tmp_path / "out", "--output", tmp_path / "merged", "--dtype", "fp32").code == 0
    right, merged = (load_file(each / "model.safetensors") for each in (other, tmp_path / "merged"))
    for name, weight in right.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=2e-6)
    made = read_adapter(tmp_path / "out")
    assert made.config["target_modules"] == [name.removesuffix(".weight") for name in names]
    assert made.metadata.made_of == "the change from tiny-llama to tuned, at rank 3"
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert "none but the rounding of fp32" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_lost_and_what_cannot_be_held_is_said(tiny_llama: Path, tmp_path: Path, lora: Any):
    torch.manual_seed(0)
    outside = ["model.norm.weight", "model.embed_tokens.weight"]
    other = tuned(tiny_llama, tmp_path / "tuned", lambda tensors: [add(tensors, name) for name in [MLP, *outside]])
    words = ("diff", tiny_llama, other, "--rank", 4, "--output")
    said = json.loads(lora(*words, tmp_path / "out", "--json").out)
    was, now = load_file(tiny_llama / "model.safetensors"), load_file(other / "model.safetensors")
    values = torch.linalg.svdvals((now[MLP] - was[MLP]).double())
    (layer,) = said["layers"]
    assert layer["norm"] == pytest.approx(values.norm().item(), rel=1e-5)
    best = values[4:].norm().item()
    assert best * (1 - 1e-5) <= layer["lost"] <= 1.01 * best
    assert said["not_held"] == pytest.approx(
        {name: (now[name] - was[name]).norm().item() for name in outside}, rel=1e-5
    )
    shown = lora(*words, tmp_path / "again").out
    share = 1 - layer["norm"] ** 2 / (layer["norm"] ** 2 + sum(each**2 for each in said["not_held"].values()))
    assert f"{share:.2%} of ‖Δ‖² of all that changed" in shown
    assert "model.embed_tokens.weight, model.norm.weight" in shown


def test_energy_gives_each_layer_the_fewest_directions(tiny_llama: Path, tmp_path: Path, lora: Any):
    torch.manual_seed(0)
    names = [MLP, "model.layers.1.self_attn.q_proj.weight"]
    other = tuned(tiny_llama, tmp_path / "tuned", lambda it: [add(it, names[0], rank=3), add(it, names[1])])
    words, was, now = ("diff", tiny_llama, other), *(load_file(it / "model.safetensors") for it in (tiny_llama, other))
    said = json.loads(lora(*words, "--energy", 0.9, "--output", tmp_path / "out", "--json").out)
    for each in said["layers"]:
        weight = f"{each['name']}.weight"
        held = torch.linalg.svdvals((now[weight] - was[weight]).double()).square().cumsum(0) / each["norm"] ** 2
        assert each["rank"] == 1 + int((held < 0.9).sum())
        assert (each["lost"] / each["norm"]) ** 2 == pytest.approx(1 - held[each["rank"] - 1].item(), abs=1e-5)
    assert [each["rank"] <= 3 for each in said["layers"]] == [True, False]
    assert read_adapter(tmp_path / "out").metadata.made_of.endswith("with 0.9 of the energy of each layer")
    said = json.loads(lora(*words, "--energy", 0.9, "--rank", 2, "--output", tmp_path / "both", "--json").out)
    assert {each["rank"] for each in said["layers"]} == {2}


def test_gpt2_stores_its_weights_transposed(tiny_gpt2: Path, tmp_path: Path, lora: Any):
    torch.manual_seed(0)
    stored = load_file(tiny_gpt2 / "model.safetensors")
    name = next(each for each in stored if each.endswith("h.0.mlp.c_fc.weight"))
    other = tuned(tiny_gpt2, tmp_path / "tuned", lambda tensors: add(tensors, name, rank=1))
    said = json.loads(lora("diff", tiny_gpt2, other, "--rank", 64, "--output", tmp_path / "out", "--json").out)
    assert [each["name"] for each in said["layers"]] == ["transformer.h.0.mlp.c_fc"]
    assert lora("merge", tmp_path / "out", "--output", tmp_path / "merged").code == 0
    right, merged = (load_file(each / "model.safetensors")[name] for each in (other, tmp_path / "merged"))
    torch.testing.assert_close(merged, right)


def test_random_projection_finds_what_is_there():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 150)).Q for size in (200, 150))
    values = 0.9 ** torch.arange(150)
    update = U * values @ V.T
    (A, B), norm, lost = nearest(update, 8)
    assert lost == pytest.approx(values[8:].norm().item(), rel=1e-3)
    assert norm == pytest.approx(values.norm().item(), rel=1e-5)
    assert (update - B @ A).norm().item() == pytest.approx(lost, rel=1e-5)
    torch.testing.assert_close(nearest(update, 8)[0][0], A, rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.999), st.floats(0.9, 0.99), st.integers(0, 9))
def test_energy_is_held_where_directions_are_projected(energy: float, decay: float, seed: int):
    """More than the 64 that are looked at first, and few enough that the matrix is not decomposed whole."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, 400, generator=draw)).Q for size in (500, 400))
    values = decay ** torch.arange(400)
    update = U * values @ V.T
    (A, B), norm, lost = nearest(update, None, energy)
    fewest = 1 + int((values.double().square().cumsum(0) < energy * values.double().square().sum()).sum())
    assert lost**2 <= (1 - energy + 1e-5) * norm**2
    assert fewest <= len(A) <= fewest + 1 + fewest // 20
    assert (update - B @ A).norm().item() == pytest.approx(lost, rel=1e-5)


def test_mistakes(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, lora: Any):
    out = ["--rank", 2, "--output", tmp_path / "x"]
    assert "how small?" in lora("diff", tiny_llama, tiny_gpt2, "--output", tmp_path / "x").error
    assert "--energy is 0.0" in lora("diff", tiny_llama, tiny_gpt2, "--energy", 0, "--output", tmp_path / "x").error
    assert "no linear layer differs" in lora("diff", tiny_llama, tiny_llama, *out).error
    assert "is not a fine-tune of" in lora("diff", tiny_llama, tiny_gpt2, *out).error
    longer = tuned(tiny_llama, tmp_path / "longer", lambda it: it.update({MLP: it[MLP].repeat(2, 1)}))
    assert f"{MLP}: (128, 64) in" in lora("diff", tiny_llama, longer, *out).error
    broken = tuned(tiny_llama, tmp_path / "broken", lambda it: it[MLP].fill_(torch.nan))
    assert "holds NaN or infinity" in lora("diff", tiny_llama, broken, *out).error
    assert (
        "inside the base model's folder"
        in lora("diff", longer, tiny_llama, "--rank", 2, "--output", longer / "x").error
    )
    (tmp_path / "quantized").mkdir()
    shutil.copytree(tiny_llama, tmp_path / "quantized", dirs_exist_ok=True)
    config = json.loads((tiny_llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    assert "mostly rounding" in lora("diff", tiny_llama, tmp_path / "quantized", *out).error
    assert not (tmp_path / "x").exists()
