"""A stage on Ray: training on Ray Train, data stages on Ray Data.

`python -m genpipe.launch.ray SPEC JOB` is the driver of a job that `launch/jobs.py` submitted.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from genpipe.config import Resources
from genpipe.launch import lease
from genpipe.launch.failure import BEGUN, JobLost, StageError, first_line, read_failure, report_failure
from genpipe.launch.local_ray import TUNING
from genpipe.pipeline.spec import Progress, StageSpec, write_progress
from genpipe.storage import join, open_storage

INSIST_SECONDS = 3.0


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
            with _insisting():
                trainer.fit()
        except TrainingFailedError as error:
            self._raise_failure(spec)
            raise _judged(error) from error
        self._raise_failure(spec)

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
            with _insisting():
                for count, _ in enumerate(done.iter_rows(), 1):
                    rate = count / (time.monotonic() - started)
                    write_progress(spec.work, Progress(done=count, total=len(parts), unit="parts", rate=rate))
        except RayError as error:
            self._raise_failure(spec)
            raise JobLost(f"Ray Data gave up: {first_line(error)}") from error

    def _raise_failure(self, spec: StageSpec) -> None:
        """Raise what the stage itself failed of, if a worker has reported that."""
        failure = read_failure(spec.work, self.job)
        if failure is not None and not failure.infrastructure:
            raise StageError(failure.message, details=failure.traceback)


def _infrastructure() -> tuple[type[Exception], ...]:
    """Exceptions that say that a part of the cluster is gone, whoever of the stage's processes meets them."""
    from ray.exceptions import RayError
    from torch.distributed import DistError

    return RayError, DistError


def _judged(error: Exception) -> StageError:
    """What it means that Ray Train gave up, after it has started the group `max_failures` times again.

    A rank cannot tell its own RuntimeError from that of a collective whose other side is gone. If at last no rank was
    lost, the error is the stage's own.
    """
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback as RankError

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = [failure for failure in failures.values() if isinstance(failure, RankError)]
    own = [failure for failure in raised if type(failure._base_exc) is RuntimeError]
    if own and len(raised) == len(failures):
        return StageError(first_line(own[0]._base_exc), details=str(own[0]))
    return JobLost(f"Ray Train gave up: {first_line(error)}")


def _train_rank(config: dict[str, Any]) -> None:
    """One rank of a training stage, in a Ray Train worker."""
    import ray.train.torch

    from genpipe.launch.rank import train_rank

    spec, job = StageSpec.model_validate(config["spec"]), config["job"]
    failure = read_failure(spec.work, job)
    if failure is not None and not failure.infrastructure:
        return  # the fault is the stage's own, so a restarted group has nothing to try
    context = ray.train.get_context()
    try:
        peers = context.get_world_size() - 1
        with report_failure(spec, job, infrastructure=_infrastructure(), peers=peers):
            train_rank(
                spec,
                config["run_id"],
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=ray.train.torch.get_device(),
            )
    except Exception:
        failure = read_failure(spec.work, job)
        if failure is None or failure.infrastructure or context.get_world_size() > 1:
            raise  # other ranks may be waiting for this one; Ray Train ends them


class _MapPart:
    """A data stage's worker in a Ray Data actor."""

    def __init__(self, spec: dict[str, Any], job: str) -> None:
        from genpipe.launch.run_stage import PartWorker

        self.spec = StageSpec.model_validate(spec)
        self.job = job
        self.resources = Resources.model_validate(self.spec.config["resources"])
        with report_failure(self.spec, job, infrastructure=_infrastructure()):
            self.worker = PartWorker(self.spec)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with report_failure(self.spec, self.job, infrastructure=_infrastructure()):
            for part in map(str, batch["item"]):
                self._begin(part)
                self.worker(part)
        return batch

    def _begin(self, part: str) -> None:
        """Count in the work folder that the part begins, as Ray Data would restart its worker for ever.

        Raises StageError once it has killed more workers than `resources.max_failures` allows.
        """
        begun = open_storage(join(self.spec.work, f"{BEGUN}{self.job}", part))
        lives = self.resources.max_failures
        died = len(list(begun.list()))
        if died > lives:
            raise StageError(
                f"{part} has killed its worker {died} times, by its memory or with its machine (resources.max_failures "
                f"is {lives}); give workers more memory, make parts smaller, or raise resources.max_failures"
            )
        begun.write(str(died), b"")


def drive(spec_uri: str, job: str) -> int:
    """The driver of one job: run the stage; the exit status."""
    os.environ.update({key: value for key, value in TUNING.items() if key not in os.environ})
    spec = StageSpec.read(spec_uri)
    spec = spec.model_copy(update={"links": {**spec.links, "ray_job": job}})
    try:
        with report_failure(spec, job, infrastructure=_infrastructure()):
            import ray

            from genpipe.launch.run_stage import execute

            ray.init(address="auto", logging_level=logging.WARNING)
            signal.signal(signal.SIGTERM, _stop_driver)  # Ray's own handler would leave the MLflow run running
            execute(spec, RayLauncher(job), attempt=job, lost=lease.leave)
            ray.shutdown()  # at exit it would sleep first, for logs that nobody waits for
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _insisting() -> Iterator[None]:
    """In the block a SIGTERM raises KeyboardInterrupt again and again until it is heard.

    What is raised while Ray runs a destructor or a callback of the garbage collector is lost.
    """

    def insist(signum: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS)
        _stop_driver(signum, frame)

    usual = {number: signal.signal(number, insist) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in usual.items():
            signal.signal(number, handler)


def _stop_driver(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("the job was stopped")


if __name__ == "__main__":
    # By its own name, so that what is sent to workers is found there by reference.
    status = importlib.import_module("genpipe.launch.ray").drive(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is committed, and taking the interpreter down would add seconds to every stage
