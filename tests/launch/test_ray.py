"""Stages on a real Ray: one local cluster for the module, jobs through its dashboard, faults by real signals."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from toybox import Toys, artifact_of, saved, wait_for

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.launch import jobs as on_ray
from genpipe.launch import ray as driver
from genpipe.launch import stopping
from genpipe.launch.failure import JobLost, StageError
from genpipe.launch.jobs import Cluster, connect
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import Progress, StageSpec, read_progress
from genpipe.stage_config import Resources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(ray: Cluster, spec: StageSpec) -> str:
    return ray.run(spec, report=lambda progress: None)


def submitted(ray: Cluster, spec: StageSpec) -> dict[str, str]:
    """The jobs that were to make an artifact, with their status."""
    mine = [job for job in ray.client.list_jobs() if (job.metadata or {}).get("artifact") == spec.target.uri]
    return {str(job.submission_id): str(job.status) for job in mine}


def run_of(toys: Toys, spec: StageSpec) -> Run:
    """The only MLflow run of the fingerprint."""
    client = MlflowClient(toys.tracking_uri)
    experiment = client.get_experiment_by_name(spec.experiment)
    assert experiment is not None
    query = f"tags.`genpipe.fingerprint` = '{spec.target.fingerprint}'"
    [found] = client.search_runs([experiment.experiment_id], query)
    return found


def history(toys: Toys, spec: StageSpec, name: str) -> list[tuple[int, float]]:
    """(samples seen, value) of a metric of a finished stage."""
    found = run_of(toys, spec)
    assert found.info.status == "FINISHED"
    metrics = MlflowClient(toys.tracking_uri).get_metric_history(found.info.run_id, name)
    return [(metric.step, metric.value) for metric in metrics]


def weights(spec: StageSpec) -> dict[str, torch.Tensor]:
    return load_file(artifacts.fetch(artifact_of(spec)) / "model.safetensors")


def with_torch(ray: Cluster) -> list[int]:
    """Those of the processes of a local Ray that have loaded torch."""
    assert ray.local is not None
    found = []
    for process in psutil.Process(ray.local.head.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # of one that ends meanwhile
            found += [process.pid] if any("libtorch" in part.path for part in process.memory_maps()) else []
    return found


def test_two_ranks_on_s3_train_as_one_here(ray_on_s3: Cluster, toys: Toys, alone: Toys, tmp_path: Path) -> None:
    """Inputs, ranks and checkpoints without a shared folder.

    The global batch is the same samples with the same noise, so the weights agree up to rounding.
    """
    toys.store = f"s3://genpipe/{tmp_path.name}"
    made = run_local(toys.spec("toy_data"))
    resources = {"workers": 2, "cpus": 0.5, "checkpoint_seconds": 0.1}
    two = toys.line(made, samples=160, step_seconds=0.02, resources=resources)
    run(ray_on_s3, two)
    assert artifacts.verify(two.target.uri).artifact.fingerprint == two.target.fingerprint
    assert read_progress(two.work) is None, "what was left of the work is gone"
    one = alone.line(made, samples=160)
    run_local(one)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-5)
    assert weights(one)["weight"].item() > 0.5, "it did learn something on its way to the slope of 2"


def test_as_many_ranks_train_as_there_is_room_for(ray: Cluster, toys: Toys, data: Artifact, alone: Toys) -> None:
    """Two where a third does not fit, and they train as one does."""
    resources = {"workers": [1, 3], "cpus": ray.capacity["CPU"] / 2}
    spec = toys.line(data, samples=80, train={"micro_batch_size": 1}, resources=resources)
    with ray.turn("toy_line", Resources.model_validate(resources), order=0):
        assert ray.turns.free["CPU"] == 0, "all that they can use is theirs"
        job = run(ray, spec)
    assert "Started training worker group of size 2" in ray.client.get_job_logs(job)
    one = alone.line(data, samples=80, train={"micro_batch_size": 1})
    run_local(one)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(spec)[name], tensor, rtol=0, atol=1e-5)


def has_huge_pages(pid: int) -> bool:
    """Whether a process has some in its heap, or could have none on this machine."""
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text() or platform.libc_ver() < ("glibc", "2.35"):
        return True
    maps = Path(f"/proc/{pid}/smaps").read_text()
    return any(map(int, re.findall(r"\[heap\]\n(?:\w+:.*\n)*?AnonHugePages: +([0-9]+) kB", maps)))


def threads_of(pid: int) -> set[str]:
    """Their names."""
    names = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended
            names.add((task / "comm").read_text().strip())
    return names


def test_ranks_that_are_killed_or_stopped_are_replaced(ray: Cluster, toys: Toys, data: Artifact) -> None:
    """By others that go on from a checkpoint: one is killed, and that in its place is stopped, which is found.

    Each alone has imported torch, which takes seconds in every process that does.
    """
    resources = {"checkpoint_seconds": 0.1, "hang_seconds": 4.0}
    spec = toys.line(data, samples=1200, step_seconds=0.05, resources=resources)
    signals, struck = [signal.SIGKILL, signal.SIGSTOP], dict[int, int]()

    def strike(progress: Progress | None) -> None:
        """A rank that has written a checkpoint."""
        newest = saved(spec)
        if progress and len(struck) < len(signals) and newest >= 100 + 2 * max(struck.values(), default=0):
            pid = int(progress.metrics["line/pid"])
            if pid not in struck:
                assert with_torch(ray) == [pid]
                os.kill(pid, signals[len(struck)])
                struck[pid] = newest

    ray.run(spec, report=strike)
    killed, stopped = struck
    assert not psutil.pid_exists(stopped)
    steps = history(toys, spec, "line/pid")
    assert len({pid for _, pid in steps}) == 3, "one rank, and those that took its place"
    again = min(step for step, pid in steps if pid != killed)
    assert again > 100 - 20, "the second rank went on from a checkpoint"
    assert min(step for step, pid in steps if pid not in struck) > again, "and the third from another"
    assert max(step for step, _ in steps) == 1200


def test_a_rank_that_is_told_to_end_is_preempted_and_the_job_goes_on(
    ray: Cluster, toys: Toys, data: Artifact, alone: Toys
) -> None:
    """With no failure allowed, with the checkpoint that it wrote, and to the weights of a run left alone.

    It has huge pages, and no thread for a process group that nobody else is in.
    """
    resources = {"max_failures": 0}
    spec = toys.line(data, samples=400, step_seconds=0.05, resources=resources)
    told: dict[int, str] = {}

    def end_one(progress: Progress | None) -> None:
        if progress and progress.done >= 60 and not told:
            pid = int(progress.metrics["line/pid"])
            told[pid] = ""
            assert has_huge_pages(pid) and not any(name.startswith("gloo") for name in threads_of(pid))
            os.kill(pid, signal.SIGTERM)
        elif progress and progress.note:
            told.update(dict.fromkeys(told, progress.note))

    job = ray.run(spec, report=end_one)
    assert submitted(ray, spec) == {job: "SUCCEEDED"}, "one job, whose ranks started anew"
    [(pid, note)] = told.items()
    assert re.fullmatch(rf"was preempted by SIGTERM to process {pid} on \S+, goes on from [0-9]+ samples", note)
    steps = history(toys, spec, "line/pid")
    assert len({of for _, of in steps}) == 2
    counts = [step for step, _ in steps]
    assert counts == sorted(set(counts)), "nothing was done twice"
    straight = alone.line(data, samples=400)
    run_local(straight)
    assert all(torch.equal(weights(spec)[name], tensor) for name, tensor in weights(straight).items())


def test_a_driver_that_is_told_to_end_is_followed_by_another(ray: Cluster, toys: Toys, data: Artifact) -> None:
    """It first has its ranks write a checkpoint; nobody counts a failure."""
    spec = toys.line(data, samples=400, step_seconds=0.052, resources={"max_failures": 0})
    notes: list[str] = []

    def end_driver(progress: Progress | None) -> None:
        if progress and progress.done >= 60 and not notes:
            [driving] = [process for process in drivers(spec) if "-m" in process.cmdline()]
            driving.terminate()
            notes.append("")
        elif progress and progress.note:
            notes.append(progress.note)

    job = ray.run(spec, report=end_driver)
    assert "SIGTERM to process" in notes[-1]
    assert sorted(submitted(ray, spec).values()) == ["FAILED", "SUCCEEDED"], "Ray's word for a status that is not 0"
    assert submitted(ray, spec)[job] == "SUCCEEDED"
    steps = [step for step, _ in history(toys, spec, "line/pid")]
    assert steps == sorted(set(steps)), "nothing was done twice"


def test_a_stage_that_fails_says_so_once(ray: Cluster, toys: Toys, data: Artifact) -> None:
    spec = toys.line(data, fail="the loss is wrong; mend it")
    with pytest.raises(StageError, match=r"^the loss is wrong; mend it \(log: .*job.log\)$") as failure:
        run(ray, spec)
    assert not isinstance(failure.value, JobLost)
    assert "toy_line.py" in failure.value.details, "the traceback, for a debugger"
    log = Path(spec.work, "job.log").read_text()
    assert log.count("Started training worker group") == 1, "a stage's own fault is not tried again"
    found = run_of(toys, spec)
    assert found.info.status == "FAILED"
    assert found.data.tags["genpipe.error"] == "StageError: the loss is wrong; mend it"
    assert artifacts.find(spec.target.uri) is None


def test_a_job_that_somebody_stops_is_stopped_and_not_lost(ray: Cluster, toys: Toys, data: Artifact) -> None:
    spec = toys.line(data, samples=4000, step_seconds=0.05, train={"seed": 5})

    def stop(progress: Progress | None) -> None:
        if progress:
            ray.client.stop_job(job_of(ray, spec))

    with pytest.raises(on_ray.Stopped, match="was stopped; run it again to resume"):
        ray.run(spec, report=stop)


def test_training_and_data_stages_can_be_cancelled(ray: Cluster, toys: Toys, data: Artifact) -> None:
    """By a request in the work folder alone, which needs no way to this Ray."""
    training = toys.line(data, samples=4000, step_seconds=0.05, train={"seed": 6})
    mapping = toys.spec("toy_data", parts=40, seconds=1.0)
    for spec in (training, mapping):
        asked: list[Progress] = []

        def ask(progress: Progress | None, spec: StageSpec = spec, asked: list[Progress] = asked) -> None:
            if progress and progress.done and not asked:
                asked.append(progress)
                stopping.request_stop(spec, "cancelled", by="somebody")

        with pytest.raises(on_ray.Stopped, match=r"^cancelled at .* \(somebody\); run it again to resume"):
            ray.run(spec, report=ask)
        assert run_of(toys, spec).info.status == "KILLED"
    assert list(Path(training.work, "checkpoints").glob("*/manifest.json"))


def test_a_stage_is_adopted_by_others_who_want_it_but_not_for_another_store(
    ray: Cluster, toys: Toys, tmp_path: Path
) -> None:
    mine = toys.spec("toy_data", parts=2, seconds=1.5)
    (tmp_path / "other").mkdir()
    other = Toys(tmp_path / "other").spec("toy_data", parts=2, seconds=1.5)
    assert mine.target.fingerprint == other.target.fingerprint
    jobs: list[str] = []
    threads = [threading.Thread(target=lambda: jobs.append(run(ray, mine))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: on_ray.jobs_of(ray.client, artifact=mine.target.uri))
    elsewhere = run(ray, other)
    for thread in threads:
        thread.join()
    assert len(jobs) == 2 and elsewhere not in jobs
    made_by = artifacts.verify(mine.target.uri).environment["attempt"]
    assert made_by in jobs, "one of the two made it; the other adopted the job or waited for it"
    assert artifact_of(mine).uri != artifact_of(other).uri


def test_a_killed_driver_is_a_lost_job_and_the_next_attempt_goes_on(ray: Cluster, toys: Toys, data: Artifact) -> None:
    spec = toys.line(data, samples=400, step_seconds=0.051, resources={"checkpoint_seconds": 0.1})

    def kill_driver(progress: Progress | None) -> None:
        if progress and progress.done >= 60:
            for process in drivers(spec):
                process.kill()

    with pytest.raises(JobLost, match="exited without reporting an error"):
        ray.run(spec, report=kill_driver)
    run(ray, spec)
    steps = [step for step, _ in history(toys, spec, "line/pid")]
    assert steps.count(20) == 1, "the second attempt did not begin at the beginning"


def is_of(job: Any, spec: StageSpec) -> bool:
    return bool((job.metadata or {}).get("artifact") == spec.target.uri)


def job_of(ray: Cluster, spec: StageSpec) -> str:
    """The job that is making the artifact of `spec`."""
    [job] = on_ray.jobs_of(ray.client, artifact=spec.target.uri)
    return job


def drivers(spec: StageSpec) -> list[psutil.Process]:
    """The processes that drive the job of `spec`, found by the spec that they were given."""
    processes = psutil.process_iter(["cmdline"])
    return [p for p in processes if f"{spec.work}/spec.json" in (p.info["cmdline"] or ())]


def test_interrupt_stops_the_job_and_the_run_is_killed(toys: Toys, ray: Cluster, data: Artifact) -> None:
    spec = toys.line(data, samples=4000, step_seconds=0.05)
    own = Cluster(ray.client, runtime_env={}, capacity=ray.capacity)
    ended: list[Any] = []

    def submit() -> None:
        try:
            run(own, spec)
        except on_ray.Stopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_for(lambda: read_progress(spec.work))
    [driver] = drivers(spec)
    assert driver.parent().name() == "ray::JobSupervisor", "Ray would not see the driver's end, and wait its whole time"
    own.interrupt(stop_jobs=True)
    thread.join()
    assert len(ended) == 1
    assert [job.status for job in ray.client.list_jobs() if is_of(job, spec)] == ["STOPPED"]
    wait_for(lambda: run_of(toys, spec).info.status == "KILLED")


def test_what_does_not_fit_is_said_at_once(ray: Cluster, toys: Toys) -> None:
    refused = pytest.raises(ValueError, match=r"stages.toy_data.resources: 64 workers x 8 CPUs do not fit this machine")
    with refused, ray.turn("toy_data", Resources(workers=64, cpus=8), order=0):
        raise AssertionError("it was let in")


def test_a_turn_has_room_for_the_process_that_validates(ray: Cluster) -> None:
    own = Cluster(ray.client, runtime_env={}, capacity={"CPU": 4.0, "GPU": 0.0})
    asked = {"workers": (1, 9), "validation": {"cpus": 1.5}}
    with own.turn("first", Resources.model_validate(asked), order=0):
        assert own.turns.free["CPU"] == 0.5, "two workers and the validator"
    refused = pytest.raises(ValueError, match=r"3 workers x 1 CPUs and 1.5 for validation do not fit this machine")
    with refused, own.turn("first", Resources.model_validate(asked | {"workers": 3}), order=0):
        raise AssertionError("it was let in")


def test_a_turn_ends_when_the_run_is_interrupted(ray: Cluster) -> None:
    own = Cluster(ray.client, runtime_env={}, capacity={"CPU": 1.0, "GPU": 0.0})
    with own.turn("first", Resources(cpus=1), order=0):
        threading.Timer(1.0, lambda: own.interrupt(stop_jobs=False)).start()
        with pytest.raises(on_ray.Stopped, match="second was stopped"), own.turn("second", Resources(cpus=1), order=1):
            raise AssertionError("it was let in")


class Deaf:
    """Takes a while to be destroyed, during which the signal to stop comes; what is raised there is lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_job_hears_at_last_that_it_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)  # a second signal may come while it is told
    monkeypatch.setattr(driver, "INSIST_SECONDS", 0.05)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(KeyboardInterrupt, match="the job was stopped"), driver._insisting():
        Deaf()
        for _ in range(200):
            time.sleep(0.05)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
    time.sleep(0.1)  # nothing insists any more


def test_unreachable_clusters_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "REACH_SECONDS", 1.0)
    with pytest.raises(ValueError, match=r"ray.address: 'head:8265' is not a dashboard URL such as http://head:8265"):
        connect("head:8265")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ValueError, match=rf"ray.address: no Ray dashboard at http://127.0.0.1:{port} \(timed"):
            connect(f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=r"leave ray.address empty for a local Ray"):
        connect(f"http://127.0.0.1:{port}")
