"""LoRALinear over every kind of base layer: the formula, its gradients, PEFT's layer, the traps of quantized bases."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import open_base, randomize_adapter, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters import dropout as dropout_module
from lora_cli.adapters.attach import attach
from lora_cli.adapters.beside import join, watch_inputs
from lora_cli.adapters.dropout import dropped, feature_keys, keep_mask, token_keys
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import Target
from lora_cli.adapters.trained import (
    adapters_disabled,
    cast_once,
    dropout_keys,
    is_neutral,
    trained_modules,
    trained_parameters,
)
from lora_cli.base.linear import dense_weight, features, is_linear, settle_layers, stored_transposed
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.errors import LoraError
from lora_cli.studies import equalities

# 64 inputs are one NF4 block: where a row is no whole number of blocks, bitsandbytes 0.50.2 on CPUs takes other
# blocks' scales (measured), and so computes with other weights than the format defines.
IN, OUT, RANK, ALPHA = 64, 40, 4, 6.0
DENSE = ["linear", "linear without bias", "conv1d"]
NF4 = ["nf4", "nf4 without bias", "nf4 double", "nf4 double without bias"]
INT8 = ["int8", "int8 without bias"]
KINDS = DENSE + NF4 + INT8


def make_base(kind: str, seed: int = 0) -> Any:
    """A frozen base layer with random weights near 1/√in and, where it has one, a random bias."""
    torch.manual_seed(seed)
    bias = "without" not in kind
    if kind == "conv1d":
        base: Any = Conv1D(OUT, IN)
        nn.init.normal_(base.weight, std=IN**-0.5)
    elif kind.startswith("nf4"):
        base = bnb.nn.Linear4bit(IN, OUT, bias, compress_statistics="double" in kind, quant_type="nf4")
    elif kind.startswith("int8"):
        base = bnb.nn.Linear8bitLt(IN, OUT, bias, has_fp16_weights=False)
    else:
        base = nn.Linear(IN, OUT, bias)
    if bias:
        nn.init.normal_(base.bias)
    base = base.to("cpu")  # this is what quantizes
    settle_layers(base, torch.float32)
    return base.requires_grad_(False)


def make_layer(kind: str, **settings: Any) -> LoRALinear:
    """With random A and B: at B = 0 most tests here would prove nothing."""
    layer = LoRALinear(make_base(kind), RANK, ALPHA, **settings)
    randomize_adapter(layer, scale=0.5)
    return layer


def make_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 3)), IN, generator=generator).to(dtype).requires_grad_()


def draw_dropout(layer: LoRALinear, tokens: int, step: int = 0) -> Any:
    keys = torch.from_numpy(token_keys(0, step, np.arange(tokens)))
    return dropout_keys({"layer": layer}, keys)


def weight_and_bias(base: Any) -> tuple[Tensor, Tensor]:
    weight = base.weight.T if isinstance(base, Conv1D) else dense_weight(base)
    bias = torch.zeros(OUT) if base.bias is None else base.bias
    return weight.detach(), bias.detach().to(weight.dtype)


# E1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_fresh_adapter_is_the_base_layer_bitwise(kind, dtype, training):
    base = make_base(kind)
    base = base if kind in NF4 + INT8 else base.to(dtype)
    layer = LoRALinear(base, RANK, ALPHA, dropout=0.3).train(training)
    layer.init_A("kaiming", torch.Generator().manual_seed(0))
    x = make_input(dtype=dtype)
    with torch.no_grad(), draw_dropout(layer, 6):
        assert torch.equal(layer(x), base(x))
        assert is_neutral(layer)
        randomize_adapter(layer)
        assert not is_neutral(layer)
        assert not torch.equal(layer(x), base(x))


# E2


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 2)])
def test_forward_and_gradients_are_the_formula(kind, shape):
    layer = make_layer(kind).double()
    assert equalities.formula(layer, make_input(*shape, dtype=torch.float64)) <= 1e-12  # measured 5e-15
    assert_close(layer.delta_weight(), ALPHA / RANK * layer.lora_B @ layer.lora_A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", NF4 + INT8)
def test_forward_and_gradients_over_a_quantized_base_are_the_formula(kind):
    layer = make_layer(kind).train()
    layer(make_input())  # an 8-bit layer takes its weight over into its state at the first forward
    assert equalities.formula(layer, make_input()) <= 2e-6  # fp32 sums of 64 terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_layer_is_the_layer_of_peft(kind, training):
    ours = make_layer(kind).train(training)
    theirs = equalities.peft_layer(ours, make_base(kind))
    module = {"nf4": "bnb", "int8": "bnb"}.get(kind.split()[0], "layer")
    assert type(theirs).__module__ == f"peft.tuners.lora.{module}"
    assert equalities.like_peft(ours, theirs, make_input()) <= 1e-6
    delta = theirs.get_delta_weight("default")
    assert_close(ours.delta_weight(), delta.T if kind == "conv1d" else delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weight_is_out_by_in_and_scaled_by_alpha_over_rank(kind):
    layer = make_layer(kind)
    assert features(layer.base_layer) == (IN, OUT)
    assert layer.lora_A.shape == (RANK, IN)
    assert layer.lora_B.shape == (OUT, RANK)
    assert layer.scaling == ALPHA / RANK == 1.5
    assert layer.delta_weight().shape == (OUT, IN)
    assert_close(layer.delta_weight(), 1.5 * layer.lora_B @ layer.lora_A)
    x = make_input()
    with adapters_disabled(layer):
        base = layer(x)
    assert_close(layer(x) - base, x @ layer.delta_weight().T, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 8), inputs=st.integers(8, 24), outputs=st.integers(8, 24), seed=st.integers(0, 2**31),
    alpha=st.floats(0.1, 64), factor=st.floats(0.25, 4),
)  # fmt: skip
def test_delta_has_at_most_the_rank_and_is_linear_in_alpha(rank, inputs, outputs, seed, alpha, factor):
    def delta(alpha: float) -> Tensor:
        layer = LoRALinear(nn.Linear(inputs, outputs, bias=False), rank, alpha).double()
        randomize_adapter(layer, seed)
        return layer.delta_weight()

    once = delta(alpha)
    assert torch.linalg.matrix_rank(once) <= rank
    assert_close(delta(alpha * factor), factor * once, rtol=1e-12, atol=1e-12 * once.abs().max().item())


# Number formats and what is trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_fp32_masters(kind, dtype):
    layer = make_layer(kind)
    exact = make_layer(kind)
    if kind in DENSE:
        layer.base_layer.to(dtype)
    x = make_input(dtype=dtype)
    layer.train()
    y = layer(x)
    assert y.dtype == layer.base_layer(x).dtype == dtype
    y.float().square().sum().backward()
    for part in (layer.lora_A, layer.lora_B):
        assert part.dtype == part.grad.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert layer.delta_weight().dtype == torch.float32
    expected = exact.train()(x.detach().float())
    # Five roundings to 8 bits (bf16; fp16 has 11) on the way, each 2^-9 of values up to 20 at most.
    assert_close(y.float(), expected, rtol=0, atol=5 * 2**-9 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_only_A_and_B_are_trained(kind):
    model = nn.Sequential(make_base(kind), nn.ReLU(), nn.Linear(OUT, 3))
    layer = attach(model, [Target("0", RANK, ALPHA)])["0"]
    randomize_adapter(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]
    assert [id(p) for p in trained_parameters(model)] == [id(layer.lora_A), id(layer.lora_B)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.1)
    model.train()(make_input()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        trained = name in ("0.lora_A", "0.lora_B")
        assert (parameter.grad is not None) == trained, name
        assert torch.equal(parameter, before[name]) != trained, name


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_what_the_layer_multiplies_by(kind):
    base = make_base(kind)
    x = make_input().detach()
    bias = 0 if base.bias is None else base.bias
    for _ in range(2):  # also after the first forward, when an 8-bit layer keeps its weight elsewhere
        weight = dense_weight(base)
        assert weight.shape == (OUT, IN)
        assert_close(base.train()(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)  # sums of 64 terms in fp32
    assert stored_transposed(base) == (kind == "conv1d")


def test_layer_shows_the_weight_and_bias_of_its_base():
    layer = make_layer("linear")
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert "rank=4, alpha=6.0, dropout=0.0" in repr(layer)


def test_a_subclass_with_a_forward_of_its_own_is_no_linear_layer():
    class Router(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            scores = super().forward(input)
            return scores, scores.argmax(-1)

    class Named(nn.Linear):
        pass

    assert not is_linear(Router(4, 2))
    assert is_linear(Named(4, 2))
    assert not is_linear(nn.Embedding(4, 2))
    assert all(is_linear(make_base(kind)) for kind in KINDS)


# What is kept


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "nf4 double", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layers_beside_each_other_keep_one_input_and_no_weight(kind, dropout):
    """Beyond parameters: x once, and rank values a token and layer; of int8 the scales of its rows, which it holds."""
    layers = {name: make_layer(kind, dropout=dropout).train() for name in "qkv"}
    x = make_input(32, 8)
    known = {t.untyped_storage().data_ptr() for each in layers.values() for t in [*each.parameters(), *each.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with (
        dropout_keys(layers, torch.from_numpy(token_keys(0, 0, np.arange(256)))),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        total = sum(layer(x).sum() for layer in layers.values())
    assert isinstance(total, Tensor)
    low = 3 * 256 * RANK * 4
    inputs = x.untyped_storage().nbytes()
    held = 3 * OUT * 4 if kind == "int8" else 0
    assert sum(kept.values()) == inputs + low + held


def test_what_is_frozen_gets_no_gradient_and_an_input_without_one_none_either():
    layer = make_layer("linear")
    layer(make_input().detach()).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())
    layer.lora_A.requires_grad_(False)
    layer.lora_A.grad = layer.lora_B.grad = None
    layer(make_input()).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is not None


def test_casting_once_gives_the_same_and_does_not_outlive_its_block():
    layer = make_layer("linear").bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = make_input(dtype=torch.bfloat16)
    expected = equalities.outputs(layer, x, layer.lora_A, layer.lora_B)
    with cast_once({"layer": layer}, torch.bfloat16):
        inside = equalities.outputs(layer, x, layer.lora_A, layer.lora_B)
    assert all(torch.equal(one, other) for one, other in zip(inside, expected, strict=True))
    assert [each.dtype for each in inside[2:]] == [torch.float32] * 2
    randomize_adapter(layer, scale=2.0)
    assert not torch.equal(layer(x), expected[0])


# Layers that share an input


def beside(kind: str, **settings: Any) -> list[LoRALinear]:
    """q, k and v as the trial joins them: ranks differ, so that a wrong share of the joined products shows."""
    layers = []
    for at in range(3):
        layer = LoRALinear(make_base(kind, seed=at), RANK + at, ALPHA, **settings).train()
        randomize_adapter(layer, seed=at, scale=0.5)
        layers.append(layer)
    model = nn.ModuleList(layers)
    with watch_inputs(layers) as groups, torch.no_grad(), dropped_by_name(layers, 6):
        x = make_input()
        for layer in model:
            layer(x)
    assert groups == [layers]
    join(groups, layers)
    return layers


def dropped_by_name(layers: list[LoRALinear], tokens: int) -> Any:
    keys = torch.from_numpy(token_keys(0, 0, np.arange(tokens)))
    return dropout_keys({str(at): layer for at, layer in enumerate(layers)}, keys)


def all_of(layers: list[LoRALinear], x: Tensor, order: str = "012") -> list[Tensor]:
    """Outputs, and gradients of x and of each A and B, for random gradients of the outputs."""
    given, x = x, x * 1
    outputs = {each: layers[int(each)](x) for each in order}
    total = sum(
        (outputs[each] * torch.randn(OUT, generator=torch.Generator().manual_seed(int(each)))).sum() for each in outputs
    )
    parameters = [part for each in layers for part in (each.lora_A, each.lora_B)]
    gradients = torch.autograd.grad(total, (given, *parameters), allow_unused=True)  # type: ignore[arg-type]
    return [*(outputs[each] for each in sorted(outputs)), *(each for each in gradients if each is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("order", ["012", "201", "01", "12", "0"])
def test_joined_layers_are_the_same_layers(kind, dropout, order):
    """In whatever order they are called, and where not all of them are."""
    layers = beside(kind, dropout=dropout)
    x = make_input()
    with dropped_by_name(layers, 6):
        joined = all_of(layers, x, order)
        for layer in layers:
            layer.beside = [layer]
        apart = all_of(layers, x, order)
    joined = [each for each in joined if each.any()]  # A of a layer that is not called gets zeros
    assert len(joined) == len(apart) == 1 + 3 * len(order)
    for one, other in zip(joined, apart, strict=True):
        assert_close(one, other, rtol=1e-5, atol=2e-6 * other.abs().max().item())


def products(call: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


def test_joined_layers_make_one_product_of_three():
    """Of A x, of its gradient of A and of x; beside these each layer has its base's two, B's two, and B's gradient."""
    layers = beside("linear without bias")
    x = make_input()
    assert products(lambda: all_of(layers, x)) == 3 * 5 + 3
    for layer in layers:
        layer.beside = [layer]
    assert products(lambda: all_of(layers, x)) == 3 * 5 + 3 * 3


@pytest.mark.parametrize("changed", ["input", "weight", "nothing"])
def test_an_input_or_weight_that_was_changed_since_is_computed_anew(changed):
    q, k, v = beside("linear")
    x = make_input() * 1
    q(x)
    with torch.no_grad():
        if changed == "input":
            x.mul_(2)
        elif changed == "weight":
            k.lora_A.mul_(2)
    assert_close(k(x), k.base_layer(x) + x @ k.delta_weight().T, rtol=1e-5, atol=1e-5)
    other = make_input(seed=5) * 1
    assert_close(v(other), v.base_layer(other) + other @ v.delta_weight().T, rtol=1e-5, atol=1e-5)


def test_evaluation_joins_nothing_and_so_computes_what_it_computes_elsewhere():
    layers, x = beside("linear"), make_input() * 1
    with torch.no_grad():
        joined = [layer(x) for layer in layers]
        for layer in layers:
            layer.beside = [layer]
        assert all(torch.equal(one, layer(x)) for one, layer in zip(joined, layers, strict=True))


@pytest.mark.parametrize("called", [1, 3])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_what_is_noted_on_an_input_holds_nothing_once_it_is_gone(needs_gradient, called):
    layers = beside("linear")
    before = make_input().requires_grad_(needs_gradient)
    x = before * 1
    gone, kept = weakref.ref(x), [layer(x) for layer in layers[:called]]
    gc.disable()
    try:
        del x
        assert gone() is None
        if needs_gradient:
            node = weakref.ref(kept[0].grad_fn)
            del kept
            assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_added_in_place_of_what_the_base_gave_where_autograd_lets_it(kind, monkeypatch):
    """Not where the base gives a view, whose gradients would be copied; and the result may be changed in place."""
    layer = make_layer(kind).train()
    given: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    x = make_input()
    out = layer(x)
    assert (out.data_ptr() == given[0].data_ptr()) == (not given[0]._is_view())
    assert out.data_ptr() == given[0].data_ptr() or kind in ("linear", "conv1d", "nf4", "nf4 double")
    assert not out._is_view()
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0] + 0
    out += 1
    (gradient,) = torch.autograd.grad((out - 1).square().sum(), x)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


# Dropout


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_dropout_is_on_the_lora_path_alone(kind):
    layer = make_layer(kind, dropout=0.4).train()
    x = make_input().detach()
    with adapters_disabled(layer):
        base = layer(x)
    keep = keep_mask(torch.from_numpy(token_keys(0, 3, np.arange(6))), feature_keys("layer", IN), 0.4)
    with draw_dropout(layer, 6, step=3):
        actual = layer(x)
        with adapters_disabled(layer):
            assert torch.equal(layer(x), base), "the frozen path never drops"
    expected = base + (x.view(6, IN) * keep / 0.6).view(x.shape) @ layer.delta_weight().T
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with draw_dropout(layer, 6, step=4):
        assert not torch.equal(layer(x), actual), "drawn anew in each step"


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_with_dropout_are_those_of_the_formula(masked):
    """What is dropped of the input is dropped of its gradient, though the mask is not kept."""
    mask = torch.rand(OUT, RANK, generator=torch.Generator().manual_seed(3)) < 0.5 if masked else None
    layer = make_layer("linear", dropout=0.4, output_mask=mask).double().train()
    x = make_input(dtype=torch.float64)
    weight, bias = weight_and_bias(layer.base_layer)
    A, B = layer.lora_A, layer.lora_B
    keep = keep_mask(torch.from_numpy(token_keys(0, 0, np.arange(6))), feature_keys("layer", IN), 0.4).view(x.shape)

    def formula(x: Tensor) -> Tensor:
        allowed = B if mask is None else B * mask
        return x @ weight.T + bias + ALPHA / RANK * (x * keep / 0.6) @ (allowed @ A).T

    with draw_dropout(layer, 6):
        actual = equalities.outputs(layer, x, A, B)
    for one, other in zip(actual, equalities.outputs(formula, x, A, B), strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_dropout_in_a_layer_that_sees_some_of_the_tokens_is_refused():
    layer = make_layer("linear", dropout=0.4).train()
    for keys in (None, torch.ones(5, dtype=torch.int32)):
        with dropout_keys({"layer": layer}, keys), pytest.raises(LoraError, match="sees only some of the tokens"):
            layer(make_input())


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_should_independently(p):
    """Rates over all, per token, per feature, and of pairs that share a token, a feature or a layer's tokens."""
    tokens, features = 2000, 768
    keys = torch.from_numpy(token_keys(1, 2, np.arange(tokens)))
    one, other = (keep_mask(keys, feature_keys(name, features), p).double() for name in ("q", "k"))
    variance = p * (1 - p)

    def off(rates: Tensor, count: int, expected: float, variance: float) -> float:
        """Mean square of the deviations in units of what chance gives: 1 for independent draws."""
        return ((rates - expected) ** 2).mean().item() / (variance / count)

    assert abs(one.mean().item() - (1 - p)) < 6 * (variance / one.numel()) ** 0.5
    for dim, count in ((0, tokens), (1, features)):
        assert off(one.mean(dim), count, 1 - p, variance) == pytest.approx(1, abs=0.3)
    centred, centred_other = one - (1 - p), other - (1 - p)
    shifted = centred.roll(1, 0) * centred, centred.roll(1, 1) * centred, centred * centred_other
    for products in shifted:
        assert abs(products.mean().item()) < 6 * variance / products.numel() ** 0.5
    between = centred.T @ centred / tokens  # of all pairs of features
    between = between[~torch.eye(features, dtype=torch.bool)]
    assert off(between, tokens, 0.0, variance**2) == pytest.approx(1, abs=0.1)
    assert between.abs().max() < 8 * variance / tokens**0.5


def test_dropout_is_off_in_evaluation_and_right_on_average():
    layer = make_layer("linear", dropout=0.4)
    x = make_input(1).detach()
    weight, bias = weight_and_bias(layer.base_layer)
    expected = x @ (weight + layer.delta_weight()).T + bias
    assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)
    with draw_dropout(layer.train(), 20000):
        samples = layer(x.expand(20000, IN))
    # An output is a sum over inputs of x·Δ, each kept with 0.6 and divided by it: deviation √(x²Δ² · 0.4/0.6).
    deviation = ((x**2) @ (layer.delta_weight() ** 2).T * (0.4 / 0.6)).sqrt()[0]
    assert_close(samples.std(0), deviation, rtol=0.05, atol=0)  # 7σ of a deviation is 7/√(2·20000) = 3.5 %
    assert ((samples.mean(0) - expected[0]).abs() < 6 * deviation / math.sqrt(20000)).all()


# Masked outputs of fused layers


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4 double", "int8"])
def test_masked_outputs_stay_exactly_zero_while_training(kind):
    """q and v of a fused layer of q, k and v, with two columns of B each."""
    rows = torch.arange(OUT)
    q, v = rows < 16, rows >= 28
    mask = torch.stack([q, q, v, v], 1)
    layer = LoRALinear(make_base(kind), RANK, ALPHA, output_mask=mask)
    attach_like = [layer.lora_A, layer.lora_B]
    randomize_adapter(layer)
    with torch.no_grad():
        layer.lora_B.mul_(mask)
    optimizer = torch.optim.AdamW(attach_like, lr=0.1, weight_decay=0.5)
    layer.train()
    before = layer.delta_weight().detach()
    for step in range(5):
        layer(make_input(seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not layer.lora_B[~mask].any()
        assert not layer.delta_weight()[~(q | v)].any()
    delta = layer.delta_weight()
    assert (delta - before)[q | v].any(1).all(), "every other output is trained"
    A, B = layer.lora_A, layer.lora_B
    assert_close(delta[q], 1.5 * B[q, :2] @ A[:2], rtol=1e-5, atol=1e-6)
    assert_close(delta[v], 1.5 * B[v, 2:] @ A[2:], rtol=1e-5, atol=1e-6)
    x = make_input()
    with adapters_disabled(layer):
        base = layer(x)
    assert torch.equal(layer(x)[..., ~(q | v)], base[..., ~(q | v)])


def test_mask_holds_whatever_B_is_and_is_not_saved():
    mask = torch.zeros(OUT, RANK, dtype=torch.bool)
    mask[:5] = True
    layer = make_layer("linear", output_mask=mask)
    assert layer.lora_B[5:].any()
    assert not layer.delta_weight()[5:].any()
    assert layer.delta_weight()[:5].any()
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"}


# Switching off


def test_adapters_disabled_is_the_base_and_restores():
    model = nn.Sequential(make_base("linear"), nn.Linear(OUT, IN), make_base("linear", seed=1))
    x = make_input()
    base = model(x)
    attach(model, [Target("0", RANK, ALPHA), Target("2", RANK, ALPHA)])
    randomize_adapter(model)
    trained_modules(model)["2"].active = False
    with_one = model(x)
    assert not torch.equal(with_one, base)
    with adapters_disabled(model):
        assert torch.equal(model(x), base)
        with adapters_disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), with_one)
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), with_one)
    assert [layer.active for layer in trained_modules(model).values()] == [True, False]


# How A starts


def fresh(init: str, seed: int, rank: int = 64) -> list[Tensor]:
    model = nn.Sequential(nn.Linear(1024, 256), nn.Linear(256, 1024))
    layers = attach(model, [Target("0", rank, 1.0), Target("1", rank, 1.0)], init=init, seed=seed)
    assert is_neutral(model)
    return [layer.lora_A.detach() for layer in layers.values()]


def test_kaiming_start_is_uniform_within_one_over_root_in():
    for A, inputs in zip(fresh("kaiming", 0), (1024, 256), strict=True):
        bound = inputs**-0.5
        assert A.abs().max() <= bound
        assert A.abs().max() > 0.999 * bound
        assert_close(A.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)  # 5σ of 16,384 draws is 2 %
        assert abs(A.mean().item()) < 5 * bound / math.sqrt(3 * A.numel())
        kept = (A.abs() < bound / 2).float().mean().item()
        assert abs(kept - 0.5) < 5 * 0.5 / math.sqrt(A.numel())  # half of a uniform lies in its inner half


def test_gaussian_start_has_deviation_one_over_rank():
    for rank in (8, 64):
        for A in fresh("gaussian", 0, rank):
            assert_close(A.std().item(), 1 / rank, rtol=0.08, atol=0)  # 5σ of the smallest, 2,048 draws, is 8 %
            within = (A.abs() < 1 / rank).float().mean().item()
            assert abs(within - 0.6827) < 5 * 0.4654 / math.sqrt(A.numel())  # one deviation of a normal


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start_is_a_function_of_the_seed_alone(init):
    first = fresh(init, 7)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, fresh(init, 7), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, fresh(init, 8), strict=True))
    assert not torch.equal(first[0].flatten()[:100], first[1].flatten()[:100])
    model, state = nn.Sequential(nn.Linear(8, 8)), torch.get_rng_state()
    attach(model, [Target("0", 2, 1.0)], init=init, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not used up"


# E11: quantized bases


def codebook_weight(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """NF4 by its definition (QLoRA, arXiv:2305.14314, section 3): (weight, codebook, absmax for each weight)."""
    packed, state = layer.weight.data.flatten(), layer.weight.quant_state
    index = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    absmax = state.absmax
    if state.nested:  # the scales are quantized too: 8-bit codes, a scale for each 256 of them, and their mean
        blocks = torch.arange(len(absmax)) // state.state2.blocksize
        absmax = state.state2.code[absmax.long()] * state.state2.absmax[blocks] + state.offset
    each = absmax.repeat_interleave(state.blocksize)[: len(index)]
    return (state.code[index] * each).reshape(state.shape), state.code, each.reshape(state.shape)


@pytest.mark.parametrize("kind", NF4)
def test_dense_weight_of_nf4_is_its_codebook_times_its_scales(kind):
    base = make_base(kind)
    assert base.weight.quant_state.nested == ("double" in kind)
    assert_close(dense_weight(base), codebook_weight(base)[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_rounds_to_the_nearest_code_with_the_mean_error_of_the_format(double):
    torch.manual_seed(0)
    original = torch.randn(512, 512)
    base = bnb.nn.Linear4bit(512, 512, False, compress_statistics=double, quant_type="nf4")
    base.weight.data.copy_(original)
    base = base.to("cpu")
    weight, code, absmax = codebook_weight(base)
    error = (original - weight).abs()
    # bitsandbytes states 0.0728 for blocks of 64 normal weights; 7σ of 262,144 errors of deviation 0.06 is 0.0008.
    assert 0.0720 < error.mean() < 0.0737
    if not double:
        nearest = (original.unsqueeze(-1) - code * absmax.unsqueeze(-1)).abs().amin(-1)
        assert_close(error, nearest, rtol=0, atol=1e-5)  # fp32 rounding at the borders between codes


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in NF4 + INT8 for dtype in (torch.float32, torch.bfloat16)]
    + [(kind, torch.float16) for kind in INT8],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_layer_is_the_dense_layer_of_its_dequantized_weight(kind, training, dtype):
    """Output and all gradients: nothing is rounded but the weight."""
    layer = make_layer(kind)
    before = dense_weight(layer.base_layer)
    # one rounding of the largest, where the sums end on different sides of it
    assert equalities.like_dense(layer.train(training), make_input(dtype=dtype)) <= 4 * torch.finfo(dtype).eps
    assert torch.equal(dense_weight(layer.base_layer), before)


def test_what_an_int8_layer_gives_a_token_does_not_depend_on_its_neighbours():
    """bitsandbytes' own kernel fails this: it takes scales and outlier columns from the whole micro-batch."""
    base = make_base("int8")
    x = make_input(1, 64).detach()
    x[0, 40] *= 50  # an outlier, whose columns bitsandbytes would compute in another way for all tokens
    together = base.eval()(x)
    alone = torch.cat([base(x[:, at : at + 1]) for at in range(64)], dim=1)
    assert_close(together, alone, rtol=0, atol=2e-5 * together.abs().max().item())


@pytest.fixture
def evaluated_nf4_model(tiny_llama, request) -> Any:
    """An NF4 model as the program loads it, after a forward without gradients in evaluation."""
    dtype, double = request.param
    model = load_model(
        find_base(str(tiny_llama)),
        quantization="nf4",
        dtype=dtype,
        device=torch.device("cpu"),
        double_quantization=double,
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    return model


@pytest.mark.parametrize(
    "evaluated_nf4_model",
    [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False), (torch.bfloat16, False)],
    indirect=True,
)
def test_nf4_gives_input_gradients_also_after_an_evaluation(evaluated_nf4_model):
    """On CPUs with avx512_bf16, bitsandbytes repacks weights in an evaluation, and gradients are lost from then on."""
    model = evaluated_nf4_model
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantized) == 2 * 7
    for name, layer in quantized.items():
        assert not getattr(layer, "support_avx512bf16_for_cpu", False), name  # fails also where the CPU lacks it
        weight = codebook_weight(layer)[0]
        for training in (False, True):
            layer.train(training)
            x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
            upstream = torch.randn(3, layer.out_features, generator=torch.Generator().manual_seed(1)).to(model.dtype)
            x.requires_grad_()
            layer(x).backward(upstream)
            expected = upstream.float() @ weight
            # bf16 rounds the weights to 2^-9 and the result to 2^-9; fp32 to 2^-24, in sums of 128.
            limit = (1e-5 if model.dtype == torch.float32 else 2**-6) * expected.abs().max().item()
            assert_close(x.grad.float(), expected, rtol=0, atol=limit)


def test_an_evaluation_in_the_middle_changes_no_gradient_of_an_nf4_model(tiny_llama):
    """The same trap as it would meet a user: gradients of every A and B, before and after, bitwise."""
    model = with_adapter(open_base(tiny_llama, "nf4", torch.bfloat16), rank=2, alpha=4.0)
    ids = torch.arange(3, 19).reshape(2, 8)

    def gradients() -> list[Tensor]:
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        return list(torch.autograd.grad(loss, trained_parameters(model)))

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert all(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_some_rows_at_a_time_drops_the_same(dtype, monkeypatch):
    """The random numbers behind a mask take twice the memory of bf16 values, so few rows are drawn at a time."""
    values = make_input(7, 9, dtype=dtype).detach().reshape(63, IN)
    tokens, inputs = torch.from_numpy(token_keys(0, 1, np.arange(63))), feature_keys("layer", IN)
    whole = dropped(values, tokens, inputs, 0.3)
    assert torch.equal(whole, values * keep_mask(tokens, inputs, 0.3))
    monkeypatch.setattr(dropout_module, "_MASK_NUMBERS", 5 * IN)
    assert torch.equal(dropped(values, tokens, inputs, 0.3), whole)
