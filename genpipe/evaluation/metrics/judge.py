"""The CLIP that judges pictures, and that it is not the one that conditioned them.

A system that draws what its CLIP sees in a caption is judged by that very CLIP with open arms: the number says how well
the system does what it was told, not whether a picture shows its caption.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from genpipe.artifacts import Artifact, Role
from genpipe.lineage import clips_behind, clips_content_behind, content_digest

Judge = Literal["independent", "self"]
"""`independent`: the role `judge`, a CLIP that no part of the system was made with; `self`: the role `clip`, any."""

CLIP_ROLE: dict[Judge, str] = {"independent": "judge", "self": "clip"}
FEATURES_ROLE: dict[Judge, str] = {"independent": "judge_features", "self": "features"}
PREFIX: dict[Judge, str] = {"independent": "", "self": "self_"}
"""What stands before the names of numbers, so that none of a system's own CLIP passes for another's."""


def judge_roles(judge: Judge) -> dict[str, Role]:
    """The role of the CLIP."""
    return {CLIP_ROLE[judge]: Role("clip")}


def check_judge(inputs: Mapping[str, Artifact], *, judge: Judge, setting: str) -> None:
    """Raise ValueError if an independent judge is a CLIP that conditions the samples, by fingerprint."""
    if judge == "independent" and inputs["judge"].fingerprint in clips_behind(inputs["sample"]):
        raise ValueError(_refusal(inputs["judge"].fingerprint, setting))


def check_judge_content(inputs: Mapping[str, Artifact], *, judge: Judge, setting: str) -> None:
    """Raise ValueError if an independent judge holds the very weights that condition the samples, under another name.

    Committed inputs only.
    """
    if judge == "independent" and (digest := content_digest(inputs["judge"])) in clips_content_behind(inputs["sample"]):
        raise ValueError(_refusal(digest, setting))


def _refusal(what: str, setting: str) -> str:
    return (
        f"{setting}: the judge ({what[:12]}) is a CLIP that the system of these samples was made with, so it does not "
        "judge them; map the role judge to another one (trained with another train.seed and other data, or published "
        "weights), or set judge: self, which names the numbers accordingly"
    )
