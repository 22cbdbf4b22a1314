"""Typographic attacks: a picture with words written on it (Goh et al. 2021; Ramesh et al. 2022, section 4, figure 6).

Whether CLIP takes the picture for what is written there, and whether the decoder, told its embedding, still draws what
the picture shows. For systems of kind unclip. B pictures, K captions, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from genpipe.data.sheets import letters_of
from genpipe.data.text import clean_text, is_visible
from genpipe.generation.systems.unclip import UnclipSystem

LETTERS = 0.16
"""Size of the letters at most, in shares of the picture's height."""

MIDDLE = 0.7
"""Where the middle of the label is, in shares of the height from above."""


class Attacked(NamedTuple):
    """A picture with `words` written on it, "" for none: the probability of each label, and variations of it."""

    words: str
    picture: Image.Image
    probabilities: dict[str, float]
    variations: list[Image.Image]


def captions_for(labels: Sequence[str], caption: str) -> list[str]:
    """A caption for each label, which stands where `caption` has its {}. Raises ValueError."""
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(map(is_visible, labels)):
        raise ValueError("labels: name what the picture shows, then one or more others to write on it, no two alike")
    if caption.count("{}") != 1:
        raise ValueError(f"caption: {caption!r} says not where the label stands; give it one {{}}")
    return [clean_text(caption.replace("{}", label)) for label in labels]


def write_on(picture: Image.Image, words: str) -> Image.Image:
    """The picture, RGB, with a label on the lower half of it: black words on white, as large as fit on a line."""
    attacked = picture.convert("RGB")
    (width, height), size = picture.size, max(1, round(LETTERS * picture.height))
    margin = max(2, size // 4)
    while size > 1 and _inked(words, size=size)[2] > width - 2 * margin:
        size -= 1
    left, top, wide, high = _inked(words, size=size)
    x, y = round((width - wide) / 2), round(MIDDLE * height - high / 2)
    drawing = ImageDraw.Draw(attacked)
    corners = (x - margin, y - margin, x + wide + margin - 1, y + high + margin - 1)
    drawing.rectangle(corners, fill="white", outline="black")
    drawing.text((x - left, y - top), words, fill="black", font=letters_of("", size=size))
    return attacked


def _inked(words: str, *, size: int) -> tuple[int, int, int, int]:
    """The box of what is seen of the words, in pixels: left, top, width and height."""
    left, top, right, bottom = letters_of("", size=size).getbbox(words)
    return math.floor(left), math.floor(top), math.ceil(right - left), math.ceil(bottom - top)


@torch.no_grad()
def probabilities(system: UnclipSystem, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Which of the captions the system's CLIP takes pictures to have, fp32 [B, K], rows that sum to 1.

    Of unit vectors [B, D] and [K, D]: the softmax over captions of their cosines, times CLIP's learned factor (Radford
    et al. 2021, section 3.1.2).
    """
    return (system.clip.logit_scale.exp() * image_embeds.float() @ text_embeds.float().T).softmax(-1)
