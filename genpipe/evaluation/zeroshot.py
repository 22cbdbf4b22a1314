"""Zero-shot classification: which class's description is an image most like? (Radford et al. 2021, sec. 3.1).

B images, K classes, P prompt templates, D embedding width.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field, StringConstraints, field_validator
from torch import Tensor

from genpipe.config import Config
from genpipe.evaluation.retrieval import recall_at, retrieval_ranks

Template = Annotated[str, StringConstraints(pattern=r"^[^{}]*\{\}[^{}]*$")]


class ZeroShotConfig(Config):
    """Classes by name, and the sentences about each whose embeddings are averaged."""

    classes: tuple[str, ...] = Field(min_length=2, description="an image is of the one that its caption names")
    templates: tuple[Template, ...] = Field(
        ("a photo of a {}.",), min_length=1, description="sentences, with {} where the class stands"
    )

    @field_validator("classes")
    @classmethod
    def _names_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        names = [name.lower() for name in classes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} stands there twice, case aside; name each class once")
        return classes

    def prompts(self) -> list[str]:
        """The K P sentences, class by class."""
        return [template.format(name) for name in self.classes for template in self.templates]


def class_embeds(prompt_embeds: Tensor, *, classes: int) -> Tensor:
    """Embeddings of `ZeroShotConfig.prompts` [K P, D] -> unit vectors of the classes [K, D].

    Unit vectors are averaged over the templates and brought to unit length again (sec. 3.1.4).
    """
    return F.normalize(F.normalize(prompt_embeds.float(), dim=-1).unflatten(0, (classes, -1)).mean(1), dim=-1)


def zero_shot_accuracy(images: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of unit image embeddings [B, D] with labels int64 [B], given `class_embeds` [K, D]."""
    ranks = retrieval_ranks(images, classes, labels)
    return {f"zero_shot_top{k}": recall_at(ranks, k) for k in (1, 5)}


def named_class(caption: str, classes: tuple[str, ...]) -> int:
    """The class that a caption names, in whole words and any case; -1 if it names none, or more than one.

    Of names that overlap the longer is meant: a hot dog is no dog.
    """
    numbers, pattern = _names(classes)
    found = {numbers[name] for name in pattern.findall(caption.lower())}
    return found.pop() if len(found) == 1 else -1


@lru_cache(maxsize=4)
def _names(classes: tuple[str, ...]) -> tuple[dict[str, int], re.Pattern[str]]:
    """The number of each class by its name in lower case, and what finds the names in a caption."""
    numbers = {name.lower(): number for number, name in enumerate(classes)}
    longest_first = "|".join(map(re.escape, sorted(numbers, key=len, reverse=True)))
    return numbers, re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")
