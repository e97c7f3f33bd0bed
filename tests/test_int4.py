"""`quantization: int4`: what Q4_1 stores, quantized well, and a layer that computes with exactly that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers as hf
from conftest import open_base, randomize_adapter, save_tiny
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.attach import attach
from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.qa_lora import QALoRALinear
from lora_cli.adapters.targets import find_targets
from lora_cli.adapters.trained import trained_modules, trained_parameters
from lora_cli.base.linear import dense_weight, features, unquantized_layers
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.base.storage import int4
from lora_cli.base.storage.int4 import Int4Linear, dequantize, q4_1_blocks, quantize
from lora_cli.base.storage.registry import storage_named
from lora_cli.errors import LoraError
from lora_cli.merging.compare import make_dense
from lora_cli.merging.merge import merge
from lora_cli.planning.check import check
from lora_cli.recipe import load_recipe
from lora_cli.studies.equalities import like_gguf
from lora_cli.training.opening import open_session

CPU = torch.device("cpu")
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def weights(outputs: int = 24, inputs: int = 256, seed: int = 0) -> Tensor:
    """Normal, with scales and offsets that differ by group, as trained weights have them."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(outputs, inputs // 32, 1, generator=draw) + 0.1
    return (torch.randn(outputs, inputs // 32, 32, generator=draw) * scale + scale / 3).view(outputs, inputs) * 0.05


def layer_of(weight: Tensor, bias: Tensor | None = None, group_size: int = 32) -> Any:
    layer = Int4Linear(weight.shape[1], weight.shape[0], None if bias is None else nn.Parameter(bias), group_size)
    for name, part in zip(("weight", "d", "m"), quantize(weight, group_size), strict=True):
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    return layer


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_layers_weight_is_what_gguf_reads_in_its_blocks_bit_for_bit(group_size: int):
    parts = quantize(weights(), group_size)
    assert [each.shape[1] for each in parts] == [128, 256 // group_size, 256 // group_size]
    assert like_gguf(*parts) == 0


def squares(made: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group."""
    errors = (made - weight).double().square() * (1 if counts is None else counts.bfloat16().double())
    return errors.view(-1, 32).sum(-1)


@pytest.mark.parametrize("by_input", [False, True])
def test_quantizing_is_never_worse_than_rounding_and_exact_where_that_is(by_input: bool):
    """Rounding: d and m from the least and the greatest weight, as gguf's own quantizer does it."""
    weight, counts = weights(256), torch.ones(256)
    if by_input:
        counts = torch.rand(256, generator=torch.Generator().manual_seed(1)).exp2().pow(8)
    rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Q4_1), Q4_1))
    own = dequantize(*quantize(weight, importance=counts))
    errors, of_rounding = squares(own, weight, counts), squares(rounded, weight, counts)
    assert (errors <= of_rounding * (1 + 1e-5) + 1e-12).all()
    assert (errors.sum() / of_rounding.sum()).item() < 0.9  # measured 0.83 and 0.59
    assert torch.equal(dequantize(*quantize(rounded)), rounded)  # a model that was Q4_1 before costs nothing
    flat = torch.full((2, 32), 0.125)
    assert torch.equal(dequantize(*quantize(flat)), flat)
    with pytest.raises(LoraError, match="too large for int4"):
        storage_named("int4").prepare(layer_of(torch.full((1, 32), 1e5)))


def test_quantizing_comes_near_the_best_of_all_scales_and_offsets():
    """Of 32,000 pairs of d and m each, on sixteen groups."""
    weight, counts = weights(2), torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1
    x, counted = weight.view(-1, 32), counts.expand(2, -1).reshape(-1, 32).bfloat16().double()
    low, high = x.amin(-1)[:, None, None, None], x.amax(-1)[:, None, None, None]
    shares = torch.linspace(-0.05, 0.25, 180)
    m = low + (high - low) * shares[:, None, None]
    d = (high - (high - low) * shares[None, :, None] - m) / 15
    q = ((x[:, None, None] - m) / d).round().clamp(0, 15)
    best = ((q * d + m - x[:, None, None]).double().square() * counted[:, None, None]).sum(-1).flatten(1).amin(1)
    own = squares(dequantize(*quantize(weight, importance=counts)), weight, counts.expand(2, -1))
    assert (own < 1.4 * best).all()  # measured 1.33
    assert own.sum() < 1.1 * best.sum()  # measured 1.08


def test_small_weights_are_taken_for_those_of_large_inputs():
    """Where a channel was made smaller and the layer larger by as much, which changes no output before quantizing."""
    draw = torch.Generator().manual_seed(2)
    scale = torch.exp(0.6 * torch.randn(256, generator=draw))
    weight, x = weights(64) * scale, torch.randn(512, 256, generator=draw) / scale

    def lost(importance: Tensor | None) -> float:
        return ((dequantize(*quantize(weight, importance=importance)) - weight) @ x.T).square().sum().item()

    assert lost(None) < 0.9 * lost(torch.ones(256))
    assert lost(1 / scale.square()) < lost(None)  # what is known is better than what is guessed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_do_not_depend_on_threads_or_on_how_the_work_is_split(dtype: torch.dtype, monkeypatch: Any):
    weight = weights(96).to(dtype)
    expected, threads = quantize(weight), torch.get_num_threads()
    for at_once, count in ((256, 1), (256 * 7, 2), (2**30, 4)):
        monkeypatch.setattr(int4, "_AT_ONCE", at_once)
        torch.set_num_threads(count)
        try:
            made = quantize(weight)
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, made, expected))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(own, each[order]) for own, each in zip(quantize(weight[order]), expected, strict=True))


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
    ids: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4}
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
    assert opened.adapter is not None
    assert opened.adapter.metadata.group_size == 64
    assert torch.equal(opened.model(input_ids=ids).logits, logits)
    report = merge(tmp_path / "adapter", tmp_path / "merged", dtype="fp32", onto=onto)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if onto == "trained":
        assert report.kept > 0.99999
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=2e-5)
    else:
        assert report.kept > 0.99999  # of the adapter on these weights
        assert report.kl_trained / report.adapter_effect > 1e-5  # another model than was trained


# ── QA-LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────


def qa_layer(group_size: int = 64, **settings: Any) -> QALoRALinear:
    layer = QALoRALinear(layer_of(weights(), torch.randn(24), group_size), 4, 6.0, settings.get("dropout", 0.0))
    layer.double()
    layer.base_layer.d.data, layer.base_layer.m.data = (
        each.half() for each in (layer.base_layer.d, layer.base_layer.m)
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("joined", [False, True])
def test_qa_lora_is_the_papers_formula_forward_and_backward(group_size: int, joined: bool):
    """W x + b + s · B A pool(x) with the sum of each group, in float64; gradients of x, A and B."""
    layer = qa_layer(group_size)
    assert layer.lora_A.shape == (4, 256 // group_size)
    given = torch.randn(7, 256, dtype=torch.float64, requires_grad=True)
    x = given * 1 if joined else given  # what begins a graph is computed layer by layer
    out = layer(x)
    A, B = (each.detach().clone().requires_grad_(True) for each in (layer.lora_A, layer.lora_B))
    y = given.detach().clone().requires_grad_(True)
    pooled = nn.functional.avg_pool1d(y.unsqueeze(1), group_size).squeeze(1) * group_size
    frozen = nn.functional.linear(y, dense_weight(layer.base_layer).double(), layer.base_layer.bias)
    expected = frozen + 6.0 / 4 * pooled @ A.T @ B.T
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for own, theirs in ((given, y), (layer.lora_A, A), (layer.lora_B, B)):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=0, atol=1e-10)
    delta = 6.0 / 4 * (B @ A).repeat_interleave(group_size, 1)
    torch.testing.assert_close(layer.delta_weight(), delta, rtol=0, atol=1e-12)
    assert layer.update_norm(dense_weight(layer.base_layer)) == pytest.approx(delta.norm().item(), rel=1e-12)


@pytest.mark.parametrize("group_size", [32, 128])
def test_merged_it_is_the_same_four_bits_with_other_offsets(group_size: int):
    """d and q stay; m' is m + s · B A rounded to fp16: bit for bit what gguf reads in blocks with that m'."""
    layer = qa_layer(group_size)
    with torch.no_grad():
        layer.lora_B.mul_(0.01)
        q, d, m = layer.base_layer.parts()
        moved = (m.float() + (1.5 * layer.lora_B @ layer.lora_A).float()).half()
        assert torch.equal(layer.merged_offsets(), moved)
        assert (moved != m).float().mean() > 0.9
        merged = layer.merged(dense_weight(layer.base_layer))
    read = torch.from_numpy(gguf.quants.dequantize(q4_1_blocks(q, d, moved).numpy(), Q4_1))
    assert torch.equal(merged, read)


def test_dropout_is_that_of_lora_with_the_spread_a(tiny_llama: Path):
    """Inputs drop one by one, before the sum."""
    layer = qa_layer(dropout=0.3)
    plain = LoRALinear(nn.Linear(256, 24), 4, 6.0, 0.3).double()
    plain.base_layer = layer.base_layer
    with torch.no_grad():
        plain.lora_A.copy_(layer.spread_A())
        plain.lora_B.copy_(layer.lora_B)
    x, tokens = torch.randn(9, 256, dtype=torch.float64), torch.arange(9, dtype=torch.int32) * 77 + 1
    for each in (layer, plain):
        each.hold_token_keys("a.name", tokens)
    assert torch.equal(layer.train()(x), plain.train()(x))
    assert not torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_a_run_of_qa_lora_is_trained_saved_read_and_merged(base: str, run_recipe: Any, tmp_path: Path, request: Any):
    folder = request.getfixturevalue(base)
    quantized = {"quantization": "int4", "group_size": 64}
    adapter = {"method": "qa_lora", "target_modules": "all-linear", "rank": 4, "dropout": 0.1}
    run, _ = run_recipe(
        base_model=str(folder), **quantized, adapter=adapter, data={"validation": 0.25},
        train={"max_steps": 6, "learning_rate": 5e-3, "gradient_checkpointing": "full"},
    )  # fmt: skip
    opened = open_model(None, run, device="cpu", dtype="fp32")
    layers = trained_modules(opened.model)
    assert layers
    assert all(type(each) is QALoRALinear and each.group_size == 64 for each in layers.values())
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, layer in layers.items():
        A = stored[f"base_model.model.{name}.lora_A.weight"]
        assert A.shape[1] == features(layer.base_layer)[0]
        assert torch.equal(A[:, ::64], layer.lora_A)
        assert torch.equal(A, layer.spread_A())
        assert layer.lora_B.any()
    ids = torch.arange(20)[None]
    logits = opened.model(input_ids=ids).logits
    theirs: Any = peft.PeftModel.from_pretrained(dense_of(folder, 64), run / "adapter")
    torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=0, atol=2e-5)  # an ordinary PEFT adapter
    merged = merge(run, tmp_path / "merged")
    assert (merged.dtype, merged.onto) == ("fp32", "trained")
    assert merged.kept > 0.99
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=5e-3)
    for name, layer in layers.items():
        weight = dense_weight(again.get_submodule(name))
        q, d, m = layer.base_layer.parts()
        change = layer.scaling * (layer._masked_B() @ layer.lora_A)
        assert torch.equal(weight, dequantize(q, d, (m.float() + change).half()))  # 4 bits still
    with pytest.raises(LoraError, match="merged into the offsets of the int4 base"):
        merge(run, tmp_path / "other", onto="original")
    with pytest.raises(LoraError, match="does not fit"):
        open_model(None, run, quantization="none", device="cpu", dtype="fp32")
    file = run / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as own:
        save_file(stored, file, {key: value for key, value in own.metadata().items() if key != "search"})
    with pytest.raises(LoraError, match="trained on int4 weights that another version of lora chose in another way"):
        open_model(None, run, device="cpu", dtype="fp32")  # made before there was more than one


def dense_of(folder: Path, group_size: int) -> Any:
    """The int4 base as plain layers, for programs that know no int4."""
    model = load_model(
        find_base(str(folder)), quantization="int4", dtype=torch.float32, device=CPU, group_size=group_size
    )
    make_dense(model)
    return model


def test_qa_lora_on_layers_without_whole_groups_is_refused_before_weights_are_read(recipe_file: Any, tmp_path: Path):
    ids: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4}
    folder = save_tiny(hf.LlamaConfig(**ids, hidden_size=64, intermediate_size=96, **small), tmp_path / "odd")

    def recipe(**adapter: Any) -> Any:
        own = {"method": "qa_lora", "target_modules": "all-linear", "rank": 4} | adapter
        return load_recipe(recipe_file(base_model=str(folder), quantization="int4", group_size=64, adapter=own))

    with pytest.raises(LoraError) as refused:
        check(recipe())
    assert "needs layers whose inputs are whole groups of 64, but 1 layers have other widths" in refused.value.what
    assert "exclude_modules: [down_proj]" in str(refused.value.fix)
    checked = check(recipe(exclude_modules=["down_proj"]))
    session = open_session(recipe(exclude_modules=["down_proj"]), Console(file=io.StringIO()))
    assert checked.parameters == sum(each.numel() for each in trained_parameters(session.model))
