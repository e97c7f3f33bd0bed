"""What blocks keep for the backward pass: how it is planned, measured and made less, and that no result changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import quiet_console, with_adapter
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_cli.adapters.targets import block_lists
from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.activations import ActivationPlan, measured, plan_activations
from lora_cli.recipe import load_recipe
from lora_cli.training.opening import open_session

# ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────

BYTES = st.lists(st.integers(0, 5000), min_size=1, max_size=12)  # a token's, in each block
INPUT = st.integers(1, 500)
TOKENS = st.integers(1, 5000)
SHARE = st.floats(0, 1.2)  # of what all blocks keep when none is recomputed


def plan(mode: str, kept: Sequence[float], inputs: float, tokens: int = 1, budget: float = 0.0) -> ActivationPlan:
    return plan_activations(mode, kept, inputs, tokens=tokens, budget_bytes=budget)


@given(kept=BYTES, inputs=INPUT, tokens=TOKENS)
def test_none_and_full(kept: list[int], inputs: int, tokens: int):
    none, full = (plan(mode, kept, inputs, tokens) for mode in ("none", "full"))
    assert not any(none.recomputed)
    assert none.kept_bytes(tokens) == tokens * sum(kept)
    assert full.recomputed == tuple(each > 0 for each in kept)  # a block that keeps nothing has nothing to save
    assert full.kept_bytes(tokens) == tokens * sum(min(each, inputs) for each in kept)


@given(kept=BYTES, inputs=INPUT, tokens=TOKENS, share=SHARE)
def test_selective_recomputes_as_few_as_the_budget_needs(kept: list[int], inputs: int, tokens: int, share: float):
    budget = share * tokens * sum(kept)
    chosen, full = plan("selective", kept, inputs, tokens, budget), plan("full", kept, inputs, tokens)
    count = sum(chosen.recomputed)
    can = [at for at, each in enumerate(kept) if each > 0]
    assert [at for at, again in enumerate(chosen.recomputed) if again] == can[:count]  # the first ones
    if full.kept_bytes(tokens) <= budget:
        assert chosen.kept_bytes(tokens) <= budget
    else:
        assert chosen.recomputed == full.recomputed  # the nearest that there is
    if count:
        fewer = tuple(at in can[: count - 1] for at in range(len(kept)))
        assert ActivationPlan(fewer, tuple(kept), inputs).kept_bytes(tokens) > budget


@given(kept=BYTES, inputs=INPUT, tokens=TOKENS, shares=st.tuples(SHARE, SHARE))
def test_a_larger_budget_never_recomputes_more(kept: list[int], inputs: int, tokens: int, shares: tuple[float, float]):
    less, more = (plan("selective", kept, inputs, tokens, each * tokens * sum(kept)) for each in sorted(shares))
    assert sum(more.recomputed) <= sum(less.recomputed)
    assert more.kept_bytes(tokens) >= less.kept_bytes(tokens)


@given(kept=BYTES, inputs=INPUT, mode=st.sampled_from(["none", "selective", "full", "offload"]), share=SHARE)
def test_bytes_grow_with_the_tokens(kept: list[int], inputs: int, mode: str, share: float):
    chosen = plan(mode, kept, inputs, 1, share * sum(kept))
    assert chosen.kept_bytes(0) == 0
    assert chosen.kept_bytes(7) == 7 * chosen.kept_bytes(1)


@given(kept=BYTES, inputs=INPUT, tokens=TOKENS)
def test_offloaded_inputs_are_on_the_host_but_for_two(kept: list[int], inputs: int, tokens: int):
    full, chosen = (plan(mode, kept, inputs, tokens) for mode in ("full", "offload"))
    assert chosen.recomputed == full.recomputed
    assert (full.host_bytes(tokens), chosen.host_bytes(tokens)) == (0, full.kept_bytes(tokens))
    assert chosen.host_bytes(tokens) <= chosen.host_bytes(tokens, pinned=True) <= 2 * chosen.host_bytes(tokens) + 2
    assert chosen.kept_bytes(tokens) <= min(full.kept_bytes(tokens), 2 * tokens * inputs)


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────


class Exponential(nn.Module):
    """Keeps its result, and that alone: twice, of which one is counted."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        return (y * y.detach()).sin() if x.requires_grad else y


def test_each_storage_is_counted_once_where_it_was_kept():
    blocks = [nn.Linear(8, 4, bias=False).requires_grad_(False), Exponential(), Exponential()]
    x = torch.randn(16, 8, requires_grad=True)
    with measured(blocks) as kept:
        hidden = blocks[0](x)  # keeps its weight, which is not counted
        outside = hidden.exp()  # in no block
        for block in blocks[1:]:
            hidden = block(hidden)
        (hidden + outside).sum().backward()
    each = 16 * 4 * 4
    assert kept == [0, 2 * each, 2 * each]  # y, and y · y for the sine; y a second time counts for nothing
    before = kept.copy()
    blocks[1](blocks[0](x))
    assert kept == before  # the hooks are gone


def test_what_was_measured_goes_without_a_backward_pass():
    """`lora init` measures each way of holding a model, and has no backward pass."""
    block = nn.Linear(8, 8)
    with measured([block]):
        hidden = torch.randn(2, 8, requires_grad=True).exp()
        y = block(hidden)
    saved = weakref.ref(hidden)
    del hidden, y
    gc.collect()
    assert saved() is None


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_a_and_b_in_the_compute_dtype_are_weights_and_no_activations(recipe_file, dtype, size):
    """A token keeps `rank` values more in each of the seven layers, and no share of A and B: they are cast once a step.

    Counted as activations they made up to half of what a token seemed to keep in bf16.
    """

    def kept(rank: int) -> tuple[float, ...]:
        adapter = {"rank": rank, "target_modules": "all-linear"}
        return open_session(
            load_recipe(recipe_file(dtype=dtype, adapter=adapter)), quiet_console()
        ).activations.bytes_per_token

    small, large = kept(4), kept(32)
    assert [more - less for less, more in zip(small, large, strict=True)] == [7 * 28 * size] * len(small)


# ── applying a plan ────────────────────────────────────────────────────────────────────────────────────────────


def tiny(**where: Any) -> Any:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return with_adapter(model, **where).train()


def blocks_of(model: Any) -> list[nn.Module]:
    return [block for name in block_lists(model) for block in model.get_submodule(name)]


def run(model: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and the adapter's gradients for two rows of 300 tokens."""
    ids = torch.arange(600).view(2, 300) * 7 % 97
    logits = model(input_ids=ids, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return logits.detach(), torch.autograd.grad(logits, trained_parameters(model), upstream)


def forwards(blocks: Sequence[nn.Module]) -> list[int]:
    """How often each block's attention and products are computed from now on: those of its first norm."""
    counts = [0] * len(blocks)

    def count(at: int) -> Any:
        def hook(*_: Any) -> None:
            counts[at] += 1

        return hook

    for at, block in enumerate(blocks):
        block.input_layernorm.register_forward_pre_hook(count(at))  # type: ignore[union-attr, operator]
    return counts


@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("recomputed", [(False, False, False), (True, False, True), (True, True, True)], ids=str)
def test_no_gradient_changes_by_a_bit(recomputed, offloaded):
    model = tiny(target_modules="all-linear")
    logits, gradients = run(model)
    blocks = blocks_of(model)
    ActivationPlan(recomputed, (1.0,) * 3, 1.0, offloaded).apply(blocks)
    counts = forwards(blocks)
    after, again = run(model)
    assert torch.equal(after, logits)
    assert all(torch.equal(one, other) for one, other in zip(again, gradients, strict=True))
    assert all(gradient.any() for gradient in gradients), "or nothing was compared"
    assert counts == [1 + each for each in recomputed]
    with torch.no_grad():
        model(input_ids=torch.arange(9)[None])
    assert counts == [2 + each for each in recomputed]  # in evaluation nothing is computed twice


def test_what_has_no_adapter_in_or_below_keeps_nothing_and_is_not_recomputed():
    model = tiny(layers=[-1])
    blocks = blocks_of(model)
    with measured(blocks) as kept:
        _, gradients = run(model)
    assert kept[:2] == [0, 0]
    assert kept[2] > 0
    chosen = plan("full", [each / 600 for each in kept], 64 * 4, 600)
    assert chosen.recomputed == (False, False, True)
    chosen.apply(blocks)
    counts = forwards(blocks)
    _, again = run(model)
    assert counts == [1, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(again, gradients, strict=True))


@pytest.mark.parametrize("recomputed", [(False, False, True), (True, True, True)], ids=str)
def test_the_plan_foretells_what_is_kept(recomputed):
    """Measured once, as is; then followed, and measured again: within 1 % and some small tensors."""
    model = tiny(target_modules="all-linear")
    blocks = blocks_of(model)
    with measured(blocks) as kept:
        run(model)
    foretold = ActivationPlan(recomputed, tuple(each / 600 for each in kept), 64 * 4)
    foretold.apply(blocks)
    with measured(blocks) as again:
        ids = torch.arange(600).view(2, 300) * 7 % 97
        model(input_ids=ids, use_cache=False)
    assert sum(again) == pytest.approx(foretold.kept_bytes(600), rel=0.01, abs=2**16)
