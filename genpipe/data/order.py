"""Which sample stands at which position of the stream: pure functions of (seed, position), with nothing in memory.

Positions count the samples of all ranks together from 0, without end. Whatever depends on chance in loading (order,
source, caption, crop, flip, latent noise) is a function of the seed and the position, so that any number of ranks,
threads or processes delivers the same samples, and a restart anywhere goes on as if nothing had happened.

Shape legend: N positions, S sources, R samples of a run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CYCLE = 4096
"""Positions over which a mix of sources keeps its weights exactly."""

_FEISTEL_ROUNDS = 6
_UINT = np.uint64
_CAPTION, _MIXTURE = 0x632BE59BD9B4E019, 0x2545F4914F6CDD1D  # keep draws for different ends apart
_SPREAD = 0x9E6C63D0876A9A47
_WEIGHTS = "train.source_weights"


def order(positions: np.ndarray, *, n: int, seed: int) -> np.ndarray:
    """The sample at each global position: int64 [N] in, int64 [N] in [0, n) out.

    Epoch e = p // n is the permutation of range(n) keyed by (seed, e), evaluated at p % n: a balanced Feistel
    network (Luby & Rackoff 1988) over the smallest even number of bits that holds n, with cycle walking for
    the values beyond it (Black & Rogaway 2002, section 3). Nothing of size n is ever in memory.
    """
    positions = np.asarray(positions, np.int64)
    assert n > 0 and (positions >= 0).all()
    epochs, which = np.unique(positions // n, return_inverse=True)  # few, so their keys are mixed once
    keys = _round_keys(epochs.astype(_UINT), seed=seed)
    half = _UINT(max(1, ((n - 1).bit_length() + 1) // 2))
    values = _feistel((positions % n).astype(_UINT), keys=keys, which=which, half=half)
    # Walking the cycle from a value in range must come back into range: at most 4 values per one that counts.
    outside = np.flatnonzero(values >= n)
    while len(outside):
        walked = _feistel(values[outside], keys=keys, which=which[outside], half=half)
        values[outside] = walked
        outside = outside[walked >= n]
    return values.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of a dataset that may come from several sources, each a range of its indices.

    Without `slots` all samples are one permutation an epoch, so that a source counts by its size. With them every
    cycle of `sum(slots)` positions holds exactly `slots[s]` samples of source s, shuffled among the others; a
    source goes through its own samples epoch after epoch, so a small one repeats sooner.
    """

    sources: tuple[range, ...]
    slots: tuple[int, ...]
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions: int64 [N] in, int64 [N] out."""
        positions = np.asarray(positions, np.int64)
        if not self.slots:
            return order(positions, n=sum(map(len, self.sources)), seed=self.seed)
        cycle, ends = sum(self.slots), np.cumsum(self.slots)
        slot = order(positions, n=cycle, seed=self.seed ^ _MIXTURE)  # shuffled anew each cycle, its "epoch"
        source = np.searchsorted(ends, slot, side="right")
        counts = np.asarray(self.slots, np.int64)[source]
        own = positions // cycle * counts + slot - (ends[source] - counts)
        samples = np.empty_like(own)
        for number in np.unique(source):
            mine, rows = source == number, self.sources[number]
            samples[mine] = rows.start + order(own[mine], n=len(rows), seed=self.seed + int(number))
        return samples


def order_of(sources: Mapping[str, range], *, weights: Mapping[str, float], seed: int) -> Order:
    """The order of a dataset of these sources. `weights` are shares of the training samples on any scale; 0 leaves
    a source out, and none at all takes every sample equally often.

    Raises ValueError, naming the setting `train.source_weights`, unless the weights name every source and no other.
    """
    ranges = tuple(sources.values())
    if not weights:
        return Order(ranges, (), seed)
    _check_weights(sources, weights)
    slots = _apportion([weights[name] for name in sources], total=CYCLE)
    if starved := [name for name, count in zip(sources, slots, strict=True) if weights[name] and not count]:
        raise ValueError(f"{_WEIGHTS}: the share of {_listed(starved)} is below 1/{CYCLE}; raise it or set it to 0")
    return Order(ranges, slots, seed)


@dataclass(frozen=True, eq=False)
class BucketOrder:
    """The order of a dataset whose images are of several sizes: runs of `run` samples of one size.

    Every group of samples, of one source and one size, has an endless order of its own, epoch after epoch, which is
    cut into runs; the rest of an epoch that fills no run begins the first run of the next. Epoch e of the whole
    has the runs that the groups complete when each has given `shares` samples e + 1 times, shuffled. So every sample
    comes once an epoch, up to those that wait for their run to fill, and nothing is left out or repeated.

    groups: the samples of each group, int64 [N]; shares: how many of them an epoch takes, all of them if sources count
    by size.
    """

    groups: tuple[np.ndarray, ...]
    shares: tuple[int, ...]
    run: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions: int64 [N] in, int64 [N] out."""
        runs, within = np.divmod(np.asarray(positions, np.int64), self.run)
        epochs = self._epochs_of(runs)
        before = self._completed(epochs)
        counts = self._completed(epochs + 1) - before
        group, nth = self._shuffled(epochs, runs - before.sum(-1), counts)
        first = np.take_along_axis(before, group[:, None], -1)[:, 0]
        own = (first + nth) * self.run + within
        samples = np.empty_like(own)
        for number in np.unique(group).tolist():
            mine, members = group == number, self.groups[number]
            samples[mine] = members[order(own[mine], n=len(members), seed=self.seed + number)]
        return samples

    def _shuffled(self, epochs: np.ndarray, runs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each run [N] of an epoch that has `counts` [N, groups] runs, and which of that group's it is."""
        totals, ends = counts.sum(-1), np.cumsum(counts, -1)
        slots = np.empty_like(runs)
        for total in np.unique(totals).tolist():  # epochs differ in length by a run a group at most
            here = totals == total
            slots[here] = order(epochs[here] * total + runs[here], n=total, seed=self.seed ^ _MIXTURE)
        group = (slots[:, None] >= ends).sum(-1)
        starts = np.take_along_axis(ends - counts, group[:, None], -1)[:, 0]
        return group, slots - starts

    def _completed(self, epochs: np.ndarray) -> np.ndarray:
        """Runs of each group before these epochs [N]: int64 [N, groups]."""
        given: np.ndarray = np.multiply.outer(epochs, np.asarray(self.shares, np.int64))
        return given // self.run

    def _epochs_of(self, runs: np.ndarray) -> np.ndarray:
        """The epoch that each run is of: the first before whose end it lies."""
        epochs: np.ndarray = runs * self.run // sum(self.shares)  # by as many as that, at least, are complete before it
        while (late := self._completed(epochs + 1).sum(-1) <= runs).any():
            epochs = epochs + late
        return epochs


def bucket_order(
    sources: Mapping[str, range],
    buckets: Sequence[np.ndarray],
    *,
    weights: Mapping[str, float],
    seed: int,
    run: int,
) -> BucketOrder:
    """The order of a dataset of these sources and sizes; `buckets` are the samples of each size, ascending int64 [N].

    Sizes keep their shares within each source. Weights are as in `order_of`, which says what it raises.
    """
    if weights:
        _check_weights(sources, weights)
    groups, shares = [], []
    used = {name: rows for name, rows in sources.items() if rows and (not weights or weights[name])}
    samples = sum(map(len, used.values()))
    for name, rows in used.items():
        share = weights[name] / sum(weights.values()) * samples / len(rows) if weights else 1.0
        for bucket in buckets:
            own = bucket[slice(*np.searchsorted(bucket, [rows.start, rows.stop]))]
            if len(own):
                groups.append(own)
                shares.append(max(1, round(share * len(own))))
    return BucketOrder(tuple(groups), tuple(shares), run, seed)


def spread(sources: Mapping[str, range], *, count: int, weights: Mapping[str, float], repeat: bool) -> np.ndarray:
    """About `count` samples that stand for all of these sources, each time the same: int64 [N], in mixed order.

    Every source gives its share of them, by `weights` as in `order_of` or else by size, drawn evenly from all that it
    holds. There are no more than it takes to go through every source once. A source that has fewer samples than its
    share is gone through again with `repeat`, as training does, so that means over them are those of training. Without,
    for what is held out, each sample comes once at most, and a source that holds nothing out gives none.

    Raises ValueError, naming `train.source_weights`: with `repeat` for what `order_of` refuses, without if no source
    with samples has a weight.
    """
    if repeat and weights:
        _check_weights(sources, weights)
    filled = [rows for rows in sources.values() if rows]
    shares = [weights.get(name, 0.0) if weights else float(len(rows)) for name, rows in sources.items() if rows]
    if not any(shares):
        found = _listed([name for name, rows in sources.items() if rows])
        raise ValueError(f"{_WEIGHTS}: only {found} has held-out samples; give one of them a weight, or shard again")
    rounds = [len(rows) / share for rows, share in zip(filled, shares, strict=True) if share]
    counts = _apportion(shares, total=min(count, math.ceil(max(rounds) * sum(shares))))
    chosen = []
    for number, (rows, own) in enumerate(zip(filled, counts, strict=True)):
        places = np.arange(own if repeat else min(own, len(rows)))
        chosen.append(rows.start + order(places, n=len(rows), seed=_SPREAD + number))
    together = np.concatenate(chosen)
    return together[order(np.arange(len(together)), n=len(together), seed=_SPREAD)]


def uniform(positions: np.ndarray, *, seed: int, salt: int) -> np.ndarray:
    """float64 [N], uniform in [0, 1) with 53 bits: a function of (seed, salt, position)."""
    key = _mix(np.asarray([(seed + salt) % 2**64], _UINT))
    bits = _mix(key + np.asarray(positions).astype(_UINT)) >> _UINT(11)
    return bits.astype(np.float64) / 2**53


def normal(positions: np.ndarray, *, shape: tuple[int, ...], seed: int, salt: int) -> np.ndarray:
    """float32 [N, *shape], standard normal: each sample's a function of (seed, salt, its position)."""
    noise = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(noise, np.asarray(positions).tolist(), strict=True):
        bits = np.random.Philox(key=np.asarray([(seed + salt) % 2**64, position], _UINT))
        np.random.Generator(bits).standard_normal(dtype=np.float32, out=row)
    return noise


def caption_draws(positions: np.ndarray, *, seed: int) -> np.ndarray:
    """float64 [N] in [0, 1): what `pick` chooses the caption of a training sample by."""
    return uniform(positions, seed=seed, salt=_CAPTION)


def pick(draw: float, *, count: int, weights: Sequence[float] | np.ndarray | None = None) -> int:
    """The option, of `count`, on which `draw` in [0, 1) falls: each with the same chance, or by its weight."""
    if weights is None or not len(weights):
        return int(draw * count)
    ends = np.cumsum(np.asarray(weights, np.float64))
    return min(int(np.searchsorted(ends, draw * ends[-1], side="right")), count - 1)


def _check_weights(sources: Mapping[str, range], weights: Mapping[str, float]) -> None:
    """Raise ValueError unless the weights name every source and no other, and some with samples."""
    for name in weights:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the dataset's sources: {_listed(sources)}"
            raise ValueError(f"{_WEIGHTS}: no source is called {name!r}; {hint}")
    if missing := [name for name in sources if name not in weights]:
        raise ValueError(f"{_WEIGHTS}: no weight for {_listed(missing)}; give one (0 leaves a source out)")
    if not any(weights.values()):
        raise ValueError(f"{_WEIGHTS}: all are 0; give a source that is to be used a weight")
    if empty := [name for name, rows in sources.items() if weights[name] and not rows]:
        raise ValueError(f"{_WEIGHTS}: {_listed(empty)} has no training samples; set its weight to 0")


def _apportion(weights: Sequence[float], *, total: int) -> tuple[int, ...]:
    """`total` by weight: the largest remainders get what rounding down leaves over, the first of equals first."""
    shares = np.asarray(weights, np.float64)
    assert (shares >= 0).all() and shares.sum() > 0
    exact = shares / shares.sum() * total
    slots = np.floor(exact).astype(np.int64)
    over = np.argsort(slots - exact, kind="stable")[: total - int(slots.sum())]
    slots[over] += 1
    return tuple(slots.tolist())


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names)


def _round_keys(epochs: np.ndarray, *, seed: int) -> np.ndarray:
    """uint64 [_FEISTEL_ROUNDS, E] of the epochs uint64 [E]."""
    keys = _mix(_mix(np.full_like(epochs, seed % 2**64)) + epochs)
    return _mix(keys + np.arange(_FEISTEL_ROUNDS, dtype=_UINT)[:, None])


def _feistel(values: np.ndarray, *, keys: np.ndarray, which: np.ndarray, half: np.uint64) -> np.ndarray:
    """The values under the round keys of the epochs `which` [N] they are of."""
    mask = (_UINT(1) << half) - _UINT(1)
    left, right = values >> half, values & mask
    for round_keys in keys:
        mixed = _mix(right + round_keys[which])
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): uint64 to well-mixed uint64, wrapping on overflow."""
    mixed: np.ndarray = x + _UINT(0x9E3779B97F4A7C15)
    mixed ^= mixed >> _UINT(30)
    mixed *= _UINT(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> _UINT(27)
    mixed *= _UINT(0x94D049BB133111EB)
    mixed ^= mixed >> _UINT(31)
    return mixed
