"""How long a run still takes, told while it runs."""

from __future__ import annotations

import math
import statistics
import threading
import time

from flows.reporting import Reporter
from genpipe.pipeline.forecast import STAGE_SECONDS, Forecast
from genpipe.pipeline.spec import Progress

ALL = "all stages"
"""Under which what is left of the whole run is told; no stage is named so."""

EVERY_SECONDS = 5.0
SETTLED = 0.1
"""The share of a stage after which its own pace is believed."""


class Foreseeing:
    """Passes everything on to another reporter, and tells it now and then what is left of the whole run.

    What is left of a stage that tells its progress follows from that. A machine that is slower than was estimated, by
    the stages that have got so far, is expected to be so for the others.
    """

    def __init__(self, reporter: Reporter, forecast: Forecast) -> None:
        self.reporter, self.forecast = reporter, forecast
        self.lock = threading.Lock()
        self.begun: dict[str, float] = {}
        self.took: dict[str, float] = {}
        """Of stages that have ended, or got far enough to know: the seconds of all of it."""
        self.ends: dict[str, float] = {}
        """Of stages that tell how far they are: when they end."""
        self.ended: set[str] = set()
        self.told = -math.inf
        self._tell()

    def update(self, stage: str, status: str, *, progress: Progress | None = None, message: str = "") -> None:
        """As any reporter."""
        self.reporter.update(stage, status, progress=progress, message=message)
        with self.lock:
            self._note(stage, status, progress)
        if status == "running":
            self._tell()

    def _note(self, stage: str, status: str, progress: Progress | None) -> None:
        now = time.monotonic()
        if status == "running":
            self.ended.discard(stage)  # a lost one is tried again
            begun = self.begun.setdefault(stage, now)
            if progress and progress.seconds_left is not None and progress.done >= SETTLED * progress.total:
                self.ends[stage] = now + progress.seconds_left
                self.took[stage] = self.ends[stage] - begun
        elif status != "waiting":
            self.ended.add(stage)
            if status == "ran" and stage in self.begun:
                self.took[stage] = now - self.begun[stage]

    def _tell(self) -> None:
        with self.lock:
            now, total = time.monotonic(), len(self.forecast.seconds)
            if now - self.told < EVERY_SECONDS:
                return
            self.told = now
            seconds = self._seconds(now)
            running = [stage for stage in seconds if stage in self.begun]
            left = self.forecast.after(left=seconds, running=running).total()
        progress = Progress(done=total - len(seconds), total=total, unit="stages", left=left)
        self.reporter.update(ALL, "running", progress=progress)

    def _seconds(self, now: float) -> dict[str, float]:
        """What is left of each stage that has not ended."""
        trained = {stage: seconds for stage, seconds in self.forecast.seconds.items() if seconds > STAGE_SECONDS}
        known = [took / trained[stage] for stage, took in self.took.items() if stage in trained]
        pace = statistics.median(known) if known else 1.0
        found = {}
        for stage, estimate in self.forecast.seconds.items():
            expected = estimate * pace if stage in trained else estimate
            ends = self.ends.get(stage, self.begun.get(stage, now) + expected)
            found[stage] = max(0.0, ends - now)
        return {stage: seconds for stage, seconds in found.items() if stage not in self.ended}
