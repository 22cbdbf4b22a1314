"""What the decoder is told of a caption, signal by signal: the last is the system's own drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genpipe.generation.conditions import Conditions
from genpipe.generation.representation import as_unclip
from genpipe.generation.signals import SIGNALS, draw_signals
from genpipe.generation.systems import load_system

if TYPE_CHECKING:
    from conftest import TinyPipeline

PROMPTS = ["a small red circle", "a large blue bar"]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_each_signal_says_more(tiny: TinyPipeline) -> None:
    system = as_unclip(load_system(tiny.run("system"), device=torch.device("cpu")), use="test")
    made = draw_signals(system, PROMPTS, generator=seeded(0))
    assert len(made) == len(SIGNALS) and made[0].shape == (2, 3, 16, 16)
    whole = system.stages(Conditions(2, texts=PROMPTS), generator=seeded(0))[0]
    torch.testing.assert_close(made[3], whole)
    other = draw_signals(system, [PROMPTS[1], PROMPTS[1]], generator=seeded(0))
    torch.testing.assert_close(other[0], made[0], atol=1e-4, rtol=0)  # nothing is said of either
    for signal in (1, 2, 3):
        assert not torch.allclose(other[signal][0], made[signal][0], atol=1e-3), SIGNALS[signal]
        assert not torch.allclose(made[signal], made[signal - 1], atol=1e-3), SIGNALS[signal]
