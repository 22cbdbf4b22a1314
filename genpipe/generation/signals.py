"""What of a caption the decoder is told, signal by signal (Ramesh et al. 2022, section 5.1 and figure 8).

For systems of kind unclip whose decoder takes an image embedding. B captions, S the side of pictures in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genpipe.generation.conditions import Given
from genpipe.generation.drawing import draw_given
from genpipe.generation.systems.unclip import UnclipSystem

SIGNALS = ("nothing", "caption", "caption and its text embedding", "caption and the prior's embedding")


def draw_signals(system: UnclipSystem, captions: Sequence[str], *, generator: torch.Generator) -> list[Tensor]:
    """The decoder's pictures with each of SIGNALS, fp32 [B, 3, S, S] in [-1, 1] each, all from the same noise.

    The paper has the last three: in the second the text embedding stands where the image embedding is expected. What
    is not given is the decoder's null.
    """
    text = system.encode_text(captions)
    prior_embeds = system.prior_embeds(text, generator=generator)
    state = generator.get_state()
    made = []
    for given in (
        Given(),
        system.given_embeds(None, text),
        system.given_embeds(text.embed, text),
        system.given_embeds(prior_embeds, text),
    ):
        generator.set_state(state)
        made.append(draw_given(system, given, count=len(captions), generator=generator))
    return made
