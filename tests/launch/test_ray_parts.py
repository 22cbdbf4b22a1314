"""Data stages on a real Ray, of workers that take a part or several at a time."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stages.test_features import features_of
from toybox import Toys, artifact_of, wait_for

from genpipe import artifacts
from genpipe.launch.failure import StageError
from genpipe.launch.jobs import Cluster, Stopped
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import Progress, StageSpec

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.slow


def run(ray: Cluster, spec: StageSpec) -> str:
    return ray.run(spec, report=lambda progress: None)


def digests(spec: StageSpec) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifacts.verify(spec.target.uri).files}


def test_every_part_is_mapped_once_though_an_actor_is_killed(ray_on_s3: Cluster, toys: Toys, tmp_path: Path) -> None:
    """Without a shared folder: parts, and the record of what was begun, are in S3."""
    toys.store = f"s3://genpipe/{tmp_path.name}"
    spec = toys.spec("toy_data", parts=5, die_once=str(tmp_path / "died"), resources={"workers": 2})
    seen: list[Progress | None] = []
    job = ray_on_s3.run(spec, report=seen.append)
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


def test_a_failing_part_is_named(ray: Cluster, toys: Toys) -> None:
    spec = toys.spec("toy_data", parts=2, fail="part-1")
    with pytest.raises(StageError, match=r"^part-1 cannot be read; replace the file \(log: "):
        run(ray, spec)


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
        except Stopped as error:
            stopped.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_for(lambda: list(Path(spec.work).glob("begun/*/part-0/*")))
    own.interrupt(stop_jobs=True)
    thread.join()
    assert stopped
    pause.unlink()
    run(ray, spec)
    assert artifact_of(spec).meta["samples"] == 100


def test_what_a_killed_actor_had_is_mapped_again_one_by_one_and_nothing_else(
    ray: Cluster, toys: Toys, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    # The three that are lost can keep at most four of the other seven apart.
    spec = toys.spec("toy_at_once", parts=10, deadly_once="part-1", seconds=1.0, log=str(log))
    job = run(ray, spec)
    assert artifacts.verify(spec.target.uri).environment["attempt"] == job, "a lost actor does not end the job"
    assert {*digests(spec)} == {*(f"part-{n}.npy" for n in range(10)), "preview.png"}

    events = [line.split() for line in log.read_text().splitlines()]
    first = events[0][0]
    lost = {part for pid, what, part in events if pid == first and what == "began"}
    assert len(lost) == 3 and "part-1" in lost
    assert Counter(part for _, what, part in events if what == "ended") == Counter(f"part-{n}" for n in range(10))
    running: set[str] = set()
    most = 0
    for _, what, part in (event for event in events if event[0] != first):
        if what == "began":
            assert not running if part in lost else not running & lost, "what may be deadly is alone"
            running.add(part)
        else:
            running.remove(part)
        most = max(most, len(running))
    assert most > 1, "others are not"


def test_of_parts_that_die_together_the_deadly_one_is_named(ray: Cluster, toys: Toys, tmp_path: Path) -> None:
    settings = {"seconds": 0.5, "log": str(tmp_path / "log"), "resources": {"max_failures": 0}}
    spec = toys.spec("toy_at_once", parts=5, deadly="part-1", **settings)
    with pytest.raises(StageError, match=r"^part-1 has killed its worker 1 times"):
        run(ray, spec)


def test_a_feature_cache_made_here_and_by_two_actors_is_the_same_to_the_bit(
    ray: Cluster, tiny: TinyPipeline, tmp_path: Path
) -> None:
    settings = ("stages.features.batch_size=8", "stages.features.resources.loader_threads=2")
    inputs = dict(tiny.spec("features", *settings).inputs)
    here = features_of(tiny, tmp_path / "here", inputs, *settings)
    run_local(here)
    there = features_of(tiny, tmp_path / "there", inputs, *settings, "stages.features.resources.workers=2")
    run(ray, there)
    assert len(digests(here)) > 10 and digests(there) == digests(here)
