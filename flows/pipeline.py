"""The pipeline as Prefect flows: which stage runs when, and what is told about it.

Each stage is a task that submits a Ray job and waits for its artifact; the edges are what the stages consume. Whether a
stage is done is asked of the store alone, so Prefect caches nothing. A stage that fails leaves the others to finish.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.flows import Flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task
from prefect.utilities.urls import url_for

from flows import notify, server
from flows.cancellation import RunCancelled, is_cancelled, watched
from flows.foresight import Foreseeing
from flows.reporting import Outcome, PlainReporter, Reporter, StageResult, StagesFailed
from genpipe import artifacts
from genpipe.config import ConfigError
from genpipe.evaluation.comparison import judge
from genpipe.launch import jobs, submission
from genpipe.launch.failure import JobLost
from genpipe.launch.lease import clear_work, may_be_held
from genpipe.pipeline.baselines import names_needed, with_baselines
from genpipe.pipeline.forecast import forecast
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.pipeline.order import longest_path_first, works_of
from genpipe.pipeline.plan import Planned, plan, spec_of
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import local_path
from genpipe.tracking.recording import claim, pipeline_run, records_of, settle_stage, settle_store
from genpipe.tracking.registry import resolve

RETRY_SECONDS = 3
FLOW_RUN = "genpipe.prefect_flow_run_id"


@dataclass(frozen=True)
class _Run:
    """A checked pipeline about to run."""

    pipeline: Pipeline
    plans: dict[str, Planned]
    reporter: Reporter
    overrides: Sequence[str] = ()
    misfits: dict[str, str] = field(default_factory=dict)
    """Why a stage cannot run, where that is seen before its turn."""


@dataclass(frozen=True)
class _Place:
    """Where the tasks of a flow run send their work and their records."""

    run: _Run
    cluster: jobs.Cluster | None
    pipeline_run_id: str
    links: dict[str, str]
    turns: dict[str, int]
    running: dict[str, StageSpec] = field(default_factory=dict)


_prepared: ContextVar[_Run] = ContextVar("prepared")
_place: ContextVar[_Place] = ContextVar("place")


def run_pipeline(
    path: str,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> list[StageResult]:
    """Run a pipeline here, with a Prefect server and a Ray of its own unless others are configured.

    The result has every stage, failed and skipped ones too. Raises ConfigError, ManifestError, or ValueError where
    MLflow or Ray is unreachable, before any work; KeyboardInterrupt once everything it started has stopped.
    """
    prepared = _prepare(path, overrides, only=only, reporter=reporter)
    parameters = {"config": str(path), "overrides": list(overrides), "only": list(only)}
    return _start(pipeline_flow, prepared, parameters)


def run_one(
    stage: str,
    path: str,
    overrides: Sequence[str] = (),
    *,
    reporter: Reporter | None = None,
) -> StageResult:
    """Run one instance of a pipeline on inputs that are committed already. Raises as `run_pipeline` does."""
    prepared = _prepare_one(stage, path, overrides, reporter=reporter)
    parameters = {"stage": stage, "config": str(path), "overrides": list(overrides)}
    [result] = _start(stage_flow, prepared, parameters)
    return result


def stop_jobs(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Stop the Ray jobs of a cancelled flow run. (A crashed one's go on, and the next run adopts them.)"""
    pipeline = load_pipeline(flow_run.parameters["config"], flow_run.parameters.get("overrides", ()))
    if pipeline.cfg.ray.address:  # a local Ray ended with the flow's process
        client = jobs.connect(pipeline.cfg.ray.address)
        jobs.stop(client, jobs.jobs_of(client, prefect_flow_run_id=str(flow_run.id)))


def _run_name() -> str:
    """What Prefect and MLflow call this run: the pipeline's file, the stage if it is one, and the time."""
    given = flow_run.parameters
    stage = f" {given['stage']}" if "stage" in given else ""
    return f"{Path(given['config']).stem}{stage} {datetime.now():%Y-%m-%d %H:%M:%S}"


@flow(
    name="genpipe",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=16),
    on_cancellation=[stop_jobs],
)
def pipeline_flow(
    config: str,
    overrides: list[str] | None = None,
    only: list[str] | None = None,
) -> list[StageResult]:
    """Run the stages of a pipeline that are not done. Raises StagesFailed."""
    run = _prepared.get(None) or _prepare(config, overrides or (), only=only or ())
    return _until_cancelled(run)


@flow(
    name="genpipe-stage",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=1),
    on_cancellation=[stop_jobs],
)
def stage_flow(stage: str, config: str, overrides: list[str] | None = None) -> list[StageResult]:
    """Run one stage of a pipeline on committed inputs. Raises StagesFailed."""
    run = _prepared.get(None) or _prepare_one(stage, config, overrides or ())
    return _until_cancelled(run)


def _worth_retrying(task: Task[Any, Any], task_run: TaskRun, state: State) -> bool:
    """Whether a task failed for what a new attempt may find mended: the job was lost, not wrong."""
    return isinstance(state.result(raise_on_failure=False), JobLost)


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=_worth_retrying,
)
def stage_task(stage: str) -> StageResult:
    """Bring about one stage's artifact. Raises what the stage failed of."""
    place = _place.get()
    run, planned = place.run, place.run.plans[stage]
    if planned.status == "cached" or artifacts.committed(planned.artifact) is not None:
        spec = _plain_spec(place, planned)
        settle_stage(spec)
        clear_work(spec)
        result = _result(planned, "cached", seconds=0.0)
        run.reporter.update(stage, "cached", message=planned.why)
        return result
    if stage in run.misfits:
        raise ConfigError(run.misfits[stage])
    assert place.cluster is not None, "a plan with work to do has a cluster"
    with place.cluster.turn(stage, planned.instance.cfg.resources, order=place.turns[stage]):
        started = time.monotonic()
        spec = place.running[stage] = _spec(place, planned)
        run.reporter.update(stage, "running", message=planned.why)
        try:
            job = place.cluster.run(
                spec, report=lambda progress: run.reporter.update(stage, "running", progress=progress)
            )
        except JobLost as error:
            run.reporter.update(stage, "lost", message=str(error))
            settle_stage(spec, status="FAILED", error=str(error), gone=not may_be_held(spec.work))
            raise
        settle_stage(spec, gone=True)
        result = _result(planned, "ran", seconds=time.monotonic() - started, job=job)
    _check_ahead(run, planned)
    run.reporter.update(stage, result.status, message="" if result.status == "ran" else result.message)
    return result


def _check_ahead(run: _Run, made: Planned) -> None:
    """Ask the stages that take what was just made whether it fits, now that it is there, instead of when they start.

    One that it does not fit is told to have failed at once: what a training stands between is better known before it.
    """
    for later in run.plans.values():
        if made.name in later.instance.needs and later.status == "run" and later.name not in run.misfits:
            inputs = {role: artifacts.committed(artifact) or artifact for role, artifact in later.inputs.items()}
            try:
                later.instance.stage.check_inputs(later.instance.cfg, inputs)
            except ValueError as error:
                run.misfits[later.name] = (
                    f"{run.pipeline.source}: stages.{later.name}: {error} (seen as soon as {made.name} was made)"
                )
                run.reporter.update(later.name, "failed", message=run.misfits[later.name])


def _plain_spec(place: _Place, planned: Planned) -> StageSpec:
    return spec_of(planned, place.run.pipeline, pipeline_run_id=place.pipeline_run_id, links=place.links)


def _spec(place: _Place, planned: Planned) -> StageSpec:
    """What the stage's job is told: the inputs as they were committed, not as they were planned."""
    inputs = {}
    for role, artifact in planned.inputs.items():
        committed = artifacts.committed(artifact)
        assert committed is not None, f"{role} is not committed at {artifact.uri}"
        inputs[role] = committed
    try:
        promised = planned.instance.stage.check_inputs(planned.instance.cfg, inputs)
    except ValueError as error:
        raise ConfigError(f"{place.run.pipeline.source}: stages.{planned.name}: {error}") from error
    target = planned.artifact.model_copy(update={"meta": promised})
    planned = replace(planned, inputs=inputs, artifact=target)
    spec = _plain_spec(place, planned)
    return spec.model_copy(update={"run_id": claim(spec)})


def _result(planned: Planned, status: Outcome, *, seconds: float, job: str = "") -> StageResult:
    """What to tell of a committed stage; `job` is that of this run, which another one may have been faster than."""
    manifest = artifacts.read_manifest(planned.artifact.uri)
    assert manifest is not None, f"{planned.name} is not committed at {planned.artifact.uri}"
    why = planned.why
    if job and (made_by := manifest.environment.get("attempt")) != job:
        status, why = "cached", f"another run has made it meanwhile, as {made_by}"
    return StageResult(
        planned.name,
        status,
        seconds,
        manifest.artifact,
        manifest.metrics,
        tuple(planned.instance.stage.HEADLINES),
        planned.instance.cfg.observe.gates,
        manifest.run_id,
        why,
        judged=judge(manifest.artifact, planned.instance.cfg.observe.gates),
    )


def _prepare(
    path: str,
    overrides: Sequence[str],
    *,
    only: Sequence[str],
    reporter: Reporter | None = None,
) -> _Run:
    pipeline = load_pipeline(path, overrides)
    look_up = partial(resolve, tracking_uri=pipeline.tracking_uri)
    plans = with_baselines(plan(pipeline, only=only, resolve=look_up), pipeline, resolve=look_up)
    by_name = {planned.name: planned for planned in plans}
    return _Run(pipeline, by_name, reporter or PlainReporter(), overrides)


def _prepare_one(
    stage: str,
    path: str,
    overrides: Sequence[str],
    *,
    reporter: Reporter | None = None,
) -> _Run:
    run = _prepare(path, overrides, only=[stage], reporter=reporter)
    absent = [name for name in run.plans[stage].instance.needs if run.plans[name].status == "run"]
    if absent:
        raise ConfigError(
            f"{path}: stages.{stage}: its input {', '.join(absent)} is not committed for this configuration; run "
            f"`genpipe stage {absent[0]} {path}` first, or give another one with --input ROLE=URI"
        )
    return replace(run, plans={stage: run.plans[stage]})


def _start(entry: Flow[Any, list[StageResult]], prepared: _Run, parameters: dict[str, Any]) -> list[StageResult]:
    server.check_home()
    with _terminable(), ThreadPoolExecutor(1, "prefect-server") as pool, ExitStack() as stack:
        starting = pool.submit(server.start)  # while MLflow is looked at
        stack.callback(server.settle)
        records_of(prepared.pipeline.tracking_uri).check(prepared.pipeline.tracking_uri)
        starting.result()
        stack.callback(_prepared.reset, _prepared.set(prepared))
        try:
            return entry(**parameters)
        except StagesFailed as failed:
            return failed.results
        except CancelledRun as cancelled:
            raise KeyboardInterrupt("the run was cancelled in Prefect; run it again to go on") from cancelled


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the block as Ctrl-C does, so that nothing it started is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _until_cancelled(run: _Run) -> list[StageResult]:
    """Run the stages; the flow run ends as cancelled, not as crashed, if somebody cancels it."""
    try:
        return _run_stages(run)
    except RunCancelled as cancelled:
        return Cancelled(message=str(cancelled))  # the state that Prefect is to take


def _run_stages(run: _Run) -> list[StageResult]:
    """Run every stage of the plan in its order of need; called inside a flow."""
    pipeline = run.pipeline
    links = {"prefect_flow_run_id": str(flow_run.id), "prefect_flow_run": str(flow_run.name)}
    if get_current_settings().api.url:  # else the server ends with this run
        links["prefect_url"] = url_for("flow-run", flow_run.id) or ""
    if pipeline.cfg.ray.address:
        links["ray_dashboard"] = pipeline.cfg.ray.address
    tags = {
        "genpipe.pipeline": pipeline.cfg.name,
        "genpipe.config": pipeline.source,
        "genpipe.overrides": " ".join(run.overrides),
        **{f"genpipe.{name}": value for name, value in links.items()},
    }
    files = [Path(pipeline.source)] if Path(pipeline.source).is_file() else []
    if dead := settle_store(pipeline.cfg.store):
        server.crash_flow_runs([record.tags.get(FLOW_RUN, "") for record in dead])
    with ExitStack() as stack:
        parent = stack.enter_context(
            pipeline_run(
                pipeline.tracking_uri,
                store=pipeline.cfg.store,
                experiment=pipeline.experiment,
                name=flow_run.name,
                tags=tags,
                settings=dict(override.split("=", 1) for override in run.overrides),
                files=files,
                holds=names_needed(run.plans.values()),
            )
        )
        plans = list(run.plans.values())
        works = stack.enter_context(ThreadPoolExecutor(1)).submit(works_of, plans)
        cluster = None
        if any(planned.status == "run" for planned in run.plans.values()):
            cluster = stack.enter_context(jobs.cluster(pipeline.cfg.ray))
            submission.check(cluster, pipeline, plans)
        turns = longest_path_first(plans, works.result())
        run = _foreseen(run, cluster, works.result())
        place = _Place(run, cluster, parent.run_id, links, turns)
        stack.callback(_place.reset, _place.set(place))
        futures = _submit(run)
        try:
            stop = partial(cluster.interrupt, stop_jobs=True) if cluster else (lambda: None)
            with watched(str(flow_run.id), stop=stop) as cancellation:
                results = []
                for name, future in futures.items():
                    future.wait()
                    cancellation.check()
                    results.append(_outcome(run, name, future))
        except BaseException as error:
            if cluster is not None:
                stops = cluster.embedded or isinstance(error, KeyboardInterrupt) or _ended_by_cancel(error)
                cluster.interrupt(stop_jobs=stops)
                for spec in place.running.values() if stops else ():
                    settle_stage(spec, error=f"{type(error).__name__}: {error}", gone=True)
            raise
        notify.tell(pipeline.cfg.notify, pipeline=pipeline.cfg.name, run=str(flow_run.name), results=results)
        rows = [_row(result) for result in results]
        told = [result for result in results if result.stage != "system"]  # where MLflow has metrics of machines
        headlines = {f"{result.stage}/{name}": value for result in told for name, value in result.shown.items()}
        parent.summarize(rows, metrics=headlines, images=_images(results))
        create_table_artifact(rows, key="genpipe-stages", description=f"MLflow run {parent.run_id}")
    if any(result.status == "failed" for result in results):
        raise StagesFailed(results)
    return results


def _foreseen(run: _Run, cluster: jobs.Cluster | None, works: dict[str, float]) -> _Run:
    """The run with a reporter that is told what is left of all of it, if that is more than a stage and can be known."""
    plans = list(run.plans.values())
    if cluster is None or sum(planned.status == "run" for planned in plans) < 2:
        return run
    expected = forecast(plans, capacity=cluster.capacity, works=works, probe=cluster.embedded)
    return run if expected is None else replace(run, reporter=Foreseeing(run.reporter, expected))


def _ended_by_cancel(error: BaseException) -> bool:
    """Whether a worker has sent this process SIGTERM because the run was cancelled, which it may hear of first.

    In a worker's process Prefect hears the signal and raises TerminationSignal, in any other `_terminable` SystemExit.
    """
    return isinstance(error, (SystemExit, TerminationSignal)) and is_cancelled(str(flow_run.id))


def _submit(run: _Run) -> dict[str, PrefectFuture[StageResult]]:
    submitted: dict[str, PrefectFuture[StageResult]] = {}
    retrying = stage_task.with_options(retries=run.pipeline.cfg.ray.retries)
    for name in run.plans:
        run.reporter.update(name, "waiting")
        needs = [submitted[need] for need in run.plans[name].instance.needs if need in submitted]
        submitted[name] = retrying.submit(name, wait_for=needs)
    return submitted


def _outcome(run: _Run, stage: str, future: PrefectFuture[StageResult]) -> StageResult:
    """Say what became of a stage that has ended."""
    state = future.state
    if state.is_completed():
        return future.result()
    if stage in run.misfits:
        return StageResult(stage, "failed", message=run.misfits[stage])
    if not state.is_final():  # Prefect leaves a task pending whose upstream did not complete
        needs = [need for need in run.plans[stage].instance.needs if need in run.plans]
        result = StageResult(stage, "skipped", message=f"it needs {', '.join(needs)}, of which not all were made")
    else:
        error = state.result(raise_on_failure=False)
        message = str(error).strip() or type(error).__name__
        result = StageResult(stage, "failed", message=message, details=getattr(error, "details", ""))
    run.reporter.update(stage, result.status, message=result.message)
    return result


def _row(result: StageResult) -> dict[str, Any]:
    return {
        "stage": result.stage,
        "status": result.status,
        "seconds": round(result.seconds, 1),
        "headline": result.headline,
        "missed gates": "; ".join(result.missed),
        "held gates": "; ".join(result.held),
        "metrics": " ".join(f"{name}={value:.4g}" for name, value in result.metrics.items()),
        "run_id": result.run_id,
        "artifact": result.artifact.uri if result.artifact else "",
        "message": result.message,
    }


def _images(results: Sequence[StageResult]) -> list[Path]:
    """The pictures of the last stage that made some, if they are on this machine."""
    for result in reversed(results):
        folder = local_path(result.artifact.uri) if result.artifact else None
        if folder is not None and (images := sorted(folder.glob("*.png"))):
            return images
    return []
