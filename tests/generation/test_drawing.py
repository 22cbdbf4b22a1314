"""What the uses share: negative conditions cost the others none of their randomness, and drawing is the system's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import draw, enlarged, told
from genpipe.generation.systems import load_system

if TYPE_CHECKING:
    from conftest import TinyPipeline

PROMPTS = ["a small red circle", "a large blue bar"]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_negative_conditions_change_nothing_of_what_is_told_of_the_others(tiny: TinyPipeline) -> None:
    """The prior draws for both, and the generator goes on from the same state."""
    system = load_system(tiny.run("system"), device=torch.device("cpu"))
    alone, both = seeded(2), seeded(2)
    given, nothing = told(system, Conditions(2, texts=PROMPTS), generator=alone)
    same, negative = told(system, Conditions(2, texts=PROMPTS, negative=PROMPTS[::-1]), generator=both)
    assert nothing is None and negative is not None and torch.equal(alone.get_state(), both.get_state())
    assert given.image_embed is not None and same.image_embed is not None and negative.image_embed is not None
    assert torch.equal(given.image_embed, same.image_embed)
    assert not torch.equal(given.image_embed, negative.image_embed)


def test_what_is_drawn_is_the_decoders_picture_enlarged(tiny: TinyPipeline) -> None:
    system = load_system(tiny.run("system"), device=torch.device("cpu"))
    generator = seeded(2)
    made = draw(system, Conditions(2, texts=PROMPTS), generator=generator)
    assert [images.shape[-1] for images in made] == [system.base_size, system.size]
    assert torch.equal(made[-1], system.sample(Conditions(2, texts=PROMPTS), generator=seeded(2)))
    assert enlarged(system, made[0], seeded(0)).shape == made[-1].shape
    latents = system.encode(made[0])
    assert latents.shape == (2, *system.grid) and system.decode(latents).shape == made[0].shape
