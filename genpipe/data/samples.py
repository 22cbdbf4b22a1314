"""What a source yields: a sample, or the reason why there is none. Every sample is one or the other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")  # no space, of whatever width
LONGEST_DETAIL = 1000  # characters
LONGEST_CAPTION = 2**15  # characters: NFC takes a time that grows with the square of a run of accents


@dataclass(frozen=True)
class Sample:
    """One image and its captions.

    key: unique within its part, and within the dataset unless the keys of a table repeat; letters, digits, `-` and
        `_` only: it becomes a WebDataset member name.
    group: the subject; the train/held-out split never separates two samples of one group.
    image: the encoded image as the source holds it.
    captions: at least one, cleaned by `clean_captions`.
    meta: JSON-able facts that travel with the sample; `file_name` says where it came from.
    source: the name of its source in a mix, "" where there is one source only.
    caption_weights: how likely each caption is to be chosen, > 0 on any scale; empty means uniform.
    """

    key: str
    group: str
    image: bytes
    captions: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    caption_weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reject:
    """A sample that did not make it: which (`key`, and `source`, its place), why (`reason`, a short code), `detail`.

    These may quote anybody, but must stand in a table: what is not UTF-8 is escaped, and a long detail is cut.
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

    def digest(self) -> str:
        """sha256 of the content's identity (names, sizes, times or versions), without reading the images."""
        ...


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """NFC, control characters and runs of whitespace to one space; captions that show nothing, or the same, dropped.

    Raises ValueError for one that is longer than LONGEST_CAPTION.
    """
    captions = list(captions)
    if any(len(caption) > LONGEST_CAPTION for caption in captions):
        raise ValueError(f"a caption has more than {LONGEST_CAPTION} characters")
    plain = (_CONTROL.sub(" ", unicodedata.normalize("NFC", caption)) for caption in captions)
    cleaned = (" ".join(caption.split()) for caption in plain)
    return tuple(dict.fromkeys(caption for caption in cleaned if _VISIBLE.search(caption)))


def weigh_captions(weighted: Iterable[tuple[str, float]]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Captions cleaned as by `clean_captions` and their weights; repeated captions add theirs up.

    The weights are () where all are equal.
    """
    total: dict[str, float] = {}
    for caption, weight in weighted:
        for clean in clean_captions([caption]):
            total[clean] = total.get(clean, 0.0) + weight
    return tuple(total), () if len(set(total.values())) < 2 else tuple(total.values())
