"""What all ranks are to know at the same step: agreed beside the training, which never waits for it."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from genpipe.training.runtime import Runtime

PATIENCE = timedelta(days=1)
"""For which a collective waits for a slow rank: whether one hangs is for a watchdog to say, not for a timeout."""

MOST_STEPS = 1000


class Agreement:
    """Flags that any rank may raise and that all ranks see at the same step.

    One rank sees its flags at once. Several exchange them every step, or several times a second where steps are faster:
    an all-reduce of a few bytes, by gloo on the host, runs beside a step, and its result is read after the next one,
    when it has long been there. With it rank 0 says in how many steps they exchange the next ones.
    """

    def __init__(self, rt: Runtime, *, flags: int) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if rt.world_size > 1 else None
        self._leads = rt.rank == 0
        self._round_seconds = rt.round_seconds
        self._values = torch.zeros(flags + 1, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._steps = self._until = 1
        self._began = time.monotonic()

    def ask(self, *flags: bool) -> list[bool]:
        """Raise this rank's flags, each until it is seen, and see which ones are up; every rank asks once a step."""
        if self._group is None:
            return list(flags)
        up = self._read()
        self._until -= 1
        if self._until <= 0:
            steps = self._steps_of_a_round() if self._leads else 0
            self._values = torch.tensor([*flags, steps], dtype=torch.int32)
            self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, self._group, async_op=True)
        return up or [False] * len(flags)

    def close(self) -> None:
        """Wait for what runs, which every rank has asked for, and give the connections back."""
        if self._group is not None:
            self._read()
            dist.destroy_process_group(self._group)

    def _read(self) -> list[bool]:
        """The flags of a round that has ended, empty while there is none."""
        if self._work is None:
            return []
        self._work.wait()
        self._work = None
        *flags, self._steps = self._values.tolist()
        self._until = self._steps
        return [bool(flag) for flag in flags]

    def _steps_of_a_round(self) -> int:
        """By rank 0's clock since the last round, and at most twice as many as in that."""
        now = time.monotonic()
        seconds, self._began = max(now - self._began, 1e-9), now
        return max(1, min(2 * self._steps, MOST_STEPS, int(self._steps * self._round_seconds / seconds)))
