"""Cleaning of text: one function, for captions as they are stored and for prompts as they are encoded."""

from __future__ import annotations

import re
import unicodedata

LONGEST_TEXT = 2**15
"""Characters. NFC takes time that grows with the square of a run of accents."""

CONTROL = "[\x00-\x1f\x7f-\x9f]"
"""Characters that are none, as a regular expression in which they stand themselves: not all engines read \\x80."""

_CONTROL = re.compile(CONTROL)
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")  # no space, of whatever width


def clean_text(text: str) -> str:
    """NFC; control characters and runs of whitespace become one space, none at either end. Idempotent.

    Raises ValueError for a text of more than `LONGEST_TEXT` characters.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"a text of {len(text)} characters is too long; shorten it to at most {LONGEST_TEXT}")
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def is_visible(text: str) -> bool:
    """Whether a text has any character that shows: not only spaces, joiners and direction marks."""
    return _VISIBLE.search(text) is not None
