"""Held-out curves: what validations of a training found, kept with its artifact, and what that lets one expect.

A later training of like settings should go the same way. Where it does not, data or code have changed, or luck has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from genpipe.artifacts import CURVE, Artifact, Manifest, read_manifest
from genpipe.pipeline.spec import StageSpec
from genpipe.pipeline.systems import committed_in
from genpipe.storage import open_storage

STUDENT = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)
"""The 99.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last one for more, too."""

LEAST = 0.01
"""Half of the width of a band at the least, as a share of its mean: what is as good as equal is no surprise."""

Curve = dict[int, dict[str, float]]
"""What each validation found, by samples seen."""


def curve_text(curve: Curve) -> str:
    """The content of a curve's file: a JSON object of metrics by samples seen, in order."""
    return json.dumps({str(samples): curve[samples] for samples in sorted(curve)}, indent=1)


def read_curve(uri: str) -> Curve:
    """The curve in an artifact, or in the work folder of an unfinished one; empty if there is none."""
    try:
        return {int(samples): found for samples, found in json.loads(open_storage(uri).read(CURVE)).items()}
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class Band:
    """Where a metric is expected: the mean of what so many runs had, and a 99 % prediction interval of the next one."""

    mean: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Expectation:
    """The curves of finished runs of like settings."""

    curves: tuple[Curve, ...]

    @classmethod
    def of(cls, spec: StageSpec) -> Expectation:
        """From the artifacts in the store of `spec` that were made with its settings but for `train.seed`.

        So were all of their inputs, at every remove; the data may have been others.
        """
        there = committed_in(spec.store, spec.target.kind)
        alike = (manifest for manifest in there if _alike(spec.identity, spec.inputs, manifest))
        return cls(tuple(curve for manifest in alike if (curve := read_curve(manifest.artifact.uri))))

    def at(self, name: str, samples: int) -> Band | None:
        """What to expect of a metric after so many samples, between validations on the line.

        None where fewer than two curves say something of that, as one run does not show how far runs differ. The
        interval is Student's, `mean +- t s sqrt(1 + 1 / runs)`: the range of a few runs would miss most of the next.
        """
        values = []
        for curve in self.curves:
            places = [place for place in sorted(curve) if name in curve[place]]
            if places and places[0] <= samples <= places[-1]:
                values.append(float(np.interp(samples, places, [curve[place][name] for place in places])))
        if (runs := len(values)) < 2:
            return None
        middle, t = mean(values), STUDENT[min(runs - 1, len(STUDENT)) - 1]
        half = max(t * stdev(values) * math.sqrt(1 + 1 / runs), LEAST * abs(middle))
        return Band(middle, middle - half, middle + half, runs)


def _alike(identity: Mapping[str, Any], inputs: Mapping[str, Artifact], other: Manifest) -> bool:
    """Whether an artifact was made with the same settings but for the seed, and so were its inputs."""
    if _but_for_seed(identity) != _but_for_seed(other.identity) or inputs.keys() != other.inputs.keys():
        return False
    return all(_are_alike(artifact, other.inputs[role]) for role, artifact in inputs.items())


def _are_alike(one: Artifact, other: Artifact) -> bool:
    if one.fingerprint == other.fingerprint:
        return True
    ours, theirs = (read_manifest(of.uri, check_files=False) for of in (one, other))
    return ours is not None and theirs is not None and _alike(ours.identity, ours.inputs, theirs)


def _but_for_seed(identity: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
    settings = dict(identity["settings"])
    if isinstance(settings.get("train"), Mapping):
        settings["train"] = {name: value for name, value in settings["train"].items() if name != "seed"}
    return identity["stage"], identity["version"], settings
