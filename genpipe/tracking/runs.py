"""What MLflow remembers: a run for each pipeline run, and one run for each stage fingerprint.

A stage's run is found again by its fingerprint, so a retry, a resume or another pipeline run goes on in the same
one. While a stage works, a thread of its own writes what was logged: work never waits for MLflow. Where MLflow is gone
for good, the stage goes on, and its records are kept in the store as those of `tracking/jsonl.py`.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import UNFINGERPRINTED, flatten
from genpipe.stages import is_training, load_stage
from genpipe.tracking import jsonl
from genpipe.tracking.recorder import Point, Recorder
from genpipe.tracking.store import check, client_of, experiment_id_of, first_line, is_refused, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from genpipe.pipeline.spec import StageSpec
    from genpipe.tracking.recording import StageRun

FINGERPRINT = "genpipe.fingerprint"
MAX_TAG = 5000
MAX_PARAM = 6000
PARAMS_A_CALL = 100
METRICS_A_CALL = 1000


@contextmanager
def pipeline_run(
    uri: str, *, experiment: str, name: str, tags: Mapping[str, str], files: Sequence[Path] = ()
) -> Iterator[PipelineRun]:
    """The MLflow run of one pipeline run, under which the stages' runs nest.

    `files` (the configuration) are logged with it. An exception marks it failed, an interruption killed. Raises
    ValueError where MLflow cannot be reached at the start; later it may go away.
    """
    check(uri)
    client = client_of(uri)
    experiment_id = experiment_id_of(client, uri, experiment)
    run = client.create_run(experiment_id, run_name=name, tags=_tags(tags))
    for file in files:
        client.log_artifact(run.info.run_id, str(file), "config")
    parent = PipelineRun(client, run.info.run_id, experiment_id)
    try:
        yield parent
    except BaseException as error:
        _end(client, parent.run_id, error)
        raise
    with _outages_reported(f"the end of the MLflow run {parent.run_id} is not recorded"):
        client.set_terminated(parent.run_id, parent.status)


@contextmanager
def _outages_reported(what: str) -> Iterator[None]:
    """In the block, trouble with MLflow costs a line on standard error and nothing else."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        print(f"{what}: {first_line(error)}", file=sys.stderr, flush=True)


class PipelineRun:
    """A pipeline run in MLflow."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.status = "FINISHED"

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, images: Sequence[Path] = ()) -> None:
        """Log the table of stages (each row names its `stage`, `status` and `run_id`) and sample images."""
        if any(row["status"] in ("failed", "skipped") for row in rows):
            self.status = "FAILED"
        with _outages_reported("the summary is not recorded in MLflow"):
            self.client.log_dict(self.run_id, {"stages": [dict(row) for row in rows]}, "summary.json")
            for row in rows:
                self.client.set_tag(self.run_id, f"genpipe.status.{row['stage']}", row["status"])
                if row.get("run_id"):
                    self.client.set_tag(self.run_id, f"genpipe.run.{row['stage']}", row["run_id"])
            for image in images:
                self.client.log_artifact(self.run_id, str(image), "samples")

    def end_stages(self, error: BaseException) -> None:
        """End the stages' runs that `error` stopped: a job that is killed, or has no time, cannot do so itself."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and attributes.status = 'RUNNING'"
        with _outages_reported("runs of stages could not be ended"):
            for run in self.client.search_runs([self.experiment_id], query):
                _end(self.client, run.info.run_id, error)


@contextmanager
def open_stage_run(spec: StageSpec) -> Iterator[StageRun]:
    """The run of `spec`'s fingerprint: the one its submitter claimed, or found or created here.

    An exception marks it failed with its text in the tag `genpipe.error`, an interruption killed; both are raised on.
    Otherwise `StageRun.finish` is what ends it. Where MLflow does not answer, the run is recorded in the store.
    """
    run_id = spec.run_id or try_claim(spec)
    if not run_id:
        with jsonl.open_stage_run(spec) as records:
            yield records
        return
    run = MlflowRun(spec, run_id, watch_system=not is_training(load_stage(spec.stage)))
    if job := spec.links.get("ray_job"):
        run.set_tags({"ray_job": job})
    try:
        yield run
    except BaseException as error:
        run.close()
        _end(client_of(spec.tracking_uri), run.run_id, error)
        raise
    run.close()


def attach(spec: StageSpec, run_id: str) -> StageRun:
    """The run that `open_stage_run` opened in another process, for rank 0 of a training stage."""
    return MlflowRun(spec, run_id, watch_system=True) if run_id else jsonl.attach(spec, run_id)


def try_claim(spec: StageSpec) -> str:
    """As `claim_stage_run`, but empty where MLflow does not answer: the stage is then recorded in the store alone."""
    from mlflow.exceptions import MlflowException

    try:
        return claim_stage_run(spec)
    except MlflowException as error:
        if is_refused(error):
            raise
        where = jsonl.runs_uri(spec)
        print(f"{spec.name}: no answer from MLflow; recording in {where}: {first_line(error)}", file=sys.stderr)
        return ""


def fail_stage_run(spec: StageSpec, message: str) -> None:
    """Mark the run of `spec` failed if it still counts as running: its job died before it could do so."""
    client = client_of(spec.tracking_uri)
    with _outages_reported(f"the failure of {spec.name} is not recorded in MLflow"):
        run_id = _find(client, experiment_id_of(client, spec.tracking_uri, spec.experiment), spec.target.fingerprint)
        if run_id and client.get_run(run_id).info.status == "RUNNING":
            client.set_tag(run_id, "genpipe.error", message[:MAX_TAG])
            client.set_terminated(run_id, "FAILED")


class MlflowRun:
    """A stage's run in MLflow. Logging returns at once; a thread writes."""

    def __init__(self, spec: StageSpec, run_id: str, *, watch_system: bool) -> None:
        self.spec = spec
        self.run_id = run_id
        self.recorder = Recorder(
            write=self._write_points,
            refused=is_refused,
            sense=_System(spec.tracking_uri, run_id) if watch_system else None,
            keep=partial(jsonl.append_points, spec),
            label=f"MLflow at {redacted(spec.tracking_uri)}",
        )

    def log(self, metrics: Mapping[str, float], *, samples_seen: int) -> None:
        """Log metrics with samples seen as MLflow's step."""
        now = time.time_ns() // 1_000_000
        self.recorder.put([Point(name, float(value), now, samples_seen) for name, value in metrics.items()])

    def log_image(self, name: str, image: np.ndarray, *, samples_seen: int) -> None:
        """Log a picture (uint8, HWC); MLflow shows the pictures of one name as a series over samples."""
        self.put(lambda client: client.log_image(self.run_id, image, key=name, step=samples_seen, synchronous=True))

    def log_file(self, path: Path) -> None:
        """Log a file; it is read before this returns, so it may be temporary."""
        data, name = path.read_bytes(), path.name
        self.put(lambda client: client.log_stream(self.run_id, io.BytesIO(data), name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run with `genpipe.NAME` for each of `tags`."""
        for name, value in tags.items():
            self.put(lambda client, name=name, value=value: client.set_tag(self.run_id, f"genpipe.{name}", value))  # type: ignore[misc]

    def finish(self, artifact: Artifact) -> None:
        """Record the committed artifact, its weights as a logged model if the stage trains, and end the run."""
        manifest = artifacts.read_manifest(artifact.uri)
        assert manifest is not None, f"nothing is committed at {artifact.uri}"
        training = is_training(load_stage(self.spec.stage))
        if training:
            self.log(manifest.metrics, samples_seen=int(self.spec.config["train"]["samples"]))
        self.put(lambda client: client.log_dict(self.run_id, manifest.model_dump(mode="json"), "manifest.json"))
        self.put(lambda client: client.set_tag(self.run_id, "genpipe.meta", _json(artifact.meta)[:MAX_TAG]))
        if training:
            self.put(lambda client: _log_model(client, self.run_id, self.spec, artifact))
        self.put(lambda client: client.set_terminated(self.run_id, "FINISHED"))
        self.close()

    def put(self, write: Callable[[MlflowClient], Any]) -> None:
        """Have the thread call `write` with its client."""
        self.recorder.put(lambda: write(client_of(self.spec.tracking_uri)))

    def close(self) -> None:
        """Write what is left, within a bounded time."""
        self.recorder.close()

    def _write_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        client = client_of(self.spec.tracking_uri)
        for start in range(0, len(points), METRICS_A_CALL):
            client.log_batch(self.run_id, metrics=[Metric(*point) for point in points[start : start + METRICS_A_CALL]])


class _System:
    """CPU, memory, disk, network and GPU use of this machine, as MLflow's own monitor measures them."""

    FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self.monitor: Any = None
        self.started = 0
        self.due = 0.0

    def __call__(self) -> list[Point]:
        """A reading, if one is due; called on the recorder's thread alone."""
        if self.monitor is None:
            self._start()
        if time.monotonic() < self.due:
            return []
        self.due = time.monotonic() + self.EVERY_SECONDS
        self.monitor.collect_metrics()
        values = self.monitor.aggregate_metrics()
        self._clear()
        now = time.time_ns() // 1_000_000
        return [Point(f"system/{k}", float(v), now, (now - self.started) // 1000) for k, v in values.items()]

    def _start(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.started = client_of(self.uri).get_run(self.run_id).info.start_time
        self.monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri)
        self.monitor.collect_metrics()  # the first reading of CPU use has no interval to speak of
        self._clear()
        self.due = time.monotonic() + self.FIRST_SECONDS

    def _clear(self) -> None:
        for monitor in self.monitor.monitors:
            monitor.clear_metrics()


def _find(client: MlflowClient, experiment_id: str, fingerprint: str) -> str | None:
    query = f"tags.`{FINGERPRINT}` = '{fingerprint}'"
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


def claim_stage_run(spec: StageSpec) -> str:
    """Find or create the run of `spec`, record what is known before the work starts, and mark it as running.

    A submitter that has MLflow at hand does this for its job, which then starts without it.
    """
    client = client_of(spec.tracking_uri)
    experiment_id = experiment_id_of(client, spec.tracking_uri, spec.experiment)
    run_id = _find(client, experiment_id, spec.target.fingerprint)
    tags = _stage_tags(spec)
    if run_id is None:
        run_id = str(client.create_run(experiment_id, run_name=spec.name, tags=tags).info.run_id)
        _log_params(client, run_id, spec.config)
        _log_inputs(client, run_id, spec)
    else:
        client.update_run(run_id, status="RUNNING")
        if "genpipe.error" in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, "genpipe.error")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
    return run_id


def _stage_tags(spec: StageSpec) -> dict[str, str]:
    tags = {
        FINGERPRINT: spec.target.fingerprint,
        "genpipe.instance": spec.name,
        "genpipe.stage": spec.stage,
        "genpipe.pipeline": spec.pipeline,
        "genpipe.artifact": spec.target.uri,
        **{f"genpipe.{block}": _json(spec.config.get(block, {})) for block in sorted(UNFINGERPRINTED)},
        "mlflow.parentRunId": spec.pipeline_run_id,
        "mlflow.source.name": "genpipe",
        "mlflow.source.git.commit": spec.git_revision.removesuffix("-dirty"),
        "genpipe.git_revision": spec.git_revision,
    }
    tags |= {f"genpipe.input.{name}": artifact.fingerprint for name, artifact in spec.inputs.items()}
    tags |= {f"genpipe.{name}": value for name, value in spec.links.items()}
    return _tags(tags)


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    settings = flatten({key: value for key, value in config.items() if key not in UNFINGERPRINTED})
    # Keys that users choose, such as templates of captions, may have characters that MLflow refuses.
    named = {re.sub(r"[^\w./: -]", "_", key)[:250]: value for key, value in settings.items()}
    params = [Param(key, str(value)[:MAX_PARAM]) for key, value in named.items()]
    for start in range(0, len(params), PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_A_CALL])


def _log_inputs(client: MlflowClient, run_id: str, spec: StageSpec) -> None:
    """Every input artifact as a dataset, and the models that its run logged as models."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    datasets: list[DatasetInput] = []
    models: list[str] = []
    for name, artifact in spec.inputs.items():
        source = _json({"uri": artifact.uri, "fingerprint": artifact.fingerprint})
        dataset = Dataset(name, artifact.fingerprint[:16], "genpipe", source, profile=_json(artifact.meta)[:MAX_TAG])
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
        models += _models_of(client, artifact)
    if datasets:
        unique = [LoggedModelInput(model) for model in dict.fromkeys(models)]
        _insist(lambda: client.log_inputs(run_id, datasets=datasets, models=unique))


def _insist(write: Callable[[], Any], *, times: int = 3) -> None:
    """Call `write` again if MLflow fails: two stages that name the same dataset at once trip over each other there."""
    from mlflow.exceptions import MlflowException

    for left in reversed(range(times)):
        try:
            write()
            return
        except MlflowException:
            if not left:
                raise
            time.sleep(0.2)


def _models_of(client: MlflowClient, artifact: Artifact) -> list[str]:
    """The logged models of the run that made `artifact`; none if it was recorded in another MLflow."""
    from mlflow.exceptions import MlflowException

    manifest = artifacts.read_manifest(artifact.uri)
    if manifest is None or not manifest.run_id:
        return []
    try:
        outputs = client.get_run(manifest.run_id).outputs
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    return [model.model_id for model in outputs.model_outputs] if outputs else []


def _log_model(client: MlflowClient, run_id: str, spec: StageSpec, artifact: Artifact) -> None:
    """Make the committed weights a logged model of the run, once."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    if run.outputs and run.outputs.model_outputs:
        return
    tags = {
        "genpipe.artifact": artifact.uri,
        FINGERPRINT: artifact.fingerprint,
        "genpipe.meta": _json(artifact.meta),
    }
    params = {key[:250]: str(value)[:MAX_PARAM] for key, value in flatten(spec.config).items()}
    model = client.create_logged_model(
        run.info.experiment_id,
        name=spec.name,
        source_run_id=run_id,
        tags=_tags(tags),
        params=params,
        model_type="genpipe",
    )
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, int(spec.config["train"]["samples"]))])


def _end(client: MlflowClient, run_id: str, error: BaseException) -> None:
    """End a run that did not finish; `error` is on its way to the caller."""
    with _outages_reported(f"MLflow run {run_id} could not be ended"):
        client.set_tag(run_id, "genpipe.error", f"{type(error).__name__}: {error}"[:MAX_TAG])
        client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:MAX_TAG] for key, value in tags.items() if value}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
