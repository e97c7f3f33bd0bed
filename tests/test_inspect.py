"""`lora inspect`: what it says of an update is what the dense matrix says, computed the long way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_base, with_adapter
from safetensors.torch import load_file, save_file

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.low_rank import singular_values
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.linear import dense_weight
from lora_cli.base.source import BaseSource, find_base
from lora_cli.studies.inspect import Layer, inspect_adapter


def layer_of(*values: float, rank: int = 4) -> Layer:
    return Layer("x", (8, 8), rank, 16 * rank, 1.0, list(values), None)


def save(model: Any, folder: Path, base: BaseSource) -> Path:
    folder.mkdir()
    save_adapter(model, folder, base, quantization="none", double_quantization=True)
    return folder


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Any]:
    """An adapter of ours with an inert layer and one of two dead directions, and its model."""
    model = with_adapter(open_base(tiny_llama), "all-linear", rank=6)
    modules = trained_modules(model)
    with torch.no_grad():
        modules["model.layers.0.mlp.up_proj"].lora_B.zero_()
        modules["model.layers.1.mlp.up_proj"].lora_A[2:4] = 0
    return save(model, tmp_path / "adapter", find_base(str(tiny_llama))), model


def test_what_is_said_is_what_the_dense_matrix_says(saved, tiny_llama):
    folder, model = saved
    found = inspect_adapter(str(folder), str(tiny_llama))
    modules = trained_modules(model)
    assert [each.name for each in found.layers] == sorted(modules)
    for each in found.layers:
        module = modules[each.name]
        dense = module.delta_weight().detach().double()
        right = torch.linalg.svdvals(dense)
        weight = dense_weight(module.base_layer).double()
        torch.testing.assert_close(torch.tensor(each.singular_values).double(), right[:6], rtol=0, atol=1e-6 * right[0])
        assert each.norm == pytest.approx(dense.norm().item(), rel=1e-6)
        assert each.ratio == pytest.approx((dense.norm() / weight.norm()).item(), rel=1e-5)
        assert each.shape == tuple(weight.shape)
        assert each.dead_directions == 6 - int((right > 1e-6 * right[0]).sum())
    totals = found.totals()
    assert totals["inert_layers"] == ["model.layers.0.mlp.up_proj"]
    assert totals["dead_directions"] == 6 + 2
    assert totals["norm"] == pytest.approx(sum(each.norm**2 for each in found.layers) ** 0.5)
    assert totals["parameters"] == sum(each.lora_A.numel() + each.lora_B.numel() for each in modules.values())


def test_singular_values_of_factors_of_any_shape():
    draw = torch.Generator().manual_seed(0)
    for rank, inputs, outputs in ((3, 9, 5), (7, 5, 6), (6, 6, 2), (1, 1, 1)):
        A, B = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        right = torch.linalg.svdvals(-0.5 * B.double() @ A.double())[: min(rank, inputs, outputs)]
        torch.testing.assert_close(singular_values(A, B, -0.5), right, rtol=0, atol=1e-12)


def test_effective_rank_and_directions_in_closed_form():
    assert layer_of(2.0, 2.0, 2.0, 2.0).effective_rank == pytest.approx(4)
    assert layer_of(5.0, 0.0, 0.0, 0.0).effective_rank == pytest.approx(1)
    assert layer_of(3.0, 1.0).effective_rank == pytest.approx(4 / 3**0.75)  # exp(-¾ ln ¾ - ¼ ln ¼)
    assert layer_of(3.0, 1.0).directions_90 == 1  # 9 of 10
    assert layer_of(1.0, 1.0, 1.0, 1.0).directions_90 == 4
    assert layer_of(1.0, 1e-7, 0.0, 0.0).dead_directions == 3
    empty = layer_of(0.0, 0.0, 0.0, 0.0)
    assert (empty.effective_rank, empty.directions_90, empty.dead_directions, empty.inert) == (0, 0, 4, True)
    assert layer_of(1.0, rank=1).ratio is None


@pytest.mark.parametrize("stabilized", [False, True])
def test_scalings_are_those_of_peft(stabilized: bool, tiny_llama: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 7},
        alpha_pattern={"down_proj": 5},
        use_rslora=stabilized,
        init_lora_weights=False,  # type: ignore[arg-type]  # B is random
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    model.save_pretrained(tmp_path / "adapter")
    layers = {each.name: each for each in inspect_adapter(str(tmp_path / "adapter")).layers}
    assert {each.rank for each in layers.values()} == {4, 7}
    assert len({each.scaling for each in layers.values()}) == 3
    for name, each in layers.items():
        dense = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
        right = torch.linalg.svdvals(dense.double())[: each.rank]
        torch.testing.assert_close(torch.tensor(each.singular_values).double(), right, rtol=1e-5, atol=1e-6)


def test_qa_lora_is_looked_at_as_it_is_stored(run_recipe):
    adapter = {"method": "qa_lora", "target_modules": "all-linear", "rank": 4}
    run, report = run_recipe(quantization="int4", adapter=adapter)
    assert inspect_adapter(str(run)).totals()["parameters"] == report["trained_parameters"]


def test_weights_stored_in_other_ways_are_found(tiny_gpt2: Path, tmp_path: Path):
    """GPT-2 stores (in, out), and on the hub without `transformer.`"""
    model = with_adapter(open_base(tiny_gpt2), "all-linear")
    folder = save(model, tmp_path / "adapter", find_base(str(tiny_gpt2)))
    right = {each.name: each.weight_norm for each in inspect_adapter(str(folder), str(tiny_gpt2)).layers}
    assert None not in right.values()
    for name, module in trained_modules(model).items():
        assert right[name] == pytest.approx(dense_weight(module.base_layer).float().norm().item(), rel=1e-5)


def test_another_base_is_refused_and_layers_that_it_lacks_are_counted(saved, tiny_llama: Path, tiny_gpt2: Path, lora):
    folder, _ = saved
    said = lora("inspect", folder, "--base", tiny_gpt2)
    assert "the adapter was trained on another base model" in said.error
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.layers.0.mlp", "model.layers.0.moe"): each for name, each in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    said = lora("inspect", folder, "--base", tiny_llama)
    assert said.code == 0
    assert "3 layers are not in" in said.out
    wide = {name: each[:, :-1] if "lora_A" in name else each for name, each in tensors.items()}
    save_file({name: each.contiguous() for name, each in wide.items()}, folder / "adapter_model.safetensors")
    assert "but the weight of" in lora("inspect", folder, "--base", tiny_llama).error


def test_bad_files_are_refused(saved, lora):
    folder, _ = saved
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(each for each in tensors if "lora_B" in each)
    for wrong, said in (
        (tensors[name].index_fill(0, torch.tensor(1), math.nan), "holds NaN, infinity or no real numbers"),
        (tensors[name].int(), "holds NaN, infinity or no real numbers"),
        (tensors[name][:, :-1].contiguous(), "do not fit each other"),
    ):
        save_file(tensors | {name: wrong}, path)
        assert said in lora("inspect", folder).error
    assert "no such folder" in lora("inspect", folder / "gone").error


def test_the_table_fits_80_columns_and_the_picture_is_ours(saved, tiny_llama: Path, tmp_path: Path, lora, monkeypatch):
    folder, _ = saved
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "adapter.png"
    said = lora("inspect", folder, "--base", tiny_llama, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = said.out.split("\n\n")[0].splitlines()
    assert len(table) == 1 + 14
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["model.layers.…", "rank", "effective", "90", "%", "in", "dead", "‖ΔW‖", "of", "‖W‖"]
    assert any(line.startswith("0.mlp.up_proj") and "inert" in line for line in table)
    assert "dead directions: 8 of 84" in said.out
    assert lora("inspect", folder, "--picture", picture).code == 0, "its own picture is replaced"
    picture.write_bytes(b"mine")
    assert "refusing to overwrite a file" in lora("inspect", folder, "--picture", picture).error
    document = json.loads(lora("inspect", folder, "--json").out)
    assert document["base"] is None
    assert document["layers"][0]["ratio"] is None
