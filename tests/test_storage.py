"""The ways of storing weights: each answers for its layers and its stored tensors, and nothing else knows of them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as hf
from conftest import ROOT, randomize_adapter, save_tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach
from lora_cli.adapters.targets import find_targets
from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.linear import dense_weight, held_bytes, is_quantized, stored_transposed, unquantized_layers
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import Int4Linear
from lora_cli.base.storage.registry import KINDS, part_of, storage_named, storage_of
from lora_cli.base.stored import dense_tensor, parameters_stored, parts_of
from lora_cli.base.weight_files import stored_tensors
from lora_cli.merging.compare import make_dense
from lora_cli.planning.memory import estimate_memory, shape_of
from lora_cli.planning.skeleton import look_at_model
from lora_cli.quantization import RULES, Quantization

CPU = torch.device("cpu")
IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**IDS, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4),
    "odd": hf.LlamaConfig(**IDS, hidden_size=96, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4),
    "gpt2": hf.GPT2Config(**IDS, n_embd=64, n_layer=1, n_head=4),
}
STORED = [("none", False), ("nf4", False), ("nf4", True), ("int8", False)]


def test_recipes_can_name_what_the_registry_has():
    names = sorted(kind.name for kind in KINDS)
    assert names == sorted(get_args(Quantization)) == sorted(RULES)
    assert all(storage_named(kind.name) is kind for kind in KINDS)


def test_every_other_module_belongs_to_no_kind():
    class Router(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), 0

    for module in (nn.Embedding(4, 2), nn.LayerNorm(4), nn.ModuleList(), Router(4, 2)):
        assert storage_of(module) is None
    for module in (nn.Linear(4, 2), Conv1D(4, 2)):
        assert storage_of(module) is storage_named("none")


@pytest.mark.parametrize(("quantization", "double"), STORED)
@pytest.mark.parametrize("name", MODELS)
def test_a_stored_tensor_is_what_its_layer_computes_with_bit_for_bit(
    name: str, quantization: str, double: bool, tmp_path: Path
):
    folder = save_tiny(MODELS[name], tmp_path / "model")
    settings = storage_named(quantization).load_settings(torch.float32, double)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(tmp_path / "stored")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    source = find_base(str(tmp_path / "stored"))
    loaded = load_model(source, quantization=quantization, dtype=torch.float32, device=CPU)
    stored = stored_tensors(source.folder)
    compared = 0
    for layer_name, layer in loaded.named_modules():
        if (kind := storage_of(layer)) is None or f"{layer_name}.weight" not in stored:
            continue
        dense = dense_tensor(stored, f"{layer_name}.weight", parts_of(stored))
        as_stored = kind.name == quantization == "none" and stored_transposed(layer)
        assert torch.equal(dense.T if as_stored else dense, dense_weight(layer)), layer_name
        assert dense.std() > 0  # not all zero
        compared += 1
    assert compared >= 4
    assert parameters_stored(stored) == parameters_stored(stored_tensors(folder))


@pytest.mark.parametrize(("quantization", "double"), STORED)
def test_held_bytes_are_those_of_the_stored_file(quantization: str, double: bool, tiny_llama: Path, tmp_path: Path):
    """Scales included; less what the file has beside them: a codebook of 16 or 256 numbers and a text a layer."""
    model = load_model(
        find_base(str(tiny_llama)), quantization=quantization, dtype=torch.float32, device=CPU,
        double_quantization=double,
    )  # fmt: skip
    parts = {name: part for name in model.state_dict() if (part := part_of(name)) is not None}
    scales = {"absmax", "nested_absmax", "SCB"}
    expected = sum(
        each.nbytes
        for name, each in model.state_dict().items()
        if name not in parts or parts[name].name in scales
    )  # fmt: skip
    buffers = sum(each.nbytes for each in model.buffers())  # rotary frequencies, which no file has
    shared = model.lm_head.weight.nbytes if model.lm_head.weight is model.model.embed_tokens.weight else 0
    assert held_bytes(model) == expected + buffers - shared
    assert held_bytes(model, frozen_alone=True) == expected - shared
    model.lm_head.weight.requires_grad_(True)
    assert held_bytes(model, frozen_alone=True) == expected - shared - model.lm_head.weight.nbytes


def test_a_kind_of_our_own_is_one_class_and_one_line(tiny_llama: Path):
    """Loaded, adapted, trained on, counted, estimated and made dense for a merge, without another line anywhere."""
    source = find_base(str(tiny_llama))
    plain = load_model(source, quantization="none", dtype=torch.float32, device=CPU)
    model = load_model(source, quantization="int4", dtype=torch.float32, device=CPU)
    held = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    assert len(held) == 14
    assert storage_of(model.get_output_embeddings()) is storage_named("none")
    assert all(is_quantized(layer) for layer in held.values())
    assert unquantized_layers(model) == []
    for name, layer in held.items():
        weight = plain.get_submodule(name).weight
        blocks = weight.view(len(weight), -1, 32)
        step = ((blocks.amax(-1) - blocks.amin(-1)) / 15).max().item()
        assert (dense_weight(layer) - weight).abs().max() <= 2 * step  # ends of a range may be clipped
    shape = shape_of(look_at_model(str(tiny_llama)), {}, torch.float32, quantization="int4", device="cpu")
    nothing = {"tokens": 0, "target_tokens": 0, "gradient_checkpointing": "none"}
    estimated = estimate_memory(shape, quantization="int4", value_bytes=4, **nothing).weights - 4 * shape.largest_layer
    assert estimated == pytest.approx(held_bytes(model), rel=0.01)
    attach(model, find_targets(model, "all-linear", rank=4, alpha=8))
    randomize_adapter(model)
    ids = torch.arange(20)[None]
    model(input_ids=ids).logits.sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in trained_parameters(model))
    logits = model(input_ids=ids).logits
    make_dense(model)
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-5)


def test_nothing_outside_the_registry_speaks_of_a_kind():
    """Names of kinds and of their layers' classes are written in base/storage and quantization.py alone.

    The equalities of `lora selftest` are about some of them by name. gguf is also a format, a package and an extra.
    """
    kinds = {kind.name for kind in KINDS} - {"none", "gguf"}
    inside = {
        "Linear4bit",
        "Linear8bitLt",
        "Params4bit",
        "Int4Linear",
        "Q8Linear",
        "SCB",
        "absmax",
        "quant_state",
        "load_in_4bit",
    }
    package = ROOT / "lora_cli"
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path.name not in ("quantization.py", "equalities.py", "selftest.py")
        and not path.is_relative_to(package / "base" / "storage")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Constant) and node.value in kinds | inside)
        or (isinstance(node, ast.Attribute) and node.attr in inside)
    ]
    assert found == []
