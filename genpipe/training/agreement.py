"""What all ranks are to know at the same step: agreed beside the training, which never waits for it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from genpipe.training.runtime import Runtime

PATIENCE = timedelta(days=1)
"""For which a collective waits for a slow rank: whether one hangs is for a watchdog to say, not for a timeout."""


class Agreement:
    """Flags that any rank may raise and that all ranks see at the same step.

    One rank sees its flags at once, several see them a step later: an all-reduce of a few bytes, by gloo on the host,
    runs beside each step, and its result is read after the next one, when it has long been there.
    """

    def __init__(self, rt: Runtime, *, flags: int) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if rt.world_size > 1 else None
        self._raised = torch.zeros(flags, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def ask(self, *flags: bool) -> list[bool]:
        """Raise this rank's flags, and see which ones are up; every rank asks once a step."""
        if self._group is None:
            return list(flags)
        up = self._up()
        self._raised = torch.tensor(flags, dtype=torch.uint8)
        self._work = dist.all_reduce(self._raised, dist.ReduceOp.MAX, self._group, async_op=True)
        return [bool(flag) for flag in up.tolist()]

    def close(self) -> None:
        """Wait for what runs, which every rank has asked for, and give the connections back."""
        if self._group is not None:
            self._up()
            dist.destroy_process_group(self._group)

    def _up(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._raised
