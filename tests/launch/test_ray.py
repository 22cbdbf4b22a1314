"""Stages on a real Ray: one local cluster for the module, jobs through its dashboard, faults by real signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from toybox import Toys, artifact_of, survivors, wait_for

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.launch import jobs as on_ray
from genpipe.launch import ray as driver
from genpipe.launch import stopping
from genpipe.launch.failure import JobLost, StageError
from genpipe.launch.jobs import Cluster, cluster, connect
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import Progress, StageSpec, read_progress
from genpipe.stage_config import Resources

pytestmark = pytest.mark.slow


@pytest.fixture
def data(toys: Toys) -> Artifact:
    return run_local(toys.spec("toy_data"))


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


def test_every_part_is_mapped_once_though_an_actor_is_killed(ray: Cluster, toys: Toys, tmp_path: Path) -> None:
    spec = toys.spec("toy_data", parts=5, die_once=str(tmp_path / "died"), resources={"workers": 2})
    seen: list[Progress | None] = []
    job = ray.run(spec, report=seen.append)
    assert (tmp_path / "died").exists()
    manifest = artifacts.verify(spec.target.uri)
    assert manifest.environment["attempt"] == job, "a lost actor costs its part only"
    assert {file.path for file in manifest.files} == {*(f"part-{n}.npy" for n in range(5)), "preview.png"}
    assert manifest.artifact.meta["samples"] == 500
    assert seen[0] is None, "no progress before the job has begun"


def test_a_part_that_always_kills_its_actor_is_given_up_and_named(ray: Cluster, toys: Toys) -> None:
    spec = toys.spec("toy_data", parts=2, deadly="part-1", resources={"max_failures": 1})
    with pytest.raises(StageError, match=r"^part-1 has killed its worker 2 times.*resources.max_failures \(log: "):
        run(ray, spec)


def test_two_ranks_on_s3_train_as_one_here(ray: Cluster, toys: Toys, s3_server: str, tmp_path: Path) -> None:
    """Data and training stages, ranks, checkpoints and the record of a lost actor, without a shared folder.

    The global batch is the same samples with the same noise, so the weights agree up to rounding.
    """
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    there = Cluster(ray.client, runtime_env={"env_vars": credentials}, capacity=ray.capacity)
    toys.store = f"s3://genpipe/{tmp_path.name}"
    made = toys.spec("toy_data", parts=3, die_once=str(tmp_path / "died"))
    run(there, made)
    assert (tmp_path / "died").exists() and artifact_of(made).meta["samples"] == 300
    two = toys.line(
        artifact_of(made),
        samples=160,
        step_seconds=0.02,
        resources={"workers": 2, "cpus": 0.5, "checkpoint_seconds": 0.1},
    )
    run(there, two)
    assert artifacts.verify(two.target.uri).artifact.fingerprint == two.target.fingerprint
    assert read_progress(two.work) is None, "what was left of the work is gone"
    (tmp_path / "alone").mkdir()
    alone = Toys(tmp_path / "alone").line(artifact_of(made), samples=160)
    run_local(alone)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-5)
    assert weights(alone)["weight"].item() > 0.5, "it did learn something on its way to the slope of 2"


def test_as_many_ranks_train_as_there_is_room_for(ray: Cluster, toys: Toys, data: Artifact, tmp_path: Path) -> None:
    """Two where a third does not fit, and they train as one does."""
    resources = {"workers": [1, 3], "cpus": ray.capacity["CPU"] / 2}
    spec = toys.line(data, samples=80, train={"micro_batch_size": 1}, resources=resources)
    with ray.turn("toy_line", Resources.model_validate(resources), order=0):
        assert ray.turns.free["CPU"] == 0, "all that they can use is theirs"
        job = run(ray, spec)
    assert "Started training worker group of size 2" in ray.client.get_job_logs(job)
    (tmp_path / "alone").mkdir()
    alone = Toys(tmp_path / "alone").line(data, samples=80, train={"micro_batch_size": 1})
    run_local(alone)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(spec)[name], tensor, rtol=0, atol=1e-5)


def test_a_killed_rank_goes_on_from_its_checkpoint(ray: Cluster, toys: Toys, data: Artifact) -> None:
    resources = {"checkpoint_seconds": 0.1}
    spec = toys.line(data, samples=400, step_seconds=0.05, resources=resources)
    killed: list[int] = []

    def kill_one(progress: Progress | None) -> None:
        if progress and progress.done >= 100 and not killed:
            killed.append(int(progress.metrics["line/pid"]))
            os.kill(killed[0], signal.SIGKILL)

    ray.run(spec, report=kill_one)
    assert killed
    pids = history(toys, spec, "line/pid")
    assert len({pid for _, pid in pids}) == 2, "one rank, and the one that took its place"
    again = min(step for step, pid in pids if pid != killed[0])
    assert again > 100 - 20, "the second rank went on from a checkpoint"
    assert max(step for step, _ in pids) == 400


def test_a_rank_that_is_told_to_end_is_preempted_and_the_job_goes_on(
    ray: Cluster, toys: Toys, data: Artifact, tmp_path: Path
) -> None:
    """With no failure allowed, with the checkpoint that it wrote, and to the weights of a run left alone."""
    resources = {"max_failures": 0}
    spec = toys.line(data, samples=400, step_seconds=0.05, resources=resources)
    told: dict[int, str] = {}

    def end_one(progress: Progress | None) -> None:
        if progress and progress.done >= 60 and not told:
            pid = int(progress.metrics["line/pid"])
            told[pid] = ""
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
    (tmp_path / "alone").mkdir()
    alone = Toys(tmp_path / "alone").line(data, samples=400, step_seconds=0.05)
    run_local(alone)
    assert all(torch.equal(weights(spec)[name], tensor) for name, tensor in weights(alone).items())


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


def test_a_failure_does_not_outlive_its_attempt(ray: Cluster, toys: Toys, data: Artifact, tmp_path: Path) -> None:
    """Mended, it runs: on the same Ray, and on a new one, which knows nothing of the attempts on others."""
    full = tmp_path / "full"
    full.touch()
    spec = toys.line(data, fail_while=str(full))
    failed = pytest.raises(StageError, match="no space left")
    with failed:
        run(ray, spec)
    with cluster() as other:
        with failed:
            run(other, spec)
        full.unlink()
        run(other, spec)
    assert artifact_of(spec).fingerprint == spec.target.fingerprint


def test_an_interrupted_part_has_not_failed(ray: Cluster, toys: Toys, tmp_path: Path) -> None:
    """With no failure allowed, so that counting the interruption as one would end it."""
    pause = tmp_path / "pause"
    pause.touch()
    spec = toys.spec("toy_data", parts=1, wait_while=str(pause), resources={"max_failures": 0})
    own = Cluster(ray.client, runtime_env={}, capacity=ray.capacity)
    stopped: list[Exception] = []

    def submit() -> None:
        try:
            run(own, spec)
        except on_ray.Stopped as error:
            stopped.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_for(lambda: list(Path(spec.work).glob("begun/*/part-0/*")))
    own.interrupt(stop_jobs=True)
    thread.join(20)
    assert stopped
    pause.unlink()
    run(ray, spec)
    assert artifact_of(spec).meta["samples"] == 100


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


def test_a_stopped_rank_is_found_and_its_group_starts_anew(ray: Cluster, toys: Toys, data: Artifact) -> None:
    resources = {"checkpoint_seconds": 0.1, "hang_seconds": 4.0}
    spec = toys.line(data, samples=400, step_seconds=0.054, resources=resources)
    stopped: list[int] = []

    def stop_one(progress: Progress | None) -> None:
        if progress and progress.done >= 100 and not stopped:
            stopped.append(int(progress.metrics["line/pid"]))
            os.kill(stopped[0], signal.SIGSTOP)

    ray.run(spec, report=stop_one)
    pids = history(toys, spec, "line/pid")
    assert [pid for _, pid in pids if pid not in stopped], "another process went on"
    assert max(step for step, _ in pids) == 400
    assert not psutil.pid_exists(stopped[0])


def test_a_failing_part_is_named(ray: Cluster, toys: Toys) -> None:
    spec = toys.spec("toy_data", parts=2, fail="part-1")
    with pytest.raises(StageError, match=r"^part-1 cannot be read; replace the file \(log: "):
        run(ray, spec)


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
    thread.join(10)
    assert len(ended) == 1
    assert [job.status for job in ray.client.list_jobs() if is_of(job, spec)] == ["STOPPED"]
    wait_for(lambda: run_of(toys, spec).info.status == "KILLED", seconds=15)


SUBMITTER = """
import sys
from genpipe.launch.jobs import cluster
from genpipe.pipeline.spec import StageSpec
with cluster() as local:
    local.run(StageSpec.read(sys.argv[1]), report=lambda progress: None)
"""


def test_a_local_ray_and_its_jobs_end_with_a_killed_submitter(toys: Toys) -> None:
    spec = toys.spec("toy_data", parts=2, seconds=60.0)
    submitter = subprocess.Popen([sys.executable, "-c", SUBMITTER, spec.write()])
    wait_for(lambda: read_progress(spec.work) or submitter.poll() is not None, seconds=180)
    started = psutil.Process(submitter.pid).children(recursive=True)
    assert any("genpipe.launch.ray" in p.cmdline() for p in started)
    submitter.kill()
    submitter.wait()
    assert survivors(started) == []


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_local_ray_that_dies_is_replaced_and_the_stage_goes_on(toys: Toys, data: Artifact, victim: str) -> None:
    """By another thread than the one that started the first, as Prefect's tasks do, which end long before the run."""
    spec = toys.line(data, samples=400, step_seconds=0.05, resources={"checkpoint_seconds": 0.1})
    before, first = psutil.Process().children(recursive=True), list[psutil.Process]()

    def kill_once(progress: Progress | None) -> None:
        if progress and progress.done >= 100 and not first:
            first.extend(p for p in psutil.Process().children(recursive=True) if p not in before)
            next(p for p in first if p.name() == victim).kill()

    with cluster() as local:
        with pytest.raises(JobLost):
            local.run(spec, report=kill_once)
        assert survivors(first) == [], "nothing of it goes on beside the new one"
        threads = [threading.Thread(target=run, args=(local, spec)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        second = [p for p in psutil.Process().children(recursive=True) if p not in before]
        assert sum(p.name() == victim for p in second) == 1
    assert survivors(second) == []
    pids = history(toys, spec, "line/pid")
    assert len({pid for _, pid in pids}) == 2
    assert [step for step, _ in pids].count(20) == 1, "it did not begin at the beginning"


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
