"""File names as people write them: matched across Unicode normal forms, cases, and folders that have moved."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath


class Names:
    """The files of a source, found by names that may be written otherwise: é as one character or as two."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = frozenset(files)
        self._by_form = {_nfc(name): name for name in sorted(self._files, reverse=True)}

    def exactly(self, name: str) -> str | None:
        """The file of this name in any Unicode normal form; one of the very same bytes first."""
        return name if name in self._files else self._by_form.get(_nfc(name))

    def find(self, written: str, *, folder: str) -> str | None:
        """The file that a line of a table in `folder` means, or None.

        That is the name relative to `folder`, else to the source's root, else the longest end of the path that is a
        file below `folder`: paths of another machine, or with the folder's own name repeated. Raises ValueError for a
        path that leads out of the source.
        """
        name = os.path.normpath(os.path.join(folder, written))
        plain = written if name in self._files else written.replace("\\", "/")
        parts = PurePosixPath(plain).parts
        places = [os.path.join(folder, plain), plain]
        if ".." not in parts:
            places += [os.path.join(folder, *parts[start:]) for start in range(1, len(parts))]
        found = (self.exactly(os.path.normpath(place)) for place in places)
        file = next((file for file in found if file is not None), None)
        if file is None and name.startswith(("../", "/")):
            raise ValueError(f"file_name {written} lies outside the folder, and no image ends like it")
        return file


def pair_by_stem(images: Iterable[str], texts: Iterable[str]) -> dict[str, str]:
    """For each image the text that has its name up to the suffix, where there is one.

    In any Unicode normal form; in another case where just one text and images of one name come into question.
    """
    images, by_stem, by_case = list(images), dict[str, str](), dict[str, set[str]]()
    stems = {name: _nfc(stem_of(name)) for name in images}
    for text in sorted(texts):  # of a.TXT and a.txt the latter
        by_stem[_nfc(stem_of(text))] = text
    for stem in [*by_stem, *stems.values()]:
        by_case.setdefault(stem.casefold(), set()).add(stem)
    pairs: dict[str, str] = {}
    for name, stem in stems.items():
        alike = by_case[stem.casefold()]
        for other in (stem, *alike) if len(alike) == 2 else (stem,):
            if other in by_stem:
                pairs.setdefault(name, by_stem[other])
    return pairs


def stem_of(name: str) -> str:
    """A file's path without its suffix."""
    return os.path.splitext(name)[0]


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
