"""A merge reads and writes a tensor at a time, and writes what the opened model would have given, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import open_base, save_tiny, with_adapter
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, GPT2Config

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.opened import open_model
from lora_cli.base import tensor_files
from lora_cli.base.source import find_base
from lora_cli.errors import CheckFailed
from lora_cli.merging import job as merging
from lora_cli.merging import streamed
from lora_cli.merging.merge import merge


def _adapter(base: Path, folder: Path, quantization: str, dtype: torch.dtype) -> Path:
    model = with_adapter(open_base(base, quantization, dtype), target_modules="all-linear")
    folder.mkdir()
    save_adapter(model, folder, find_base(str(base)), quantization=quantization, double_quantization=True)
    return folder


def _refused(*_: object, **__: object) -> None:
    raise AssertionError("a model was opened")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name not in ("merge.json", "README.md")}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("onto", ["trained", "original"])
def test_streamed_weights_are_those_of_the_opened_model(kind, quantization, onto, tmp_path, request, monkeypatch):
    base = request.getfixturevalue(kind)
    adapter = _adapter(base, tmp_path / "adapter", quantization, torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(merging, "open_model", _refused)
        report = merge(adapter, tmp_path / "streamed", dtype="fp32", onto=onto, proof="replay")
    assert report.streamed
    monkeypatch.setattr(merging, "why_whole", lambda *_: "asked for by this test")
    opened = merge(adapter, tmp_path / "opened", dtype="fp32", onto=onto, proof="replay")
    assert not opened.streamed
    assert any("asked for by this test" in each for each in opened.notes)
    assert opened.replayed == report.replayed
    assert _bytes(tmp_path / "streamed") == _bytes(tmp_path / "opened")


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "keep"), ("none", "fp16"), ("nf4", "fp32")])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_a_few_rows_at_a_time_give_the_same_weights(kind, quantization, dtype, tmp_path, request, monkeypatch):
    base = request.getfixturevalue(kind)
    adapter = _adapter(base, tmp_path / "adapter", quantization, torch.bfloat16)
    merge(adapter, tmp_path / "whole", dtype=dtype, proof="replay")
    taken = []
    monkeypatch.setattr(tensor_files, "_NUMBERS", 200)
    monkeypatch.setattr(streamed, "is_finite", lambda made: taken.append(len(made)) or True)
    merge(adapter, tmp_path / "rows", dtype=dtype, proof="replay")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rows"))
    assert one.keys() == other.keys()
    for name, each in one.items():  # products of fewer rows may round in another way
        torch.testing.assert_close(other[name], each, rtol=torch.finfo(each.dtype).eps, atol=1e-7, check_dtype=True)
    assert kind == "tiny_gpt2" or max(taken) < 10


def test_a_tensor_that_was_written_wrong_is_found_by_the_replay(tiny_llama, tmp_path, monkeypatch):
    adapter = _adapter(tiny_llama, tmp_path / "adapter", "none", torch.float32)
    write = merging.write_weights

    def damaged(source, place, *rest, **more):
        write(source, place, *rest, **more)
        file = place / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(merging, "write_weights", damaged)
    with pytest.raises(CheckFailed, match="was not written as base and adapter give it"):
        merge(adapter, tmp_path / "merged", proof="replay")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("proof", ["replay", "none"])
def test_a_merge_that_compared_nothing_says_so(proof, tiny_llama, tmp_path):
    adapter = _adapter(tiny_llama, tmp_path / "adapter", "none", torch.float32)
    report = merge(adapter, tmp_path / "merged", proof=proof)
    assert f"not compared with base + adapter (--proof {proof})" in report.lines()[-1]
    stored = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (stored["proof"], stored["kl"], stored["kept"]) == (proof, None, None)
    assert bool(stored["replayed"]) == (proof == "replay")
    assert "was not compared" in (tmp_path / "merged" / "README.md").read_text()


def test_the_base_to_merge_onto_is_measured_on_held_out_rows(run_recipe, tmp_path, monkeypatch):
    from lora_cli.merging import onto

    run, _ = run_recipe(quantization="nf4", data={"validation": 0.25}, train={"max_steps": 2})
    report = merge(run, tmp_path / "merged")
    measured = json.loads((tmp_path / "merged" / "merge.json").read_text())["bases_compared"]
    examples = onto.held_out(run)
    assert measured["examples"] == len(examples) > 1
    for name, how in (("before", None), ("after", "none")):
        model = open_model(None, run, quantization=how, dtype="fp32", device="cpu").model
        nats = sum(
            torch.nn.functional.cross_entropy(
                model(torch.tensor(each.ids, dtype=torch.long)[None]).logits[0, :-1].float(),
                torch.where(torch.tensor(each.trained), torch.tensor(each.ids, dtype=torch.long), -100)[1:],
                reduction="sum",
            ).item()
            for each in examples
        )
        assert measured[name] == pytest.approx(nats / measured["targets"], rel=5e-3)
    assert report.onto == ("original" if measured["low"] > 0 else "trained")
    targets = torch.tensor([each.targets for each in examples])
    losses = [2.0 * targets, 1.0 * targets]
    monkeypatch.setattr(onto, "example_losses", lambda *_: (losses.pop(0), targets))
    opened = []
    load = merging.open_model
    monkeypatch.setattr(merging, "open_model", lambda *each, **how: opened.append(how) or load(*each, **how))
    better = merge(run, tmp_path / "better")
    assert better.onto == "original"
    assert [each["quantization"] for each in opened] == ["nf4", "none"]  # for losses and proof together
    assert any("merged onto the original weights" in each for each in better.notes)


def test_block_by_block_both_bases_are_measured_too(run_recipe, tmp_path, monkeypatch):
    run, _ = run_recipe(quantization="nf4", data={"validation": 0.25}, train={"max_steps": 2})
    whole = merge(run, tmp_path / "whole")
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    blocks = merge(run, tmp_path / "blocks")
    assert blocks.block_by_block
    for name in ("before", "after", "gain", "examples", "targets"):
        assert blocks.bases_compared[name] == pytest.approx(whole.bases_compared[name], rel=1e-4, abs=1e-6), name


def test_a_layer_that_loading_leaves_as_it_is_is_not_rounded(tmp_path):
    """transformers quantizes torch's own Linear alone; Falcon's is a subclass."""
    config = FalconConfig(vocab_size=512, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, bos_token_id=0)
    base = save_tiny(config, tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter", "nf4", torch.bfloat16)
    assert merge(adapter, tmp_path / "merged", dtype="fp32").kl < 1e-4


def test_without_held_out_rows_nothing_is_compared_and_it_says_so(tiny_llama, tmp_path):
    report = merge(_adapter(tiny_llama, tmp_path / "adapter", "nf4", torch.float32), tmp_path / "merged")
    assert (report.onto, report.bases_compared) == ("trained", None)
    assert any("not compared: there are no prepared validation rows" in each for each in report.notes)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])  # the second has tied embeddings and transposed layers
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_block_by_block_the_proof_gives_the_figures_of_the_opened_models(
    kind, quantization, tmp_path, request, monkeypatch
):
    adapter = _adapter(request.getfixturevalue(kind), tmp_path / "adapter", quantization, torch.bfloat16)
    whole = merge(adapter, tmp_path / "whole", dtype="bf16")
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    monkeypatch.setattr(merging, "open_model", _refused)
    monkeypatch.setattr(merging, "reopened", _refused)
    blocks = merge(adapter, tmp_path / "blocks", dtype="bf16")
    assert (whole.block_by_block, blocks.block_by_block) == (False, True)
    assert (whole.compared_in, blocks.compared_in) == ("fp32", "fp32")
    for name in ("kl", "adapter_effect", "top1_agreement", "largest_difference"):
        assert getattr(blocks, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    assert "in fp32, block by block, on" in blocks.lines()[1]
    assert _bytes(tmp_path / "blocks") == _bytes(tmp_path / "whole")


def test_block_by_block_what_is_not_quantized_is_rounded_as_in_training(tmp_path, monkeypatch):
    """Biases in fp32, which bf16 cannot hold."""
    config = GPT2Config(vocab_size=512, n_embd=64, n_head=4, n_layer=2, n_positions=512, bos_token_id=0, eos_token_id=0)
    base = save_tiny(config, tmp_path / "base")
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(each.shape, generator=draw) if name.endswith(".bias") else each
        for name, each in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = _adapter(base, tmp_path / "adapter", "nf4", torch.bfloat16)
    whole = merge(adapter, tmp_path / "whole", dtype="fp32")
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    blocks = merge(adapter, tmp_path / "blocks", dtype="fp32")
    assert blocks.block_by_block
    assert whole.kl > 1e-8  # the merged folder has the biases of the base
    assert blocks.kl == pytest.approx(whole.kl, rel=1e-3)


def test_block_by_block_at_most_one_block_is_in_memory(tiny_llama, tmp_path, monkeypatch):
    from lora_cli.merging import in_place

    adapter = _adapter(tiny_llama, tmp_path / "adapter", "nf4", torch.float32)
    held, most = [0], [0]
    fill, empty = in_place._fill, in_place._empty

    def numbers(places):
        values = [getattr(module, key) for module, key, _ in places]
        return sum(each.untyped_storage().nbytes() // 4 for each in values if not each.is_meta and each.ndim == 2)

    def filled(found, dtype, places):
        fill(found, dtype, places)
        held[0] += numbers(places)
        most[0] = max(most[0], held[0])

    def emptied(places):
        held[0] -= numbers(places)
        empty(places)
        held[0] += numbers(places)

    monkeypatch.setattr(in_place, "_fill", filled)
    monkeypatch.setattr(in_place, "_empty", emptied)
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    merge(adapter, tmp_path / "merged", dtype="fp32")
    model = open_base(tiny_llama, "none", torch.float32)
    matrices = [each for each in model.model.layers[0].parameters() if each.ndim == 2]
    block = sum(each.numel() for each in matrices)
    assert most[0] < max(block, model.lm_head.weight.numel()) + 100  # and a number in the place of each other matrix
    assert 0 < held[0] < 100
