"""Deployments: pipelines that a Prefect server has its workers run, on a schedule or when asked to.

A deployment takes the pipeline along as one YAML file in the store, so that it runs wherever a worker is, and goes on
as it was deployed while the file that it came from is edited.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.schedules import Cron
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.pipeline import pipeline_flow, stage_flow
from flows.reconciler import reconcile
from genpipe import config
from genpipe.config import ConfigError
from genpipe.pipeline.curves import kept_text
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.storage import Storage, join, open_storage

POOL = "genpipe"
RECONCILER = "reconciler"
RECONCILE_SECONDS = 300
REACH_SECONDS = 15.0
Overlap = Literal["queue", "skip"]
"""What happens to a run that is due while the one before still runs."""

_COLLISIONS = {"queue": ConcurrencyLimitStrategy.ENQUEUE, "skip": ConcurrencyLimitStrategy.CANCEL_NEW}
_ENDED = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]


@dataclass(frozen=True)
class Deployed:
    """A deployment as the server knows it. `config` is the pipeline's file in its store."""

    name: str
    config: str
    pool: str
    schedule: str
    paused: bool
    next_run: datetime | None
    last_run: FlowRun | None


def deploy(
    path: str,
    overrides: Sequence[str] = (),
    *,
    cron: str = "",
    timezone: str = "UTC",
    pool: str = POOL,
    overlap: Overlap = "queue",
) -> Deployed:
    """Make or update the deployment of a pipeline, which has the pipeline's name, and the reconciler beside the first.

    Its runs do not overlap: the server holds one back, or drops it, while another is under way. Without `cron` it runs
    when asked to. Raises ConfigError where the pipeline would not be the same on a worker's machine, ValueError where
    no Prefect server is configured or the schedule cannot be read.
    """
    pipeline = load_pipeline(path, overrides)
    schedule = {"schedule": Cron(cron, timezone=timezone)} if cron else {}
    with _client() as client:
        uri = _publish(pipeline, path, overrides)
        _make_pool(client, pool)
        _make_reconciler(client, pool)
        made: Any = pipeline_flow.to_deployment(
            name=pipeline.cfg.name,
            parameters={"config": uri},
            description=f"{len(pipeline.instances)} stages: {', '.join(pipeline.instances)}",
            tags=["genpipe"],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=_COLLISIONS[overlap]),
            work_pool_name=pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
            paused=False,
            **schedule,
        )
        return _described(client, made.apply())


def pause(name: str, *, paused: bool = True) -> Deployed:
    """Stop or go on scheduling runs of a deployment. Raises ValueError if there is none of this name."""
    with _client() as client:
        found = _found(client, name)
        (client.pause_deployment if paused else client.resume_deployment)(found)
        return _described(client, found)


def remove(name: str) -> None:
    """Delete a deployment, and with the last one the reconciler; what it made stays.

    Raises ValueError if there is none of this name.
    """
    with _client() as client:
        client.delete_deployment(_found(client, name))
        if not client.read_deployments(flow_filter=_flows(pipeline_flow.name), limit=1):
            for each in client.read_deployments(flow_filter=_flows(reconcile.name)):
                client.delete_deployment(each.id)


def start(name: str) -> UUID:
    """Ask for a run of a deployment now; the flow run's id. Raises ValueError if there is none of this name."""
    with _client() as client:
        return client.create_flow_run_from_deployment(_found(client, name)).id


def deployments() -> list[Deployed]:
    """All deployments of pipelines, by name."""
    with _client() as client:
        found = client.read_deployments(flow_filter=_flows(pipeline_flow.name))
        return sorted((_described(client, each.id) for each in found), key=lambda each: each.name)


def recent_runs(pipeline: str = "", *, limit: int = 20) -> list[FlowRun]:
    """Runs of pipelines and of single stages, the newest first; of one pipeline where its name is given."""
    with _client() as client:
        found = client.read_flow_runs(
            flow_filter=_flows(pipeline_flow.name, stage_flow.name),
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=f"{pipeline} ")) if pipeline else None,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=limit,
        )
    return list(found)


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """A client of the server that is configured. Raises ValueError if there is none, or it does not let us in."""
    url = get_current_settings().api.url
    if url is None:
        raise ValueError(
            "PREFECT_API_URL: names no Prefect server, and a deployment needs one that stays; start one with "
            "`prefect server start`, or see infra/README.md"
        )
    with get_client(sync_client=True, httpx_settings={"timeout": REACH_SECONDS}) as client:
        _check_reachable(client, url)
        yield client


def _check_reachable(client: SyncPrefectClient, url: str) -> None:
    try:
        client.read_work_pools(limit=1)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ValueError(f"PREFECT_API_URL: {url} asks for a login; set PREFECT_API_AUTH_STRING") from None
    except httpx.HTTPError as error:
        raise ValueError(
            f"PREFECT_API_URL: no Prefect server at {url} ({error}); start it, or correct the variable"
        ) from None


def _publish(pipeline: Pipeline, path: str, overrides: Sequence[str]) -> str:
    """Put the pipeline, its bases and overrides merged, into its store; its URI there."""
    values, storage = config.load(path, overrides).values, open_storage(pipeline.cfg.store)
    if pipeline.cfg.curves:
        curves = kept_text(pipeline.curves).encode()
        values = {**values, "curves": join(pipeline.cfg.store, _put(storage, curves, "curves.json"))}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    _check_travels(pipeline, text)
    return join(pipeline.cfg.store, _put(storage, text.encode(), f"{pipeline.cfg.name}.yaml"))


def _put(storage: Storage, content: bytes, name: str) -> str:
    """Write a file of a deployment, below a digest of its content; its key."""
    key = f"deployments/{hashlib.sha256(content).hexdigest()[:12]}/{name}"
    storage.write(key, content)
    return key


def _check_travels(pipeline: Pipeline, text: str) -> None:
    """Raise ConfigError for each setting that means another place where the file lies somewhere else."""
    with tempfile.TemporaryDirectory() as elsewhere:
        moved = Path(elsewhere, "pipeline.yaml")
        moved.write_text(text, encoding="utf-8")
        there = _places(load_pipeline(str(moved)))
    faults = [
        f"{pipeline.source}: {setting}: {place} is named by a path from this file, which a worker reads elsewhere; "
        "make it absolute (a folder that every node has), or an s3:// URI"
        for setting, place in _places(pipeline).items()
        if there[setting] != place
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _places(pipeline: Pipeline) -> dict[str, Any]:
    """Every setting of a pipeline by its path, locations absolute."""
    settings = {"store": pipeline.cfg.store}
    for name, instance in pipeline.instances.items():
        settings |= config.flatten(config.resolved(instance.cfg), f"stages.{name}.")
    return settings


def _make_pool(client: SyncPrefectClient, pool: str) -> None:
    """Make a pool of processes where there is none of this name; one of another kind is taken as it is."""
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template))


def _make_reconciler(client: SyncPrefectClient, pool: str) -> None:
    """Deploy the reconciler unless it is: a change that somebody made to it, such as another interval, stays."""
    if client.read_deployments(flow_filter=_flows(reconcile.name), limit=1):
        return
    made: Any = reconcile.to_deployment(
        name=RECONCILER,
        interval=RECONCILE_SECONDS,
        description="marks runs Crashed whose process is gone",
        tags=["genpipe"],
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        work_pool_name=pool,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    made.apply()


def _found(client: SyncPrefectClient, name: str) -> UUID:
    try:
        return client.read_deployment_by_name(f"{pipeline_flow.name}/{name}").id
    except ObjectNotFound:
        known = [each.name for each in client.read_deployments(flow_filter=_flows(pipeline_flow.name))]
        there = f"there are: {', '.join(sorted(known))}" if known else "there is none yet"
        raise ValueError(f"no deployment is named {name!r}; {there}") from None


def _described(client: SyncPrefectClient, identity: UUID) -> Deployed:
    found = client.read_deployment(identity)
    of_it = DeploymentFilter(id=DeploymentFilterId(any_=[identity]))
    ahead = client.read_flow_runs(
        deployment_filter=of_it,
        flow_run_filter=_in_states([StateType.SCHEDULED]),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=1,
    )
    ended = client.read_flow_runs(
        deployment_filter=of_it, flow_run_filter=_in_states(_ENDED), sort=FlowRunSort.END_TIME_DESC, limit=1
    )
    crons = [f"{each.schedule.cron} {each.schedule.timezone or 'UTC'}" for each in found.schedules
             if hasattr(each.schedule, "cron")]  # fmt: skip
    return Deployed(
        name=found.name,
        config=str((found.parameters or {}).get("config", "")),
        pool=found.work_pool_name or "",
        schedule=", ".join(crons),
        paused=found.paused,
        next_run=ahead[0].expected_start_time if ahead else None,
        last_run=ended[0] if ended else None,
    )


def _flows(*names: str) -> FlowFilter:
    return FlowFilter(name=FlowFilterName(any_=list(names)))


def _in_states(states: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
