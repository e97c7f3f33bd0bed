"""`lora resize`: the update of smaller rank is the best there is, its error is what it says, and full rank is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_base, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.adapters.file import read_adapter, save_adapter
from lora_cli.adapters.low_rank import decomposed
from lora_cli.base.source import find_base


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    model = with_adapter(open_base(tiny_llama), "all-linear", rank=6, rank_pattern={"q_proj": 3})
    save_adapter(model, folder, find_base(str(tiny_llama)), quantization="none", double_quantization=True)
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    found = read_adapter(folder)
    return {
        name: found.alphas[name]
        / len(parts["lora_A.weight"])
        * (parts["lora_B.weight"] @ parts["lora_A.weight"]).double()
        for name, parts in found.tensors.items()
    }


def test_at_full_rank_it_is_the_same_update(adapter: Path, tmp_path: Path, lora: Any):
    for number, options in enumerate((["--rank", 6], ["--rank", 100], ["--energy", 1])):
        assert lora("resize", adapter, *options, "--output", tmp_path / f"{number}").code == 0
        before, after = updates(adapter), updates(tmp_path / f"{number}")
        assert before.keys() == after.keys()
        for name, right in before.items():
            torch.testing.assert_close(after[name], right, rtol=0, atol=2e-6 * right.norm().item())


def test_the_error_is_that_of_the_best_approximation_and_is_said(adapter: Path, tmp_path: Path, lora: Any):
    said = json.loads(lora("resize", adapter, "--rank", 2, "--output", tmp_path / "small", "--json").out)
    before, after = updates(adapter), updates(tmp_path / "small")
    for each in said["layers"]:
        values = torch.linalg.svdvals(before[each["name"]])
        distance = (before[each["name"]] - after[each["name"]]).norm().item()
        assert each["rank"] == 2
        assert each["lost"] == pytest.approx(values[2:].norm().item(), rel=1e-5)
        assert distance == pytest.approx(each["lost"], rel=1e-5)
    total = sum((before[name] - after[name]).square().sum().item() for name in before) ** 0.5
    assert said["error"] == pytest.approx(total / said["norm"], rel=1e-5)


def test_energy_gives_each_layer_the_fewest_directions(adapter: Path, tmp_path: Path, lora: Any):
    said = json.loads(lora("resize", adapter, "--energy", 0.8, "--output", tmp_path / "small", "--json").out)
    assert len({each["rank"] for each in said["layers"]}) > 1
    before = updates(adapter)
    for each in said["layers"]:
        held = torch.linalg.svdvals(before[each["name"]]).square().cumsum(0)
        assert held[each["rank"] - 1] >= (0.8 - 1e-6) * held[-1]
        assert each["rank"] == 1 or held[each["rank"] - 2] < 0.8 * held[-1]
    assert read_adapter(tmp_path / "small").metadata.base_fingerprint == read_adapter(adapter).metadata.base_fingerprint


@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_what_was_made_of_its_adapter(stabilized: bool, tiny_llama: Path, tmp_path: Path, lora: Any):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj"], use_rslora=stabilized, init_lora_weights=False)  # type: ignore[arg-type]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    model.save_pretrained(tmp_path / "adapter")
    assert lora("resize", tmp_path / "adapter", "--rank", 4, "--output", tmp_path / "same").code == 0
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "same")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_factors_make_the_product(rank: int, inputs: int, outputs: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    U, values, V = decomposed(A, B, -0.5)
    torch.testing.assert_close(U * values @ V, -0.5 * B.double() @ A.double(), rtol=0, atol=1e-12)
    assert (values[:-1] >= values[1:]).all()


def test_mistakes(adapter: Path, tmp_path: Path, lora: Any):
    assert "how small?" in lora("resize", adapter, "--output", tmp_path / "x").error
    assert "--energy is 1.5" in lora("resize", adapter, "--energy", 1.5, "--output", tmp_path / "x").error
    assert "the output already exists" in lora("resize", adapter, "--rank", 2, "--output", adapter).error
    assert (
        "the output is inside the adapter's folder"
        in lora("resize", adapter, "--rank", 2, "--output", adapter / "x").error
    )
    assert not (tmp_path / "x").exists()
