"""Systems that were measured, side by side: their numbers, what is different about how they were made, and how it went.

A run is named by the scores that it ended in; all that it was made of is behind those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from genpipe.artifacts import Artifact, Manifest, read_manifest
from genpipe.config import flatten
from genpipe.evaluation.comparison import Interval, check_paired, interval, paired_difference
from genpipe.evaluation.per_sample import Values, read_values
from genpipe.pipeline.curves import read_curve
from genpipe.pipeline.spec import Curve
from genpipe.stage_config import UNFINGERPRINTED

ABSENT = "-"


@dataclass(frozen=True)
class Measured:
    """A measured system: what it is called here, and the manifest of its scores."""

    label: str
    manifest: Manifest

    @classmethod
    def at(cls, scores: Artifact, *, label: str) -> Measured:
        """The one whose scores are committed there. Raises ValueError if they are gone."""
        manifest = read_manifest(scores.uri)
        if manifest is None:
            raise ValueError(f"{scores.uri}: no scores are committed here (any more)")
        return cls(label, manifest)

    @cached_property
    def values(self) -> dict[str, Values]:
        """The values of single pictures, by number."""
        return read_values(self.manifest.artifact)

    @cached_property
    def stages(self) -> dict[str, Manifest]:
        """The scores and all that they were made of, what is nearer first, as far as it is still there.

        By kind of stage; of several artifacts of one kind, `KIND`, `KIND.1`, ... in the order in which they are met.
        """
        found: dict[str, Manifest] = {}
        met, counts, queue = {self.manifest.artifact.fingerprint}, Counter[str](), [self.manifest]
        for manifest in queue:
            kind = manifest.identity["stage"]
            found[f"{kind}.{counts[kind]}" if counts[kind] else kind] = manifest
            counts[kind] += 1
            for artifact in manifest.inputs.values():
                if artifact.fingerprint not in met:
                    met.add(artifact.fingerprint)
                    queue += [there] if (there := read_manifest(artifact.uri, check_files=False)) else []
        return found


@dataclass(frozen=True)
class Row:
    """One number of all runs: the value of each, and of all but the first how it differs from that, if it can be told.

    `first` has an interval where values of single pictures were kept; so have differences of the same pictures.
    """

    number: str
    values: tuple[float | None, ...]
    first: Interval | None
    differences: tuple[Interval | float | None, ...]


def numbers(runs: Sequence[Measured]) -> list[Row]:
    """Every number that one of the runs has, those of the first run first, otherwise by name."""
    first, *others = runs
    names = list(dict.fromkeys(name for run in runs for name in sorted(run.manifest.metrics)))
    return [
        Row(
            name,
            tuple(run.manifest.metrics.get(name) for run in runs),
            interval(first.values[name]) if name in first.values else None,
            tuple(_difference(name, run, first) for run in others),
        )
        for name in names
    ]


def _difference(name: str, run: Measured, first: Measured) -> Interval | float | None:
    if name in run.values and name in first.values and not unpaired(run, first, name):
        return paired_difference(run.values[name], first.values[name])
    ours, theirs = run.manifest.metrics.get(name), first.manifest.metrics.get(name)
    return None if ours is None or theirs is None else ours - theirs


def unpaired(run: Measured, first: Measured, name: str) -> str:
    """Why a number of two runs is not of the same pictures; empty if it is."""
    try:
        check_paired(run.values[name], first.values[name])
    except ValueError as error:
        return str(error)
    return ""


def unpaired_runs(runs: Sequence[Measured]) -> dict[str, str]:
    """The runs whose pictures are others than the first one's, by label, and in what."""
    first, *others = runs
    found = {
        run.label: why
        for run in others
        for name in sorted(run.values.keys() & first.values.keys(), reverse=True)
        if (why := unpaired(run, first, name))
    }
    return found


def settings(runs: Sequence[Measured]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(stage, setting, value in each run) of all that differs in how runs were made, that which decides the outcome.

    A stage that some runs have not got is a single row, and so is one whose version or source is another.
    """
    rows = []
    for stage in dict.fromkeys(name for run in runs for name in run.stages):
        made = [run.stages.get(stage) for run in runs]
        if None in made:
            rows.append((stage, "the stage itself", tuple("there" if each else ABSENT for each in made)))
        facts = [_facts(each) if each else None for each in made]
        there = [each for each in facts if each is not None]
        for setting in dict.fromkeys(name for each in there for name in each):
            if len({str(each.get(setting)) for each in there}) > 1:
                told = tuple(ABSENT if each is None else str(each.get(setting, "(unset)")) for each in facts)
                rows.append((stage, setting, told))
    return rows


def _facts(manifest: Manifest) -> dict[str, Any]:
    """The settings of a stage, its version, and what it read from outside."""
    config = flatten({name: value for name, value in manifest.config.items() if name not in UNFINGERPRINTED})
    source = {"its source": manifest.identity["source"][:12]} if manifest.identity["source"] else {}
    return {**config, "its version": manifest.identity["version"], **source}


def curves(runs: Sequence[Measured]) -> dict[str, dict[str, Curve]]:
    """The held-out curves of each stage, by label of the run; without stages that all runs share, or that have none."""
    found: dict[str, dict[str, Curve]] = {}
    for stage in dict.fromkeys(name for run in runs for name in run.stages):
        made: Mapping[str, Manifest] = {run.label: run.stages[stage] for run in runs if stage in run.stages}
        if len({manifest.artifact.fingerprint for manifest in made.values()}) == 1 and len(made) == len(runs):
            continue
        of_stage = {label: curve for label, of in made.items() if (curve := read_curve(of.artifact.uri))}
        if of_stage:
            found[stage] = of_stage
    return found
