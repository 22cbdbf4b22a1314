"""What is told of a run while it runs, and what came of its stages."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from genpipe.artifacts import Artifact
from genpipe.evaluation.comparison import Judgment
from genpipe.pipeline.spec import Progress
from genpipe.stage_config import Gate

Outcome = Literal["cached", "ran", "failed", "skipped"]


@dataclass(frozen=True)
class StageResult:
    """What became of one instance of a run, which `stage` names.

    `headlines` are the metrics to show, `gates` what metrics must come to, `judged` what came of those that are held
    against a baseline. `message` says why; `details` is a traceback for a debugger.
    """

    stage: str
    status: Outcome
    seconds: float = 0.0
    artifact: Artifact | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    headlines: tuple[str, ...] = ()
    gates: dict[str, Gate] = field(default_factory=dict)
    run_id: str = ""
    message: str = ""
    details: str = ""
    judged: dict[str, Judgment] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, float]:
        """The few metrics that say how it went."""
        return {name: self.metrics[name] for name in self.headlines if name in self.metrics}

    @property
    def headline(self) -> str:
        """Those metrics, in words."""
        return "; ".join(f"{name} {value:.4g}" for name, value in self.shown.items())

    @property
    def missed(self) -> list[str]:
        """A sentence for each gate that its metrics miss."""
        said = [gate.missed(name, self.metrics) for name, gate in self.gates.items()]
        said += [judgment.told(name) for name, judgment in self.judged.items() if judgment.missed]
        return [f"{self.stage}: {sentence}" for sentence in said if sentence]

    @property
    def held(self) -> list[str]:
        """A sentence for each metric that is not worse than its baseline."""
        return [f"{self.stage}: {of.told(name)}" for name, of in self.judged.items() if not of.missed]


class Reporter(Protocol):
    """Told of every change, from several threads: a stage is `waiting`, `running` (its progress with it), or ended.

    What the progress notes, such as a preemption, is worth a line of its own.
    """

    def update(self, stage: str, status: str, *, progress: Progress | None = None, message: str = "") -> None:
        """Take note of an instance's new status, of its progress, or of both."""
        ...


class PlainReporter:
    """Prints a line for every change, and for progress now and then."""

    EVERY_SECONDS = 15.0

    def __init__(self) -> None:
        self.said: dict[str, tuple[str, float]] = {}
        self.noted: dict[str, str] = {}

    def update(self, stage: str, status: str, *, progress: Progress | None = None, message: str = "") -> None:
        """Print a line if the status is new, or the last progress was printed a while ago."""
        if progress and progress.note != self.noted.get(stage, ""):
            self.noted[stage] = progress.note
            print(f"{stage}: {progress.note}\n", end="", flush=True)
        before, at = self.said.get(stage, ("waiting", -math.inf))
        if status == before and (progress is None or time.monotonic() - at < self.EVERY_SECONDS):
            return
        self.said[stage] = (status, time.monotonic() if progress else -math.inf)  # the first progress is said at once
        done = f" {progress.describe()}" if progress else ""
        told = f" ({message})" if message else ""
        print(f"{stage}: {status}{done}{told}\n", end="", flush=True)  # one write, as threads share the line


class StagesFailed(RuntimeError):
    """Some stages of a run failed; `results` tells of all."""

    def __init__(self, results: list[StageResult]) -> None:
        failed = [result.stage for result in results if result.status == "failed"]
        super().__init__(f"failed: {', '.join(failed)}")
        self.results = results
