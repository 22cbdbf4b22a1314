"""What drawing the pictures cost, as the stage `sample` found it when it drew them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from genpipe.artifacts import Artifact, Manifest, Role, read_manifest
from genpipe.config import Config
from genpipe.evaluation.metrics.metric import SAMPLE, Evaluation, Measure, Partial
from genpipe.storage import Storage

PREFIX = "speed/"
"""Stands before these numbers among the metrics of samples, too."""


class SpeedConfig(Config):
    """`speed/pictures_per_second` of one worker, `speed/evaluations_NETWORK` a picture, `speed/parameters`, and more.

    They are those of the day on which the samples were drawn, and of that machine: the samples' manifest names it.
    `speed/peak_gib` is the most memory that tensors had on a GPU, where there was one.
    """

    kind: Literal["speed"] = "speed"

    def roles(self) -> dict[str, Role]:
        """The generated pictures."""
        return dict(SAMPLE)

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Those that every system has, and what depends on its parts and on the machine."""
        return [f"{PREFIX}pictures_per_second", f"{PREFIX}parameters", f"{PREFIX}*"]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError for pictures that are there, and of which it is not known."""
        manifest = read_manifest(inputs["sample"].uri, check_files=False)
        if manifest is not None and not _found(manifest):
            raise ValueError(
                "metrics.speed: it was not recorded when these samples were drawn; delete their artifact "
                f"({inputs['sample'].uri}) to have them drawn again, or leave the metric out"
            )

    def parts(self, evaluation: Evaluation) -> list[str]:
        """One: it is read."""
        return ["samples"]

    def measure(self, evaluation: Evaluation) -> Measure:
        """Reads the samples' manifest."""
        manifest = read_manifest(evaluation.inputs["sample"].uri, check_files=False)
        assert manifest is not None, "inputs are committed"
        found = _found(manifest)
        return lambda part, out: dict(found)

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """The numbers."""
        return dict(partials[0])


def _found(manifest: Manifest) -> dict[str, float]:
    return {name: value for name, value in manifest.metrics.items() if name.startswith(PREFIX)}
