"""Stages as Ray jobs: training on Ray Train, data stages on Ray Data.

A stage is submitted as a job whose id follows from its fingerprint, so that whoever submits it again finds the one
that runs. `python -m genpipe.launch.ray SPEC JOB` is the job's driver, on the local Ray that a run starts for itself
and on a cluster alike. What a job tells its submitter lies in the stage's work folder: progress, and the error.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from genpipe import artifacts
from genpipe.config import Config, Resources
from genpipe.launch.spec import Progress, StageSpec, read_progress, write_progress
from genpipe.storage import join, open_storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 0.3
REACH_SECONDS = 5.0
LOST_SECONDS = 60.0
OBJECT_STORE_BYTES = 256 * 2**20

# Ray Train's own pauses, which would otherwise stand in every stage; a group waits in line for CPUs for a week.
TUNING = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


class StageError(RuntimeError):
    """The stage itself failed; running it again as it is would fail again. `details` is for a debugger."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class JobLost(StageError):
    """The job ended without a word (a killed driver, a lost node or cluster); a new attempt goes on from there."""


class Stopped(Exception):
    """The job was stopped or let go because its submitter was asked to stop."""


Report = Callable[[Progress | None], None]


class Cluster:
    """A Ray cluster that takes jobs."""

    def __init__(self, client: JobSubmissionClient, *, runtime_env: dict[str, Any], capacity: dict[str, float]) -> None:
        self.client = client
        self.runtime_env = runtime_env
        self.capacity = capacity
        self.jobs: set[str] = set()
        self.interrupted = threading.Event()

    @property
    def embedded(self) -> bool:
        return bool(self.capacity)

    def run(self, spec: StageSpec, *, report: Report) -> str:
        """Submit a stage, or adopt the job that already runs it, and wait for its artifact; the job's id.

        `report` gets the progress, None before the first. Raises ValueError if the local Ray could never run it,
        StageError, JobLost, or Stopped after `interrupt`.
        """
        self._fits(spec)
        job = self._submit(spec)
        self.jobs.add(job)
        try:
            self._wait(spec, job, report)
        finally:
            if not self.interrupted.is_set():
                self.jobs.discard(job)
        return job

    def interrupt(self, *, stop_jobs: bool) -> None:
        """Make every `run` return; stop their jobs, or leave them to be adopted."""
        self.interrupted.set()
        if stop_jobs:
            stop(self.client, self.jobs)

    def _fits(self, spec: StageSpec) -> None:
        resources = Resources.model_validate(spec.config.get("resources", {}))
        for kind, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            there = self.capacity.get(kind, 0.0)
            if self.embedded and resources.workers * each > there:
                raise ValueError(
                    f"stages.{spec.stage}.resources: {resources.workers} workers x {each:g} {kind}s do not fit this "
                    f"machine, which has {there:g}; lower them, or set ray.address to a cluster"
                )

    def _submit(self, spec: StageSpec) -> str:
        for attempt in itertools.count(1):
            job = job_id(spec, attempt)
            status = _status(self.client, job)
            if status is None:
                return self._submit_as(spec, job)
            if not status.is_terminal():
                return job
        raise AssertionError("unreachable")

    def _submit_as(self, spec: StageSpec, job: str) -> str:
        python = sys.executable if self.embedded else "python"
        command = [python, "-m", "genpipe.launch.ray", spec.write(), job]
        metadata = {"fingerprint": spec.target.fingerprint, "mlflow_run": spec.pipeline_run_id, **spec.links}
        try:
            self.client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=job,
                runtime_env=self.runtime_env,
                metadata=metadata,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise JobLost(f"Ray refused the job: {_first_line(error)}") from error
        return job

    def _wait(self, spec: StageSpec, job: str, report: Report) -> None:
        heard = time.monotonic()
        while not self.interrupted.wait(POLL_SECONDS):
            try:
                status = _status(self.client, job)
            except OSError as error:
                if time.monotonic() - heard > LOST_SECONDS:
                    raise JobLost(f"Ray has not answered for {LOST_SECONDS:.0f} s: {_first_line(error)}") from error
                continue
            heard = time.monotonic()
            if status is not None and not status.is_terminal():
                report(read_progress(spec.work))
                continue
            if artifacts.find(spec.target.uri) is not None:
                return
            if self.interrupted.is_set():
                break
            raise self._failure(spec, job)
        raise Stopped(f"{spec.stage} was stopped")

    def _failure(self, spec: StageSpec, job: str) -> StageError:
        """The error that the job left; the job's log is put beside it."""
        told = read_failure(spec.work)
        try:
            log = self.client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            log = f"the log of {job} is gone: {_first_line(error)}"
        open_storage(spec.work).write("job.log", log.encode())
        where = join(spec.work, "job.log")
        if told is None or told.job != job:
            tail = "\n".join(log.strip().splitlines()[-20:])
            return JobLost(f"the job {job} died; its log: {where}", details=tail)
        kind = JobLost if told.infrastructure else StageError
        return kind(f"{told.message} (log: {where})", details=told.traceback)


@contextmanager
def cluster(address: str = "", *, runtime_env: dict[str, Any] | None = None) -> Iterator[Cluster]:
    """A cluster for jobs: the one whose dashboard is at `address`, or a local one that ends with the block.

    A local one must be opened on the main thread; its processes die with this one, even if it is killed. Raises
    ValueError naming `ray.address` where no Ray answers.
    """
    if address:
        yield Cluster(connect(address), runtime_env=runtime_env or {}, capacity={})
        return
    with tempfile.TemporaryDirectory(prefix="genpipe-ray-", ignore_cleanup_errors=True) as folder:
        import ray

        os.environ.update({key: value for key, value in TUNING.items() if key not in os.environ})
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            client = connect(f"http://{context.dashboard_url}")
            local = Cluster(client, runtime_env=runtime_env or {}, capacity=ray.cluster_resources())
            try:
                yield local
            finally:
                stop(client, local.jobs)
        finally:
            ray.shutdown()


def connect(address: str) -> JobSubmissionClient:
    """A client for the jobs of the cluster at `address`. Raises ValueError if none answers within seconds."""
    import urllib.request

    remedy = "correct it, start the cluster, or leave ray.address empty for a local Ray"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"ray.address: {address!r} is not a dashboard URL such as http://head:8265; {remedy}")
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=_auth())
        with urllib.request.urlopen(request, timeout=REACH_SECONDS) as response:
            response.read()
    except OSError as error:
        raise ValueError(f"ray.address: no Ray dashboard at {address} ({_first_line(error)}); {remedy}") from None
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)
