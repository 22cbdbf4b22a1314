"""One cleaning for captions and prompts; Unicode's normal forms are those of `unicodedata`."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpipe.data.text import LONGEST_TEXT, clean_text, is_visible


def test_spaces_controls_and_accents() -> None:
    assert clean_text(" a\x00b\r\n c\t\u3000d ") == "a b c d"
    assert clean_text("cafe\u0301") == "caf\u00e9"
    assert clean_text("\u00a0\t\n") == ""


@given(st.text(max_size=60))
def test_cleaning_again_changes_nothing(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean == unicodedata.normalize("NFC", clean)
    assert clean == " ".join(clean.split())


def test_a_text_too_long_to_be_cleaned_in_time() -> None:
    with pytest.raises(ValueError, match=str(LONGEST_TEXT)):
        clean_text("a" + "\u0301\u0327" * LONGEST_TEXT)


def test_what_shows() -> None:
    assert is_visible("a") and is_visible("\u2764\ufe0f")
    assert not any(map(is_visible, ["", " ", "\u200b\u00a0", "\ufeff", "\u2060\u200d"]))
