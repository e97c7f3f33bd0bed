"""What a checkpoint is stored as, and what people name instead of a model: check, init and train say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_console, refusal, save_tiny
from torch import Tensor
from transformers import GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lora_cli.base.linear import dense_weight, is_quantized, stored_transposed, unquantized_layers
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.planning.check import check
from lora_cli.planning.skeleton import look_at_model
from lora_cli.recipe import load_recipe
from lora_cli.training.opening import open_session
from lora_cli.training.train import train

CPU = torch.device("cpu")
IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ODD: dict[str, Any] = {  # rows of 96 and 80 numbers: no whole blocks of 64
    "llama": LlamaConfig(
        **IDS, hidden_size=96, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    ),
    "gpt2": GPT2Config(**IDS, n_embd=96, n_layer=1, n_head=4, n_inner=80),
}


def with_config(model: Path, folder: Path, **changed: Any) -> Path:
    shutil.copytree(model, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    return folder


STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "awq": ("awq", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    "fp8": ("fp8", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "mxfp4": ("mxfp4", {"quantization_config": {"quant_method": "mxfp4"}}),
    "unheard of": ("zorp", {"quantization_config": {"quant_method": "zorp"}}),
    "of the text alone": ("awq", {"text_config": {"quantization_config": {"quant_method": "awq"}}}),
    "an older name": ("compressed-tensors", {"compression_config": {"quant_method": "compressed-tensors"}}),
    "4 bits, not NF4": ("fp4", {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_check_and_init_refuse_what_training_refuses(name, quantization, tiny_llama, tmp_path: Path, recipe_file: Any):
    kind, changed = STORED[name]
    folder = with_config(tiny_llama, tmp_path / "model", **changed)
    recipe = load_recipe(recipe_file(base_model=str(folder), quantization=quantization))
    said = refusal(lambda: train(recipe, quiet_console()))
    assert said.what == f"the checkpoint is already quantized ({kind}), which cannot be trained on"
    for call in (lambda: check(recipe), lambda: look_at_model(str(folder))):
        assert (refusal(call).what, refusal(call).fix) == (said.what, said.fix)


@pytest.mark.parametrize("stated", [{"bits": 4}, "awq", {"quant_method": 3}, []])
def test_quantization_that_is_not_said_is_not_guessed(stated, tiny_llama, tmp_path: Path, recipe_file: Any):
    folder = with_config(tiny_llama, tmp_path / "model", quantization_config=stated)
    recipe = load_recipe(recipe_file(base_model=str(folder)))
    for call in (lambda: train(recipe, quiet_console()), lambda: check(recipe), lambda: look_at_model(str(folder))):
        assert "does not say how the weights are stored" in refusal(call).what


def test_a_checkpoint_of_another_quantization_than_the_recipe(tiny_llama, tmp_path: Path, recipe_file: Any):
    stated = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    folder = with_config(tiny_llama, tmp_path / "model", quantization_config=stated)
    recipe = load_recipe(recipe_file(base_model=str(folder), quantization="int8"))
    said = refusal(lambda: train(recipe, quiet_console()))
    assert str(said.fix).startswith("write quantization: nf4")
    assert refusal(lambda: check(recipe)).what == said.what
    check(load_recipe(recipe_file(base_model=str(folder), quantization="nf4")))  # the fix, followed


# ── what is no model folder ───────────────────────────────────────────────────────────────────────────────────────


def test_what_people_name_instead_of_a_model_is_called_by_its_name(tiny_llama, tmp_path: Path, run_recipe: Any):
    run, _ = run_recipe(train={"max_steps": 1})
    holding = tmp_path / "ggufs"
    holding.mkdir()
    (holding / "model-Q4_0.gguf").write_bytes(b"GGUF")
    base = f"name its base model: {tiny_llama}"
    cases = [
        (holding, "holds GGUF files, one of which is a model", f"name the file, such as {holding / 'model-Q4_0.gguf'}"),
        (run, "is a run folder, whose result is an adapter, not a base model", base),
        (run / "adapter", "is an adapter, not a base model", base),
        (tiny_llama / "model.safetensors", "is a file, not a model folder", f"name its folder: {tiny_llama}"),
    ]
    for name, what, fix in cases:
        for call in (lambda name=name: find_base(str(name)), lambda name=name: look_at_model(str(name))):
            said = refusal(call)
            assert said.what == f"{name} {what}"
            assert fix in str(said.fix)


# ── NF4 on a CPU ──────────────────────────────────────────────────────────────────────────────────────────────────


def nf4_by_hand(weight: Tensor) -> Tensor:
    """Each block of 64 numbers along the rows, divided by its largest, to the nearest of 16 values (QLoRA)."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device="cpu").float()
    flat = weight.float().flatten()
    blocks = torch.cat([flat, torch.zeros(-len(flat) % 64)]).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(code).abs().argmin(-1)
    return (code[nearest] * scale).flatten()[: len(flat)].view(weight.shape)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_layers_of_odd_widths_hold_their_nf4_values_on_a_cpu(kind, stored, tmp_path: Path):
    """What a GPU computes with; also of a checkpoint that is stored in NF4 already."""
    folder = save_tiny(ODD[kind], tmp_path / kind)
    plain = load_model(find_base(str(folder)), quantization="none", dtype=torch.float32, device=CPU)
    if stored:
        import transformers as hf

        settings = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        again = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
        again.save_pretrained(tmp_path / "stored")
        (tmp_path / "stored" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        folder = tmp_path / "stored"
    model = load_model(
        find_base(str(folder)), quantization="nf4", dtype=torch.float32, device=CPU, double_quantization=False
    )
    assert unquantized_layers(model) == []
    seen = 0
    for name, layer in model.named_modules():
        if is_quantized(layer):
            theirs = plain.get_submodule(name)
            assert stored_transposed(layer) == isinstance(theirs, Conv1D)
            expected = nf4_by_hand(dense_weight(theirs).contiguous())
            torch.testing.assert_close(dense_weight(layer), expected, rtol=0, atol=1e-6)
            x = torch.randn(3, expected.shape[1])
            bias = 0 if layer.bias is None else layer.bias
            torch.testing.assert_close(layer(x), x @ expected.T + bias, rtol=0, atol=1e-5)
            seen += 1
    assert seen >= 4


def test_what_is_said_of_layers_follows_from_what_they_are(tmp_path: Path, recipe_file: Any, tiny_llama: Path):
    """Nothing of widths where all is quantized, or where the checkpoint itself leaves layers out."""
    import transformers as hf

    said: list[str] = []

    class Saying:
        is_terminal = False

        def print(self, *texts: Any, **_: Any) -> None:
            said.extend(map(str, texts))

    def session_of(folder: Path) -> str:
        said.clear()
        console: Any = Saying()
        open_session(load_recipe(recipe_file(base_model=str(folder), quantization="nf4")), console)
        return "\n".join(said)

    text = session_of(tiny_llama)
    assert "stay unquantized" not in text
    assert "wrongly on a CPU" not in text
    assert "7 layers hold their NF4 values in float32: bitsandbytes computes their size wrongly on a CPU" in session_of(
        save_tiny(ODD["llama"], tmp_path / "odd")
    )
    settings = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["down_proj", "lm_head"]
    )
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(tmp_path / "skipping")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "skipping")
    text = session_of(tmp_path / "skipping")
    assert "2 layers stay unquantized, as the checkpoint stores them" in text
    assert "wrongly on a CPU" not in text
