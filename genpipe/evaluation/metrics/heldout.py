"""Trained parts' own held-out validations, repeated from their committed weights: do the numbers come again?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from genpipe.artifacts import Artifact, Role, several
from genpipe.config import Config
from genpipe.evaluation.metrics.metric import Evaluation, Measure, Partial
from genpipe.storage import Storage
from genpipe.weights import MODELS

ROLE = "trained"


class HeldoutConfig(Config):
    """What each artifact of the role `trained` reports of itself: `KIND/NAME`, such as `decoder/loss`.

    Of several artifacts of one kind, `KIND.0/NAME`, `KIND.1/NAME`, ... in the order in which they are given.
    """

    kind: Literal["heldout"] = "heldout"

    def roles(self) -> dict[str, Role]:
        """Any trained parts."""
        return {ROLE: Role(*MODELS, several=True)}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All that each part may give."""
        return [f"{name}/*" for name, _ in _named(inputs)]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Anything trained can be validated."""

    def parts(self, evaluation: Evaluation) -> list[str]:
        """One for each trained part."""
        return [name for name, _ in _named(evaluation.inputs)]

    def measure(self, evaluation: Evaluation) -> Measure:
        """Each part is loaded when it is its turn, and left again."""
        artifacts = dict(_named(evaluation.inputs))

        def validated(part: str, out: Path) -> Partial:
            found = evaluation.validate(artifacts[part], evaluation.device)
            return {f"{part}/{name}": value for name, value in found.items()}

        return validated

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """All of them."""
        return {name: value for partial in partials for name, value in partial.items()}


def _named(inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, Artifact]]:
    """The trained parts by the names that their metrics begin with."""
    artifacts = several(inputs, ROLE)
    counts, seen = Counter(artifact.kind for artifact in artifacts), Counter[str]()
    for artifact in artifacts:
        number = f".{seen[artifact.kind]}" if counts[artifact.kind] > 1 else ""
        seen[artifact.kind] += 1
        yield f"{artifact.kind}{number}", artifact
