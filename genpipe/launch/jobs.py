"""Stages as jobs of a Ray cluster, or of the local Ray that a run starts for itself.

Whoever wants an artifact that a job is already making adopts that job, whose metadata names the artifact. Of two who
submit at once, here or on different clusters, one makes it and the other waits for it (`launch/lease.py`). What a job
(`launch/ray.py`) tells its submitter lies in the stage's work folder: progress, and the error.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from genpipe import artifacts
from genpipe.artifacts import Artifact, work_uri
from genpipe.launch import stopping
from genpipe.launch.failure import JobLost, StageError, first_line, read_failure
from genpipe.launch.lease import clear_work, new_attempt
from genpipe.launch.local_ray import ALONE, TUNING, authorization, get, local_head
from genpipe.launch.placement import Node, check_places, needs_of
from genpipe.launch.resource_queue import Turns
from genpipe.pipeline.code import packages_of
from genpipe.pipeline.graph import RayConfig
from genpipe.pipeline.spec import Progress, StageSpec, read_progress
from genpipe.stage_config import Resources
from genpipe.storage import join, open_storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
REACH_SECONDS = 5.0
LOST_SECONDS = 60.0
STOP_SECONDS = 15.0
LOOK_SECONDS = 120.0
ABSENT = "absent: "
LOOK = f"import os, sys; [print('{ABSENT}' + path) for path in sys.argv[1:] if not os.path.exists(path)]"


class Stopped(Exception):
    """The job was stopped or let go because its submitter was asked to stop."""


Report = Callable[[Progress | None], None]


class LocalRay:
    """The Ray that a run has for itself, and the one that takes its place when it dies."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.lock = threading.Lock()
        self._start()

    def revive(self) -> JobSubmissionClient:
        """A client of the Ray that runs now; another one is started if it has died."""
        with self.lock:
            if not self.head.is_alive:
                self.stack.close()
                self._start()
            return self.client

    def _start(self) -> None:
        self.head = self.stack.enter_context(local_head({**TUNING, **ALONE, **os.environ}))
        self.client = connect(self.head.address, token=self.head.token)


class Cluster:
    """A Ray cluster that takes jobs."""

    def __init__(
        self,
        client: JobSubmissionClient,
        *,
        runtime_env: dict[str, Any],
        capacity: dict[str, float],
        local: LocalRay | None = None,
        carries_code: bool = False,
        autoscales: bool = False,
    ) -> None:
        self.client = client
        self.autoscales = autoscales
        self.local = local
        self.runtime_env = runtime_env
        self.carries_code = carries_code
        self.capacity = capacity
        self.jobs: set[str] = set()
        self.interrupted = threading.Event()
        self.stopping = False
        self.turns = Turns(capacity, interrupted=self.interrupted)

    @property
    def embedded(self) -> bool:
        """Whether it is a local Ray that ends with this run."""
        return bool(self.capacity)

    def nodes(self) -> list[Node]:
        """What each node that is alive has in all."""
        return nodes_of(self.client)

    def absent(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` that are not there where the cluster's jobs are led from, which a small job looks for.

        Raises JobLost where that job does not end well.
        """
        return _absent(self.client, paths) if paths and not self.embedded else []

    @contextmanager
    def turn(self, stage: str, resources: Resources, *, order: int) -> Iterator[None]:
        """Hold what a stage needs of the local Ray, the lowest `order` first; a cluster has a queue of its own.

        Raises ValueError if the local Ray could never run it, Stopped after `interrupt`.
        """
        if not self.embedded:
            yield
            return
        workers = self._that_fit(stage, resources)
        with self.turns.take(resources.taken(workers), order=order) as granted:
            if not granted:
                raise Stopped(f"{stage} was stopped before it began")
            yield

    def run(self, spec: StageSpec, *, report: Report) -> str:
        """Submit a stage, or adopt the job that already runs it, and wait for its artifact; the job's id.

        A local Ray that has died is replaced first, and a job that is preempted is followed by another one. `report`
        gets the progress, None before the first. Raises StageError, JobLost, or Stopped after `interrupt` or where
        somebody else stopped the job.
        """
        if self.local is not None:
            self.client = self.local.revive()
        while True:
            job = self._submit(spec)
            self.jobs.add(job)
            if self.stopping:  # since it was asked for, and before `interrupt` could know of it
                self.stop_jobs()
            try:
                if self._wait(spec, job, report):
                    return job
            finally:
                if not self.interrupted.is_set():
                    self.jobs.discard(job)

    def interrupt(self, *, stop_jobs: bool) -> None:
        """Make every `run` return; stop their jobs, or leave them to be adopted."""
        self.stopping |= stop_jobs
        self.interrupted.set()
        if stop_jobs:
            self.stop_jobs()

    def stop_jobs(self) -> None:
        """Stop the jobs that have not ended; those of a local Ray end with it at the latest."""
        try:
            stop(self.client, self.jobs)
        except (OSError, RuntimeError):
            if self.local is None:
                raise

    def _that_fit(self, stage: str, resources: Resources) -> int:
        """Workers that the local Ray can run at once. Raises ValueError if they are too few."""
        fit, beside = resources.max_workers, resources.taken(0)
        for kind, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            there = self.capacity.get(kind, 0.0)
            fit = min(fit, int((there - beside[kind]) / each)) if each else fit
            if resources.taken(resources.min_workers)[kind] > there:
                validator = f" and {beside[kind]:g} for validation" if beside[kind] else ""
                raise ValueError(
                    f"stages.{stage}.resources: {resources.min_workers} workers x {each:g} {kind}s{validator} do not "
                    f"fit this machine, which has {there:g}; lower them, or set ray.address to a cluster"
                )
        if needs_of(resources).keys() - {"CPU", "GPU"}:
            check_places(stage, resources, nodes_of(self.client), least=1)
        return fit

    def _submit(self, spec: StageSpec) -> str:
        """The job that makes the artifact of `spec`: one that runs already, or a new attempt."""
        try:
            running = jobs_of(self.client, artifact=spec.target.uri)
        except (OSError, RuntimeError) as error:
            raise JobLost(f"Ray does not say what it runs: {first_line(error)}") from error
        if running:
            return running[0]
        return self._submit_as(spec, new_attempt(spec))

    def _submit_as(self, spec: StageSpec, job: str) -> str:
        python = sys.executable if self.embedded else "python"
        first = ["-P"] if self.carries_code else []  # else what lies where the node was started would come first
        command = [python, *first, "-m", "genpipe.launch.ray", spec.write(), job]
        metadata = {"artifact": spec.target.uri, "mlflow_run": spec.pipeline_run_id, **spec.links}
        runtime_env = _with_code(self.runtime_env, spec) if self.carries_code else self.runtime_env
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=f"exec {shlex.join(command)}",  # of a shell's child Ray would not see the end
                    submission_id=job,
                    runtime_env=runtime_env,
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return job
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise JobLost(f"Ray refused the job: {first_line(error)}") from error
            except OSError as error:
                raise JobLost(f"Ray does not take the job: {first_line(error)}") from error
            time.sleep(POLL_SECONDS)  # the cluster has only just started

    def _wait(self, spec: StageSpec, job: str, report: Report) -> bool:
        """Wait until the job has made the artifact (True) or was preempted."""
        heard = time.monotonic()
        while not self.interrupted.wait(POLL_SECONDS):
            try:
                status = _status(self.client, job)
            except (OSError, RuntimeError) as error:
                if self.local is not None and not self.local.head.is_alive:
                    raise JobLost("the local Ray has died; the stage goes on in another one") from error
                if time.monotonic() - heard > LOST_SECONDS:
                    raise JobLost(f"Ray has not answered for {LOST_SECONDS:.0f} s: {first_line(error)}") from error
                continue
            heard = time.monotonic()
            if status is not None and not status.is_terminal():
                report(read_progress(spec.work))
                continue
            if artifacts.committed(spec.target) is not None:
                clear_work(spec)  # a driver that was killed after its commit has not
                return True
            if self.interrupted.is_set():
                break
            if str(status) == "STOPPED":
                raise Stopped(f"the job {job} was stopped; run it again to resume")
            stopped = stopping.outcome(spec)
            if stopped is None or self._exit_status(job) != stopped.status:
                raise self._failure(spec, job)
            if stopped.reason == "cancelled":
                raise Stopped(f"{stopped.describe()}; run it again to resume")
            report(read_progress(spec.work))  # which says so
            return False
        raise Stopped(f"{spec.name} was stopped")

    def _exit_status(self, job: str) -> int | None:
        """What the driver of a job that has ended said of it, None where it was killed or nobody knows."""
        try:
            status: int | None = self.client.get_job_info(job).driver_exit_code
        except (OSError, RuntimeError):
            return None
        return status

    def _failure(self, spec: StageSpec, job: str) -> StageError:
        """The error that the job reported; the job's log is put beside it."""
        failure = read_failure(spec.work, job)
        try:
            log = self.client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            log = f"the log of {job} cannot be read: {first_line(error)}"
        where = f"log: {join(spec.work, 'job.log')}"
        try:
            open_storage(spec.work).write("job.log", log.encode())
        except OSError as error:
            where = f"its log cannot be kept: {first_line(error)}"
        if failure is None:
            lines = log.strip().splitlines()[-20:]
            last = f": {lines[-1]}" if lines else ""
            return JobLost(f"the job {job} exited without reporting an error{last} ({where})", details="\n".join(lines))
        kind = JobLost if failure.infrastructure else StageError
        return kind(f"{failure.message} ({where})", details=failure.traceback)


@contextmanager
def cluster(config: RayConfig | None = None) -> Iterator[Cluster]:
    """A cluster for jobs: the one whose dashboard is at the address of `config`, or a local one for the block.

    The processes of a local one die with this one, even if it is killed. Raises ValueError naming `ray.address` where
    no Ray answers.
    """
    config = config or RayConfig()
    runtime_env, carries_code = config.runtime_env, config.code == "checkout"
    if config.address:
        yield Cluster(
            connect(config.address),
            runtime_env=runtime_env,
            capacity={},
            carries_code=carries_code,
            autoscales=config.autoscales,
        )
        return
    local = LocalRay()
    with local.stack:
        there = Cluster(
            local.client, runtime_env=runtime_env, capacity=local.head.capacity, local=local, carries_code=carries_code
        )
        try:
            yield there
        finally:
            there.stop_jobs()


def connect(address: str, *, token: str = "") -> JobSubmissionClient:
    """A client for the jobs of the cluster at `address`. Raises ValueError if none answers within seconds.

    Without `token`, Ray finds its own where it always does (RAY_AUTH_TOKEN, ~/.ray/auth_token).
    """
    remedy = "correct it, start the cluster, or leave ray.address empty for a local Ray"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"ray.address: {address!r} is not a dashboard URL such as http://head:8265; {remedy}")
    try:
        get(f"{address.rstrip('/')}/api/version", token=token, timeout=REACH_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise ValueError(f"ray.address: {address} answers, but not as Ray does ({error}); {remedy}") from None
    except OSError as error:
        raise ValueError(f"ray.address: no Ray dashboard at {address} ({first_line(error)}); {remedy}") from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address, headers=authorization(token))
    except AuthenticationError as error:
        raise ValueError(
            f"ray.address: {address} asks for a token: {first_line(error)}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None


def stop(client: JobSubmissionClient, jobs: Sequence[str] | set[str]) -> None:
    """Stop jobs and wait until they have, for as long as Ray takes to kill one that does not listen."""
    running = [job for job in jobs if not _ended(client, job)]
    for job in running:
        client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and not all(_ended(client, job) for job in running):
        time.sleep(POLL_SECONDS)


def _absent(client: JobSubmissionClient, paths: Sequence[str]) -> list[str]:
    command = ["python", "-c", LOOK, *paths]
    try:
        job = client.submit_job(entrypoint=shlex.join(command), submission_id=f"genpipe-look-{secrets.token_hex(8)}")
        deadline = time.monotonic() + LOOK_SECONDS
        while not _ended(client, job) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        status, said = str(client.get_job_status(job)), client.get_job_logs(job)
    except (OSError, RuntimeError) as error:
        raise JobLost(f"Ray does not run a job: {first_line(error)}") from error
    if status != "SUCCEEDED":
        raise JobLost(f"a job that looks for {', '.join(paths)} on the cluster is {status}: {said.strip()[-500:]}")
    return [path for path in paths if f"{ABSENT}{path}" in said.splitlines()]


def nodes_of(client: JobSubmissionClient) -> list[Node]:
    """What each node that is alive has in all."""
    answer = client._do_request("GET", "/api/v0/nodes?detail=true")  # with the client's token
    answer.raise_for_status()
    found = answer.json()["data"]["result"]["result"]
    return [node["resources_total"] for node in found if node["state"] == "ALIVE"]


def jobs_of(client: JobSubmissionClient, **metadata: str) -> list[str]:
    """The jobs that have not ended and whose metadata holds what is given."""
    return [
        job.submission_id
        for job in client.list_jobs()
        if job.submission_id and not job.status.is_terminal() and metadata.items() <= (job.metadata or {}).items()
    ]


def log_of(artifact: Artifact, *, store: str, address: str) -> tuple[str, bool]:
    """What the last job for an artifact printed, and whether it still runs.

    Raises ValueError where no cluster is named, or no job for it is known there and none left its log in the store.
    """
    if not address:
        raise ValueError(
            "ray.address: a local Ray keeps no logs after its run; what a failed stage printed is in the work folder "
            "that its error names"
        )
    client = connect(address)
    jobs = [job for job in client.list_jobs() if job.submission_id]
    known = [job for job in jobs if (job.metadata or {}).get("artifact") == artifact.uri]
    if known:
        last = max(known, key=lambda job: job.start_time or 0)
        return client.get_job_logs(last.submission_id), not last.status.is_terminal()
    try:
        return open_storage(work_uri(store, artifact.kind, artifact.fingerprint)).read("job.log").decode(), False
    except FileNotFoundError:
        raise ValueError(f"the cluster at {address} knows no job for {artifact.uri}") from None


def _with_code(runtime_env: Mapping[str, Any], spec: StageSpec) -> dict[str, Any]:
    """A runtime environment with the packages that a stage runs, as they are here, before those of the nodes.

    Ray keeps them on the cluster by their content, so that they travel once. (Of a wheel its nodes would have pip
    install every dependency beside it.)
    """
    folders = [str(folder) for folder in packages_of(spec.stage).values()]
    return {
        **runtime_env,
        "py_modules": [*folders, *runtime_env.get("py_modules", ())],
        "excludes": [*runtime_env.get("excludes", ()), "__pycache__"],
        "env_vars": {**runtime_env.get("env_vars", {}), "GENPIPE_REVISION": spec.git_revision},
    }


def _status(client: JobSubmissionClient, job: str) -> Any:
    """The status of a job, None if the cluster knows no such job."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise


def _ended(client: JobSubmissionClient, job: str) -> bool:
    status = _status(client, job)
    return status is None or status.is_terminal()
