"""What MLflow remembers: a run for each pipeline run, and one run for each stage fingerprint.

A stage's run is found again by its fingerprint, so a retry, a resume or another pipeline run goes on in the same one,
until it is finished: an artifact that was deleted and is made again gets another. Its metrics go forward only: what a
resumed training computes once more is there already.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import flatten
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.tracking import jsonl, pages
from genpipe.tracking.flavor import write_flavor
from genpipe.tracking.open_runs import OpenRun
from genpipe.tracking.progress_pictures import IN_MLFLOW
from genpipe.tracking.recorder import Facts, File, Picture, Point, Record, Status, Steps
from genpipe.tracking.registry import ARTIFACT, FINGERPRINT, register
from genpipe.tracking.store import check, client_of, experiment_id_of, first_line, is_refused, page_of, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ERROR = "genpipe.error"
DESCRIPTION = "mlflow.note.content"
PICTURES = "samples"
MAX_TAG = 5000
MAX_PARAM = 6000
PARAMS_A_CALL = 100
METRICS_A_CALL = 1000

__all__ = ["StageKeeper", "begin_pipeline", "check", "claim_stage_run", "end_pipeline"]


def begin_pipeline(run: OpenRun, files: Sequence[Path]) -> str:
    """Create the MLflow run of a pipeline run, with `files` (the configuration); its id.

    Raises ValueError where MLflow cannot be reached.
    """
    assert run.pipeline is not None, "the run of a pipeline"
    check(run.tracking_uri)
    client = client_of(run.tracking_uri)
    experiment_id = experiment_id_of(client, run.tracking_uri, run.pipeline.experiment)
    created = client.create_run(experiment_id, run_name=run.pipeline.name, tags=_tags(run.pipeline.tags))
    run_id = str(created.info.run_id)
    _log_params(client, run_id, run.pipeline.settings)
    _describe(client, created, pages.pipeline_page(run.pipeline, link=_link_from(created)))
    for file in files:
        client.log_artifact(run_id, str(file), "config")
    return run_id


def end_pipeline(run: OpenRun) -> None:
    """Record what came of a pipeline run's stages, its pictures and how it ended; may be repeated."""
    assert run.pipeline is not None, "the run of a pipeline"
    client, record = client_of(run.tracking_uri), run.pipeline
    there = client.get_run(run.run_id)
    if record.rows:
        client.log_dict(run.run_id, {"stages": [dict(row) for row in record.rows]}, "summary.json")
    for name, value in record.metrics.items():
        client.log_metric(run.run_id, _name(name), value, step=0)
    pictures = [image for image in map(Path, record.images) if image.is_file()]
    for picture in pictures:
        client.log_artifact(run.run_id, str(picture), PICTURES)
    shown = f"get-artifact?path={PICTURES}/{quote(pictures[0].name)}&run_uuid={run.run_id}" if pictures else ""
    _describe(client, there, pages.pipeline_page(record, link=_link_from(there), picture=shown))
    _log_lineage(client, there, [row["run_id"] for row in record.rows if row.get("run_id")])
    if record.error:
        client.set_tag(run.run_id, ERROR, record.error[:MAX_TAG])
    client.set_terminated(run.run_id, "FINISHED" if record.status == "RUNNING" else record.status)


class StageKeeper:
    """Keeps a stage's run in MLflow; where it is not claimed yet, it is when MLflow answers."""

    pause_seconds = 0.5

    def __init__(self, spec: StageSpec, run_id: str) -> None:
        self.spec = spec
        self.run_id = run_id
        self.where = f"MLflow at {redacted(spec.tracking_uri)}"
        self.sense = _System(self)
        self.started = 0
        self.steps = Steps()

    @property
    def client(self) -> MlflowClient:
        """The client of this process."""
        return client_of(self.spec.tracking_uri)

    def open(self) -> None:
        """Look up the run and the last step of every series, and hand in what was kept in the store meanwhile."""
        self.run_id = self.run_id or claim_stage_run(self.spec)
        run = self.client.get_run(self.run_id)
        self.started = run.info.start_time
        self.steps = Steps()
        self.steps.last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        if "mlflow.loggedImages" in run.data.tags:
            self._find_pictures()
        if kept := jsonl.kept(self.spec):
            self.write(kept)
            jsonl.mark_handed_in(self.spec, self.run_id)

    def write(self, records: Sequence[Record]) -> None:
        """Log records, those of metrics together."""
        points: list[Point] = []
        for record in filter(self.steps.is_new, records):
            if isinstance(record, Point):
                points.append(record)
            else:
                self._log_points(points)
                points = []
                self._log(record)
        self._log_points(points)

    def refuses(self, error: Exception) -> bool:
        """Whether MLflow answered that it does not want a record."""
        return is_refused(error)

    def _log_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), METRICS_A_CALL):
            batch = points[start : start + METRICS_A_CALL]
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            for point in batch:
                self.steps.note(point)

    def _log(self, record: Picture | File | Facts | Status) -> None:
        client, run_id = self.client, self.run_id
        if isinstance(record, Picture):
            name, image, moment, step = record
            client.log_image(run_id, image, key=name, step=step, timestamp=moment, synchronous=True)
            self.steps.note(record)
        elif isinstance(record, File):
            client.log_stream(run_id, io.BytesIO(record.data), record.name)
        elif isinstance(record, Facts):
            for name, value in record.tags.items():
                client.set_tag(run_id, f"genpipe.{_name(name)}"[:250], value[:MAX_TAG])
        elif record.status == "RUNNING":
            _mark_running(client, client.get_run(run_id))
        elif record.status == "FINISHED":
            self._complete(record)
        elif not record.late or client.get_run(run_id).info.status == "RUNNING":
            client.set_tag(run_id, ERROR, record.error[:MAX_TAG])
            client.set_terminated(run_id, record.status, end_time=record.milliseconds)

    def _complete(self, record: Status) -> None:
        """Record the committed artifact, and end the run; weights, systems and releases as logged models.

        A release is registered as well: it is its model's candidate.
        """
        client, run_id = self.client, self.run_id
        manifest = artifacts.read_manifest(self.spec.target.uri, check_files=False)
        if manifest is not None:
            client.log_dict(run_id, manifest.model_dump(mode="json"), "manifest.json")
            client.set_tag(run_id, "genpipe.meta", _json(manifest.artifact.meta)[:MAX_TAG])
            if self.spec.trains or manifest.artifact.kind in ("system", "release"):
                samples = int(self.spec.config["train"]["samples"]) if self.spec.trains else 0
                model_id = _log_model(client, run_id, self.spec, manifest.artifact, samples=samples)
                if manifest.artifact.kind == "release":
                    name = self.spec.config["observe"]["register_as"] or self.spec.experiment
                    register(client, name, manifest.artifact, model_id=model_id, run_id=run_id)
        _forget_error(client, client.get_run(run_id))
        client.set_terminated(run_id, "FINISHED", end_time=record.milliseconds)

    def _find_pictures(self) -> None:
        """Note the pictures that are there."""
        for file in self.client.list_artifacts(self.run_id, "images"):
            if (found := IN_MLFLOW.fullmatch(file.path)) is not None:
                name = f"images/{found['name'].replace('~', '/')}"
                self.steps.last[name] = max(int(found["step"]), self.steps.last.get(name, -1))


class _System:
    """CPU, memory, disk, network and GPU use of this machine, as MLflow's own monitor measures them."""

    FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0

    def __init__(self, keeper: StageKeeper) -> None:
        self.keeper = keeper
        self.monitor: Any = None
        self.due = 0.0

    def __call__(self) -> list[Point]:
        """A reading, if one is due; called on the recorder's thread alone."""
        if not self.keeper.started:
            return []
        if self.monitor is None:
            self._start()
        if time.monotonic() < self.due:
            return []
        self.due = time.monotonic() + self.EVERY_SECONDS
        self.monitor.collect_metrics()
        values = self.monitor.aggregate_metrics()
        self._clear()
        now = time.time_ns() // 1_000_000
        seconds = (now - self.keeper.started) // 1000
        return [Point(f"system/{name}", float(value), now, seconds) for name, value in values.items()]

    def _start(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.monitor = SystemMetricsMonitor(self.keeper.run_id, tracking_uri=self.keeper.spec.tracking_uri)
        self.monitor.collect_metrics()  # the first reading of CPU use has no interval to speak of
        self._clear()
        self.due = time.monotonic() + self.FIRST_SECONDS

    def _clear(self) -> None:
        for monitor in self.monitor.monitors:
            monitor.clear_metrics()


def claim_stage_run(spec: StageSpec) -> str:
    """Find or create the run of `spec`, record what is known before the work starts, and mark it as running.

    Raises ValueError where MLflow refuses that.
    """
    try:
        return _claim(spec)
    except Exception as error:
        if is_refused(error):
            raise ValueError(f"stages.{spec.name}: MLflow refuses its run: {first_line(error)}") from error
        raise


def _claim(spec: StageSpec) -> str:
    client = client_of(spec.tracking_uri)
    experiment_id = experiment_id_of(client, spec.tracking_uri, spec.experiment)
    run = _find(client, experiment_id, spec)
    tags = _stage_tags(spec)
    if run is not None:
        _describe(client, run, pages.stage_page(spec, link=_link_from(run)))
        for key, value in tags.items():
            client.set_tag(run.info.run_id, key, value)
        if run.info.status != "FINISHED":
            _mark_running(client, run)
        return str(run.info.run_id)
    created = client.create_run(experiment_id, run_name=spec.name, tags=tags)
    run_id = str(created.info.run_id)
    _describe(client, created, pages.stage_page(spec, link=_link_from(created)))
    _log_params(client, run_id, {key: value for key, value in spec.config.items() if key not in UNFINGERPRINTED})
    _log_inputs(client, run_id, spec)
    return run_id


def _find(client: MlflowClient, experiment_id: str, spec: StageSpec) -> Run | None:
    """The run that makes the artifact of `spec`, or made it.

    A finished one counts only while its artifact is there. On a server that several stores share, each has its own.
    """
    query = f"tags.`{FINGERPRINT}` = '{spec.target.fingerprint}'"
    runs = client.search_runs([experiment_id], query, order_by=["attributes.start_time DESC"])
    if not spec.tracking_uri.startswith("sqlite:"):  # else it is the store's own, which may have been moved
        runs = [run for run in runs if run.data.tags.get("genpipe.artifact") == spec.target.uri]
    if runs and runs[0].info.status == "FINISHED" and artifacts.find(spec.target.uri) is None:
        return None
    return runs[0] if runs else None


def _mark_running(client: MlflowClient, run: Run) -> None:
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    _forget_error(client, run)


def _forget_error(client: MlflowClient, run: Run) -> None:
    if ERROR in run.data.tags:
        client.delete_tag(run.info.run_id, ERROR)


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
        "genpipe.version": spec.version,
        "genpipe.code": spec.code,
    }
    tags |= {f"genpipe.input.{name}": artifact.fingerprint for name, artifact in spec.inputs.items()}
    tags |= {f"genpipe.{name}": value for name, value in spec.links.items()}
    return _tags(tags)


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    named = {_name(key)[:250]: value for key, value in flatten(config).items()}
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


def _log_lineage(client: MlflowClient, run: Run, stages: Sequence[str]) -> None:
    """Let the run of a pipeline have the datasets of its stages' runs that have one, and their models as its own."""
    from mlflow.entities import DatasetInput, LoggedModelOutput
    from mlflow.exceptions import MlflowException

    datasets: dict[str, DatasetInput] = {}
    outputs: list[LoggedModelOutput] = []
    for run_id in dict.fromkeys(stages):
        try:
            made = client.get_run(run_id)
        except MlflowException as error:  # a cached stage's run may be in another MLflow, or deleted
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        datasets |= {each.dataset.digest: each for each in (made.inputs.dataset_inputs if made.inputs else ())}
        outputs += [
            LoggedModelOutput(each.model_id, each.step) for each in (made.outputs.model_outputs if made.outputs else ())
        ]
    if datasets:
        _insist(lambda: client.log_inputs(run.info.run_id, datasets=list(datasets.values())))
    if outputs and not (run.outputs and run.outputs.model_outputs):
        client.log_outputs(run.info.run_id, outputs)


def _describe(client: MlflowClient, run: Run, text: str) -> None:
    """Set the description of a run, unless somebody wrote one."""
    if pages.is_ours(run.data.tags.get(DESCRIPTION, "")):
        client.set_tag(run.info.run_id, DESCRIPTION, text)


def _link_from(run: Run) -> Callable[[str], str]:
    """Addresses of runs, relative to MLflow's page, in the experiment of `run`."""
    return lambda run_id: page_of(run.info.experiment_id, run_id)


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


def _log_model(client: MlflowClient, run_id: str, spec: StageSpec, artifact: Artifact, *, samples: int) -> str:
    """Make the committed weights or system a logged model of the run, once, as of so many training samples; its id."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    if run.outputs and run.outputs.model_outputs:
        return str(run.outputs.model_outputs[0].model_id)
    tags = {
        ARTIFACT: artifact.uri,
        FINGERPRINT: artifact.fingerprint,
        "genpipe.meta": _json(artifact.meta),
    }
    params = {key[:250]: str(value)[:MAX_PARAM] for key, value in flatten(spec.config).items()}
    query = f"tags.`{FINGERPRINT}` = '{artifact.fingerprint}'"
    begun = client.search_logged_models([run.info.experiment_id], query)  # by one that was killed before the next line
    model = next((model for model in begun if model.source_run_id == run_id), None) or client.create_logged_model(
        run.info.experiment_id,
        name=spec.name,
        source_run_id=run_id,
        tags=_tags(tags),
        params=params,
        model_type="genpipe",
    )
    if artifact.kind == "release":
        with tempfile.TemporaryDirectory() as folder:
            made = write_flavor(artifact, Path(folder), model_id=model.model_id, run_id=run_id)
            client.log_model_artifacts(model.model_id, str(made))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, samples)])
    return str(model.model_id)


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:MAX_TAG] for key, value in tags.items() if value}


def _name(text: str) -> str:
    """A name that MLflow takes: those that users choose, such as templates of captions, may have other characters."""
    return re.sub(r"[^\w./: -]", "_", text)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
