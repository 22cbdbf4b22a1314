"""What a source yields: samples, and rejects with the reason why a sample was left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from genpipe.data.text import clean_text, is_visible

LONGEST_DETAIL = 1000  # characters


@dataclass(frozen=True)
class Sample:
    """One image, its captions, and what else it may be conditioned on.

    key: unique within its part, and within the dataset unless the keys of a table repeat; letters, digits, `-` and
        `_` only: it becomes a WebDataset member name.
    group: the subject; the train/held-out split never separates two samples of one group.
    image: the encoded image as the source holds it.
    captions: at least one, cleaned by `clean_captions`.
    meta: JSON-able facts that travel with the sample; `file_name` says where it came from.
    source: the name of its source in a mix, "" where there is one source only.
    caption_weights: how likely each caption is to be chosen, > 0 on any scale; empty means uniform.
    label: the name of its class, one of the source's `classes()`; None without one.
    condition: an encoded conditioning image (edges, depth, a pose, ...), as the source holds it; None without one.
    """

    key: str
    group: str
    image: bytes
    captions: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    caption_weights: tuple[float, ...] = ()
    label: str | None = None
    condition: bytes | None = None


@dataclass(frozen=True)
class Reject:
    """A sample that was left out: its `key`, its place (`source`), a short code (`reason`) and a `detail` for people.

    They quote untrusted input and go into a table: what is not UTF-8 is escaped, and a long detail is cut.
    """

    key: str
    source: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            object.__setattr__(self, name, text.encode("utf-8", "backslashreplace").decode())
        object.__setattr__(self, "detail", self.detail[:LONGEST_DETAIL])


class Source(Protocol):
    """A dataset as a user brings it. Opening one lists it; samples are read part by part."""

    def parts(self) -> list[str]:
        """Stable names of the parts, each about `part_size` samples; a part's place is its number."""
        ...

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """The samples of a part, always in the same order; one item for every sample, good or bad."""
        ...

    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, each at its index; () without labels.

        None where labels are numbers that only reading the samples tells: then each number is its own index.
        """
        ...

    def digest(self) -> str:
        """sha256 of what identifies the content: relative names, sizes and contents (`sources/identity.py`)."""
        ...


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Each cleaned by `clean_text`; those that are blank or repeat an earlier one are dropped.

    Raises ValueError for one that is too long.
    """
    return tuple(dict.fromkeys(clean for clean in map(clean_text, captions) if is_visible(clean)))


def weigh_captions(weighted: Iterable[tuple[str, float]]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Captions cleaned as by `clean_captions` and their weights; repeated captions add theirs up.

    The weights are () where all are equal.
    """
    total: dict[str, float] = {}
    for caption, weight in weighted:
        for clean in clean_captions([caption]):
            total[clean] = total.get(clean, 0.0) + weight
    return tuple(total), () if len(set(total.values())) < 2 else tuple(total.values())
