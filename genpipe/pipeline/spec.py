"""One stage to run, with everything that it needs anywhere, and how far it is: what launchers and tracking share."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import Field

from genpipe.artifacts import Artifact, work_uri
from genpipe.config import Config, canonical_json
from genpipe.storage import join, open_storage, read_file

Curve = dict[int, dict[str, float]]
"""What each validation of a training found, by samples seen."""


class TrackingConfig(Config):
    """Where runs are recorded."""

    uri: str = Field("", description="an MLflow tracking URI, or jsonl; default: SQLite in the store's folder")
    experiment: str = Field("", description="the MLflow experiment; default: the pipeline's name")


def sqlite_uri(file: Path) -> str:
    """The URI of an SQLite file: a ? in its path would begin the options."""
    path = str(file.absolute())
    return f"sqlite:///file:{quote(path)}?uri=true" if "?" in path else f"sqlite:///{path}"


class Attempt(Config):
    """One try at a stage: an id that no other has, and the fencing number under which it writes."""

    id: str
    number: int


class StageSpec(Config):
    """One stage to run: its resolved config, its inputs, and the artifact it is to commit."""

    name: str = Field(description="of the instance in its pipeline: what people call it")
    stage: str = Field(description="the kind of stage: its module")
    config: dict[str, Any]
    inputs: dict[str, Artifact] = Field(description="by role")
    identity: dict[str, Any] = Field(description="what the target's fingerprint is made of")
    target: Artifact = Field(description="planned: its uri and fingerprint are final, its meta is what is promised")
    store: str
    version: str = Field("", description="of genpipe, where this was planned")
    git_revision: str = Field("", description="of the checkout there; empty if it was none")
    code: str = Field("", description="the digest of the code there; empty: whatever runs it is right")
    tracking_uri: str
    experiment: str
    pipeline: str = ""
    pipeline_run_id: str = Field("", description="the MLflow run of the pipeline run that launched this stage")
    run_id: str = Field("", description="this stage's MLflow run, if the submitter has claimed it")
    links: dict[str, str] = Field(default_factory=dict, description="Prefect run, Ray job: recorded as tags")
    curves: dict[str, Curve] = Field(
        default_factory=dict,
        description="by fingerprint: held-out curves of like trainings that the store need not have",
    )
    attempt: Attempt | None = Field(None, description="who works on it, once somebody does")

    @property
    def trains(self) -> bool:
        """Whether it is a training stage: only those have settings `train`. (Loading its module imports torch.)"""
        return "train" in self.config

    @property
    def work(self) -> str:
        """The URI of this stage's resumable state: checkpoints and progress."""
        return work_uri(self.store, self.target.kind, self.target.fingerprint)

    def write(self) -> str:
        """Store the spec in its work folder and return its URI, which is what a job is given."""
        open_storage(self.work).write("spec.json", canonical_json(self.model_dump(mode="json")).encode())
        return join(self.work, "spec.json")

    @classmethod
    def read(cls, uri: str) -> StageSpec:
        """The spec that `write` stored. Raises FileNotFoundError."""
        return cls.model_validate_json(read_file(uri))


class Progress(Config):
    """How far a stage is, as its work folder's `progress.json` says."""

    done: int = Field(description="samples trained on, or parts finished")
    total: int
    unit: str = "samples"
    rate: float = Field(0.0, description="units a second")
    metrics: dict[str, float] = Field(default_factory=dict)
    note: str = Field("", description="what happened on the way, and was no failure")
    left: float | None = Field(None, description="seconds, where that does not follow from the rate")

    @property
    def seconds_left(self) -> float | None:
        """Until all is done, where that is known."""
        if self.left is None and self.rate:
            return max(0, self.total - self.done) / self.rate
        return self.left

    def describe(self) -> str:
        """For people: done of total, rate, time left, and the loss if there is one."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:,.1f}/s" if self.rate < 10 else f"{self.rate:,.0f}/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        losses = [f"loss {value:.4f}" for name, value in self.metrics.items() if name.endswith("/loss")]
        return "  ".join(parts + losses[:1])


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 8.2s, 3m05s, 2h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def read_progress(work: str) -> Progress | None:
    """The last progress written under `work`, None before the first."""
    try:
        return Progress.model_validate_json(open_storage(work).read("progress.json"))
    except FileNotFoundError:
        return None


def write_progress(work: str, progress: Progress) -> None:
    """Replace the progress under `work`."""
    open_storage(work).write("progress.json", progress.model_dump_json().encode())
