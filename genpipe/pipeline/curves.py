"""Held-out curves: what validations of a training found, kept with its artifact, and what that lets one expect.

A later training of like settings should go the same way. Where it does not, data or code have changed, or luck has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev
from typing import Any, Protocol

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from genpipe.artifacts import CURVE, Artifact, Manifest, ManifestError, committed_in, fingerprint, read_manifest
from genpipe.config import Config, ConfigError
from genpipe.pipeline.spec import Curve, StageSpec
from genpipe.storage import open_storage, read_file

STUDENT = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)
"""The 99.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last one for more, too."""

LEAST = 0.01
"""Half of the width of a band at the least, as a share of its mean: what is as good as equal is no surprise."""


class Made(Protocol):
    """How something is made, or is to be: a manifest, a stage's spec, or what is planned."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its fingerprint is made of."""

    @property
    def inputs(self) -> Mapping[str, Artifact]:
        """What it is made from, by role."""


Find = Callable[[str], Made | None]
"""How what lies, or is to lie, at a URI is made; None where nobody knows."""


class KeptCurves(Config):
    """The curves of one stage in a file of them, which a pipeline names with `curves`."""

    likeness: str = Field(description="of what was trained, as `likeness` gives it")
    curves: dict[str, Curve] = Field(description="by fingerprint of what was trained")


def curve_text(curve: Curve) -> str:
    """The content of a curve's file: a JSON object of metrics by samples seen, in order."""
    return json.dumps({str(samples): curve[samples] for samples in sorted(curve)}, indent=1)


def read_curve(uri: str) -> Curve:
    """The curve in an artifact, or in the work folder of an unfinished one; empty if there is none."""
    try:
        return {int(samples): found for samples, found in json.loads(open_storage(uri).read(CURVE)).items()}
    except FileNotFoundError:
        return {}


def kept_text(kept: Mapping[str, KeptCurves]) -> str:
    """The content of a file of curves: a JSON object by name of the stage, a line for each curve."""
    stages = []
    for name, of in kept.items():
        curves = ",\n".join(f"  {json.dumps(made)}: {json.dumps(curve)}" for made, curve in of.curves.items())
        stages.append(f'{json.dumps(name)}: {{"likeness": {json.dumps(of.likeness)}, "curves": {{\n{curves}}}}}')
    return "{\n" + ",\n".join(stages) + "\n}\n"


def read_kept(uri: str) -> dict[str, KeptCurves]:
    """The curves in a file that `kept_text` wrote, by name of the stage. Raises ConfigError."""
    remedy = "write one with `genpipe curves`, or leave it out"
    try:
        return TypeAdapter(dict[str, KeptCurves]).validate_json(read_file(uri))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{uri}: no file of held-out curves ({where}: {fault['msg']}); {remedy}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{uri}: the held-out curves cannot be read ({error}); {remedy}") from None


def manifest_at(uri: str) -> Manifest | None:
    """The manifest of an artifact, None where it is damaged or not there."""
    with suppress(ManifestError):
        return read_manifest(uri, check_files=False)
    return None


def likeness(made: Made, find: Find = manifest_at) -> str:
    """The sha256 (hex) of how something is made but for `train.seed`: its settings, and those of all that went into it.

    What was read from outside of the pipeline is no part of it: the data may be others. An input that `find` knows
    nothing of is like itself alone.
    """
    inputs = {}
    for role, artifact in made.inputs.items():
        before = find(artifact.uri)
        inputs[role] = artifact.fingerprint if before is None else likeness(before, find)
    return fingerprint({**_but_for_seed(made.identity), "inputs": inputs})


def curves_alike(alike: str, store: str, kind: str) -> dict[str, Curve]:
    """The curves, by fingerprint, of a store's artifacts of a kind with this likeness."""
    find = cache(manifest_at)
    there = (made for made in committed_in(store, kind, check_files=False) if likeness(made, find) == alike)
    return {made.artifact.fingerprint: curve for made in there if (curve := read_curve(made.artifact.uri))}


def _but_for_seed(identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(identity["settings"])
    if isinstance(settings.get("train"), Mapping):
        settings["train"] = {name: value for name, value in settings["train"].items() if name != "seed"}
    return {"stage": identity["stage"], "version": identity["version"], "settings": settings}


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
        """From the artifacts in the store of `spec` that are like what it makes, and from what it knows of others."""
        return cls(tuple((spec.curves | curves_alike(likeness(spec), spec.store, spec.target.kind)).values()))

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
