"""The bootstrap of differences against scipy's, and how often it is wrong, on values of a known distribution."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from genpipe.evaluation.comparison import Difference, bootstrap_mean, interval, paired_difference
from genpipe.evaluation.per_sample import Better, Values
from genpipe.stage_config import Gate


def values(of: np.ndarray, *, keys: list[str] | None = None, better: Better = "higher", seed: int = 0) -> Values:
    return Values(better, keys or [f"prompt {i}" for i in range(len(of))], frozenset({seed}), np.asarray(of, float))


@pytest.mark.parametrize("size", [40, 400])
def test_the_interval_of_a_paired_difference_is_scipys(size: int) -> None:
    rng = np.random.default_rng(size)
    ours, theirs = rng.exponential(size=size), rng.exponential(size=size)
    theirs += 0.7 * ours
    found = paired_difference(values(ours), values(theirs))
    statistic = lambda x, y, axis: x.mean(axis) - y.mean(axis)  # noqa: E731
    expected = bootstrap(
        (ours, theirs), statistic, paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=rng
    )
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.value == pytest.approx((ours - theirs).mean())
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)
    assert found.pictures == size


def test_pictures_of_one_prompt_are_not_independent() -> None:
    """Each value four times over says nothing new: the interval is that of the prompts."""
    once = np.random.default_rng(0).normal(size=60)
    keys = [f"prompt {i}" for i in range(60)]
    alone = interval(values(once, keys=keys))
    repeated = interval(values(np.repeat(once, 4), keys=[key for key in keys for _ in range(4)]))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    blind = interval(values(np.repeat(once, 4)))
    assert blind.high - blind.low < 0.6 * (alone.high - alone.low)


def test_prompts_with_more_pictures_weigh_more() -> None:
    mean, low, high = bootstrap_mean(np.asarray([0.0, 1, 1, 1]), ["a", "b", "b", "b"])
    assert (mean, low, high) == (0.75, 0, 1)


def trial(generator: np.random.Generator, *, ours: float, theirs: float, better: Better = "higher") -> Difference:
    """Shares of 200 pictures each, of which some prompts are hard for both."""
    ease = generator.normal(size=200)
    drawn = [generator.random(200) < 1 / (1 + np.exp(-(ease + np.log(p / (1 - p))))) for p in (ours, theirs)]
    return paired_difference(values(drawn[0], better=better), values(drawn[1], better=better))


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, as there are hundreds of trials."""
    monkeypatch.setattr("genpipe.evaluation.comparison.RESAMPLES", 1000)


def test_the_same_twice_passes_nineteen_times_of_twenty(fewer: None) -> None:
    """Of 95 % intervals about one in twenty misses the truth, and half of those on the worse side."""
    rng, trials = np.random.default_rng(1), 600
    found = [trial(rng, ours=0.6, theirs=0.6, better="higher" if i % 2 else "lower") for i in range(trials)]
    covered = sum(of.low <= 0 <= of.high for of in found)
    assert binomtest(covered, trials, 0.95).pvalue > 0.001
    passed = sum(not of.is_worse(margin=0) for of in found)
    assert binomtest(passed, trials, 0.975).pvalue > 0.001 and passed >= 0.95 * trials


def test_what_is_clearly_worse_fails_unless_the_margin_allows_it(fewer: None) -> None:
    rng = np.random.default_rng(2)
    worse = [trial(rng, ours=0.3, theirs=0.7) for _ in range(50)]
    assert all(of.is_worse(margin=0) for of in worse)
    assert not any(of.is_worse(margin=0.5) for of in worse)
    assert not any(trial(rng, ours=0.7, theirs=0.3).is_worse(margin=0) for _ in range(50)), "better is not worse"
    assert all(trial(rng, ours=0.7, theirs=0.3, better="lower").is_worse(margin=0) for _ in range(50))


def test_the_order_of_the_pictures_does_not_matter() -> None:
    ours, theirs = np.arange(9.0), np.arange(9.0) ** 2
    keys = ["a", "b", "c"] * 3
    shuffled = [1, 0, 2, 4, 3, 5, 7, 6, 8]  # of each prompt in the same order
    there = values(theirs[shuffled], keys=[keys[i] for i in shuffled])
    assert paired_difference(values(ours, keys=keys), there) == paired_difference(
        values(ours, keys=keys), values(theirs, keys=keys)
    )


@pytest.mark.parametrize(
    ("baseline", "told"),
    [
        (values(np.zeros(3), seed=1), "drawn with seed 0, the baseline with 1"),
        (values(np.zeros(3), keys=["prompt 0", "prompt 1", "a cat"]), "1 here of 'prompt 2', 0 there"),
        (values(np.zeros(4)), "3 pictures, the baseline's are 4"),
        (values(np.zeros(3), keys=["prompt 0", "prompt 0", "prompt 1"]), "1 here of 'prompt 0', 2 there"),
    ],
)
def test_other_pictures_are_refused(baseline: Values, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        paired_difference(values(np.ones(3)), baseline)


def test_a_margin_needs_a_baseline() -> None:
    with pytest.raises(ValueError, match="set not_worse_than, too"):
        Gate(min=0, margin=0.1)
