"""A merged model rounded to NF4 is what bitsandbytes makes of the merged weights, and its loss is measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import refusal, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_cli.adapters.opened import open_model
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.storage.bnb4 import Bnb4
from lora_cli.errors import CheckFailed, DiskError
from lora_cli.evaluation.gain import share_kept
from lora_cli.merging import job as merging
from lora_cli.merging import quantized
from lora_cli.merging.merge import merge
from lora_cli.merging.onto import held_out
from lora_cli.merging.quantized import Rounding, rounding_lines

TOKENS = torch.tensor([[5, 9, 2, 77, 301, 40, 8, 8, 19, 250]])
WIDE = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "hidden_size": 64}
WIDE |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# Of each: layers that are rounded, and linear ones that are not.
MODELS: dict[str, tuple[Any, int, list[str]]] = {
    "llama": (lambda: hf.LlamaConfig(**WIDE), 14, ["lm_head"]),
    "tied": (lambda: hf.LlamaConfig(**WIDE, tie_word_embeddings=True), 14, ["lm_head"]),
    "odd": (
        lambda: hf.LlamaConfig(**WIDE | {"intermediate_size": 96, "num_hidden_layers": 1}),
        6,
        ["lm_head", "model.layers.0.mlp.down_proj"],
    ),
    "qwen3": (lambda: hf.Qwen3Config(**WIDE, head_dim=16, tie_word_embeddings=True), 14, ["lm_head"]),
    "mixtral": (lambda: hf.MixtralConfig(**WIDE, num_local_experts=4), 8, ["lm_head"]),
    "gpt2": (None, 8, ["lm_head"]),
}


def model_of(name: str, folder: Path, tiny_gpt2: Path) -> Path:
    return tiny_gpt2 if MODELS[name][0] is None else save_tiny(MODELS[name][0](), folder)


@pytest.mark.parametrize(
    "name", [name if name in ("odd", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_folder_is_what_loading_the_merged_model_rounded_gives(name, run_recipe, tiny_gpt2, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = model_of(name, tmp_path / "base", tiny_gpt2)
    run, _ = run_recipe(base_model=str(base), dtype="bf16", data={"validation": 0.25}, train={"max_steps": 3})
    size = "40KB" if name == "odd" else "5GB"
    merge(run, tmp_path / "plain", dtype="bf16")
    report = merge(run, tmp_path / "rounded", dtype="bf16", quantize="nf4", max_shard_size=size)
    stated = json.loads((tmp_path / "rounded" / "config.json").read_text())["quantization_config"]
    assert stated["llm_int8_skip_modules"] == MODELS[name][2]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=None if name != "odd" else MODELS[name][2],
    )
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded").eval()
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings).eval()
    assert opened.dtype == direct.dtype == torch.bfloat16
    ours, theirs = opened.state_dict(), direct.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if ".quant_state." in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert torch.equal(ours[key], value), key
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    layers = {key: each for key, each in opened.named_modules() if type(each).__name__ == "Linear4bit"}
    assert len(layers) == MODELS[name][1] == report.quantized["layers"]
    for key, layer in layers.items():
        stored = plain.get(f"{key}.weight", plain.get(f"{key.removeprefix('transformer.')}.weight"))
        weight = stored.T.contiguous() if name == "gpt2" else stored
        made = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), made), key
        assert not torch.equal(made, weight)
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).logits, direct(TOKENS).logits)
    files = [load_file(each) for each in (tmp_path / "rounded").glob("*.safetensors")]
    assert (len(files) > 2) == (name == "odd")
    for tensors in files:
        for key in (each for each in tensors if each.endswith(".absmax")):
            assert key.removesuffix(".absmax") in tensors  # the parts of one weight lie in one file


def losses_of(model: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, in the model's own dtype."""
    nats = []
    for row in rows:
        ids, trained = torch.tensor([int(each) for each in row.ids]), torch.tensor([bool(each) for each in row.trained])
        with torch.no_grad():
            each = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        nats.append(-each.gather(-1, ids[1:, None])[:, 0][trained[1:]].sum())
    return torch.stack(nats), torch.tensor([sum(map(bool, row.trained[1:])) for row in rows])


@pytest.mark.parametrize(
    ("quantization", "onto", "in_blocks"),
    [
        ("nf4", "auto", False),
        pytest.param("none", "auto", False, marks=pytest.mark.slow),
        pytest.param("none", "auto", True, marks=pytest.mark.slow),
        pytest.param("nf4", "original", True, marks=pytest.mark.slow),
        pytest.param("nf4", "trained", True, marks=pytest.mark.slow),
        pytest.param("nf4", "original", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_said_is_what_anybody_measures(quantization, onto, in_blocks, run_recipe, lora, tmp_path, monkeypatch):
    run, _ = run_recipe(quantization=quantization, data={"validation": 0.25}, train={"max_steps": 12})
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: not in_blocks)
    said = lora("merge", run, "--output", tmp_path / "rounded", "--quantize", "nf4", "--onto", onto, "--json")
    assert said.code == 0, said.text
    measured = json.loads(said.out)["quantized"]
    stored = json.loads((tmp_path / "rounded" / "merge.json").read_text())
    assert stored["quantized"] == measured
    assert stored["block_by_block"] == in_blocks
    rows = held_out(run)
    how = "none" if stored["onto"] == "original" else quantization
    trained = open_model(None, run, quantization=how, dtype="fp32", device="cpu").model
    merged = merge(run, tmp_path / "plain", onto=stored["onto"])
    models = {"adapter": trained, "merged": AutoModelForCausalLM.from_pretrained(merged.output, dtype=torch.float32)}
    models["quantized"] = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    for layer in models["quantized"].modules():
        layer.support_avx512bf16_for_cpu = False  # a product of bitsandbytes for CPUs, in bf16
    found = {name: losses_of(model, rows)[0] for name, model in models.items()}
    with adapters_disabled(trained):
        found["base"], targets = losses_of(trained, rows)
    assert measured["losses"].keys() == found.keys()
    for name, nats in found.items():
        assert measured["losses"][name] == pytest.approx((nats.sum() / targets.sum()).item(), abs=2e-5), name
    cost = (found["quantized"] - found["merged"]).sum() / targets.sum()
    assert measured["cost"]["gain"] == pytest.approx(cost.item(), abs=2e-5)
    assert cost.abs() > 1e-4  # rounding is seen
    share = (found["base"] - found["quantized"]).sum() / (found["base"] - found["adapter"]).sum()
    assert measured["kept"]["share"] == pytest.approx(share.item(), abs=1e-3)
    assert measured["kept"]["low"] < measured["kept"]["share"] < measured["kept"]["high"]
    card = (tmp_path / "rounded" / "README.md").read_text()
    for text in (f"in nf4 {measured['losses']['quantized']:.4f}", f"nf4 keeps {share:.0%} of what was learned"):
        assert text.lower() in card.lower()
        assert text in "\n".join(rounding_lines(measured))


def test_a_share_is_the_ratio_of_sums_and_its_interval_that_of_each_row_left_out():
    before, after, other = torch.tensor([[9.0, 8, 7, 9], [5, 4, 6, 4], [6, 7, 6, 4.5]])
    share, low, high = share_kept(before, after, other)
    assert share == pytest.approx(9.5 / 14)
    without = torch.stack([(before - other).sum() - (before - other)[i] for i in range(4)])
    without /= torch.stack([(before - after).sum() - (before - after)[i] for i in range(4)])
    half = 3.182446 * (3 / 4 * ((without - share) ** 2).sum().item()) ** 0.5  # the jackknife's, t of 3 degrees
    assert (low, high) == (pytest.approx(share - half, rel=1e-5), pytest.approx(share + half, rel=1e-5))
    assert share_kept(before[:1], after[:1], other[:1])[1:] == (None, None)


def test_the_cost_is_that_of_rounding_alone_and_the_share_is_of_what_was_learned():
    one = Rounding.__new__(Rounding)
    one.kind, one.layers, one.weights, one.targets = "nf4", {"layer.weight": False}, (3, 4), torch.tensor([2, 2, 2])
    sums = {"base": [9.0, 8, 10], "adapter": [4.0, 3, 6], "merged": [4.5, 3.5, 6.5], "quantized": [5.5, 4.5, 8]}
    one.losses = {name: torch.tensor(each) for name, each in sums.items()}
    facts = one.facts(9)
    assert facts["cost"]["gain"] == pytest.approx((5.5 + 4.5 + 8 - 4.5 - 3.5 - 6.5) / 6)
    assert facts["learned"]["gain"] == pytest.approx((27 - 13) / 6)
    assert facts["kept"]["share"] == pytest.approx((27 - 18) / (27 - 13))


def test_what_is_not_sure_has_no_share(tmp_path):
    facts = {"kind": "nf4", "layers": 1, "weights": 1, "weights_of_model": 2, "bytes": 9, "examples": 2, "targets": 3}
    facts |= {"losses": dict.fromkeys(("base", "adapter", "merged", "quantized"), 1.0)}
    nothing = {"share": None, "low": None, "high": None}
    lines = rounding_lines(facts | {"cost": {"gain": 0.0, "low": None, "high": None}, "kept": nothing})
    assert "no share" in lines[-1]
    lost = {"share": 0.2, "low": 0.1, "high": 0.3}
    lines = rounding_lines(facts | {"cost": {"gain": 0.0, "low": -0.1, "high": 0.1}, "kept": lost})
    assert lines[-1].startswith("nf4 keeps 20% of what was learned (95 % interval 10% to 30%)")
    assert "Base and adapter used together keep all of it" in lines[-1]


def test_what_could_not_be_measured_or_written_is_refused(run_recipe, lora, tmp_path):
    run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 1})
    cases = [
        ((run, "--proof", "replay"), "measures nothing"),
        ((run, "--proof", "none"), "measures nothing"),
        ((run / "adapter",), "none are prepared here"),
    ]
    for words, what in cases:
        said = lora("merge", *words, "--output", tmp_path / "out", "--quantize", "nf4")
        assert said.code == 2
        assert what in said.text
    for kind in ("int8", "int4", "none", "gptq"):
        said = lora("merge", run, "--output", tmp_path / "out", "--quantize", kind)
        assert said.code == 2
        assert f"cannot be rounded to {kind}" in said.text
    shutil.rmtree(run / "prepared")
    said = lora("merge", run, "--output", tmp_path / "out", "--quantize", "nf4")
    assert said.code == 2
    assert "none are prepared here" in said.text
    assert not [each for each in tmp_path.iterdir() if "out" in each.name]


def test_qa_lora_names_its_own_four_bits(run_recipe, lora, tmp_path):
    how = {"adapter": {"rank": 4, "alpha": 8, "method": "qa_lora"}, "quantization": "int4"}
    run, _ = run_recipe(**how, data={"validation": 0.25}, train={"max_steps": 1})
    said = lora("merge", run, "--output", tmp_path / "out", "--quantize", "nf4")
    assert said.code == 2
    assert "--type q4_1" in said.text


def test_layers_that_share_a_stored_tensor_are_refused(run_recipe, tiny_llama, tmp_path, monkeypatch):
    run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 1})
    of = quantized.Places.of

    def without(model: Any, stored: Any) -> Any:
        found = of(model, stored)
        return replace(
            found, direct={name: each for name, each in found.direct.items() if "layers.1.mlp.up" not in name}
        )

    monkeypatch.setattr(quantized.Places, "of", without)
    error = refusal(lambda: merge(run, tmp_path / "out", quantize="nf4"))
    assert "1 linear layers have no stored tensor of their own, the first is model.layers.1.mlp.up_proj" in error.what


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_rounding_that_ended_early(what, run_recipe, tmp_path, monkeypatch):
    run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 1})
    seen = []

    def fail(self: Any, weight: torch.Tensor) -> Any:
        seen.append(weight)
        if len(seen) == 5:
            raise what
        return packed(self, weight)

    packed = Bnb4.packed
    monkeypatch.setattr(Bnb4, "packed", fail)
    with pytest.raises((KeyboardInterrupt, DiskError)):
        merge(run, tmp_path / "out", quantize="nf4")
    assert len(seen) == 5
    assert not [each for each in tmp_path.iterdir() if "out" in each.name]


def test_a_tensor_that_was_rounded_wrong_is_found(run_recipe, tmp_path, monkeypatch):
    run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 1})
    write = quantized.write_files

    def damaged(plain: Path, place: Path, *rest: Any) -> None:
        write(plain, place, *rest)
        content = bytearray((place / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (place / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(quantized, "write_files", damaged)
    with pytest.raises(CheckFailed, match="was not written as"):
        merge(run, tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists()
