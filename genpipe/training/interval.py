"""How long to train between two checkpoints."""

from __future__ import annotations

import math

from genpipe.stage_config import Resources

UNMEASURED_SECONDS = 60.0
"""The interval until a checkpoint has shown what it costs: a resumed run begins without one."""

LEAST_SECONDS = 10.0

BACKGROUND = 0.1
"""Share of the time that a checkpoint is written beside the training that the training loses by it."""


def checkpoint_interval(resources: Resources, *, stall_seconds: float, write_seconds: float) -> float:
    """Seconds between checkpoints: as set, or those that lose the least time.

    Checkpoints that cost C seconds lose C / T of the time where they come every T seconds, and a failure every M
    seconds loses T / 2 of work: together least at T = sqrt(2 C M) (Young 1974; Daly 2006, eq. 13, for C << M). C is
    what the last checkpoint kept the loop waiting and a share of what it took in the background; M is
    `resources.failure_hours`.
    """
    if resources.checkpoint_seconds is not None:
        return resources.checkpoint_seconds
    cost = stall_seconds + BACKGROUND * write_seconds
    if not cost:
        return UNMEASURED_SECONDS
    return max(LEAST_SECONDS, math.sqrt(2 * cost * resources.failure_hours * 3600))
