from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.data.order import (
    CYCLE,
    Order,
    bucket_order,
    caption_draws,
    normal,
    order,
    order_of,
    pick,
    spread,
    uniform,
)


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 700), seed=st.integers(-5, 2**63), epoch=st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * n, (epoch + 1) * n)
    assert (np.sort(order(positions, n=n, seed=seed)) == np.arange(n)).all()


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 2**40),
    seed=st.integers(0, 100),
    positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=50),
)
def test_order_is_a_function_of_each_position_alone(n: int, seed: int, positions: list[int]) -> None:
    together = order(np.array(positions), n=n, seed=seed)
    assert together.dtype == np.int64 and ((together >= 0) & (together < n)).all()
    assert together.tolist() == [int(order(np.array([p]), n=n, seed=seed)[0]) for p in positions]


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 5000
    orders = [order(np.arange(n) + epoch * n, n=n, seed=seed) for seed in (0, 1) for epoch in (0, 1, 2)]
    for a, b in itertools.combinations([np.arange(n), *orders], 2):
        # For random permutations the correlation is N(0, 1/n) and the number of agreements Poisson(1).
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
        assert (a == b).sum() < 10


@pytest.mark.parametrize("n", [1000, 1024, 1025, 10**6 + 3])
def test_consecutive_positions_are_spread_evenly(n: int) -> None:
    bins = np.bincount(order(np.arange(n // 2), n=n, seed=3) * 20 // n, minlength=20)
    expected = n // 2 / 20
    chi2 = ((bins - expected) ** 2 / expected).sum() * 2  # sampling half without replacement halves the variance
    assert chi2 < 60  # 19 degrees of freedom: the chance is below 1e-5
    steps = np.diff(order(np.arange(1000), n=n, seed=3))
    assert len(np.unique(steps)) > 350


ranges = st.lists(st.integers(1, 400), min_size=1, max_size=5).map(
    lambda sizes: {f"s{k}": range(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))}
)


@settings(deadline=None, max_examples=60)
@given(
    sources=ranges,
    data=st.data(),
    seed=st.integers(0, 2**63),
    first=st.integers(0, 10**9),
)
def test_a_mix_keeps_its_weights_in_every_cycle(
    sources: dict[str, range], data: st.DataObject, seed: int, first: int
) -> None:
    """Exactly its slots in each cycle, within one of the exact share, and every sample of a source in turn."""
    weights = data.draw(st.fixed_dictionaries({name: st.floats(0.1, 100) for name in sources}))
    mixed = order_of(sources, weights=weights, seed=seed)
    assert sum(mixed.slots) == CYCLE
    shares = np.array([weights[name] for name in sources]) / sum(weights.values()) * CYCLE
    assert (np.abs(np.array(mixed.slots) - shares) < 1).all()
    for cycle in (first, first + 1):
        samples = mixed(np.arange(cycle * CYCLE, (cycle + 1) * CYCLE))
        for rows, slots in zip(sources.values(), mixed.slots, strict=True):
            own = samples[(samples >= rows.start) & (samples < rows.stop)]
            assert len(own) == slots
            times = np.bincount(own - rows.start, minlength=len(rows))
            assert times.max() - times.min() <= 2, "whole epochs between the ends of two"


@settings(deadline=None, max_examples=60)
@given(
    sources=ranges,
    weighted=st.booleans(),
    seed=st.integers(0, 99),
    positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=40),
)
def test_a_mix_is_a_function_of_each_position_alone(
    sources: dict[str, range], weighted: bool, seed: int, positions: list[int]
) -> None:
    weights = {name: 1.0 + k for k, name in enumerate(sources)} if weighted else {}
    mixed = order_of(sources, weights=weights, seed=seed)
    together = mixed(np.array(positions)).tolist()
    assert together == [int(mixed(np.array([position]))[0]) for position in positions]
    assert all(any(i in rows for rows in sources.values()) for i in together)


def test_a_source_is_gone_through_whole_before_any_of_it_comes_again() -> None:
    sources = {"big": range(0, 5000), "small": range(5000, 5100)}
    samples = order_of(sources, weights={"big": 3, "small": 1}, seed=7)(np.arange(40 * CYCLE))
    for rows in sources.values():
        own = samples[(samples >= rows.start) & (samples < rows.stop)]
        counts = Counter(own.tolist())
        assert len(counts) == len(rows) and max(counts.values()) - min(counts.values()) <= 1
    small = samples >= 5000
    assert small[: 40 * CYCLE].sum() == 40 * CYCLE // 4
    # Within a cycle the small source is strewn about: 1024 draws over 16 bins of 64 on average.
    bins = np.bincount(np.flatnonzero(small[:CYCLE]) * 16 // CYCLE, minlength=16)
    assert bins.min() > 30 and bins.max() < 105


def test_without_weights_every_sample_counts_the_same() -> None:
    sources = {"one": range(0, 30), "two": range(30, 37)}
    samples = order_of(sources, weights={}, seed=2)(np.arange(37 * 4))
    assert (samples == order(np.arange(37 * 4), n=37, seed=2)).all()


def test_a_source_of_weight_zero_is_left_out() -> None:
    sources = {"one": range(0, 30), "two": range(30, 37)}
    assert order_of(sources, weights={"one": 0, "two": 5}, seed=2)(np.arange(10_000)).min() >= 30


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"photo": 1, "web": 1}, "no source is called 'photo'; did you mean 'photos'?"),
        ({"x": 1}, "no source is called 'x'; the dataset's sources: 'photos', 'web', 'none'"),
        ({"photos": 1, "none": 0}, "no weight for 'web'; give one (0 leaves a source out)"),
        ({"photos": 1, "web": 1, "none": 1}, "'none' has no training samples; set its weight to 0"),
        ({"photos": 0, "web": 0, "none": 0}, "all are 0; give a source that is to be used a weight"),
        ({"photos": 1e9, "web": 1, "none": 0}, "the share of 'web' is below 1/4096; raise it or set it to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], told: str) -> None:
    sources = {"photos": range(5), "web": range(5, 9), "none": range(9, 9)}
    with pytest.raises(ValueError) as error:
        order_of(sources, weights=weights, seed=0)
    assert str(error.value) == f"train.source_weights: {told}"


@st.composite
def bucketed(draw: st.DrawFn) -> tuple[dict[str, range], list[np.ndarray]]:
    """Sources, and their samples by one of up to four sizes."""
    sources = draw(ranges)
    n = sum(map(len, sources.values()))
    size_of = np.random.default_rng(draw(st.integers(0, 99))).choice(4, n, p=[0.6, 0.3, 0.08, 0.02])
    return sources, [np.flatnonzero(size_of == size) for size in np.unique(size_of)]


@settings(deadline=None, max_examples=100)
@given(made=bucketed(), run=st.integers(1, 40), seed=st.integers(0, 2**40), first=st.integers(0, 5))
def test_a_run_has_one_size_and_an_epoch_every_sample_once(
    made: tuple[dict[str, range], list[np.ndarray]], run: int, seed: int, first: int
) -> None:
    """All that fills a run: of each source and size fewer than a run are left over, and come first thereafter."""
    sources, buckets = made
    place = bucket_order({"": range(sum(map(len, sources.values())))}, buckets, weights={}, seed=seed, run=run)
    size_of = np.empty(sum(map(len, buckets)), int)
    for size, members in enumerate(buckets):
        size_of[members] = size
    ends = [sum(epoch * len(members) // run for members in buckets) * run for epoch in range(first, first + 3)]
    samples = place(np.arange(ends[-1]))
    assert (size_of[samples].reshape(-1, run) == size_of[samples].reshape(-1, run)[:, :1]).all()
    for epoch, end in enumerate(ends, first):
        times = np.bincount(samples[:end], minlength=len(size_of))
        for members in buckets:
            given = epoch * len(members) // run * run
            assert epoch * len(members) - run < given == times[members].sum() <= epoch * len(members)
            assert times[members].max() - times[members].min() <= 1


@settings(deadline=None, max_examples=60)
@given(
    made=bucketed(),
    weighted=st.booleans(),
    run=st.integers(1, 64),
    positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=40),
)
def test_an_order_of_buckets_is_a_function_of_each_position_alone(
    made: tuple[dict[str, range], list[np.ndarray]], weighted: bool, run: int, positions: list[int]
) -> None:
    sources, buckets = made
    weights = {name: 1.0 + k for k, name in enumerate(sources)} if weighted else {}
    place = bucket_order(sources, buckets, weights=weights, seed=1, run=run)
    together = place(np.array(positions)).tolist()
    assert together == [int(place(np.array([position]))[0]) for position in positions]


def test_sources_keep_their_weights_and_sizes_in_buckets() -> None:
    sources = {"a": range(0, 3000), "b": range(3000, 4000), "c": range(4000, 4100)}
    size_of = np.arange(4100) % 5 // 4  # a fifth of each source is tall
    buckets = [np.flatnonzero(size_of == size) for size in (0, 1)]
    place = bucket_order(sources, buckets, weights={"a": 1, "b": 1, "c": 0}, seed=3, run=16)
    samples = place(np.arange(16 * 8000))
    assert abs((samples < 3000).mean() - 0.5) < 1e-3 and samples.max() < 4000
    assert abs(size_of[samples[samples < 3000]].mean() - 0.2) < 1e-3
    shuffled = size_of[samples].reshape(-1, 16)[:, 0]
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 5 / np.sqrt(len(shuffled)), "sizes come in no pattern"
    with pytest.raises(ValueError, match="source_weights: no weight for 'c'"):
        bucket_order(sources, buckets, weights={"a": 1, "b": 1}, seed=3, run=16)


@settings(deadline=None, max_examples=100)
@given(sources=ranges, data=st.data(), count=st.integers(1, 3000))
def test_a_spread_gives_every_source_its_share(sources: dict[str, range], data: st.DataObject, count: int) -> None:
    """Within one of the exact share, whatever the sizes; a source is gone through whole before any of it repeats."""
    weights = data.draw(st.fixed_dictionaries({name: st.floats(0.1, 100) for name in sources}) | st.just({}))
    once, repeated = (spread(sources, count=count, weights=weights, repeat=repeat) for repeat in (False, True))
    assert (repeated == spread(sources, count=count, weights=weights, repeat=True)).all()
    sizes = np.array([len(rows) for rows in sources.values()])
    shares = np.array([weights[name] for name in sources]) if weights else sizes
    shares = shares / shares.sum()
    assert len(repeated) <= min(count, np.ceil((sizes / shares).max()) + 1) and len(once) == len(np.unique(once))
    assert weights or len(repeated) == min(count, sizes.sum())
    for rows, share in zip(sources.values(), shares, strict=True):
        times = np.bincount(
            repeated[(repeated >= rows.start) & (repeated < rows.stop)] - rows.start, minlength=len(rows)
        )
        assert abs(times.sum() - share * len(repeated)) < 1 and times.max() - times.min() <= 1
        assert ((once >= rows.start) & (once < rows.stop)).sum() == min(times.sum(), len(rows))


def test_a_spread_is_mixed_and_drawn_evenly() -> None:
    """Of classes and sources that lie one after the other, as in a folder of folders."""
    chosen = spread({"a": range(10_000), "b": range(10_000, 40_000)}, count=4000, weights={}, repeat=False)
    bins = np.bincount(chosen * 20 // 40_000, minlength=20)
    assert (bins[:5].sum(), bins[5:].sum()) == (1000, 3000)
    assert ((bins - 200) ** 2 / 200).sum() < 60  # 18 degrees of freedom
    assert abs(np.corrcoef(np.arange(4000), chosen)[0, 1]) < 5 / np.sqrt(4000)
    assert {int(i) // 10_000 > 0 for i in chosen[:8]} == {False, True}, "the first batch already has both"


def test_a_spread_does_without_sources_that_hold_nothing_out() -> None:
    sources = {"none": range(0, 0), "some": range(5)}
    assert sorted(spread(sources, count=9, weights={"none": 1, "some": 1, "gone": 2}, repeat=False)) == list(range(5))
    with pytest.raises(ValueError, match="source_weights: only 'some' has held-out samples; give one of them a weight"):
        spread(sources, count=9, weights={"none": 1, "some": 0}, repeat=False)
    with pytest.raises(ValueError, match="source_weights: no source is called 'same'; did you mean 'some'"):
        spread(sources, count=9, weights={"none": 0, "same": 1}, repeat=True)


@pytest.mark.parametrize("at", [10**7, 10**9 * 7 + 123_456_789, 10**12])
def test_any_place_is_reached_at_once_and_with_flat_memory(at: int) -> None:
    """A billion samples, alone and as a mix; no permutation could be made in this time or memory."""
    sources = {"web": range(0, 9 * 10**8), "photos": range(9 * 10**8, 10**9)}
    orders = [order_of(sources, weights=weights, seed=0) for weights in ({}, {"web": 2, "photos": 1})]
    tracemalloc.start()
    began = time.perf_counter()
    for place in orders:
        indices = place(np.arange(at, at + 64))
        assert len(np.unique(indices)) == 64 and indices.max() > 5 * 10**8
    seconds = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert seconds < 60, "reading or permuting what came before would take far longer"


def test_draws_are_even_and_follow_seed_salt_and_position() -> None:
    draws = caption_draws(np.arange(30_000), seed=1)
    assert draws.dtype == np.float64 and draws.min() >= 0 and draws.max() < 1
    counts = np.bincount((draws * 3).astype(int))
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 2 / 3)
    assert (caption_draws(np.arange(100, 200), seed=1) == draws[100:200]).all()
    assert (caption_draws(np.arange(100), seed=2) != draws[:100]).all()
    others = uniform(np.arange(30_000), seed=1, salt=5)
    assert abs(np.corrcoef(draws, others)[0, 1]) < 5 / np.sqrt(30_000)


def test_picks_follow_the_weights() -> None:
    draws = uniform(np.arange(20_000), seed=3, salt=0).tolist()
    for weights in ((1.0, 1.0, 1.0), (7.0, 2.0, 1.0), (0.25, 0.5, 0.25), (1e-6, 1.0, 3.0)):
        shares = np.array(weights) / sum(weights)
        counts = np.bincount([pick(draw, count=3, weights=weights) for draw in draws], minlength=3)
        assert (np.abs(counts - 20_000 * shares) <= 5 * np.sqrt(20_000 * shares * (1 - shares)) + 1).all()
    assert np.abs(np.bincount([pick(draw, count=4) for draw in draws]) - 5000).max() < 5 * np.sqrt(5000 * 0.75)
    below_one = np.nextafter(1, 0)
    assert [pick(draw, count=3, weights=(1, 1, 1)) for draw in (0, below_one)] == [0, 2]
    assert [pick(draw, count=10**6) for draw in (0, below_one)] == [0, 10**6 - 1]


def test_noise_is_standard_normal_and_each_samples_own() -> None:
    noise = normal(np.arange(50), shape=(4, 16, 16), seed=1, salt=2)
    assert noise.dtype == np.float32 and noise.shape == (50, 4, 16, 16)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    some = np.array([7, 3, 10**12])
    assert (normal(some[:2], shape=(4, 16, 16), seed=1, salt=2) == noise[some[:2]]).all()
    flat = noise.reshape(50, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(50)).max() < 6 / np.sqrt(flat.shape[1])
    assert not (normal(some, shape=(4, 16, 16), seed=2, salt=2)[:2] == noise[some[:2]]).any()


def test_orders_are_plain_values() -> None:
    """They travel to worker processes."""
    one = order_of({"a": range(3), "b": range(3, 9)}, weights={"a": 1, "b": 1}, seed=1)
    assert one == Order((range(3), range(3, 9)), (2048, 2048), 1)
