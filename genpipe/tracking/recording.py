"""What a run records, and how its records are made complete, whoever keeps them.

MLflow keeps them (`tracking/runs.py`), or plain files in the store where there is none (`tracking/jsonl.py`), which
stand in while MLflow does not answer. A run is open (`tracking/open_runs.py`) until its keeper has all of it: whoever
comes next, or finds the artifact of a stage committed, completes what a process that was killed left undone.

MLflow's module is loaded by its name only where it is wanted, so that a stage runs on a machine without MLflow.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.evaluation.comparison import SCORES
from genpipe.pipeline.presence import Presence, heartbeat
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import join, open_storage
from genpipe.tracking import jsonl, open_runs
from genpipe.tracking.open_runs import OpenRun, PipelineRecord
from genpipe.tracking.recorder import Facts, File, Keeper, Picture, Point, Recorder, Status

End = Literal["FAILED", "KILLED"]
GONE = "the process that was at it is gone: it was killed, or its machine was lost"


class StageKeeper(Keeper, Protocol):
    """Keeps a stage's run."""

    run_id: str
    """Of the run in MLflow; empty elsewhere, and while MLflow has not answered."""


class Records(Protocol):
    """A module that keeps runs."""

    def check(self, uri: str) -> None:
        """Raise ValueError with the remedy where runs cannot be kept."""
        ...

    def claim_stage_run(self, spec: StageSpec) -> str:
        """Find or make the run of a stage, and mark it as running; its id."""
        ...

    def StageKeeper(self, spec: StageSpec, run_id: str) -> StageKeeper:
        """The keeper of a claimed run."""
        ...

    def begin_pipeline(self, run: OpenRun, files: Sequence[Path]) -> str:
        """Begin the run of a pipeline; its id."""
        ...

    def end_pipeline(self, run: OpenRun) -> None:
        """Record what became of its stages, and end it; may be repeated."""
        ...


def records_of(tracking_uri: str) -> Records:
    """Who keeps the runs of a `tracking.uri`: the JSONL files for `jsonl` and where MLflow is not installed."""
    records: Records = jsonl
    if tracking_uri != jsonl.URI and _mlflow_is_there():
        records = importlib.import_module("genpipe.tracking.runs")
    return records


class StageRun:
    """A stage's run, open for records. Logging returns at once and raises nothing: it is not worth a training."""

    def __init__(self, spec: StageSpec, run_id: str, *, watch_system: bool = False) -> None:
        self.spec = spec
        self.ended = False
        self.keeper = records_of(spec.tracking_uri).StageKeeper(spec, run_id)
        reserve = jsonl.StageKeeper(spec) if not isinstance(self.keeper, jsonl.StageKeeper) else None
        sense: Callable[[], list[Point]] | None = getattr(self.keeper, "sense", None) if watch_system else None
        self.recorder = Recorder(self.keeper, reserve=reserve, sense=sense)

    @property
    def run_id(self) -> str:
        """Of the run in MLflow; empty elsewhere."""
        return self.keeper.run_id

    @property
    def kept(self) -> bool:
        """Whether the run has ended, and its keeper has all of it."""
        return self.ended and self.recorder.complete

    @property
    def complete(self) -> bool:
        """Whether the run has ended, and all of it is where `tracking.uri` says."""
        return self.kept and (bool(self.run_id) or self.spec.tracking_uri == jsonl.URI)

    def log(self, metrics: Mapping[str, float], *, samples_seen: int) -> None:
        """Record scalars by name; one that stands there for this step, or a later one, is passed over."""
        now = _now()
        self.recorder.put([Point(name, float(value), now, samples_seen) for name, value in metrics.items()])

    def log_image(self, name: str, image: np.ndarray, *, samples_seen: int) -> None:
        """Record a picture (uint8, HWC); those of one name are a series over samples."""
        self.recorder.put([Picture(name, image, _now(), samples_seen)])

    def log_file(self, path: Path) -> None:
        """Record a file; it is read before this returns, so it may be temporary."""
        self.recorder.put([File(path.name, path.read_bytes())])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record facts about the run by name."""
        if tags:
            self.recorder.put([Facts(dict(tags))])

    def flush(self) -> None:
        """Return when what was logged is kept, here or there; after some seconds in any case."""
        self.recorder.flush()

    def begin(self) -> None:
        """Mark the run as running, in the job that it runs in."""
        self.recorder.put([Status("RUNNING", _now())])
        if job := self.spec.links.get("ray_job"):
            self.set_tags({"ray_job": job})

    def finish(self, artifact: Artifact) -> None:
        """Record the committed artifact, its metrics, pictures and scores, and end the run; may be repeated."""
        manifest = artifacts.read_manifest(artifact.uri, check_files=False)  # who knows the artifact has checked them
        assert manifest is not None, f"nothing is committed at {artifact.uri}"
        samples = int(self.spec.config["train"]["samples"]) if self.spec.trains else 0
        self.log(manifest.metrics, samples_seen=samples)
        storage = open_storage(artifact.uri)
        with tempfile.TemporaryDirectory() as folder:
            for file in manifest.files:
                if file.path.endswith(".png") or file.path == SCORES:
                    path = Path(folder, Path(file.path).name)
                    storage.download(file.path, path)
                    self.log_file(path)
        self.recorder.put([Status("FINISHED", _now())])
        self.leave()

    def leave(self) -> None:
        """The run has ended, and that is on record."""
        self.ended = True
        self.close()

    def end(self, status: End, error: str, *, late_at: float | None = None) -> None:
        """End the run without an artifact.

        `late_at` (Unix time) is when its process was last heard of, where another one tells of its end.
        """
        moment = _now() if late_at is None else round(late_at * 1000)
        self.recorder.put([Status(status, moment, error, late=late_at is not None)])
        self.leave()

    def close(self) -> None:
        """Write what is left, within a bounded time."""
        self.recorder.close()


def claim(spec: StageSpec) -> str:
    """Claim the run of a stage for whoever will run it; its id, empty where MLflow does not answer.

    A submitter that has MLflow at hand does this for its job, which then starts without it.
    """
    records = records_of(spec.tracking_uri)
    try:
        run_id = records.claim_stage_run(spec)
    except Exception as error:
        if type(error) is ValueError:  # the user's to mend; an answer that is no JSON is another
            raise
        run_id = ""
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{spec.name}: no answer from MLflow; {_kept_in(spec.store)}: {said}", file=sys.stderr, flush=True)
    open_runs.open_stage(spec, run_id).write()
    return run_id


@contextmanager
def open_stage_run(spec: StageSpec) -> Iterator[StageRun]:
    """The run of `spec`'s fingerprint: the one its submitter claimed, or found or created here.

    What is committed when the block ends is recorded as finished, however it ended. Otherwise an exception marks the
    run as failed with its text, an interruption as killed; both are raised on. That a training has begun, and all that
    it logs, is for its rank 0 to record (`attach`): as long as nothing goes wrong, this process need not import MLflow.
    """
    run_id = spec.run_id or claim(spec)
    opened = open_runs.open_stage(spec, run_id)
    run = StageRun(spec, run_id, watch_system=not spec.trains)
    try:
        with opened.beating():
            if not spec.trains:
                run.begin()
            try:
                yield run
            except BaseException as error:
                _end(run, _status(error), _text(error))
                raise
            finally:
                run.close()
    finally:
        if run.complete:
            opened.remove()
        else:
            opened.write(left=True)


def attach(spec: StageSpec, run_id: str) -> StageRun:
    """The run that another process opened, for rank 0 of a training stage, which begins it."""
    run = StageRun(spec, run_id, watch_system=True)
    run.begin()
    return run


def settle_stage(spec: StageSpec, *, status: End = "KILLED", error: str = GONE, gone: bool = False) -> None:
    """Complete the records of a stage that nobody is at any more; it costs a look where they are complete.

    The run ends as FINISHED if its artifact is committed, else with `status` and `error` if it is left RUNNING. `gone`
    says that the job of this pipeline run is known to have ended; otherwise, and of one that another pipeline run
    started since, the heartbeat decides. Raises nothing.
    """
    with _as_a_warning(f"the records of {spec.name} are not complete"):
        opened = open_runs.find_stage(spec)
        if opened is None or opened.stage is None:
            return
        ours = opened.stage.pipeline_run_id == spec.pipeline_run_id
        if (gone and ours) or not open_runs.is_alive(opened, open_runs.all_open(spec.store)):
            _settle_stage(opened, status, error)


def settle_store(store: str) -> list[PipelineRecord]:
    """End the runs that dead processes left open in a store, and hand in what was kept of them.

    Returns the pipeline runs among them. Runs that somebody is at are left alone, and those whose MLflow does not
    answer now for another time. Raises nothing.
    """
    ended: list[PipelineRecord] = []
    with _as_a_warning(f"runs that were left open in {store} could not be ended"):
        runs = open_runs.all_open(store)
        dead = [run for run in runs if not open_runs.is_alive(run, runs)]
        there = {uri: _answers(uri) for uri in {run.tracking_uri for run in dead}}
        for run in dead:
            if not there[run.tracking_uri]:
                continue
            with _as_a_warning(f"the run {run.key} could not be ended"):
                if run.stage is not None:
                    _settle_stage(run, "KILLED", GONE)
                if run.pipeline is not None:
                    ended.append(_settle_pipeline(run))
    return ended


def dead_pipelines(store: str) -> list[PipelineRecord]:
    """The pipeline runs of a store whose process is gone before it could say how they ended."""
    runs = open_runs.all_open(store)
    dead = (run for run in runs if not run.presence.left and not open_runs.is_alive(run, runs))
    return [run.pipeline for run in dead if run.pipeline is not None]


class PipelineRun:
    """A pipeline run, under which the stages' runs nest."""

    def __init__(self, opened: OpenRun) -> None:
        self.opened = opened

    @property
    def run_id(self) -> str:
        """Of the run in MLflow, or of its folder in the store."""
        return self.opened.run_id

    def summarize(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        metrics: Mapping[str, float] | None = None,
        images: Sequence[Path] = (),
    ) -> None:
        """Keep the table of stages (each row names its `stage`, `status` and `run_id`), headlines and pictures."""
        failed = any(row["status"] in ("failed", "skipped") for row in rows)
        status = "FAILED" if failed else "FINISHED"
        self.update(status=status, rows=tuple(rows), metrics=dict(metrics or {}), images=tuple(map(str, images)))

    def update(self, **told: Any) -> None:
        """Take note of what became of the run."""
        assert self.opened.pipeline is not None, "a pipeline's run"
        record = self.opened.pipeline.model_copy(update=told)
        self.opened = self.opened.model_copy(update={"pipeline": record})


@contextmanager
def pipeline_run(
    uri: str,
    *,
    store: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    settings: Mapping[str, str] | None = None,
    files: Sequence[Path] = (),
    holds: Sequence[str] = (),
) -> Iterator[PipelineRun]:
    """The run of one pipeline run.

    `settings` (the overrides) and `files` (the configuration) are recorded with it; `holds` names the artifacts that it
    takes or makes. An exception marks it failed, an interruption killed. What cannot be recorded at the end, as MLflow
    is gone, is handed in by the next run.
    """
    record = PipelineRecord(
        name=name, experiment=experiment, tags=dict(tags), settings=dict(settings or {}), holds=tuple(holds)
    )
    opened = OpenRun(presence=Presence.here(), store=store, tracking_uri=uri, run_id="", pipeline=record)
    run_id = records_of(uri).begin_pipeline(opened, files)
    run = PipelineRun(opened.model_copy(update={"run_id": run_id}))
    try:
        with heartbeat(lambda: run.opened.write()):
            run.opened.write()
            yield run
    except BaseException as error:
        run.update(status=_status(error), error=_text(error))
        raise
    finally:
        try:
            records_of(uri).end_pipeline(run.opened)
            run.opened.remove()
        except Exception as error:
            run.opened.write(left=True)
            print(f"no answer from MLflow ({_text(error)}); {_kept_in(store)}", file=sys.stderr, flush=True)


def _settle_stage(opened: OpenRun, status: End, error: str) -> None:
    assert opened.stage is not None, "a stage's run"
    run = StageRun(opened.stage, opened.run_id)
    _end(run, status, error, late_at=opened.presence.beat)
    if run.complete:
        opened.remove()


def _end(run: StageRun, status: End, error: str, *, late_at: float | None = None) -> None:
    """End a run; what is committed is finished, whatever came after."""
    artifact = None
    with suppress(ValueError, OSError):
        artifact = artifacts.committed(run.spec.target)
    if artifact is not None:
        run.finish(artifact)
    else:
        run.end(status, error, late_at=late_at)


def _settle_pipeline(opened: OpenRun) -> PipelineRecord:
    record = opened.pipeline
    assert record is not None, "a pipeline's run"
    if record.status == "RUNNING":
        record = record.model_copy(update={"status": "KILLED", "error": GONE})
    records_of(opened.tracking_uri).end_pipeline(opened.model_copy(update={"pipeline": record}))
    opened.remove()
    return record


def _answers(uri: str) -> bool:
    try:
        records_of(uri).check(uri)
    except ValueError:
        return False
    return True


def _status(error: BaseException) -> End:
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _kept_in(store: str) -> str:
    return f"what is recorded is kept in {join(store, 'runs')}, and the next run that reaches MLflow hands it in"


@contextmanager
def _as_a_warning(what: str) -> Iterator[None]:
    """In the block, trouble costs a line on standard error and nothing else."""
    try:
        yield
    except Exception as error:
        print(f"{what}: {_text(error)}", file=sys.stderr, flush=True)


def _now() -> int:
    return time.time_ns() // 1_000_000


@cache
def _mlflow_is_there() -> bool:
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec("mlflow") is not None:
            return True
    print("MLflow is not installed; runs are recorded in the store's folder runs/", flush=True)
    return False
