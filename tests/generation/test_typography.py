"""Words written on pictures: where they stand, and what CLIP takes the pictures for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genpipe.generation.systems.unclip import UnclipSystem
from genpipe.generation.typography import captions_for, probabilities, write_on

GRAY = 90


@given(
    side=st.integers(32, 300), words=st.text("abcdefghijklmnopqrstuvwxyz ", min_size=1, max_size=12).map("x".__add__)
)
def test_a_label_is_stuck_on_the_lower_half_alone_and_holds_all_the_words(side: int, words: str) -> None:
    attacked = np.asarray(write_on(Image.new("RGB", (side, side), (GRAY,) * 3), words)).astype(int)
    assert attacked.shape == (side, side, 3)
    assert (attacked[: side // 2] == GRAY).all() and (attacked[-side // 10 :] == GRAY).all()
    rows, columns = np.nonzero((attacked != GRAY).any(2))
    label = attacked[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()]
    assert (label.max((0, 1)) == 255).all() and label.min() < 128, "black on white"
    inside = (label < 128).any(2)
    assert not inside[:, [0, -1]].any() and not inside[[0, -1]].any(), "no letter is cut"
    wide = columns.max() - columns.min() + 1
    assert wide <= side, "a long word is written smaller"


def test_probabilities_are_the_softmax_that_clip_is_trained_with() -> None:
    """A picture at 60 degrees to one caption and at 90 to another, with a factor of ln 9 * 2: 9 to 1."""
    system = cast(
        UnclipSystem, SimpleNamespace(clip=SimpleNamespace(logit_scale=torch.tensor(math.log(2 * math.log(9)))))
    )
    image = torch.tensor([[0.5, math.sqrt(0.75), 0.0]])
    found = probabilities(system, image, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.1]]))


def test_each_label_stands_in_the_caption() -> None:
    assert captions_for(["Granny Smith", "iPod"], "a photo of a {}.") == [
        "a photo of a Granny Smith.",
        "a photo of a iPod.",
    ]


@pytest.mark.parametrize(
    ("labels", "caption", "named"),
    [
        (["apple"], "{}", "labels: .* one or more others"),
        (["apple", "apple"], "{}", "no two alike"),
        (["apple", "\u200b"], "{}", "labels"),
        (["apple", "iPod"], "a photo", "caption: 'a photo'"),
        (["apple", "iPod"], "{} and {}", "caption"),
    ],
)
def test_labels_that_make_no_choice_are_refused(labels: list[str], caption: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        captions_for(labels, caption)
