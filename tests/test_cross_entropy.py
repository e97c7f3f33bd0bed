"""The loss in chunks: the same as logits and F.cross_entropy, with gradients for all that is trained, and smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import assert_near, randomize_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_cli.adapters.attach import attach
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import Target, find_targets
from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.cross_entropy import LogitRule, cross_entropy_of_each, linear_cross_entropy
from lora_cli.data.batches import MicroBatch, collate
from lora_cli.data.example import Example
from lora_cli.evaluation.loss import logit_rule, summed_loss, target_logits, target_losses, training_loss

TARGETS, HIDDEN, VOCABULARY = 13, 8, 29
SOME_ROWS = 4 * VOCABULARY * 8  # bytes: chunks of four rows in float64, of eight in fp32; neither divides 13
RULES = {
    "plain": LogitRule(),
    "multiplied": LogitRule(multiplier=0.4),
    "capped": LogitRule(cap=2.0),  # of logits of deviation 2.8, so that the cap bends most of them
    "both": LogitRule(multiplier=1.7, cap=1.5),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for at, parameter in enumerate(head.parameters()):
            parameter.copy_(random(*parameter.shape, seed=10 + at))
    return head


def adapted(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> LoRALinear:
    layer = LoRALinear(linear(bias=bias, dtype=dtype).requires_grad_(False), rank=3, alpha=5)
    layer.lora_A.data = random(3, HIDDEN, seed=20, dtype=dtype)
    layer.lora_B.data = random(VOCABULARY, 3, seed=21, dtype=dtype)
    return layer


HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda **kind: linear(bias=False, **kind),
    "with-bias": linear,
    "frozen": lambda **kind: linear(**kind).requires_grad_(False),
    "adapted": adapted,
    "adapted-without-bias": lambda **kind: adapted(bias=False, **kind),
}


def inputs(count: int = TARGETS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, targets and weights (one of them 0, as a token that carries no loss)."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) * 2
    weights[1:2] = 0
    return random(count, HIDDEN, seed=1, dtype=dtype), targets, weights.to(torch.promote_types(dtype, torch.float32))


def by_plain_logits(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, rule: LogitRule, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden.unsqueeze(0))[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * rule.multiplier
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    if weights is None:
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        return cross_entropy + z_loss * (logits.logsumexp(-1) ** 2).sum(), cross_entropy
    each = F.cross_entropy(logits, targets, reduction="none")
    return ((each + z_loss * logits.logsumexp(-1) ** 2) * weights).sum(), (each * weights).sum()


def results(
    loss: Callable[..., tuple[Tensor, Tensor]], head: nn.Module, hidden: Tensor, *rest: Any, **named: Any
) -> dict[str, Tensor]:
    """Both sums, and the gradients of three times the loss: of the hidden states and of all that is trained."""
    hidden = hidden.detach().clone().requires_grad_()
    total, alone = loss(head, hidden, *rest, **named)
    assert not named or not alone.requires_grad  # of ours the cross-entropy alone is only shown
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(3 * total, [hidden, *trained.values()])
    found = {"loss": total.detach(), "cross-entropy": alone.detach()}
    return found | dict(zip(["hidden", *trained], gradients, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    assert_near(list(actual.values()), list(expected.values()), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HEADS)
def test_it_is_cross_entropy_of_plain_logits(head, rule, z_loss, weighted, dtype, tolerance):
    layer = HEADS[head](dtype=dtype)
    hidden, targets, weights = inputs(dtype=dtype)
    given_weights = weights if weighted else None
    expected = results(by_plain_logits, layer, hidden, targets, given_weights, RULES[rule], z_loss)
    settings = {"rule": RULES[rule], "z_loss": z_loss, "chunk_bytes": SOME_ROWS}
    actual = results(linear_cross_entropy, layer, hidden, targets, given_weights, **settings)
    assert actual["loss"].dtype == dtype
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HEADS)
def test_in_bf16_it_is_as_exact_as_bf16(head, rule):
    """Against fp32 with the same (rounded) values: logits and gradients are rounded to 8 bits a few times, 2⁻⁸ each."""
    layer, wide = HEADS[head](dtype=torch.bfloat16), HEADS[head](dtype=torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    hidden, targets, weights = inputs(dtype=torch.bfloat16)
    actual = results(linear_cross_entropy, layer, hidden, targets, weights, rule=RULES[rule], chunk_bytes=SOME_ROWS)
    expected = results(by_plain_logits, wide, hidden.float(), targets, weights, RULES[rule], 0.0)
    assert actual["loss"].dtype == torch.float32
    assert actual["hidden"].dtype == torch.bfloat16
    assert_close(actual, expected, 8 * 2**-8)


def test_z_loss_is_its_closed_form():
    """z · w · log² Z with gradient 2 z · w · log Z · softmax, whatever the targets are."""
    hidden, targets, weights = inputs()
    layer = linear(bias=False).requires_grad_(False)
    with_it, without = (
        results(linear_cross_entropy, layer, hidden, targets, weights, rule=LogitRule(), z_loss=z) for z in (0.7, 0.0)
    )
    logits = hidden @ layer.weight.T
    log_z = logits.exp().sum(-1).log()
    expected = 0.7 * (weights * log_z**2).sum()
    by_logits = 2 * 0.7 * (weights * log_z)[:, None] * logits.softmax(-1)
    torch.testing.assert_close(with_it["loss"] - without["loss"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(with_it["hidden"] - without["hidden"], 3 * by_logits @ layer.weight, rtol=0, atol=1e-11)
    assert torch.equal(with_it["cross-entropy"], without["cross-entropy"])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 20),
    chunk_bytes=st.one_of(st.just(0), st.integers(1, 25 * VOCABULARY * 8)),
    head=st.sampled_from(sorted(HEADS)),
    rule=st.sampled_from(sorted(RULES)),
)
def test_the_size_of_a_chunk_changes_nothing(count: int, chunk_bytes: int, head: str, rule: str):
    layer = HEADS[head]()
    hidden, targets, weights = inputs(count)
    expected = results(by_plain_logits, layer, hidden, targets, weights, RULES[rule], 0.1)
    named = {"rule": RULES[rule], "z_loss": 0.1, "chunk_bytes": chunk_bytes}
    assert_close(results(linear_cross_entropy, layer, hidden, targets, weights, **named), expected, 1e-12)


@pytest.mark.parametrize("rows", [1, 2, TARGETS - 1, TARGETS, TARGETS + 1])
def test_a_chunk_has_as_many_rows_as_its_bytes_allow(rows):
    """One byte less and it is a row less, but never none."""
    hidden, targets, _ = inputs()
    layer = linear()
    seen: list[int] = []

    def see(_head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    layer.register_forward_pre_hook(see)
    for missing, expected in ((0, min(rows, TARGETS)), (1, max(1, min(rows - 1, TARGETS)))):
        seen.clear()
        linear_cross_entropy(layer, hidden, targets, rule=LogitRule(), chunk_bytes=rows * VOCABULARY * 8 - missing)
        assert max(seen) == expected
        assert sum(seen) == TARGETS


def test_no_targets_no_loss():
    layer = linear()
    hidden, targets, weights = inputs(0)
    found = results(linear_cross_entropy, layer, hidden, targets, weights, rule=LogitRule(cap=1.0), z_loss=0.1)
    assert found["loss"] == found["cross-entropy"] == 0
    assert not any(gradient.any() for gradient in found.values())
    assert found["hidden"].shape == (0, HIDDEN)


def test_hidden_states_that_need_no_gradient():
    """As where the head alone is adapted."""
    layer = adapted()
    hidden, targets, _ = inputs()
    loss, _ = linear_cross_entropy(layer, hidden, targets, rule=LogitRule(), chunk_bytes=SOME_ROWS)
    expected, _ = by_plain_logits(layer, hidden, targets, None, LogitRule(), 0.0)
    parameters = [layer.lora_A, layer.lora_B]
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), rtol=1e-12, atol=1e-12
    )


def test_a_tied_head_gets_what_both_its_uses_give():
    """The embedding's weight is the head's: its gradient is the sum of the gather's and the head's."""
    layer = linear(bias=False)
    embedding, mix = nn.Embedding(VOCABULARY, HIDDEN), random(HIDDEN, HIDDEN, seed=5)
    embedding.weight = layer.weight
    _, targets, weights = inputs()
    ids = targets.roll(1)

    def gradient(loss: Callable[..., tuple[Tensor, Tensor]], *rest: Any, **named: Any) -> Tensor:
        hidden = torch.tanh(embedding(ids) @ mix)
        return torch.autograd.grad(loss(layer, hidden, targets, weights, *rest, **named)[0], layer.weight)[0]

    expected = gradient(by_plain_logits, LogitRule(), 0.2)
    actual = gradient(linear_cross_entropy, rule=LogitRule(), z_loss=0.2, chunk_bytes=SOME_ROWS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_backward_twice_gives_the_same_twice():
    layer = adapted()
    hidden, targets, _ = inputs()
    hidden.requires_grad_()
    loss, _ = linear_cross_entropy(layer, hidden, targets, rule=LogitRule(), chunk_bytes=SOME_ROWS)
    wanted = [hidden, layer.lora_A, layer.lora_B]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    doubled = torch.autograd.grad(2 * loss, wanted, retain_graph=True)
    again = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(torch.equal(2 * one, other) for one, other in zip(first, doubled, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_without_gradients_the_loss_is_the_same(rule):
    layer = linear()
    hidden, targets, weights = inputs()
    hidden.requires_grad_()
    named: dict[str, Any] = {"rule": RULES[rule], "z_loss": 0.2, "chunk_bytes": SOME_ROWS}
    both = torch.stack(linear_cross_entropy(layer, hidden, targets, weights, **named))
    with torch.no_grad():
        without = torch.stack(linear_cross_entropy(layer, hidden, targets, weights, **named))
    assert torch.equal(both, without)
    assert both.requires_grad
    assert not without.requires_grad


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_that_of_each_target_is_what_the_plain_logits_give(head, rule, dtype, tolerance):
    layer = HEADS[head](dtype=dtype)
    hidden, targets, _ = inputs(dtype=dtype)
    given = RULES[rule]
    logits = layer(hidden.unsqueeze(0))[0] * given.multiplier
    logits = logits if given.cap is None else given.cap * torch.tanh(logits / given.cap)
    each = cross_entropy_of_each(layer, hidden.requires_grad_(), targets, rule=given, chunk_bytes=SOME_ROWS)
    assert not each.requires_grad
    torch.testing.assert_close(
        each, F.cross_entropy(logits, targets, reduction="none").detach(), rtol=0, atol=tolerance
    )
    total = linear_cross_entropy(layer, hidden, targets, rule=given, chunk_bytes=SOME_ROWS)[0]
    torch.testing.assert_close(each.sum(), total.detach(), rtol=tolerance, atol=0)


def test_of_no_target_there_is_no_cross_entropy():
    hidden, targets, _ = inputs(0)
    assert cross_entropy_of_each(linear(), hidden, targets, rule=LogitRule()).shape == (0,)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, in the forward pass and in the backward pass."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("rule", RULES)
def test_logits_of_all_targets_never_exist(rule):
    targets, vocabulary, rows = 64, 512, 4
    layer = nn.Linear(HIDDEN, vocabulary, bias=False).requires_grad_(False)
    hidden, ids = torch.randn(targets, HIDDEN, requires_grad=True), torch.randint(vocabulary, (targets,))

    def largest(loss: Callable[[], tuple[Tensor, Tensor]]) -> int:
        with Allocations() as made:
            loss()[0].backward()
        return made.largest

    plain = largest(lambda: by_plain_logits(layer, hidden, ids, None, RULES[rule], 0.0))
    named: dict[str, Any] = {"rule": RULES[rule], "chunk_bytes": rows * vocabulary * 4}
    chunked = largest(lambda: linear_cross_entropy(layer, hidden, ids, **named))
    assert plain >= targets * vocabulary  # or the measurement sees nothing
    assert chunked <= max(rows, HIDDEN) * vocabulary < targets * vocabulary  # the head's weight is one of them


# ── what models do to their logits ──────────────────────────────────────────────────────────────────────────────

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
TINY |= {"pad_token_id": 0, "initializer_range": 0.3}  # logits large enough to be bent by a cap
MODELS: dict[str, tuple[Callable[[], Any], LogitRule]] = {
    "llama": (lambda: hf.LlamaConfig(**TINY), LogitRule()),
    "cohere": (lambda: hf.CohereConfig(**TINY, logit_scale=0.25), LogitRule(multiplier=0.25)),
    "granite": (lambda: hf.GraniteConfig(**TINY, logits_scaling=4.0), LogitRule(multiplier=0.25)),
    "gemma2": (
        lambda: hf.Gemma2Config(**TINY, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
        LogitRule(cap=2.0),
    ),
}


def tiny(config: Any, *more: Target) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attach(model, [*find_targets(model, "all-linear", rank=4, alpha=8), *more])
    randomize_adapter(model, scale=0.3)
    return model


def batch(*lengths: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(97, (length,), generator=generator).numpy() for length in lengths]
    examples = [Example(ids, [(2, len(ids), 0.5 + at)]) for at, ids in enumerate(rows)]
    return collate(examples, packed=False, pad_id=0, device=torch.device("cpu"))


def assert_loss_is_that_of_the_models_own_logits(model: Any) -> None:
    some, parameters = batch(20, 7, 11), trained_parameters(model)
    logits = target_logits(model, some)
    assert some.weights is not None
    each = F.cross_entropy(logits, some.targets, reduction="none") + 0.1 * logits.logsumexp(-1) ** 2
    expected = (each * some.weights).sum()
    actual, shown = training_loss(model, some, z_loss=0.1)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=0)
    summed = (F.cross_entropy(logits, some.targets, reduction="none") * some.weights).sum()
    torch.testing.assert_close(shown, summed.to(shown.dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(summed_loss(model, some), summed.to(shown.dtype), rtol=1e-5, atol=0)
    separate = F.cross_entropy(logits, some.targets, reduction="none")
    torch.testing.assert_close(target_losses(model, some), separate, rtol=1e-5, atol=1e-6)
    of_ours, of_plain = torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)
    largest = max(gradient.abs().max().item() for gradient in of_plain)
    torch.testing.assert_close(of_ours, of_plain, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_is_what_the_config_says(name):
    config, rule = MODELS[name]
    model = tiny(config())
    assert logit_rule(model) == rule
    assert_loss_is_that_of_the_models_own_logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_rule_is_noticed_and_costs_only_memory(name):
    model = tiny(MODELS[name][0]())
    own = model.forward
    shift = torch.zeros(97).index_fill_(
        0, torch.arange(48), 1.0
    )  # on half of the vocabulary: no softmax is blind to it

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits + shift
        return out

    model.forward = forward
    assert logit_rule(model) is None
    assert_loss_is_that_of_the_models_own_logits(model)


def test_a_config_that_says_what_the_model_does_not_do_is_not_believed():
    config = hf.LlamaConfig(**TINY)
    config.logit_scale = 0.25
    model = tiny(config)
    assert logit_rule(model) is None
    assert_loss_is_that_of_the_models_own_logits(model)


def test_trying_the_rule_leaves_mode_and_random_state_alone():
    model = tiny(MODELS["gemma2"][0]()).train()
    state = torch.get_rng_state()
    logit_rule(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapted_head_gets_its_gradients():
    model = tiny(hf.LlamaConfig(**TINY), Target("lm_head", rank=4, alpha=8))
    assert isinstance(model.get_output_embeddings(), LoRALinear)
    assert logit_rule(model) == LogitRule()
    assert_loss_is_that_of_the_models_own_logits(model)
