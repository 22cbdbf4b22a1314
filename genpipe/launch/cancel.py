"""Stop what runs of a pipeline, wherever and by whomever it was started: by a request in each stage's work folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from genpipe import artifacts
from genpipe.launch import stopping
from genpipe.launch.jobs import connect, jobs_of, stop
from genpipe.launch.lease import Watch, find_holder
from genpipe.pipeline.graph import Pipeline
from genpipe.pipeline.plan import Planned, spec_of
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage

POLL_SECONDS = 1.0


def cancel(
    pipeline: Pipeline, plans: Sequence[Planned], *, by: str, seconds: float, tell: Callable[[str], None]
) -> list[str]:
    """Ask the stages of `plans` that were begun and not finished to stop, and wait until they have; those that did not.

    On a cluster, a job that has not stopped after `seconds` is ended by Ray. Elsewhere a stage that does not answer
    does not run, or ends with what it does now. `tell` gets a line for each that stops. Raises ValueError where
    `ray.address` is not reached.
    """
    missing = {p.name: spec_of(p, pipeline) for p in plans if p.status == "run"}
    address = pipeline.cfg.ray.address
    waiting = {name: spec for name, spec in missing.items() if _may_run(spec, queued=bool(address))}
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        for name, spec in list(waiting.items()):
            if stopped := _answered(spec, by):
                tell(f"{name}: {stopped}")
                del waiting[name]
            else:
                stopping.request_stop(
                    spec, "cancelled", by=by
                )  # again, as an attempt that begins takes it for an old one
        time.sleep(POLL_SECONDS)
    for name, spec in list(waiting.items()):
        stopping.withdraw(spec)
        if address and _end_jobs(spec, address):
            tell(f"{name}: ended; it goes on from its last checkpoint, or from the parts that are finished")
            del waiting[name]
    return list(waiting)


def _may_run(spec: StageSpec, *, queued: bool) -> bool:
    """Whether somebody has begun the stage and is not known to be gone; on a cluster the next job may be in line."""
    work = open_storage(spec.work)
    holder = find_holder(work)
    return any(work.list()) and (queued or holder is None or not Watch().is_over(holder))


def _answered(spec: StageSpec, by: str) -> str:
    """How a stage ended since it was asked to stop, empty if it has not."""
    if artifacts.committed(spec.target) is not None:
        return "finished before it heard of this"
    stopped = stopping.outcome(spec)
    return stopped.describe() if stopped and stopped.by == by else ""


def _end_jobs(spec: StageSpec, address: str) -> bool:
    """Have Ray end the jobs that make an artifact; whether there were any."""
    client = connect(address)
    running = jobs_of(client, artifact=spec.target.uri)
    stop(client, running)
    return bool(running)
