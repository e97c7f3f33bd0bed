"""The gain of an adapter and its interval: closed forms, a bootstrap, and how often it holds the truth."""

from __future__ import annotations

import math

import pytest
import torch

from lora_cli.evaluation.gain import paired_gain, t_quantile


def drawn(examples: int, seed: int, trials: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(before, after, targets), each (trials, examples): lengths from a few to hundreds, a true gain of 0.3 a token."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(trials, examples, generator=generator, dtype=torch.float64)

    targets = torch.exp(3 + normal()).round().clamp(1)
    before = targets * (3 + normal())
    return before, before - targets * (0.3 + 0.5 * normal()), targets.long()


def one(examples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    before, after, targets = drawn(examples, seed)
    return before[0], after[0], targets[0]


def test_of_equal_lengths_it_is_the_paired_t_interval():
    """Differences of 1, 2 and 3 nats on 10 tokens each: mean 0.2, deviation 0.1 a token, t = 4.3027 at 2 degrees."""
    gain = paired_gain(torch.tensor([5.0, 9, 7]), torch.tensor([4.0, 7, 4]), torch.tensor([10, 10, 10]))
    assert gain.before == pytest.approx(21 / 30)
    assert gain.after == pytest.approx(15 / 30)
    assert gain.gain == pytest.approx(0.2)
    half = 4.302652729749464 * 0.1 / math.sqrt(3)
    assert (gain.low, gain.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert (gain.examples, gain.targets) == (3, 30)


def test_the_variance_is_that_of_leaving_out_one_example_after_the_other():
    before, after, targets = one(12)
    rest = ~torch.eye(12, dtype=torch.bool)
    without = torch.stack([(before - after)[keep].sum() / targets[keep].sum() for keep in rest])
    gain = paired_gain(before, after, targets)
    variance = 11 / 12 * ((without - gain.gain) ** 2).sum().item()
    assert gain.gain == pytest.approx(((before - after).sum() / targets.sum()).item())
    assert gain.high is not None
    assert gain.high - gain.gain == pytest.approx(t_quantile(0.975, 11) * math.sqrt(variance), rel=1e-9)


def test_it_agrees_with_a_bootstrap_over_examples():
    before, after, targets = one(400, seed=5)
    chosen = torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(1))
    repeated = (before - after)[chosen].sum(1) / targets[chosen].sum(1)
    low, high = (repeated.quantile(q).item() for q in (0.025, 0.975))
    gain = paired_gain(before, after, targets)
    assert gain.low is not None
    assert gain.high is not None
    # 4,000 draws know an end of the interval to about 3 % of its width; ours may differ by as much again
    assert gain.low == pytest.approx(low, abs=0.08 * (high - low))
    assert gain.high == pytest.approx(high, abs=0.08 * (high - low))


@pytest.mark.parametrize(("examples", "least"), [(5, 0.89), (20, 0.91), (100, 0.92)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(examples, least):
    """What the docstring states, within four deviations of 1,500 trials (0.007 each)."""
    held = 0
    for before, after, targets in zip(*drawn(examples, seed=3, trials=1500), strict=True):
        gain = paired_gain(before, after, targets)
        assert gain.low is not None
        assert gain.high is not None
        held += gain.low <= 0.3 <= gain.high
    assert least <= held / 1500 <= 0.965


def test_pairing_is_what_makes_it_narrow():
    before, after, targets = one(200)
    paired = paired_gain(before, after, targets)
    mixed = paired_gain(before, after[targets.argsort().argsort()], targets)  # the same losses, of other examples
    assert paired.high is not None
    assert mixed.high is not None
    assert paired.high - paired.gain < (mixed.high - mixed.gain) / 2


def test_one_example_gives_no_interval_and_none_is_an_error():
    gain = paired_gain(torch.tensor([4.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([5, 0]))
    assert (gain.gain, gain.low, gain.high, gain.examples) == (pytest.approx(0.2), None, None, 1)
    with pytest.raises(ValueError, match="target"):
        paired_gain(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_examples_without_targets_change_nothing():
    before, after, targets = one(9)
    zero = torch.zeros(4)
    more = paired_gain(torch.cat([before, zero]), torch.cat([after, zero]), torch.cat([targets, zero.long()]))
    assert more == paired_gain(before, after, targets)


def test_a_loss_that_is_not_a_number_gives_no_interval():
    gain = paired_gain(torch.tensor([4.0, math.nan]), torch.tensor([3.0, 1.0]), torch.tensor([5, 5]))
    assert math.isnan(gain.gain)
    assert (gain.low, gain.high) == (None, None)


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (100, 1.9840), (1000, 1.9623)]
)
def test_quantiles_are_those_of_the_tables(freedom, table):
    assert t_quantile(0.975, freedom) == pytest.approx(table, abs=5e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 99, 100, 101, 300])
def test_quantiles_have_their_share_of_the_density_below_them(freedom):
    """The density integrated numerically, from 0 where half is below; both formulas, on either side of 100 degrees."""
    at = t_quantile(0.975, freedom)
    t = torch.linspace(0, at, 200_001, dtype=torch.float64)
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = factor * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + torch.trapezoid(density, t).item() == pytest.approx(0.975, abs=1e-8)
