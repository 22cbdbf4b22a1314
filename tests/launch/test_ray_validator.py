"""The process beside the ranks that validates, on a real Ray: killed, given up, and left by a killed driver."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from toybox import Toys, survivors

from genpipe.artifacts import Artifact
from genpipe.launch.failure import JobLost
from genpipe.launch.jobs import Cluster
from genpipe.launch.local import run_local
from genpipe.pipeline.curves import read_curve
from genpipe.pipeline.spec import StageSpec
from genpipe.tracking import jsonl

pytestmark = pytest.mark.slow
SAMPLES, EVERY = 320, 80


@pytest.fixture
def data(toys: Toys) -> Artifact:
    toys.tracking_uri = jsonl.URI
    return run_local(toys.spec("toy_data"))


def line(toys: Toys, data: Artifact, *, seconds: float = 0.06, **resources: Any) -> StageSpec:
    given = {"cpus": 0.5, "validation": {"cpus": 0.5}, "checkpoint_seconds": 0.2} | resources
    return toys.line(data, samples=SAMPLES, step_seconds=seconds, observe={"validate_every": EVERY}, resources=given)


def validators() -> list[psutil.Process]:
    """The validators of this process's Ray."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if process.name().startswith("ray::_validate")]


def records(spec: StageSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(jsonl.runs_uri(spec), jsonl.FILE).read_text().splitlines()]


def validations(spec: StageSpec) -> list[tuple[int, float]]:
    """(samples seen, held-out loss) as they were recorded."""
    name = "heldout/loss"
    return [(row["samples_seen"], row["metrics"][name]) for row in records(spec) if name in row.get("metrics", {})]


def pictures(spec: StageSpec) -> list[int]:
    return [row["samples_seen"] for row in records(spec) if "picture" in row]


def events(spec: StageSpec) -> list[str]:
    tags = [tag for row in records(spec) for tag in row.get("tags", {}).items()]
    return [told for name, told in tags if name.startswith("event.")]


@pytest.fixture
def alone(toys: Toys, data: Artifact, tmp_path: Path) -> list[tuple[int, float]]:
    """What rank 0 finds in a run by itself."""
    (tmp_path / "alone").mkdir()
    there = Toys(tmp_path / "alone")
    there.tracking_uri = jsonl.URI
    spec = line(there, data, seconds=0.0)
    run_local(spec)
    assert [at for at, _ in validations(spec)] == [*range(EVERY, SAMPLES + 1, EVERY)]
    return validations(spec)


@contextmanager
def struck(strike: Callable[[psutil.Process], None]) -> Iterator[list[psutil.Process]]:
    """In the block the first validator that there is, as soon as it begins, and so before it has imported torch.

    `strike` is called with it; it is in the list then.
    """
    found, ended = list[psutil.Process](), threading.Event()

    def watch() -> None:
        while not found and not ended.wait(0.02):
            with suppress(psutil.NoSuchProcess):  # any of Ray's, while they are looked through
                for process in validators()[:1]:
                    strike(process)
                    found.append(process)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_a_killed_validator_goes_on_and_finds_what_rank_0_finds(
    ray: Cluster, toys: Toys, data: Artifact, alone: list[tuple[int, float]]
) -> None:
    spec = line(toys, data)
    with struck(psutil.Process.kill) as killed:
        ray.run(spec, report=lambda progress: None)
    assert killed and validations(spec) == alone
    assert pictures(spec) == [at for at, _ in alone]
    assert events(spec) == [], "the ranks had nothing to do for it"
    assert {at: found["loss"] for at, found in read_curve(spec.target.uri).items()} == dict(alone)
    assert validators() == [] and not Path(spec.work, "validations").exists()


def test_ranks_do_without_a_validator_that_is_given_up(
    ray: Cluster, toys: Toys, data: Artifact, alone: list[tuple[int, float]]
) -> None:
    spec = line(toys, data, max_failures=0)
    with struck(psutil.Process.kill) as killed:
        ray.run(spec, report=lambda progress: None)
    assert killed and validations(spec) == alone
    [told] = events(spec)
    assert "the validator was lost or failed 1 times" in told and "the ranks validate" in told


def test_a_validator_ends_with_its_driver_and_the_next_one_has_another(
    ray: Cluster, toys: Toys, data: Artifact, alone: list[tuple[int, float]]
) -> None:
    spec = line(toys, data)

    def kill_driver(validator: psutil.Process) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if f"{spec.work}/spec.json" in (process.info["cmdline"] or ()):
                process.kill()

    with struck(kill_driver) as found, pytest.raises(JobLost):
        ray.run(spec, report=lambda progress: None)
    assert found and survivors(found) == []
    ray.run(spec, report=lambda progress: None)
    assert validations(spec) == alone
