"""What is left of a run, told by a reporter that is asked as a flow asks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from flows import foresight
from flows.foresight import ALL, Foreseeing
from genpipe.pipeline.forecast import STAGE_SECONDS, Forecast
from genpipe.pipeline.spec import Progress
from genpipe.stage_config import Resources


@dataclass
class Told:
    """Keeps what it is told of all stages, and how often it is told of each."""

    left: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def update(self, stage: str, status: str, *, progress: Progress | None = None, message: str = "") -> None:
        self.names.append(stage)
        if stage == ALL:
            assert progress is not None and progress.left is not None and "left" in progress.describe()
            self.left.append(progress.left)
            self.done.append(progress.done)


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def planned(name: str, *needs: str) -> Any:
    instance = SimpleNamespace(needs=needs, cfg=SimpleNamespace(resources=Resources()))
    return SimpleNamespace(name=name, instance=instance)


def test_what_is_left_follows_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core: data, then two trainings that are estimated at 100 s each, and take twice as long."""
    clock = Clock()
    monkeypatch.setattr(foresight, "time", clock)
    seconds = {"data": STAGE_SECONDS, "first": 100.0, "second": 100.0}
    plans = [planned("data"), planned("first", "data"), planned("second", "data")]
    order = {name: place for place, name in enumerate(seconds)}
    told = Told()
    seeing = Foreseeing(told, Forecast(plans, {"CPU": 1.0}, order, seconds, dict(seconds)))
    assert told.left == [210.0] and told.done == [0]
    seeing.update("data", "running")
    clock.now += 6
    seeing.update("data", "running", progress=Progress(done=0, total=1))
    assert told.left[-1] == pytest.approx(204.0)
    seeing.update("data", "ran")
    clock.now += 5
    seeing.update("first", "running")
    assert (told.left[-1], told.done[-1]) == (200.0, 1)
    clock.now += 20
    seeing.update("first", "running", progress=Progress(done=10, total=100, rate=0.5))
    assert told.left[-1] == pytest.approx(180 + 200), "90 of 100 at 0.5 a second; the other one is as slow: 200 in all"
    clock.now += 180
    seeing.update("first", "ran")
    seeing.update("second", "running")
    assert (told.left[-1], told.done[-1]) == (pytest.approx(200.0), 2)
    clock.now += 1
    before = len(told.left)
    seeing.update("second", "running", progress=Progress(done=1, total=100, rate=0.5))
    assert len(told.left) == before, "not more often than a person reads"
    assert told.names.count("second") == 2, "all else is passed on"
