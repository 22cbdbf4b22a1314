from __future__ import annotations

from genpipe.data.classes import LARGEST_NUMBER, class_names, numbered_classes


def test_names_are_sorted_each_once() -> None:
    assert class_names(["zebra", "ant", "zebra", "Bee"]) == ("Bee", "ant", "zebra")
    assert class_names([]) == ()


def test_numbers_are_their_own_indices() -> None:
    assert class_names(["10", "2", "0"]) == tuple(map(str, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)))
    assert class_names(["002", "001"]) == ("0", "001", "002"), "a number is shown as it is written"
    assert numbered_classes(2) == ("0", "1", "2") and numbered_classes(-1) == ()


def test_what_only_looks_like_numbers_is_names() -> None:
    assert class_names(["10", "2", "two"]) == ("10", "2", "two")
    assert class_names(["01", "1"]) == ("01", "1"), "two names of one number"
    assert class_names([str(LARGEST_NUMBER + 1), "1"]) == ("1", str(LARGEST_NUMBER + 1)), "an identifier of something"
    assert class_names(["\u0663", "1"]) == ("1", "\u0663"), "a digit of another script"
