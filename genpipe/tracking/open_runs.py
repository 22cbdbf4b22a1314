"""The runs that are recorded now, or whose records are not complete: files in `STORE/runs/open/`.

A file is there from the claim of a run until whoever keeps the records has all of them. Its heartbeat says whether
somebody is still at work; where nobody is, whoever comes next ends the run, and hands in what was kept of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import Field, ValidationError

from genpipe.config import Config
from genpipe.pipeline.presence import Presence, heartbeat
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import Storage, join, open_storage


class PipelineRecord(Config):
    """What is known of a pipeline run. `rows` are the table of its stages."""

    name: str
    experiment: str
    tags: Mapping[str, str]
    settings: Mapping[str, str] = Field({}, description="what it was told beside its file: overrides by their path")
    metrics: Mapping[str, float] = Field({}, description="the headlines of its stages, as STAGE/METRIC")
    status: str = "RUNNING"
    error: str = ""
    rows: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = Field((), description="files to show with it")
    holds: tuple[str, ...] = Field((), description="names of the artifacts that it takes or makes")


class OpenRun(Config):
    """A run of a stage (`stage`) or of a pipeline (`pipeline`), and who is at it."""

    presence: Presence
    store: str
    tracking_uri: str
    run_id: str = Field(description="where the records are kept; empty while nobody answers there")
    stage: StageSpec | None = None
    pipeline: PipelineRecord | None = None

    @property
    def key(self) -> str:
        """The name of its file."""
        return stage_key(self.stage) if self.stage else f"pipeline-{self.run_id}.json"

    def write(self, *, left: bool = False) -> None:
        """Write the file, with a new heartbeat of this process, or as `left` to whoever comes next.

        A full or read-only store costs a warning.
        """
        beating = self.model_copy(update={"presence": Presence.here(left=left)})
        try:
            _files(self.store).write(self.key, beating.model_dump_json().encode())
        except OSError as error:
            print(f"{join(self.store, 'runs/open', self.key)} is not written: {error}", file=sys.stderr, flush=True)

    def remove(self) -> None:
        """Its records are complete."""
        _files(self.store).delete(self.key)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keep its heartbeat going during the block."""
        self.write()
        with heartbeat(self.write):
            yield


def stage_key(spec: StageSpec) -> str:
    """The name of the file of a stage's run."""
    return f"stage-{spec.target.kind}-{spec.target.fingerprint[:16]}.json"


def open_stage(spec: StageSpec, run_id: str) -> OpenRun:
    """The open run of a stage, of this process."""
    return OpenRun(
        presence=Presence.here(), store=spec.store, tracking_uri=spec.tracking_uri, run_id=run_id, stage=spec
    )


def find_stage(spec: StageSpec) -> OpenRun | None:
    """The open run of the stage; None where its records are complete, or never began."""
    return _read(spec.store, stage_key(spec))


def all_open(store: str) -> list[OpenRun]:
    """Every open run of a store, those of stages first."""
    found = [_read(store, entry.key) for entry in _files(store).list()]
    return sorted((run for run in found if run is not None), key=lambda run: run.stage is None)


def is_alive(run: OpenRun, among: Sequence[OpenRun]) -> bool:
    """Whether somebody is at it: its own process, or (as its job may wait in a queue) that of its pipeline run."""
    if run.presence.left:
        return False
    parent = run.stage.pipeline_run_id if run.stage else ""
    parents = [other for other in among if other.pipeline and parent and other.run_id == parent]
    return any(each.presence.is_alive() for each in (run, *parents))


def _files(store: str) -> Storage:
    return open_storage(join(store, "runs", "open"))


def _read(store: str, key: str) -> OpenRun | None:
    """A file's run, with the paths of the store where it is now; None where it is gone or unreadable."""
    with suppress(FileNotFoundError, ValidationError):
        text = _files(store).read(key).decode()
        run = OpenRun.model_validate_json(text)
        if run.store != store:  # moved or copied
            run = OpenRun.model_validate(_moved(run.model_dump(mode="json"), run.store, store))
        return run
    return None


def _moved(value: Any, before: str, after: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, before, after) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, before, after) for each in value]
    if isinstance(value, str):
        for scheme in ("", "sqlite:///"):
            if value == scheme + before or value.startswith(f"{scheme}{before}/"):
                return scheme + after + value[len(scheme + before) :]
    return value
