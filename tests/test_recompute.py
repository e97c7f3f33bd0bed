"""Norms, activations and gated products that keep their inputs alone, and adapters that keep how these are made: the
same model, the same gradients, less kept."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import assert_near, with_adapter
from test_varlen import stand_in
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lora_cli.adapters import layer as layer_module
from lora_cli.adapters.attach import attach
from lora_cli.adapters.dropout import token_keys
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import block_lists, find_targets
from lora_cli.adapters.trained import dropout_keys, trained_modules, trained_parameters
from lora_cli.base import attention, causal_attention, remade
from lora_cli.base.activations import ActivationPlan, measured
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.remade import followed, how_made, keeping_sources, note_how_made
from lora_cli.base.rotary import noting_rotary, rotating_modules
from lora_cli.base.surgery import forward_layers

TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
TINY |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT: dict[str, Any] = {key: TINY[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
GPT |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
MODELS: dict[
    str, tuple[Callable[[], Any], int]
] = {  # with the modules that are replaced: in each block, and at the end
    "llama": (lambda: hf.LlamaConfig(**TINY), 2 * (2 + 1) + 1),
    "gemma2": (lambda: hf.Gemma2Config(**TINY, head_dim=8, query_pre_attn_scalar=8), 2 * (4 + 1) + 1),
    "qwen3": (lambda: hf.Qwen3Config(**TINY, head_dim=8), 2 * (4 + 1) + 1),  # norms of queries and keys as well
    "gemma3": (lambda: hf.Gemma3TextConfig(**TINY, head_dim=8), 2 * (6 + 1) + 1),
    "granite": (lambda: hf.GraniteConfig(**TINY, residual_multiplier=0.5), 2 * (2 + 1) + 1),
    "cohere": (lambda: hf.CohereConfig(**TINY), 2 * (1 + 1) + 1),  # its norms subtract the mean: not RMSNorm
    "phi3": (lambda: hf.Phi3Config(**TINY), 2 * (2 + 1) + 1),  # gate and up are one layer
    "gpt2": (lambda: hf.GPT2Config(**GPT, activation_function="gelu_new"), 2 * (2 + 1) + 1),  # no gate
    "gpt-neox": (lambda: hf.GPTNeoXConfig(**TINY), 2 * (2 + 1) + 1),
}


def tiny(config: Any, *, target_modules: str = "all-linear") -> Any:
    """In training, with random norms: with weights of 1 a wrong use of them would not show."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with_adapter(model, target_modules, scale=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.train()


def run(model: Any) -> tuple[Tensor, list[Tensor], int]:
    """Logits, gradients of the adapter, and bytes that all blocks keep."""
    ids = torch.arange(40).view(2, 20) * 7 % 97
    blocks = [block for name in block_lists(model) for block in model.get_submodule(name)]
    with measured(blocks) as kept:
        logits = model(input_ids=ids, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return logits.detach(), list(torch.autograd.grad(logits, trained_parameters(model), upstream)), sum(kept)


def test_a_base_in_half_precision_is_replaced_as_well_though_its_adapters_are_in_fp32():
    config, replaced = MODELS["llama"]
    model = hf.AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    attach(model, find_targets(model, "all-linear", rank=4, alpha=8))
    assert save_only_inputs(model) == replaced


@pytest.mark.parametrize("target_modules", ["all-linear", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_same_values_same_gradients_less_kept(name, target_modules):
    config, replaced = MODELS[name]
    model = tiny(config(), target_modules=target_modules)
    logits, gradients, kept = run(model)
    assert save_only_inputs(model) == replaced
    after, again, less = run(model)
    assert torch.equal(after, logits)
    assert_near(again, gradients, 1e-5)  # fp32: sums in another order
    assert less < kept
    assert all(gradient.any() for gradient in gradients), "or nothing was compared"


@pytest.mark.parametrize("name", MODELS)
def test_without_gradients_and_in_evaluation_values_stay(name):
    model = tiny(MODELS[name][0]()).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    save_only_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_keeps_its_input_alone_and_has_its_gradient(kind):
    norm = with_random_weight(kind(16))
    x, upstream = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16)
    (expected,) = torch.autograd.grad(norm(x), x, upstream)
    assert save_only_inputs(norm) == 1
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = norm(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    torch.testing.assert_close(torch.autograd.grad(out, x, upstream)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_in_bf16_has_the_gradient_of_fp32_as_near_as_bf16_is(kind):
    """It is computed in fp32 and rounded to 8 bits once; so is upstream times weight at most."""
    norm = with_random_weight(kind(16)).to(torch.bfloat16)
    wide = kind(16)
    wide.load_state_dict({name: tensor.float() for name, tensor in norm.state_dict().items()})
    x, upstream = (torch.randn(5, 16).to(torch.bfloat16) for _ in range(2))
    x_wide, x = x.float().requires_grad_(), x.requires_grad_()
    (expected,) = torch.autograd.grad(wide.requires_grad_(False)(x_wide), x_wide, upstream.float())
    before = norm(x).detach()
    assert save_only_inputs(norm) == 1
    out = norm(x)
    assert torch.equal(out.detach(), before)
    (actual,) = torch.autograd.grad(out, x, upstream)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


# ── inputs of adapted layers ────────────────────────────────────────────────────────────────────────────────────


def without_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "how_made", lambda x: how_made(x.detach()))


def blocks_of(model: Any) -> list[nn.Module]:
    return [block for name in block_lists(model) for block in model.get_submodule(name)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_inputs_that_are_made_again_change_no_gradient_by_a_bit(name, dropout, recomputed, monkeypatch):
    """In fp32, with blocks recomputed and with dropout as well. Attention's inputs and outputs alone are as before."""
    model = tiny(MODELS[name][0]())
    save_only_inputs(model)
    layers = trained_modules(model)
    for each in layers.values():
        each.dropout = dropout  # type: ignore[assignment]
    if recomputed:
        ActivationPlan((True, True), (1.0, 1.0), 1.0).apply(blocks_of(model))
    with dropout_keys(layers, torch.from_numpy(token_keys(0, 0, np.arange(40)))):
        logits, gradients, less = run(model)
        without_notes(monkeypatch)
        before, expected, kept = run(model)
    assert torch.equal(logits, before)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert all(gradient.any() for gradient in gradients), "or nothing was compared"
    assert less == kept if recomputed else less < kept


@pytest.mark.parametrize(("name", "inputs"), [("llama", 32 + 32 + 48), ("cohere", 32 + 48), ("gpt2", 32 + 32 + 128)])
def test_what_is_no_longer_kept_is_the_inputs_that_norms_and_products_give(name, inputs, monkeypatch):
    """Of 40 tokens in fp32 and two blocks, of whose norms the very first has an input without gradient."""
    model = tiny(MODELS[name][0]())
    save_only_inputs(model)
    less = run(model)[2]
    without_notes(monkeypatch)
    assert run(model)[2] - less == 40 * 4 * (2 * inputs - 32)


@pytest.mark.parametrize("changed", ["tensor", "source"])
def test_a_tensor_that_was_changed_since_is_kept_itself(changed):
    source = torch.randn(3)
    tensor = note_how_made(source.exp(), torch.exp, source)
    make, sources = how_made(tensor)
    assert sources[0].data_ptr() == source.data_ptr()
    assert torch.equal(make(*sources), tensor)
    (tensor if changed == "tensor" else source).mul_(2)
    make, sources = how_made(tensor)
    assert sources[0].data_ptr() == tensor.data_ptr()
    assert torch.equal(make(*sources), tensor)


def test_a_source_that_is_changed_after_it_was_kept_is_an_error_and_no_wrong_gradient():
    norm = with_random_weight(LlamaRMSNorm(16))
    save_only_inputs(norm)
    layer = LoRALinear(nn.Linear(16, 8), 4, 8)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, 16, requires_grad=True) * 1
    out = layer(norm(x))
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ── queries and keys ────────────────────────────────────────────────────────────────────────────────────────────

ONE_HEAD_A_KEY: dict[str, Any] = TINY | {"num_key_value_heads": 4}  # or torch copies keys for SDPA on a CPU
NORMED: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: hf.Qwen3Config(**ONE_HEAD_A_KEY, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**ONE_HEAD_A_KEY, head_dim=8),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **ONE_HEAD_A_KEY, head_dim=8
    ),  # one head_dim after the other; rotates queries, then keys
    "olmo2": lambda: hf.Olmo2Config(**ONE_HEAD_A_KEY),
    "hunyuan": lambda: hf.HunYuanDenseV1Config(**ONE_HEAD_A_KEY, head_dim=8),  # normed after they are rotated
}


@pytest.fixture(params=["padded", "SDPA", "products", "varlen"])
def attended(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How: rows beside each other, or on one row example by example, in the three ways there are."""
    monkeypatch.setattr(causal_attention, "products_are_faster", lambda *_: request.param == "products")
    if request.param == "varlen":
        monkeypatch.setattr(attention, "varlen_attn", stand_in)
        monkeypatch.setattr(attention, "varlen_fits", lambda *_: True)
    return request.param


def row(model: Any, attended: str) -> tuple[list[Tensor], int]:
    """Gradients of the adapter, and bytes that all blocks keep of 40 tokens in two examples."""
    ids = torch.arange(40) * 7 % 97
    inputs = {"input_ids": ids.view(2, 20)}
    if attended != "padded":
        inputs = {"input_ids": ids[None], **attention.packed_inputs([20, 20], ids.device)}
    with measured(blocks_of(model)) as kept:
        logits = model(**inputs, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(logits, trained_parameters(model), upstream)), sum(kept)


def saving_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps queries, keys and values as torch's attention does."""
    plain = lambda function, *inputs: function(*inputs)  # noqa: E731
    for module in (attention, causal_attention):
        monkeypatch.setattr(module, "keeping_sources", plain)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", NORMED)
def test_queries_and_keys_that_are_made_again_change_no_gradient_by_a_bit(name, attended, recomputed, monkeypatch):
    config = NORMED[name]()
    config._attn_implementation = attention.PER_EXAMPLE
    model = tiny(config)
    save_only_inputs(model)
    if recomputed:
        ActivationPlan((True, True), (1.0, 1.0), 1.0).apply(blocks_of(model))
    gradients, less = row(model, attended)
    saving_attention(monkeypatch)
    expected, kept = row(model, attended)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert all(gradient.any() for gradient in gradients), "or nothing was compared"
    layers = [module for name, module in trained_modules(model).items() if name.endswith(("q_proj", "k_proj"))]
    width = sum(len(layer.lora_B) for layer in layers)  # type: ignore[arg-type]
    assert kept - less == (0 if recomputed else 40 * 4 * width)


def test_nothing_else_holds_what_is_made_again(monkeypatch):
    made: list[Any] = []

    def watched(function: Any, *inputs: Tensor) -> Tensor:
        made.extend(weakref.ref(each) for each in inputs[:2])
        return remade.keeping_sources(function, *inputs)

    monkeypatch.setattr(attention, "keeping_sources", watched)
    model = tiny(NORMED["qwen3"]())
    model.set_attn_implementation(attention.PER_EXAMPLE)
    save_only_inputs(model)
    gc.disable()  # whatever lives on in a cycle would stay until memory runs out
    try:
        loss = model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits.sum()
        assert len(made) == 4
        assert [each() for each in made] == [None] * 4
        loss.backward()
    finally:
        gc.enable()


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    x = torch.randn(3, 4, requires_grad=True)
    noted = note_how_made(x.exp(), torch.exp, x)
    out = keeping_sources(torch.sin, noted)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, (x.exp().cos() * x.exp()).detach())


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[1:], lambda x: x.T[1:, ::2]])
@pytest.mark.parametrize("make", [torch.exp, lambda x: x.T.exp().contiguous().T], ids=["in its order", "in another"])
def test_views_of_what_is_made_again_are_made_again(view, make):
    """The function keeps views of its input, which itself may be one, and comes back in any order in memory."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    given = view(note_how_made(x.exp(), make, x))
    again, sources = how_made(given)
    assert torch.equal(again(*sources), given)
    out = keeping_sources(lambda y: y * y[:1] + y.T.sin().T, followed(torch.cos, given))
    expected = view(x.exp()).cos()
    expected = expected * expected[:1] + expected.T.sin().T
    assert torch.equal(out, expected)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    assert_near(torch.autograd.grad(out, x, upstream), torch.autograd.grad(expected, x, upstream), 1e-12)


def test_notes_on_what_a_module_returns_can_be_left_out():
    norm = with_random_weight(LlamaRMSNorm(16))
    save_only_inputs(norm)
    x = torch.randn(5, 16, requires_grad=True)
    assert remade.is_remade(norm(x)[1:])
    remade.forget_how_made(norm)
    assert not remade.is_remade(norm(x))
    assert not remade.is_remade(norm(x)[1:])


def test_rotations_that_depend_on_both_are_left_alone(monkeypatch):
    code = sys.modules[hf.Qwen3ForCausalLM.__module__]
    own = vars(code)["apply_rotary_pos_emb"]

    def mixed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = own(q, k, cos, sin)
        return q * k.mean(), k

    attentions = [*rotating_modules(tiny(NORMED["qwen3"]()))]
    assert len(attentions) == 2
    for each in attentions:
        save_only_inputs(each)
        assert bool(noting_rotary(each))
    monkeypatch.setattr(code, "apply_rotary_pos_emb", mixed)
    assert not any(noting_rotary(each) for each in attentions)


# ── what is left alone ──────────────────────────────────────────────────────────────────────────────────────────


class SquaredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * self.weight  # weight²


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OfManyRMSNorm(LlamaRMSNorm):
    """Its square mean is of all tokens, not of each."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean() + self.variance_epsilon)


class ResidualMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class DroppingMLP(LlamaMLP):
    """Drops in training alone; as PyTorch's module, or as a function."""

    def __init__(self, config: Any, drop: Callable[[Any, Tensor], Tensor]):
        super().__init__(config)
        self.dropout, self.drop = nn.Dropout(0.5), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.drop(self, self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class SparseMLP(LlamaMLP):
    """As in Gemma 3n: some layers cut the gate, others of the same class do not."""

    sparsity = 0.0

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = gate.relu() if self.sparsity else gate
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def with_random_weight(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(2)))
    return norm.requires_grad_(False)


def gradient(module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 5, width, generator=generator).requires_grad_()
    torch.manual_seed(4)  # for those that drop
    out = module(x)
    return out.detach(), torch.autograd.grad(out, x, torch.randn(out.shape, generator=generator))[0]


def assert_left_alone(module: Any, width: int) -> None:
    before = gradient(module, width)
    save_only_inputs(module)
    assert not forward_layers(module)
    assert all(torch.equal(one, other) for one, other in zip(gradient(module, width), before, strict=True))


@pytest.mark.parametrize("kind", [SquaredRMSNorm, CentredRMSNorm, OfManyRMSNorm])
def test_a_norm_with_other_mathematics_is_left_alone(kind):
    assert_left_alone(with_random_weight(kind(16)), 16)


def test_an_mlp_that_does_more_is_left_alone():
    assert_left_alone(ResidualMLP(hf.LlamaConfig(**TINY)), 32)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "drop",
    [lambda mlp, x: mlp.dropout(x), lambda mlp, x: nn.functional.dropout(x, 0.5, mlp.training)],
    ids=["module", "function"],
)
def test_an_mlp_that_drops_in_training_is_left_alone(drop, adapted):
    """Also when the model is not yet in training when it is looked at, as after loading."""
    mlp = DroppingMLP(hf.LlamaConfig(**TINY), drop)
    if adapted:
        layer: Any = LoRALinear(mlp.gate_proj, 4, 8, dropout=0.1)  # whose dropout works in micro-batches alone
        mlp.gate_proj = layer
    mlp.eval()
    state = torch.get_rng_state()
    save_only_inputs(mlp)
    assert not forward_layers(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in mlp.modules())


@pytest.mark.parametrize("sparse_first", [False, True])
def test_of_one_class_each_way_to_compute_is_tried(sparse_first):
    """The first says nothing about the others where their settings differ."""
    mlps = nn.ModuleList([SparseMLP(hf.LlamaConfig(**TINY)) for _ in range(2)])
    mlps[not sparse_first].sparsity = 0.5  # type: ignore[assignment]
    before = [gradient(mlp, 32) for mlp in mlps]
    save_only_inputs(mlps)
    assert [bool(forward_layers(mlp)) for mlp in mlps] == [not sparse_first, sparse_first]
    after = [gradient(mlp, 32) for mlp in mlps]
    for (out, of_x), (out_before, of_x_before) in zip(after, before, strict=True):
        assert torch.equal(out, out_before)
        torch.testing.assert_close(of_x, of_x_before, rtol=1e-5, atol=1e-7)
