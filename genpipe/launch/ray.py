"""A stage on Ray: training on Ray Train, data stages on Ray Data.

`python -m genpipe.launch.ray SPEC JOB` is the driver of a job that `launch/jobs.py` submitted.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from genpipe import artifacts
from genpipe.launch import lease, stopping
from genpipe.launch.failure import BEGUN, JobLost, StageError, first_line, read_failure, report_failure
from genpipe.launch.local_ray import TUNING
from genpipe.launch.placement import needs_of, options_of
from genpipe.launch.process import CPU_MEMORY, end_process
from genpipe.launch.ray_validator import ranks_beside, validator
from genpipe.launch.stopping import StageStopped, Stopped
from genpipe.launch.watchdog import last_hang
from genpipe.pipeline.spec import Progress, StageSpec, write_progress
from genpipe.stage_config import Resources
from genpipe.storage import join, open_storage

INSIST_SECONDS = 3.0
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 1.0
"""Between two reports of progress: each is a write to the store, and parts may end faster than those."""
CANCEL_SECONDS = 30.0
GROUP_START_SECONDS = 15
"""For which a group that may have fewer ranks waits for its places before Ray Train counts them anew."""
GROW_SECONDS = 300.0
"""How often a group looks for room for more ranks: growing costs a start, and what was done since a checkpoint."""
JOB_STOP_SECONDS = 3.0
"""For which Ray lets a job end that it has sent a SIGTERM, unless RAY_JOB_STOP_WAIT_TIME_S says otherwise."""
END_SECONDS = 4.0
"""Of these, what the driver keeps for its own end."""
ALONE = "alone-"
"""Begins the names under which it is counted that a part began with no other in its worker."""


class RayLauncher:
    """Does a stage's work on the cluster that this process, the job's driver, is connected to."""

    def __init__(self, job: str) -> None:
        self.job = job

    def train(self, spec: StageSpec, run_id: str) -> bool:
        """Train on Ray Train; returns whether rank 0 has recorded the artifact that it committed.

        Ranks that are lost start again from the newest checkpoint, `max_failures` times.
        Ranks that are preempted write a checkpoint and start again from it, any number of times. Raises StageStopped
        where it is this driver that is to stop, or somebody cancels the stage.
        """
        stopping.withdraw(spec)
        with validator(spec):
            while artifacts.committed(spec.target) is None:
                with _insisting(spec) as told, _obeying(spec, grace=CANCEL_SECONDS):
                    ended = self._fit(spec, run_id)
                if not isinstance(ended, Stopped):
                    assert artifacts.committed(spec.target), "ranks end with an artifact or on request"
                    return ended
                if told or ended.reason == "cancelled":
                    raise StageStopped(ended)
                stopping.withdraw(spec)  # each rank hears of a preemption, and may say so after the others stopped
        return False

    def _fit(self, spec: StageSpec, run_id: str) -> Stopped | bool:
        """Train to the end, and say whether that is on record, or until the ranks stop on request."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

        from genpipe.launch.ray_ranks import ProcessGroup, RankTrainer

        resources = Resources.model_validate(spec.config["resources"])
        if resources.min_workers < resources.max_workers:  # a node that is gone may be counted on for a moment
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(GROUP_START_SECONDS)
        trainer = RankTrainer(
            _train_rank,
            train_loop_config={"spec": spec.model_dump(mode="json"), "run_id": run_id, "job": self.job},
            scaling_config=ScalingConfig(
                num_workers=ranks_beside(resources),
                elastic_resize_monitor_interval_s=GROW_SECONDS,
                use_gpu=resources.gpus > 0,
                resources_per_worker=needs_of(resources),
                placement_strategy=resources.placement or "PACK",
            ),
            run_config=RunConfig(
                name=f"{self.job}-{int(time.time())}",
                storage_path=join(spec.work, "ray"),
                failure_config=FailureConfig(max_failures=resources.max_failures),  # preemptions are not counted
                worker_runtime_env={} if resources.gpus else {"env_vars": _unless_set(CPU_MEMORY)},
            ),
            backend_config=ProcessGroup("nccl" if resources.gpus else "gloo"),
        )
        began = time.time()
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            self._raise_failure(spec)
            raise _judged(error, last_hang(spec.work, since=began)) from error
        self._raise_failure(spec)
        told = result.return_value  # by rank 0
        return Stopped.model_validate(told) if isinstance(told, dict) else bool(told)

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        """Map the parts on Ray Data, one actor a worker; a part is tried again `max_failures` times.

        An actor of a stage that says so has several parts at a time, whose tasks are threads of its process.
        """
        import ray.data
        from ray.exceptions import RayError

        from genpipe.launch.run_stage import parts_at_once

        resources = Resources.model_validate(spec.config["resources"])
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        at_once = parts_at_once(spec, len(parts), workers=resources.max_workers)
        done = ray.data.from_items(list(parts), override_num_blocks=len(parts)).map_batches(
            _MapPart,
            fn_constructor_args=(spec.model_dump(mode="json"), self.job, at_once),
            compute=ray.data.ActorPoolStrategy(
                min_size=min(resources.min_workers, len(parts)),
                max_size=min(resources.max_workers, len(parts)),
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,
            ),
            batch_size=1,
            **options_of(resources),
        )
        stopping.withdraw(spec)
        started = time.monotonic()
        write_progress(spec.work, Progress(done=0, total=len(parts), unit="parts"))
        try:
            with _insisting(), _obeying(spec, grace=0):
                told = 0.0
                for count, _ in enumerate(done.iter_rows(), 1):
                    now = time.monotonic()
                    if now > told + PROGRESS_SECONDS or count == len(parts):
                        rate = count / (now - started)
                        write_progress(spec.work, Progress(done=count, total=len(parts), unit="parts", rate=rate))
                        told = now
                    if count % artifacts.ROLL == 0:
                        with suppress(OSError):  # of the store, which may be back for the next thousand
                            artifacts.finished_parts(spec.target.uri)  # so that the end need not read all markers
        except RayError as error:
            self._raise_failure(spec)
            raise JobLost(f"Ray Data gave up: {first_line(error)}") from error

    def _raise_failure(self, spec: StageSpec) -> None:
        """Raise what the stage itself failed of, if a worker has reported that."""
        failure = read_failure(spec.work, self.job)
        if failure is not None and not failure.infrastructure:
            raise StageError(failure.message, details=failure.traceback)


def _unless_set(defaults: Mapping[str, str]) -> dict[str, str]:
    """Variables of the environment, with what the user has set in place of its default."""
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def _infrastructure(*, ranks: bool = False) -> tuple[type[Exception], ...]:
    """Exceptions that say that a part of the cluster is gone; `ranks` may meet those of torch as well."""
    from ray.exceptions import RayError

    if not ranks:
        return (RayError,)
    from torch.distributed import DistError

    return RayError, DistError


def _judged(error: Exception, hang: str) -> StageError:
    """What it means that Ray Train gave up, after it has started the group `max_failures` times again.

    A rank cannot tell its own RuntimeError from that of a collective whose other side is gone. If at last no rank was
    lost, the error is the stage's own.
    """
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback as RankError

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = [failure for failure in failures.values() if isinstance(failure, RankError)]
    own = [failure for failure in raised if type(failure._base_exc) is RuntimeError]
    if own and not hang and len(raised) == len(failures):
        return StageError(first_line(own[0]._base_exc), details=str(own[0]))
    return JobLost(f"Ray Train gave up: {hang or first_line(error)}")


def _preemption_notice() -> str:
    """Who takes a node of this rank's group away, once Ray says so.

    Read where Ray Train keeps it: `ray.train.get_preemption_info` is a barrier for all ranks.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return f"Ray, which drains {', '.join(node[:12] for node in info.preempted_node_ids)}" if info else ""


def _train_rank(config: dict[str, Any]) -> dict[str, Any] | bool:
    """One rank of a training stage, in a Ray Train worker; whether it recorded the end, or why it stopped."""
    import ray.train.torch
    import torch

    from genpipe.launch.rank import train_rank

    spec, job = StageSpec.model_validate(config["spec"]), config["job"]
    failure = read_failure(spec.work, job)
    if failure is not None and not failure.infrastructure:
        return False  # the fault is the stage's own, so a restarted group has nothing to try
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        peers = context.get_world_size() - 1
        with report_failure(spec, job, infrastructure=_infrastructure(ranks=True), peers=peers):
            return train_rank(
                spec,
                config["run_id"],
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=device,
                notice=_preemption_notice,
                attended=spec.config["resources"]["validation"] is not None,
            )
    except StageStopped as stop:
        return stop.stopped.model_dump(mode="json")
    except Exception:
        failure = read_failure(spec.work, job)
        if failure is None or failure.infrastructure or context.get_world_size() > 1:
            raise  # other ranks may be waiting for this one; Ray Train ends them
    return False


class _MapPart:
    """A data stage's worker in a Ray Data actor, called by `at_once` threads."""

    def __init__(self, spec: dict[str, Any], job: str, at_once: int) -> None:
        from genpipe.launch.run_stage import PartWorker

        self.spec = StageSpec.model_validate(spec)
        self.job = job
        self.resources = Resources.model_validate(self.spec.config["resources"])
        self.at_once = at_once
        self.places, self.door = threading.Semaphore(at_once), threading.Lock()
        with report_failure(self.spec, job, infrastructure=_infrastructure()):
            self.worker = PartWorker(self.spec)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with report_failure(self.spec, self.job, infrastructure=_infrastructure()):
            for part in map(str, batch["item"]):
                self._map(part)
        return batch

    def _map(self, part: str) -> None:
        """Map a part that no worker has begun before beside others, and any other alone: it may be deadly.

        It is counted in the work folder that a part begins, as Ray Data would restart its worker for ever. Raises
        StageError once one has killed more workers, which had nothing else, than `resources.max_failures` allows.
        """
        begun = open_storage(join(self.spec.work, f"{BEGUN}{self.job}", part))
        before = [entry.key for entry in begun.list()]
        again = bool(before)
        if again and not artifacts.missing_parts(self.spec.target.uri, [part]):
            return  # it was in place when its worker died of another
        died = sum(key.startswith(ALONE) for key in before)
        if died > self.resources.max_failures:
            raise StageError(_deadly(part, died, self.resources.max_failures))
        alone = again or self.at_once == 1
        with self._room(self.at_once if alone else 1):
            begun.write(f"{ALONE}{died}" if alone else "beside others", b"")
            self.worker(part)

    @contextmanager
    def _room(self, places: int) -> Iterator[None]:
        """In the block `places` of `at_once` are this thread's; those who come later wait behind it."""
        with self.door:
            for _ in range(places):
                self.places.acquire()
        try:
            yield
        finally:
            self.places.release(places)


def _deadly(part: str, died: int, lives: int) -> str:
    return (
        f"{part} has killed its worker {died} times, by its memory or with its machine (resources.max_failures "
        f"is {lives}); give workers more memory, make parts smaller, or raise resources.max_failures"
    )


def drive(spec_uri: str, job: str) -> int:
    """The driver of one job: run the stage; the exit status.

    A driver that is told to end is preempted: its submitter knows if it wanted the job to stop.
    """
    os.environ.update(_unless_set(TUNING))
    spec = StageSpec.read(spec_uri)
    spec = spec.model_copy(update={"links": {**spec.links, "ray_job": job}})
    try:
        with report_failure(spec, job, infrastructure=_infrastructure()):
            import ray

            from genpipe.launch.run_stage import execute

            if sys.flags.safe_path:  # our code travelled, and Ray has workers look first into the driver's folder
                os.chdir(Path(artifacts.__file__).parent.parent)
            ray.init(address="auto", logging_level=logging.WARNING)
            signal.signal(signal.SIGTERM, _stop_driver)  # Ray's own handler would leave the MLflow run running
            execute(spec, RayLauncher(job), attempt=job, lost=lease.leave)
            ray.shutdown()  # at exit it would sleep first, for logs that nobody waits for
    except StageStopped as stop:
        print(stop, flush=True)
        return stop.stopped.status
    except KeyboardInterrupt:
        return stopping.answer(spec, done="what was finished").stopped.status
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _insisting(spec: StageSpec | None = None) -> Iterator[list[str]]:
    """In the block a SIGTERM raises KeyboardInterrupt again and again until it is heard.

    What is raised while Ray runs a destructor or a callback of the garbage collector is lost. The ranks of
    a training stage are first asked to stop, and given the time that Ray gives this driver; yields what they were told.
    """
    told: list[str] = []

    def insist(signum: int, frame: FrameType | None) -> None:
        if spec and not told and signum == signal.SIGTERM:
            told.append(stopping.this_process("SIGTERM"))
            request = partial(stopping.request_stop, spec, "preempted", by=told[0])
            threading.Thread(target=request, daemon=True).start()
            seconds = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_SECONDS)) - END_SECONDS
            signal.setitimer(signal.ITIMER_REAL, max(seconds, POLL_SECONDS))
            return
        signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS)
        _stop_driver(signum, frame)

    usual = {number: signal.signal(number, insist) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield told
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def _obeying(spec: StageSpec, *, grace: float) -> Iterator[None]:
    """In the block a cancellation ends this driver, if the ranks have not heard it within `grace` seconds.

    They may be waiting for their place on the cluster, and data stages do not listen.
    """
    ended = threading.Event()

    def obey() -> None:
        while not ended.wait(POLL_SECONDS):
            with suppress(OSError):  # of the store, which may be back at the next look
                request = stopping.requested(spec)
                if request and request.reason == "cancelled" and not ended.wait(grace):
                    os.kill(os.getpid(), signal.SIGALRM)  # which `_insisting` hears

    threading.Thread(target=obey, name="cancellation", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _stop_driver(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("the job was stopped")


if __name__ == "__main__":
    # By its own name, so that what is sent to workers is found there by reference.
    end_process(importlib.import_module("genpipe.launch.ray").drive(*sys.argv[1:]))
