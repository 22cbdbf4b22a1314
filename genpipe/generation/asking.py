"""What is asked of a system, by name and number, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from genpipe.data.shards import NO_LABEL
from genpipe.data.text import clean_text, is_visible
from genpipe.generation.prompts import Prompt


def asked_of(
    prompts: str | Sequence[str],
    labels: Sequence[str | int],
    *,
    conditioned_on: Collection[str],
    classes: Sequence[str],
) -> list[Prompt]:
    """What a system with these conditions and classes is to draw.

    Raises ValueError for what the system is not told, and for what it does not take.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {"text": ("prompts", len(texts)), "label": ("labels", len(labels))}
    for condition, (argument, count) in given.items():
        if count and condition not in conditioned_on:
            known = " and ".join(sorted(conditioned_on)) or "nothing"
            raise ValueError(f"{argument}: the system is conditioned on {known}; leave them out")
        if not count and condition in conditioned_on:
            raise ValueError(f"{argument}: required, as the system is conditioned on {condition}; say what to draw")
    if texts and labels and len(texts) != len(labels):
        raise ValueError(f"labels: the system takes one for each prompt, not {len(labels)} for {len(texts)}")
    for place, text in enumerate(texts):
        if not is_visible(text):
            raise ValueError(f"prompts[{place}]: is empty; say what to draw")
        clean_text(text)  # refuses what is too long
    numbers = [_class_of(label, classes) for label in labels] or [NO_LABEL] * len(texts)
    return [Prompt(*one) for one in zip(texts or [""] * len(numbers), numbers, strict=True)] or [Prompt("")]


def _class_of(label: str | int, classes: Sequence[str]) -> int:
    """The place of a class, given by name or place. Raises ValueError."""
    if label in classes:
        return classes.index(str(label))
    if str(label).isdecimal() and int(label) < len(classes):
        return int(label)
    few = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise ValueError(f"labels: {label!r} is none of the system's classes; it has {few}, numbered from 0")


def wanted_of(numbers: Sequence[int] | None, *, of: int) -> set[int]:
    """The numbers of the pictures that are to be drawn, of so many. Raises ValueError for one that none of them has."""
    if numbers is None:
        return set(range(of))
    if not numbers:
        raise ValueError("numbers: name at least one picture, or leave it out for all of them")
    for number in numbers:
        if not 0 <= number < of:
            raise ValueError(f"numbers: there is no picture {number}; {of} are asked for, numbered from 0")
    return set(numbers)
