"""Is one system better than another? By the bootstrap over prompts, of pictures that show the same ones.

N pictures, C prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from genpipe.artifacts import Artifact, find
from genpipe.evaluation.per_sample import Better, Values, read_values
from genpipe.stage_config import Gate

SCORES = "scores.json"
"""The file of scores that has every number with its interval, and what came of gates' baselines."""

LEVEL = 0.95
"""Of all intervals."""

RESAMPLES = 10_000
DRAWS = 10**8
"""Prompts drawn for one interval, about, beyond which there are fewer resamples, but never fewer than a thousand."""
BLOCK = 2**21
"""Prompts drawn at a time: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A mean over N pictures, and where it lies with a confidence of 95 %."""

    value: float
    low: float
    high: float
    pictures: int


@dataclass(frozen=True)
class Difference(Interval):
    """How much more a number is than that of a baseline."""

    better: Better

    def is_worse(self, *, margin: float) -> bool:
        """Whether all of the interval is worse than nothing by more than `margin`."""
        return self.high < -margin if self.better == "higher" else self.low > margin

    def __str__(self) -> str:
        return f"{self.value:+.4g} (95 % interval {self.low:+.4g} to {self.high:+.4g}, {self.pictures:,} pictures)"


def interval(values: Values) -> Interval:
    """The mean of the values of a number, by the bootstrap over prompts."""
    return Interval(*bootstrap_mean(values.values, values.keys), len(values.values))


def paired_difference(values: Values, baseline: Values) -> Difference:
    """Of the means of a number, by the bootstrap over the prompts that both drew, which it resamples together.

    Raises ValueError where the two were drawn for other prompts, with other seeds, or not as often.
    """
    check_paired(values, baseline)
    ours, theirs = values.pictures, baseline.pictures
    differences = np.asarray([value - theirs[place] for place, value in ours.items()])
    found = bootstrap_mean(differences, [key for key, _ in ours])
    return Difference(*found, len(differences), better=values.better)


def check_paired(values: Values, baseline: Values) -> None:
    """Raise ValueError unless the pictures of the two are of the same prompts, as many of each, and seeds."""
    check_same_pictures(values.keys, values.seeds, baseline)


def check_same_pictures(keys: Sequence[str], seeds: frozenset[int], baseline: Values) -> None:
    """Raise ValueError unless a baseline was drawn for these prompts, [N], and with these seeds."""
    if seeds != baseline.seeds:
        here, there = (", ".join(map(str, sorted(of))) or "none" for of in (seeds, baseline.seeds))
        raise ValueError(f"drawn with seed {here}, the baseline with {there}; draw both with the same seed")
    ours, theirs = _counts(keys), _counts(baseline.keys)
    if ours != theirs:
        other = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        raise ValueError(
            f"{len(keys):,} pictures, the baseline's are {len(baseline.keys):,}, and they are of other prompts: "
            f"{ours.get(other, 0)} here of {other!r}, {theirs.get(other, 0)} there; draw both for the same prompts"
        )


def _counts(keys: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in keys:
        found[key] = found.get(key, 0) + 1
    return found


def bootstrap_mean(values: np.ndarray, keys: Sequence[str]) -> tuple[float, float, float]:
    """The mean of float64 [N], and the ends of its percentile bootstrap interval (Efron & Tibshirani 1993, section 13).

    Prompts are resampled, each with all of its pictures, which are not independent. Always the same for the same
    values in the same order.
    """
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    prompts = np.asarray([number[key] for key in keys])
    sums, counts = np.bincount(prompts, values), np.bincount(prompts)
    size = len(sums)
    resamples = min(RESAMPLES, max(1000, DRAWS // size))
    generator = np.random.default_rng(0)
    means = []
    for first in range(0, resamples, rows := max(1, BLOCK // size)):
        drawn = generator.integers(0, size, (min(rows, resamples - first), size))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class Judgment:
    """What holding a number against a baseline came to: the difference, or why there is none."""

    gate: Gate
    difference: Difference | None
    refusal: str = ""

    @property
    def missed(self) -> bool:
        """Whether the number is worse by more than the margin, or could not be compared."""
        return self.difference is None or self.difference.is_worse(margin=self.gate.margin)

    def told(self, name: str) -> str:
        """What came of it for the number `name`, in a sentence."""
        baseline = self.gate.not_worse_than
        if self.difference is None:
            return f"{name} cannot be held against {baseline}: {self.refusal}"
        allowed = f", and may be worse by {self.gate.margin:.4g}" if self.gate.margin else ""
        return f"{name} differs by {self.difference} from {baseline}{allowed}"

    def as_json(self, name: str) -> dict[str, Any]:
        """What `SCORES` has of it, for the number `name`."""
        of = asdict(self.difference) if self.difference else {}
        gate = {"baseline": self.gate.not_worse_than, "margin": self.gate.margin}
        return {**gate, **of, "missed": self.missed, "told": self.told(name)}


def judge(scores: Artifact | Mapping[str, Values], gates: Mapping[str, Gate]) -> dict[str, Judgment]:
    """The numbers of scores whose gates name the scores of a baseline, each held against it."""
    against = {name: gate for name, gate in gates.items() if gate.not_worse_than}
    if not against:
        return {}
    values = read_values(scores, against) if isinstance(scores, Artifact) else scores
    return {name: _judge(name, values, gate) for name, gate in against.items()}


def _judge(name: str, values: Mapping[str, Values], gate: Gate) -> Judgment:
    try:
        if name not in values:
            raise ValueError("these scores have no values of single pictures of it")
        return Judgment(gate, paired_difference(values[name], baseline_values(gate.not_worse_than, name)))
    except ValueError as error:
        return Judgment(gate, None, str(error))


def is_scores(uri: str) -> bool:
    """Whether scores are committed at a URI."""
    with suppress(OSError):  # a file, or what is no place at all
        found = find(uri) if uri else None
        return found is not None and found.kind == "scores"
    return False


def baseline_values(uri: str, name: str) -> Values:
    """The values of one number in a baseline's scores. Raises ValueError where there are none."""
    found = read_values(uri, [name])
    if name not in found:
        raise ValueError(f"{uri} has no values of single pictures of {name}; measure it there as here")
    return found[name]
