"""The rule that finds a loss's plateau."""

from __future__ import annotations

import pytest
import torch

from genpipe.training.plateau import Plateau, PlateauConfig


@pytest.mark.parametrize(
    ("means", "reached"),
    [
        ([1.0, 0.8, 0.6, 0.4], [False, False, False, False]),
        ([1.0, 0.8, 0.79, 0.4], [False, False, True, True]),
        ([1.0, 1.2, 0.5, 0.2], [False, True, True, True]),
        ([0.0, 0.0], [False, True]),
    ],
)
def test_a_plateau_by_hand(means: list[float], reached: list[bool]) -> None:
    """Windows of 3 steps of 4 samples; a window that is not 10 % below the one before ends the wait for good."""
    rule = Plateau(PlateauConfig(window=10, improvement=0.1), batch_size=4)
    samples, found = 0, []
    for mean in means:
        for spread in (-0.05, 0.0, 0.05):
            rule.look(samples)
            for _ in range(2):  # micro-batches of 2
                rule.add(torch.tensor(2 * (mean + spread)))
            rule.update()
            rule.update()  # as after the discriminator's step
            samples += 4
        resumed = Plateau(PlateauConfig(window=10, improvement=0.1), batch_size=4)
        resumed.load_state_dict(rule.state_dict())
        for one in (rule, resumed):
            one.look(samples)
        assert rule.reached == resumed.reached
        found.append(rule.reached)
    assert found == reached
