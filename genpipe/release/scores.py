"""What scores say about whether a system may be released."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from genpipe.artifacts import Artifact, Manifest, read_manifest
from genpipe.evaluation.comparison import SCORES
from genpipe.stage_config import Observe
from genpipe.storage import open_storage

MEMORIZED = "memorized"
"""The last part of the name of a share of memorized pictures (`evaluation.metrics.memorization`)."""

COPIED = "copied"
"""The same of the estimated share of pictures that are nearer to training pictures than new ones would be."""


def missed_gates(scores: Sequence[Manifest]) -> list[str]:
    """A sentence for each gate that the scores miss, of those that were set when they were made."""
    said = [
        gate.missed(name, manifest.metrics)
        for manifest in scores
        for name, gate in Observe.model_validate({"gates": manifest.config["observe"]["gates"]}).gates.items()
    ]
    return [*(sentence for sentence in said if sentence), *(told for of in scores for told in _worse(of))]


def _worse(scores: Manifest) -> list[str]:
    """A sentence for each number that was worse than its baseline when it was measured."""
    return [of["told"] for of in _recorded(scores).get("against", {}).values() if of["missed"]]


def intervals(scores: Manifest) -> dict[str, tuple[float, float]]:
    """The ends of the 95 % interval of each number that is a mean over single pictures."""
    numbers = _recorded(scores).get("numbers", {})
    return {name: (of["low"], of["high"]) for name, of in numbers.items() if "low" in of}


def _recorded(scores: Manifest) -> dict[str, Any]:
    """What the scores say beside their numbers, if they say something."""
    if SCORES not in {file.path for file in scores.files}:
        return {}
    record: dict[str, Any] = json.loads(open_storage(scores.artifact.uri).read(SCORES))
    return record


def shares(scores: Sequence[Manifest], kind: str) -> dict[str, float]:
    """The shares of pictures that are MEMORIZED, or COPIED, by metric; empty where none was measured."""
    return {
        name: value
        for manifest in scores
        for name, value in manifest.metrics.items()
        if name.rpartition("/")[2] == kind
    }


def check_scores(scores: Sequence[Manifest], *, system: Artifact, max_memorized: float) -> None:
    """Raise ValueError where another system was measured, a gate was missed, or more is memorized than may be."""
    for manifest in scores:
        _check_measured(manifest, system)
    if missed := missed_gates(scores):
        raise ValueError(f"inputs.evaluate: {'; '.join(missed)}; a system that misses a gate is not released")
    for name, share in shares(scores, MEMORIZED).items():
        if not share <= max_memorized:
            raise ValueError(
                f"max_memorized: {name} is {share:.4g}, and {max_memorized:g} may be; train on more pictures or for "
                "less long, or raise it if copies of training pictures may be published"
            )


def _check_measured(scores: Manifest, system: Artifact) -> None:
    """Raise ValueError if the pictures that were measured are known to be another system's."""
    samples = scores.inputs.get("sample")
    drawn = read_manifest(samples.uri, check_files=False) if samples is not None else None
    drawn_by = drawn.inputs.get("system") if drawn is not None else None
    if drawn_by is not None and drawn_by.fingerprint != system.fingerprint:
        raise ValueError(
            f"inputs.evaluate: {scores.artifact.uri} measured pictures of the system {drawn_by.fingerprint[:12]}, and "
            f"this one is {system.fingerprint[:12]}; map the scores of this system"
        )
