"""`quantization: int4`: what Q4_1 stores, quantized well, and a layer that computes with exactly that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from conftest import open_base, randomize_adapter, save_tiny
from rich.console import Console
from torch import Tensor, nn

from lora_cli.adapters.attach import attach
from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.targets import find_targets
from lora_cli.base.linear import dense_weight, unquantized_layers
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import Int4Linear, dequantize, q4_1_blocks, quantize
from lora_cli.merging.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.training.opening import open_session

CPU = torch.device("cpu")
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def weights(outputs: int = 24, inputs: int = 256, seed: int = 0) -> Tensor:
    """Normal, with scales and offsets that differ by group, as trained weights have them."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(outputs, inputs // 32, 1, generator=draw) + 0.1
    return (torch.randn(outputs, inputs // 32, 32, generator=draw) * scale + scale / 3).view(outputs, inputs) * 0.05


def layer_of(weight: Tensor, bias: Tensor | None = None, group_size: int = 32) -> Int4Linear:
    layer = Int4Linear(weight.shape[1], weight.shape[0], None if bias is None else nn.Parameter(bias), group_size)
    for name, part in zip(("weight", "d", "m"), quantize(weight, group_size), strict=True):
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    return layer


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_layers_weight_is_what_gguf_reads_in_its_blocks_bit_for_bit(group_size: int):
    parts = quantize(weights(), group_size)
    assert [each.shape[1] for each in parts] == [128, 256 // group_size, 256 // group_size]
    read = gguf.quants.dequantize(q4_1_blocks(*parts).numpy(), Q4_1)
    assert np.array_equal(read, dequantize(*parts).numpy())


def test_quantizing_is_better_than_rounding_and_exact_where_that_is():
    """Rounding: d and m from the least and the greatest weight, as gguf's own quantizer does it."""
    weight = weights(256)
    rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Q4_1), Q4_1))
    own = dequantize(*quantize(weight))
    groups = [(each - weight).view(-1, 32).square().sum(-1) for each in (own, rounded)]
    assert (groups[0] <= groups[1] * (1 + 1e-5) + 1e-12).all()
    assert 0.8 < (groups[0].sum() / groups[1].sum()).item() < 0.9  # measured 0.86
    assert torch.equal(dequantize(*quantize(rounded)), rounded)  # a model that was Q4_1 before costs nothing
    flat = torch.full((2, 32), 0.125)
    assert torch.equal(dequantize(*quantize(flat)), flat)
    with pytest.raises(ValueError, match="too large for int4"):
        quantize(torch.full((1, 32), 1e5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_layer_is_the_dense_layer_of_its_dequantized_weight(dtype: torch.dtype):
    layer = layer_of(weights(), torch.randn(24), 64)
    x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(each), each)[1], lambda each: each):
        out = layer(x)
    expected = nn.functional.linear(y, dense_weight(layer).to(dtype)) + layer.bias.to(dtype)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert sum(each.nbytes for each in kept) == sum(each.nbytes for each in layer.parts())  # and no dense weight


def test_what_does_not_fill_its_groups_stays_as_it_is_and_training_says_so(recipe_file, tmp_path):
    ids = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small = {"num_hidden_layers": 1, "num_attention_heads": 4}
    folder = save_tiny(hf.LlamaConfig(**ids, hidden_size=64, intermediate_size=80, **small), tmp_path / "odd")
    model = load_model(find_base(str(folder)), quantization="int4", dtype=torch.float32, device=CPU)
    assert unquantized_layers(model) == ["model.layers.0.mlp.down_proj"]
    assert model.model.layers[0].mlp.gate_proj.group_size == 32
    console = Console(file=io.StringIO(), width=300)
    open_session(load_recipe(recipe_file(base_model=str(folder), quantization="int4", group_size=64)), console)
    assert (
        "1 layers stay unquantized, 1 of them because group_size: 64 does not divide their inputs, first "
        "model.layers.0.mlp.down_proj" in console.file.getvalue()  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("onto", ["trained", "original"])
def test_lora_on_int4_is_saved_opened_and_merged_as_it_was_trained(base: str, onto: str, tmp_path: Path, request: Any):
    """With the group size of training, which the adapter file says."""
    folder = request.getfixturevalue(base)
    source = find_base(str(folder))
    model = load_model(source, quantization="int4", dtype=torch.float32, device=CPU, group_size=64)
    plain = open_base(folder, "none", torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Int4Linear):
            weight = dense_weight(plain.get_submodule(name))
            assert torch.equal(dequantize(*quantize(weight, 64)), dense_weight(layer))  # GPT-2's too: not transposed
    attach(model, find_targets(model, "all-linear", rank=4, alpha=8))
    randomize_adapter(model)
    ids = torch.arange(20)[None]
    logits = model(input_ids=ids).logits
    (tmp_path / "adapter").mkdir()
    held = {"quantization": "int4", "double_quantization": True, "group_size": 64}
    save_adapter(model, tmp_path / "adapter", source, **held)
    opened = open_model(None, tmp_path / "adapter", device="cpu", dtype="fp32")
    assert opened.adapter is not None and opened.adapter.metadata.group_size == 64
    assert torch.equal(opened.model(input_ids=ids).logits, logits)
    report = merge(tmp_path / "adapter", tmp_path / "merged", dtype="fp32", onto=onto)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if onto == "trained":
        assert report.kl < 1e-9
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=2e-5)
    else:
        assert report.kl > 1e-9
