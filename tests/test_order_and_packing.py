"""Order, packing, windows and micro-batches: nothing is lost, doubled or moved, whatever way one looks at it."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig

from lora_cli.data.batches import collate, similar_length_batches
from lora_cli.data.example import Example, cut, windows
from lora_cli.data.feed import PreparedFeed
from lora_cli.data.order import Groups, Order, pack, permutation, repeated, similar_lengths
from lora_cli.evaluation.loss import summed_loss

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


def lists(groups: Groups) -> list[list[int]]:
    return [groups[at] for at in range(len(groups))]


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2000), st.tuples(seeds, st.integers(0, 50)))
def test_a_permutation_holds_every_number_once(size, seed):
    assert sorted(permutation(size, seed)) == list(range(size))


def test_permutations_are_as_even_as_chance():
    """Each number at each place about equally often over seeds: a chi-square far above its degrees of freedom fails."""
    for size in (3, 5, 8):
        trials = 300 * size
        counts = np.zeros((size, size))
        for seed in range(trials):
            counts[range(size), permutation(size, (seed, 1))] += 1
        expected = trials / size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert chi_square < freedom + 6 * math.sqrt(2 * freedom), size  # six deviations


def test_all_orders_of_four_occur():
    orders = Counter(tuple(permutation(4, (seed, 0))) for seed in range(2400))
    assert len(orders) == 24
    assert max(orders.values()) < 100 + 6 * 10  # 100 each; the deviation of a count is 10


def test_seeds_and_epochs_make_different_orders():
    named = [(0, 0), (0, 1), (1, 0), (1, 23), (12, 3), (1, 2, 3)]
    orders = {tuple(permutation(60, seed)) for seed in named}
    assert len(orders) == len(named)


group_lists = st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=60)
orders = st.builds(Order, group_lists.map(groups_of), st.integers(1, 5), st.integers(1, 4), seeds)


@settings(deadline=None, max_examples=80)
@given(orders)
def test_an_epoch_sees_every_unit_once_in_steps_of_the_same_size(order):
    for epoch in range(2):
        steps = [order.step(1 + epoch * order.steps_per_epoch + at) for at in range(order.steps_per_epoch)]
        seen = Counter(index for step in steps for batch in step for index in batch)
        assert seen == Counter(index for group in lists(order.rows) for index in group)
        units = [len(order.rows) - at * order.rows_per_step for at in range(order.steps_per_epoch)]
        for step, left in zip(steps, units, strict=True):
            assert len(step) == math.ceil(min(left, order.rows_per_step) / order.rows_per_micro_batch)
            assert len(step) <= order.gradient_accumulation_steps
        assert sum(len(step) for step in steps) == sum(
            math.ceil(min(left, order.rows_per_step) / order.rows_per_micro_batch) for left in units
        )


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(1, 200))
def test_a_step_asked_for_alone_is_the_one_that_comes_in_its_turn(order, wanted):
    """By a slow way: all epochs up to it, laid out one after the other, and cut into steps."""
    units: list[list[int]] = []
    steps: list[list[list[int]]] = []
    epoch = 0
    while len(steps) < wanted:
        places = np.random.default_rng([order.seed, epoch]).permutation(len(order.rows))
        units = [order.rows[places[at]] for at in range(len(order.rows))]
        for start in range(0, len(units), order.rows_per_step):
            part = units[start : start + order.rows_per_step]
            size = order.rows_per_micro_batch
            steps.append([[*chain(*part[at : at + size])] for at in range(0, len(part), size)])
        epoch += 1
    fresh = Order(order.rows, order.rows_per_micro_batch, order.gradient_accumulation_steps, order.seed)
    assert fresh.step(wanted) == steps[wanted - 1]
    assert [order.step(step) for step in range(1, wanted + 1)][-1] == fresh.step(wanted)


def test_epochs_and_seeds_differ():
    rows = groups_of([[at] for at in range(40)])

    def epoch(seed: int, number: int) -> list[int]:
        order = Order(rows, 1, 1, seed)
        return [order.step(1 + number * 40 + at)[0][0] for at in range(40)]

    seen = [tuple(epoch(seed, number)) for seed in range(3) for number in range(4)]
    assert len(set(seen)) == 12
    assert all(sorted(each) == list(range(40)) for each in seen)


def test_the_number_of_steps_is_that_of_the_epochs_or_the_limit():
    order = Order(groups_of([[at] for at in range(10)]), 2, 2, 0)
    assert (order.rows_per_step, order.steps_per_epoch) == (4, 3)
    expected = {1: 3, 2: 6, 0.5: 2, 1 / 3: 1, 2 / 3: 2, 0.01: 1, 1.1: 4}
    assert {epochs: order.total_steps(epochs, None) for epochs in expected} == expected
    assert (order.total_steps(9, 5), order.total_steps(1, 5)) == (5, 3)
    assert [order.total_steps(n / 3, None) for n in range(1, 40)] == list(range(1, 40))


def test_seeking_takes_no_longer_far_away():
    """Counted in permutations that are drawn, not in seconds: one an epoch, whichever epoch it is."""
    order = Order(groups_of([[at] for at in range(5000)]), 2, 3, 0)
    permutation.cache_clear()
    drawn = []
    for step in (1, 2, 900, 10**6, 10**9, 10**9 + 1):
        order.step(step)
        drawn.append(permutation.cache_info().misses)
    assert drawn == [1, 1, 2, 3, 4, 4]


def feed_of(examples: list[Example], order: Order, *, by_length: bool = False) -> PreparedFeed:
    """The feed of these examples alone: no steps are counted, nothing is said of them."""
    data: Any = SimpleNamespace(train=examples)
    nothing: Any = None
    return PreparedFeed(data, nothing, order, by_length)


def test_a_feed_gives_the_examples_of_its_order():
    made = [Example([at, at + 1], [(1, 2, 1.0)], "a", at) for at in range(9)]
    order = Order(groups_of([[0, 1], [2], [3, 4, 5], [6], [7, 8]]), 2, 2, 3)
    feed = feed_of(made, order)
    for step in (1, 2, 3, 7):
        assert [[each.row for each in batch] for batch in feed.step(step)] == order.step(step)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 4), seeds)
def test_a_feed_by_length_gives_the_same_steps_split_in_another_way(sizes, size, accumulation, seed):
    """The longest first, so that no micro-batch of a step mixes what is longer and shorter than another."""
    made = [Example([1] * length, [(0, length, 1.0)], "a", at) for at, length in enumerate(sizes)]
    order = Order(groups_of([[at] for at in range(len(sizes))]), size, accumulation, seed)
    plain, split = feed_of(made, order), feed_of(made, order, by_length=True)
    for step in range(1, 2 * order.steps_per_epoch + 1):
        before, after = ([[each.row for each in batch] for batch in feed.step(step)] for feed in (plain, split))
        assert sorted(chain(*before)) == sorted(chain(*after))
        assert sorted(map(len, before)) == sorted(map(len, after))
        assert [sizes[row] for row in chain(*after)] == sorted((sizes[row] for row in chain(*before)), reverse=True)


# ── packing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Slow and plain: each, longest first, into the row with the least room that has enough of it."""
    rows: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        fitting = [(room, at) for at, (room, _) in enumerate(rows) if room >= lengths[index]]
        if fitting:
            room, at = min(fitting)
            rows[at] = (room - lengths[index], [*rows[at][1], index])
        else:
            rows.append((capacity - lengths[index], [index]))
    return [members for _, members in rows]


lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


@settings(deadline=None, max_examples=150)
@given(lengths_and_capacity)
def test_packing_loses_nothing_doubles_nothing_and_fits(case):
    lengths, capacity = case
    rows = lists(pack(lengths, capacity))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(rows)
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == lists(pack(np.array(lengths, np.int32), capacity))


@settings(deadline=None, max_examples=150)
@given(lengths_and_capacity)
def test_packing_is_best_fit_decreasing(case):
    lengths, capacity = case
    rows, slow = pack(lengths, capacity), best_fit_decreasing(lengths, capacity)
    filled, expected = (sorted(sum(lengths[index] for index in row) for row in each) for each in (lists(rows), slow))
    assert filled == expected  # rows with the same room are alike: which of them is taken is nobody's business
    assert len(rows) >= math.ceil(sum(lengths) / capacity)


@settings(deadline=None, max_examples=60)
@given(lengths_and_capacity)
def test_no_two_rows_could_be_one(case):
    lengths, capacity = case
    filled = sorted(sum(lengths[index] for index in row) for row in lists(pack(lengths, capacity)))
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_packing_of_what_is_too_long_is_refused_by_name():
    with pytest.raises(ValueError, match="example 2 has 9 tokens, above the capacity of 8"):
        pack([3, 8, 9, 8], 8)
    assert len(pack([], 8)) == 0


def test_packing_a_real_spread_wastes_less_than_two_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.8, 20_000), 2, 1024).astype(np.int64)
    rows = pack(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.98


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=9))
def test_groups_are_the_lists_they_were_made_of(given_lists):
    groups = groups_of(given_lists)
    assert lists(groups) == given_lists
    assert len(groups) == len(given_lists)


# ── rows of similar length ──────────────────────────────────────────────────────────────────────────────────────

some_lengths = st.lists(st.integers(1, 90), min_size=1, max_size=150).map(lambda each: np.array(each, np.int64))


@settings(deadline=None, max_examples=80)
@given(some_lengths, seeds, st.integers(90, 400), st.sampled_from([4, 30, 4096]))
def test_groups_of_a_budget_hold_every_index_once_within_it(lengths, seed, tokens, pool):
    groups = lists(similar_lengths(lengths, tokens, seed, pool=pool))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert max(lengths[group]) * len(group) <= tokens
    cut_short = 0
    for group, behind in pairwise(groups):  # each is as full as its longest allows, but for the last of a pool
        assert sorted(lengths[group], reverse=True) == lengths[group].tolist()
        cut_short += max(lengths[group]) * (len(group) + 1) <= tokens
        assert lengths[group[-1]] >= lengths[behind[0]] or len(lengths) > pool
    assert cut_short <= (len(lengths) - 1) // pool


def test_one_example_above_the_budget_is_alone():
    groups = lists(similar_lengths(np.array([3, 50, 3]), 10, 0))
    assert [sorted(group) for group in groups] == [[1], [0, 2]]


def test_similar_lengths_waste_little_and_are_seeded():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.8, 8192), 2, 1024).astype(np.int64)
    groups = lists(similar_lengths(lengths, 4096, 1))
    assert lengths.sum() / sum(len(group) * max(lengths[group]) for group in groups) > 0.97
    assert groups == lists(similar_lengths(lengths, 4096, 1))
    other = lists(similar_lengths(lengths, 4096, 2))
    assert {tuple(sorted(group)) for group in other} != {tuple(sorted(group)) for group in groups}


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 300))
def test_batches_of_an_evaluation_hold_every_index_once_within_the_budget(lengths, tokens):
    batches = similar_length_batches(lengths, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(max(lengths[at] for at in batch) * len(batch) <= tokens for batch in batches)
    assert [lengths[at] for batch in batches for at in batch] == sorted(lengths, reverse=True)


# ── windows and cuts ────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def examples(draw: Any, most: int = 60) -> Example:
    """ids are their own places, so that a token of a piece says where it stood."""
    size = draw(st.integers(1, most))
    edges = draw(st.lists(st.integers(0, size), max_size=10, unique=True).map(sorted))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=5, max_size=5))
    spans = [(a, b, w) for (a, b), w in zip(zip(edges[::2], edges[1::2], strict=False), weights, strict=False)]
    return Example(list(range(size)), spans, "a", 3)


def by_token(example: Example) -> dict[int, float]:
    """Weight of each target token: those that are trained and have something before them."""
    return {int(example.ids[at]): float(weight) for at, weight in enumerate(example.weights) if at > 0 and weight > 0}


@settings(deadline=None)
@given(examples())
def test_an_example_counts_its_targets(example):
    targets = by_token(example)
    assert example.targets == len(targets)
    assert example.target_weight == pytest.approx(sum(targets.values()), rel=1e-12)
    held = [any(first <= at < last for first, last, _ in example.spans) for at in range(len(example.ids))]
    assert example.trained.tolist() == held
    assert example.source == "a: row 3"


@settings(deadline=None)
@given(examples(), st.data())
def test_a_cut_keeps_masks_and_weights_in_their_places(example, data):
    start = data.draw(st.integers(0, len(example.ids) - 1))
    end = data.draw(st.integers(start + 1, len(example.ids)))
    train_from = data.draw(st.integers(0, end))
    piece = cut(example, start, end, train_from)
    assert list(piece.ids) == list(range(start, end))
    expected = [weight if at >= train_from else 0 for at, weight in enumerate(example.weights)][start:end]
    assert piece.weights.tolist() == expected
    assert (piece.file, piece.row) == ("a", 3)
    assert all(0 <= first < last <= len(piece.ids) for first, last, _ in piece.spans)


@settings(deadline=None, max_examples=200)
@given(examples(), st.integers(2, 20), st.integers(1, 25))
def test_in_windows_every_target_is_one_exactly_once_with_its_weight(example, length, stride):
    pieces = windows(example, length, stride)
    targets: dict[int, float] = {}
    for piece in pieces:
        assert 0 < len(piece.ids) <= length
        assert list(piece.ids) == list(range(piece.ids[0], piece.ids[0] + len(piece.ids)))
        assert (piece.file, piece.row) == ("a", 3)
        assert piece.targets > 0
        found = by_token(piece)
        assert not found.keys() & targets.keys()
        targets |= found
    assert targets == by_token(example)
    assert sum(piece.targets for piece in pieces) == example.targets


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 25))
def test_windows_of_a_text_have_all_the_context_that_their_stride_gives(size, length, stride):
    pieces = windows(Example(list(range(size)), [(0, size, 1.0)]), length, stride)
    assert sorted(token for piece in pieces for token in by_token(piece)) == list(range(1, size))
    for before, piece in pairwise(pieces):
        first = min(by_token(piece))
        assert first == max(before.ids) + 1
        assert len(piece.ids) == length
        assert max(by_token(piece)) - first + 1 <= stride
        assert first - piece.ids[0] >= 1  # at least one token of context
    if stride >= length and len(pieces) > 1:  # disjoint but for that one
        assert len(pieces) == math.ceil((size - 1) / (length - 1))


@settings(deadline=None)
@given(st.integers(0, 60), st.floats(0.05, 4), seeds)
def test_a_weight_repeats_whole_and_chooses_the_rest(count, weight, seed):
    indices = np.arange(100, 100 + count)
    seen = Counter(np.concatenate(repeated(indices, weight, [seed])).tolist())
    assert seen.total() == int(weight) * count + round(count * (weight % 1))
    assert set(seen) <= set(indices.tolist())
    assert all(int(weight) <= seen[at] <= int(weight) + 1 for at in indices.tolist())


# ── micro-batches ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    from lora_cli.base.attention import PER_EXAMPLE

    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=PER_EXAMPLE).eval()


@st.composite
def batches(draw: Any) -> list[Example]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(1, 511), min_size=2, max_size=12))
        at = bisect.bisect([1, 4], draw(st.integers(0, 9)))
        first = min(draw(st.integers(0, 5)), len(ids) - 1)
        middle = draw(st.integers(first + 1, len(ids)))
        weights = [(1.0, 1.0), (0.5, 2.0), (3.0, 0.25)][at]
        spans = [(first, middle, weights[0])]
        if middle + 1 < len(ids):
            spans.append((middle + 1, len(ids), weights[1]))
        made.append(Example(ids, spans, "a", number))
    return made


def by_hand(model: Any, example: Example) -> tuple[float, float, float]:
    """Σ w · −log p(token | those before it), Σ w and the number of targets, from the model's plain logits alone."""
    logits = model(input_ids=torch.tensor([list(example.ids)])).logits[0].double()
    weights = torch.zeros(len(example.ids), dtype=torch.float64)
    for first, last, weight in example.spans:
        weights[first:last] = weight
    log_p = logits.log_softmax(-1)
    total, weight, targets = 0.0, 0.0, 0
    for at in range(1, len(example.ids)):
        total += -float(weights[at] * log_p[at - 1, example.ids[at]])
        weight += float(weights[at])
        targets += bool(weights[at] > 0)
    return total, weight, targets


@pytest.mark.parametrize("packed", [True, False])
@settings(deadline=None, max_examples=25)
@given(made=batches())
def test_the_loss_of_a_micro_batch_is_the_weighted_sum_by_hand(model, packed, made):
    batch = collate(made, packed=packed, pad_id=0, device=CPU)
    with torch.no_grad():
        loss, plain = (float(summed_loss(model, each)) for each in (batch, replace(batch, weights=None)))
        parts = [by_hand(model, example) for example in made]
        unweighted = [
            by_hand(model, Example(each.ids, [(a, b, 1.0) for a, b, _ in each.spans], "a", 1))[0] for each in made
        ]
    assert loss == pytest.approx(sum(total for total, _, _ in parts), rel=1e-5)  # fp32 logits
    assert plain == pytest.approx(sum(unweighted), rel=1e-5)
    assert sum(example.target_weight for example in made) == pytest.approx(sum(weight for _, weight, _ in parts))
    assert len(batch.targets) == sum(targets for _, _, targets in parts) == sum(example.targets for example in made)
    if batch.weights is None:
        assert {weight for example in made for weight in by_token(example).values()} <= {1.0}


def test_a_weight_of_two_is_the_row_twice_and_of_a_half_the_mean_of_both(model):
    one, other = [5, 6, 7, 8], [9, 10, 11]

    def mean_loss(*weighted: tuple[list[int], float]) -> float:
        made = [Example(ids, [(1, len(ids), weight)], "a", 1) for ids, weight in weighted]
        with torch.no_grad():
            loss = summed_loss(model, collate(made, packed=True, pad_id=0, device=CPU))
        return float(loss) / sum(example.target_weight for example in made)

    assert mean_loss((one, 2), (other, 1)) == pytest.approx(mean_loss((one, 1), (one, 1), (other, 1)), rel=1e-6)
    assert mean_loss((one, 0.5), (other, 0.5)) == pytest.approx(mean_loss((one, 1), (other, 1)), rel=1e-6)
    assert mean_loss((one, 3)) == pytest.approx(mean_loss((one, 1)), rel=1e-6)
    assert abs(mean_loss((one, 2), (other, 1)) - mean_loss((one, 1), (other, 1))) > 1e-4


@settings(deadline=None, max_examples=60)
@given(batches())
def test_packed_and_padded_rows_aim_at_the_same_tokens(made):
    expected = [
        (int(example.ids[at - 1]), int(example.ids[at]), float(weight))
        for example in made
        for at, weight in enumerate(example.weights)
        if at and weight
    ]
    for packed in (True, False):
        batch = collate(made, packed=packed, pad_id=0, device=CPU)
        flat = batch.inputs["input_ids"].flatten()
        weights = torch.ones(len(batch.targets)) if batch.weights is None else batch.weights
        aimed = zip(flat[batch.positions].tolist(), batch.targets.tolist(), weights.tolist(), strict=True)
        assert list(aimed) == expected
        assert flat[batch.positions + 1].tolist() == batch.targets.tolist()
        assert batch.tokens == sum(len(example.ids) for example in made)
        if packed:
            assert flat.tolist() == [id for example in made for id in example.ids]
            assert batch.inputs["position_ids"][0].tolist() == [at for each in made for at in range(len(each.ids))]
        else:
            mask = batch.inputs["attention_mask"]
            assert mask.sum(1).tolist() == [len(example.ids) for example in made]
            for row, example in enumerate(made):
                assert batch.inputs["input_ids"][row, : len(example.ids)].tolist() == list(example.ids)
                assert not mask[row, len(example.ids) :].any()


def test_the_first_token_is_never_a_target_and_the_mask_is_by_position():
    made = [Example([7, 0, 0], [(0, 3, 1.0)], "a", 1), Example([0, 0], [(0, 2, 1.0)], "a", 2)]
    for packed in (True, False):
        batch = collate(made, packed=packed, pad_id=0, device=CPU)
        assert batch.targets.tolist() == [0, 0, 0]  # two of the first, one of the second; padding is none
        assert batch.weights is None
        assert batch.positions.tolist() == ([0, 1, 3])


def test_cross_entropy_is_what_the_closed_form_says_for_a_uniform_model():
    """A model that gives every token the same chance has a loss of log(vocabulary) nats a target, times its weight."""

    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig(vocab_size=11)
            self.head = torch.nn.Linear(3, 11, bias=False)
            torch.nn.init.zeros_(self.head.weight)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": self.head(F.one_hot(input_ids % 3, 3).float())})

    made = [Example([1, 2, 3, 4], [(1, 3, 0.5), (3, 4, 4.0)], "a", 1), Example([5, 6], [(0, 2, 1.0)], "a", 2)]
    for packed in (True, False):
        batch = collate(made, packed=packed, pad_id=0, device=CPU)
        weighted, plain = (summed_loss(Uniform(), each).item() for each in (batch, replace(batch, weights=None)))
        assert weighted == pytest.approx((0.5 * 2 + 4 + 1) * math.log(11), rel=1e-6)
        assert plain == pytest.approx(4 * math.log(11), rel=1e-6)


def test_a_row_longer_than_all_examples_together_holds_them_all():
    """Its length costs nothing: a table of a thousand million rooms would not end."""
    groups = pack([3, 9, 5], 10**9)
    assert [groups[at] for at in range(len(groups))] == [[0, 1, 2]]
    assert len(pack([], 10**9)) == 0
