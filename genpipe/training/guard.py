"""What keeps bad steps out of the weights, and finds where training has left its course.

A step whose loss or gradient is not finite is not applied: a flag on the device says so to the optimizers, and nothing
waits for it. What the steps measured is looked at later, when metrics are due, by plain arithmetic on numbers that all
ranks have alike, step by step. So the verdict does not depend on when one looks, and a resumed run comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genpipe.training.settings import GuardConfig

RECENT = 128
"""Steps whose losses are the recent range; until they are so many there is none."""

RANGED = 16
"""Steps after which the recent range is taken anew."""

NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation, inverted."""

LEAST_DEVIATION = 0.05
"""Floor under the deviation, as a share of the median: the loss of a large batch is almost without noise."""


@dataclass(frozen=True)
class Verdict:
    """Training has left its course: the positions `window` [begin, end) are to be skipped, for `reason`."""

    window: tuple[int, int]
    reason: str

    def __str__(self) -> str:
        return f"{self.window[0]}-{self.window[1]} ({self.reason})"


@dataclass
class _Course:
    """The recent losses of one module, oldest first, the largest that is no outlier, and the bad steps in a row."""

    recent: list[float] = field(default_factory=list)
    limit: float = math.inf
    fresh: int = 0
    """Losses since the limit was taken."""
    run: int = 0
    run_began: int = 0
    """Samples seen before the first bad step of the run."""
    reason: str = ""

    def take(self, loss: float, *, deviations: float | None) -> None:
        self.recent = [*self.recent[-RECENT + 1 :], loss]
        self.fresh += 1
        if self.fresh >= RANGED and len(self.recent) == RECENT and deviations is not None:
            middle = median(self.recent)
            spread = NORMAL * median(abs(x - middle) for x in self.recent)
            self.limit = middle + deviations * max(spread, LEAST_DEVIATION * abs(middle))
            self.fresh = 0


class Guard:
    """Follows the losses of every module. `look` must be called by all ranks alike."""

    def __init__(self, cfg: GuardConfig, *, global_batch_size: int) -> None:
        self.cfg, self.global_batch_size = cfg, global_batch_size
        self.skipped_steps = 0
        self.verdicts: list[Verdict] = []
        """Those that training went back for; it skips their windows."""
        self.judged = 0
        """The furthest that training came with a good verdict; up to there it says nothing new after it went back."""
        self._courses: dict[str, _Course] = {}
        self._active: tuple[str, ...] = ()
        self._noted: list[tuple[str, tuple[str, ...], int]] = []
        self._values: list[Tensor] = []

    @property
    def windows(self) -> list[tuple[int, int]]:
        """The ranges of positions that training skips, in order of their discovery."""
        return [verdict.window for verdict in self.verdicts]

    @property
    def in_a_run(self) -> bool:
        """Whether the last step looked at was bad: a checkpoint had better wait."""
        return any(course.run for course in self._courses.values())

    def note(self, name: str, *, active: Sequence[str], samples_seen: int, loss: Tensor, skip: Tensor) -> None:
        """Note the loss (a scalar of this rank) of the step of `name`, and whether it was skipped (a scalar, 1 or 0).

        `active` are the modules that are trained: where they change, losses do, and the recent range begins anew.
        """
        self._noted.append((name, tuple(active), samples_seen))
        self._values.append(torch.stack([loss.float(), skip]))

    def look(self) -> Verdict | None:
        """Judge what was noted since the last look; the verdict where training is to go back."""
        if not self._values:
            return None
        values = torch.stack(self._values)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        noted, self._noted, self._values = self._noted, [], []
        for (name, active, seen), (loss, skip) in zip(noted, values.tolist(), strict=True):
            if active != self._active:
                self._active, self._courses = active, {}
            if verdict := self._judge(name, seen, loss, skipped=bool(skip)):
                return verdict
            self.judged = max(self.judged, seen + self.global_batch_size)
        return None

    def _judge(self, name: str, seen: int, loss: float, *, skipped: bool) -> Verdict | None:
        course = self._courses.setdefault(name, _Course())
        self.skipped_steps += skipped
        if not skipped and loss <= course.limit:
            course.run = 0
            course.take(loss, deviations=self.cfg.deviations)
            return None
        if course.run == 0:
            course.run_began = seen
            course.reason = (
                f"{name}: the loss or a gradient is not finite" if skipped or not math.isfinite(loss)
                else f"{name}/loss {loss:.4g} is far above its recent range (limit {course.limit:.4g})"
            )  # fmt: skip
        course.run += 1
        if course.run < self.cfg.steps:
            return None
        begin = max(0, course.run_began - self.cfg.steps * self.global_batch_size)
        return Verdict((begin, seen + self.global_batch_size), course.reason)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; to be taken after a look, as what was noted since is not among them."""
        assert not self._values, "look before saving"
        courses = {name: vars(course).copy() for name, course in self._courses.items()}
        return {
            "courses": courses,
            "active": list(self._active),
            "skipped_steps": self.skipped_steps,
            "verdicts": [[*verdict.window, verdict.reason] for verdict in self.verdicts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; what was noted since then is forgotten."""
        self._courses = {name: _Course(**course) for name, course in state["courses"].items()}
        self._active, self.skipped_steps = tuple(state["active"]), state["skipped_steps"]
        self.verdicts = [Verdict((begin, end), reason) for begin, end, reason in state["verdicts"]]
        self._noted, self._values = [], []


class HeldBuffers:
    """The persistent buffers of modules (running statistics, codebooks), put back after a step that is skipped."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = [owner for module in modules for owner in module.modules()]
        self._places = [
            (owner, name)
            for owner in owners
            for name, buffer in owner.named_buffers(recurse=False)
            if name not in owner._non_persistent_buffers_set and buffer.numel()
        ]
        self._held: list[Tensor] = []

    def hold(self) -> None:
        """Remember them as they are."""
        self._held = [getattr(owner, name).clone() for owner, name in self._places]

    @torch.no_grad()
    def put_back(self, *, skip: Tensor) -> None:
        """Make them what they were where `skip` is 1."""
        for (owner, name), held in zip(self._places, self._held, strict=True):
            buffer = getattr(owner, name)
            buffer.copy_(torch.where(skip.bool(), held, buffer))
        self._held = []


def spread_if_bad(loss: Tensor, *, scale: float | Tensor) -> Tensor:
    """The gradient to begin the backward pass of `loss` with: `scale`, or NaN where the loss is not finite.

    A NaN reaches the gradients of all ranks by their average, so that all skip the step without a further exchange.
    """
    return torch.where(loss.detach().isfinite(), scale, torch.nan).to(loss.dtype)
