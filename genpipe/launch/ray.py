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
import threading
import time
import traceback
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from genpipe import artifacts
from genpipe.config import Config, Resources
from genpipe.launch.head import authorization, get, local_head
from genpipe.launch.turns import Turns
from genpipe.spec import Progress, StageSpec, read_progress, write_progress
from genpipe.storage import join, open_storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
REACH_SECONDS = 5.0
LOST_SECONDS = 60.0
STOP_SECONDS = 15.0
FAILURE = "error.json"

# Ray Train's own pauses, which would otherwise stand in every stage; a group waits in line for CPUs for a week.
TUNING = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "10",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_worker_niceness": "0",  # Ray would have training give way to every other process
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
        self.turns = Turns(capacity, interrupted=self.interrupted)

    @property
    def embedded(self) -> bool:
        return bool(self.capacity)

    @contextmanager
    def turn(self, stage: str, resources: Resources, *, order: int) -> Iterator[None]:
        """Hold what a stage needs of the local Ray, the lowest `order` first; a cluster has a queue of its own.

        Raises ValueError if the local Ray could never run it, Stopped after `interrupt`.
        """
        if not self.embedded:
            yield
            return
        self._fits(stage, resources)
        needs = {"CPU": resources.workers * resources.cpus, "GPU": resources.workers * resources.gpus}
        with self.turns.take(needs, order=order) as granted:
            if not granted:
                raise Stopped(f"{stage} was stopped before it began")
            yield

    def run(self, spec: StageSpec, *, report: Report) -> str:
        """Submit a stage, or adopt the job that already runs it, and wait for its artifact; the job's id.

        `report` gets the progress, None before the first. Raises StageError, JobLost, or Stopped after `interrupt`.
        """
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

    def _fits(self, stage: str, resources: Resources) -> None:
        for kind, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            there = self.capacity.get(kind, 0.0)
            if resources.workers * each > there:
                raise ValueError(
                    f"stages.{stage}.resources: {resources.workers} workers x {each:g} {kind}s do not fit this "
                    f"machine, which has {there:g}; lower them, or set ray.address to a cluster"
                )

    def _submit(self, spec: StageSpec) -> str:
        for attempt in itertools.count(1):
            job = job_id(spec, attempt)
            if _status(self.client, job) is None:
                return self._submit_as(spec, job)
            there = self.client.get_job_info(job)
            ours = (there.metadata or {}).get("artifact") == spec.target.uri  # not of a like stage in another store
            if ours and not there.status.is_terminal():
                return job
        raise AssertionError("unreachable")

    def _submit_as(self, spec: StageSpec, job: str) -> str:
        python = sys.executable if self.embedded else "python"
        command = [python, "-m", "genpipe.launch.ray", spec.write(), job]
        metadata = {"artifact": spec.target.uri, "mlflow_run": spec.pipeline_run_id, **spec.links}
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job,
                    runtime_env=self.runtime_env,
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return job
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise JobLost(f"Ray refused the job: {_first_line(error)}") from error
            time.sleep(POLL_SECONDS)  # the cluster has only just started

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
        told = read_failure(spec.work, job)
        try:
            log = self.client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            log = f"the log of {job} is gone: {_first_line(error)}"
        open_storage(spec.work).write("job.log", log.encode())
        where = join(spec.work, "job.log")
        if told is None:
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
    with local_head({**TUNING, **os.environ}) as head:
        client = connect(head.address, token=head.token)
        local = Cluster(client, runtime_env=runtime_env or {}, capacity=head.capacity)
        try:
            yield local
        finally:
            stop(client, local.jobs)


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
        raise ValueError(f"ray.address: no Ray dashboard at {address} ({_first_line(error)}); {remedy}") from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address, headers=authorization(token))
    except AuthenticationError as error:
        raise ValueError(
            f"ray.address: {address} asks for a token: {_first_line(error)}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None


def job_id(spec: StageSpec, attempt: int) -> str:
    """The submission id of an attempt at a stage: the same whoever submits it."""
    return f"genpipe-{spec.stage}-{spec.target.fingerprint[:16]}-{attempt}"


def stop(client: JobSubmissionClient, jobs: Sequence[str] | set[str]) -> None:
    """Stop jobs and wait until they have, for as long as Ray takes to kill one that does not listen."""
    running = [job for job in jobs if not _ended(client, job)]
    for job in running:
        client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and not all(_ended(client, job) for job in running):
        time.sleep(POLL_SECONDS)


def jobs_of(client: JobSubmissionClient, **metadata: str) -> list[str]:
    """The jobs that have not ended and whose metadata holds what is given."""
    return [
        job.submission_id
        for job in client.list_jobs()
        if job.submission_id and not job.status.is_terminal() and metadata.items() <= (job.metadata or {}).items()
    ]


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


class Failure(Config):
    """Why a job failed, as its work folder's `error.json` says."""

    job: str
    message: str
    infrastructure: bool = Field(description="a new attempt may well succeed")
    traceback: str


def read_failure(work: str, job: str) -> Failure | None:
    """The failure that `job` left under `work`, if it did."""
    try:
        failure = Failure.model_validate_json(open_storage(work).read(FAILURE))
    except FileNotFoundError:
        return None
    return failure if failure.job == job else None


@contextmanager
def telling(spec: StageSpec, job: str) -> Iterator[None]:
    """Leave an exception of the block where the job's submitter finds it, unless one is told already."""
    try:
        yield
    except Exception as error:
        if read_failure(spec.work, job) is None and not isinstance(error, JobLost) and ENDING not in str(error):
            failure = Failure(
                job=job,
                message=str(error).strip() or type(error).__name__,
                infrastructure=isinstance(error, ConnectionError | TimeoutError) or _lost_a_peer(error),
                traceback=traceback.format_exc(),
            )
            open_storage(spec.work).write(FAILURE, failure.model_dump_json().encode())
        raise


ENDING = "cannot schedule new futures after"
"""What work says in a process that Ray is ending meanwhile, which is no failure of the work."""


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: that rank's end is the failure, not this one."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Gloo", "NCCL", "by peer"))


class RayLauncher:
    """Does a stage's work on the cluster that this process, the job's driver, is connected to."""

    def __init__(self, job: str) -> None:
        self.job = job

    def train(self, spec: StageSpec, run_id: str) -> None:
        """Train on Ray Train; ranks that are lost start again from the newest checkpoint, `max_failures` times."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = Resources.model_validate(spec.config["resources"])
        each = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        trainer = TorchTrainer(
            _train_rank,
            train_loop_config={"spec": spec.model_dump(mode="json"), "run_id": run_id, "job": self.job},
            scaling_config=ScalingConfig(
                num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=each
            ),
            run_config=RunConfig(
                name=f"{self.job}-{int(time.time())}",
                storage_path=join(spec.work, "ray"),
                failure_config=FailureConfig(max_failures=resources.max_failures),
            ),
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            self._raise_told(spec)
            raise JobLost(f"Ray Train gave up: {_first_line(error)}") from error
        self._raise_told(spec)

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        """Map the parts on Ray Data, one actor a worker; a part is tried again `max_failures` times."""
        import ray.data
        from ray.exceptions import RayError

        resources = Resources.model_validate(spec.config["resources"])
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        done = ray.data.from_items(list(parts), override_num_blocks=len(parts)).map_batches(
            _MapPart,
            fn_constructor_args=(spec.model_dump(mode="json"), self.job),
            compute=ray.data.ActorPoolStrategy(size=min(resources.workers, len(parts))),
            batch_size=1,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
        )
        started = time.monotonic()
        write_progress(spec.work, Progress(done=0, total=len(parts), unit="parts"))
        try:
            for count, _ in enumerate(done.iter_rows(), 1):
                rate = count / (time.monotonic() - started)
                write_progress(spec.work, Progress(done=count, total=len(parts), unit="parts", rate=rate))
        except RayError as error:
            self._raise_told(spec)
            raise JobLost(f"Ray Data gave up: {_first_line(error)}") from error

    def _raise_told(self, spec: StageSpec) -> None:
        told = read_failure(spec.work, self.job)
        if told is not None and not told.infrastructure:
            raise StageError(told.message, details=told.traceback)


def _train_rank(config: dict[str, Any]) -> None:
    """One rank of a training stage, in a Ray Train worker."""
    import ray.train.torch

    from genpipe.launch.execute import train_rank

    spec, job = StageSpec.model_validate(config["spec"]), config["job"]
    told = read_failure(spec.work, job)
    if told is not None and not told.infrastructure:
        return  # the fault is the stage's own, so a restarted group has nothing to try
    context = ray.train.get_context()
    try:
        with telling(spec, job):
            train_rank(
                spec,
                config["run_id"],
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=ray.train.torch.get_device(),
            )
    except Exception:
        told = read_failure(spec.work, job)
        if told is None or told.infrastructure or context.get_world_size() > 1:
            raise  # other ranks may be waiting for this one; Ray Train ends them


class _MapPart:
    """A data stage's worker in a Ray Data actor."""

    def __init__(self, spec: dict[str, Any], job: str) -> None:
        from genpipe.launch.execute import PartWorker

        self.spec = StageSpec.model_validate(spec)
        self.job = job
        self.resources = Resources.model_validate(self.spec.config["resources"])
        with telling(self.spec, job):
            self.worker = PartWorker(self.spec)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with telling(self.spec, self.job):
            for part in map(str, batch["item"]):
                self._begin(part)
                self.worker(part)
        return batch

    def _begin(self, part: str) -> None:
        """Count this attempt in the work folder, as Ray Data itself would try for ever. Raises StageError."""
        begun, lives = open_storage(join(self.spec.work, "begun", self.job, part)), self.resources.max_failures
        died = len(list(begun.list()))
        if died > lives:
            raise StageError(
                f"{part} has ended its worker {died} times, by its memory or with its machine (resources.max_failures "
                f"is {lives}); give a worker more memory, or smaller parts, or raise resources.max_failures"
            )
        begun.write(str(died), b"")


def drive(spec_uri: str, job: str) -> int:
    """The driver of one job: run the stage; the exit status."""
    os.environ.update({key: value for key, value in TUNING.items() if key not in os.environ})
    spec = StageSpec.read(spec_uri)
    spec = spec.model_copy(update={"links": {**spec.links, "ray_job": job}})
    try:
        with telling(spec, job):
            import ray

            from genpipe.launch.execute import execute

            ray.init(address="auto", logging_level=logging.WARNING)
            signal.signal(signal.SIGTERM, _stop_driver)  # Ray's own handler would leave the MLflow run running
            execute(spec, RayLauncher(job))
            ray.shutdown()  # at exit it would sleep first, for logs that nobody waits for
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _stop_driver(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("the job was stopped")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    # By its own name, so that what is sent to workers is found there by reference.
    status = importlib.import_module("genpipe.launch.ray").drive(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is committed, and taking the interpreter down would add seconds to every stage
