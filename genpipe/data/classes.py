"""Class labels: their names as a list, in which each has its index."""

from __future__ import annotations

from collections.abc import Iterable

LARGEST_NUMBER = 2**20 - 1
"""The largest number that is taken for a class's own index."""


def class_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of their indices: sorted, each once.

    Where all are different numbers up to `LARGEST_NUMBER`, each is its own index (ImageNet's 207 stays 207), and the
    gaps are filled with the numbers that are missing.
    """
    found = sorted(set(names))
    numbers = {int(name): name for name in found if is_number(name)}
    if not found or len(numbers) < len(found):
        return tuple(found)
    return tuple(numbers.get(number, str(number)) for number in range(max(numbers) + 1))


def numbered_classes(largest: int) -> tuple[str, ...]:
    """The names of classes that are known by number only: `0` up to `largest`; -1 gives none."""
    return tuple(map(str, range(largest + 1)))


def is_number(name: str) -> bool:
    """Whether a label is a number that may serve as its own index."""
    return name.isascii() and name.isdecimal() and len(name) <= 18 and int(name) <= LARGEST_NUMBER
