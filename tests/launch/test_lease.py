"""The lease: processes that are killed and stopped, two runs of one stage, and every order in which steps can come."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toybox import Toys, wait_for
from typing_extensions import override

from genpipe import artifacts
from genpipe.launch import lease
from genpipe.launch.lease import (
    LEASE_SECONDS,
    LeaseLost,
    Watch,
    check,
    clear_work,
    find_holder,
    hold,
    may_be_held,
    new_attempt,
    renew,
    take,
)
from genpipe.launch.local import run_local
from genpipe.launch.run_stage import PartWorker, commit
from genpipe.pipeline.spec import Attempt, StageSpec
from genpipe.storage import Entry, LocalStorage, join, open_storage
from genpipe.tracking.recording import StageRun


@pytest.fixture
def spec(store_uri: str, tmp_path: Path) -> StageSpec:
    toys = Toys(tmp_path)
    toys.store = store_uri
    return toys.spec("toy_data")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)


def number_of(held: StageSpec | None) -> int:
    assert held is not None and held.attempt is not None
    return held.attempt.number


def test_each_attempt_has_a_higher_number_and_an_id_of_its_own(spec: StageSpec) -> None:
    numbers, ids = [], set()
    for _ in range(3):
        with hold(spec, new_attempt(spec), lost=print) as held:
            assert held is not None
            check(held)
            numbers.append(number_of(held))
            ids.add(held.attempt.id if held.attempt else "")
    assert numbers == [1, 2, 3] and len(ids) == 3
    assert [entry.key for entry in open_storage(spec.work).list("lease/claims/")] == ["lease/claims/000003"]


def test_whoever_is_late_waits_until_the_lease_is_given_back(spec: StageSpec, impatient: None) -> None:
    order: list[str] = []

    def wait() -> None:
        with hold(spec, "second", lost=print) as held:
            order.append(f"second has {number_of(held)}")

    with hold(spec, "first", lost=print) as held:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        check(held or spec)
        order.append("first is done")
    thread.join()
    assert order == ["first is done", "second has 2"]


HOLDER = """
import sys, time
from pathlib import Path
from genpipe.launch import lease
from genpipe.pipeline.spec import StageSpec
lease.RENEW_SECONDS = 0.1
with lease.hold(StageSpec.read(sys.argv[1]), "holder", lost=lease.leave) as held:
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[StageSpec, subprocess.Popen[str]]]:
    """A stage whose lease another process holds."""
    spec = Toys(tmp_path).spec("toy_data")
    command = [sys.executable, "-c", HOLDER, spec.write(), str(tmp_path / "held")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "held").exists)
    yield spec, process
    process.kill()
    process.wait()


def test_a_killed_holder_is_not_waited_for(holder: tuple[StageSpec, subprocess.Popen[str]], impatient: None) -> None:
    spec, process = holder
    assert may_be_held(spec.work)
    process.kill()  # and not waited for: a zombie counts as dead
    started = time.monotonic()
    wait_for(lambda: not may_be_held(spec.work))
    with hold(spec, "next", lost=print) as held:
        assert number_of(held) == 2
    assert time.monotonic() - started < LEASE_SECONDS / 2


def test_a_holder_that_stood_still_has_lost_the_lease_and_leaves(
    holder: tuple[StageSpec, subprocess.Popen[str]], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, process = holder
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)
    process.send_signal(signal.SIGSTOP)
    with hold(spec, "next", lost=print) as held:
        assert number_of(held) == 2
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert said == "error: toy_data: holder stood still for so long that another attempt has taken over\n"
        check(held or spec)


def test_a_holder_that_shows_that_it_is_alive_keeps_the_lease(
    holder: tuple[StageSpec, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = holder
    storage, watch = open_storage(spec.work), Watch()
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    for _ in range(40):
        found = find_holder(storage)
        assert found is not None and found.claim.attempt == "holder"
        assert not watch.is_over(found)
        time.sleep(0.1)


def test_time_in_which_the_store_was_away_does_not_count(spec: StageSpec) -> None:
    now = 0.0
    watch = Watch(clock=lambda: now)
    assert take(open_storage(spec.work), 1, "holder")
    found = find_holder(open_storage(spec.work))
    assert found is not None and not watch.is_over(found)
    now = LEASE_SECONDS + 1
    watch.forget()
    assert not watch.is_over(found)
    now += LEASE_SECONDS + 1
    assert watch.is_over(found)


def test_who_lost_the_lease_writes_nothing_more(spec: StageSpec, tmp_path: Path) -> None:
    storage = open_storage(spec.work)
    assert take(storage, 1, "first")
    first = spec.model_copy(update={"attempt": Attempt(id="first", number=1)})
    PartWorker(first)("part-0")
    assert take(storage, 2, "second")
    before = sorted(entry.key for entry in open_storage(spec.store).list())
    with pytest.raises(LeaseLost, match="first stood still"):
        PartWorker(first)("part-1")
    with pytest.raises(LeaseLost):
        commit(first, folder=tmp_path, meta={}, metrics={}, environment={}, run_id="")
    with pytest.raises(LeaseLost):
        renew(first, 1)
    assert sorted(entry.key for entry in open_storage(spec.store).list()) == before


def test_a_training_that_lost_the_lease_commits_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys = Toys(tmp_path)
    resources = {"checkpoint_seconds": 0.001}
    spec = toys.line(run_local(toys.spec("toy_data")), samples=80, resources=resources)
    spec = spec.model_copy(update={"tracking_uri": "jsonl"})
    flush = StageRun.flush

    def flush_and_lose(run: StageRun) -> None:
        flush(run)
        storage = open_storage(spec.work)
        found = find_holder(storage)
        if found is not None and found.claim.attempt != "second":
            assert take(storage, found.number + 1, "second")

    monkeypatch.setattr(StageRun, "flush", flush_and_lose)
    with pytest.raises(LeaseLost):
        run_local(spec)
    written = [entry.key for entry in open_storage(join(spec.work, "checkpoints")).list()]
    assert written and not any(key.endswith(artifacts.MANIFEST) for key in written)
    assert artifacts.committed(spec.target) is None


RUN = """
import sys
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
run_local(StageSpec.read(sys.argv[1]))
"""


def test_two_runs_of_one_stage_make_one_artifact(tmp_path: Path) -> None:
    """Case 23: the second one deleted the first one's parts, or found none of its own."""
    spec = Toys(tmp_path).spec("toy_data", parts=8, seconds=0.2)
    spec = spec.model_copy(update={"tracking_uri": "jsonl"})
    command = [sys.executable, "-c", RUN, spec.write()]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum("waiting for genpipe-toy_data-" in output for output in said) == 1
    manifest = artifacts.verify(spec.target.uri)
    assert manifest.artifact.meta["samples"] == 800
    assert manifest.environment["attempt"].startswith("genpipe-toy_data-")
    assert not list(open_storage(spec.work).list())
    assert len({int(p.stat().st_mtime_ns) for p in Path(spec.target.uri).glob("part-*.npy")}) == 8


def test_whoever_finds_a_stage_committed_deletes_what_a_killed_maker_left(
    holder: tuple[StageSpec, subprocess.Popen[str]], tmp_path: Path
) -> None:
    spec, process = holder
    clear_work(spec)
    assert list(open_storage(spec.work).list()), "somebody is at work there"
    process.kill()
    wait_for(lambda: not may_be_held(spec.work))
    clear_work(spec)
    assert not list(open_storage(spec.work).list())

    made = Toys(tmp_path / "other").spec("toy_data", parts=2)
    made = made.model_copy(update={"tracking_uri": "jsonl"})
    run_local(made)
    open_storage(made.work).write("checkpoints/left/manifest.json", b"{}")
    run_local(made)
    assert not list(open_storage(made.work).list())


def test_a_run_that_takes_over_goes_on_from_what_is_there(tmp_path: Path) -> None:
    spec = Toys(tmp_path).spec("toy_data", parts=2)
    spec = spec.model_copy(update={"tracking_uri": "jsonl"})
    PartWorker(spec)("part-0")
    [part] = Path(spec.target.uri).glob("*.npy")
    written = part.stat().st_mtime_ns
    assert run_local(spec).meta["samples"] == 200
    assert part.stat().st_mtime_ns == written
    assert len(np.load(part)) == 100


class Stepwise(LocalStorage):
    """A folder on which each operation waits until the scheduler lets its thread take one more step."""

    def __init__(self, uri: str, actor: Actor) -> None:
        super().__init__(uri)
        self.actor = actor

    @override
    def read(self, key: str) -> bytes:
        self.actor.wait()
        return super().read(key)

    @override
    def write(self, key: str, data: bytes) -> None:
        self.actor.wait()
        super().write(key, data)

    @override
    def create(self, key: str, data: bytes) -> None:
        self.actor.wait()
        super().create(key, data)

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.actor.wait()
        yield from list(super().list(prefix))

    @override
    def delete(self, key: str) -> None:
        self.actor.wait()
        super().delete(key)


class Actor(threading.Thread):
    """An attempt that takes the lease, renews it, and commits: step by step, on a clock that the scheduler moves."""

    def __init__(self, name: str, spec: StageSpec, world: World) -> None:
        super().__init__(name=name, daemon=True)
        self.spec, self.world = spec, world
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.storage = Stepwise(spec.work, self)

    def wait(self) -> None:
        self.arrived.release()
        self.go.acquire()

    def step(self) -> None:
        """Let the thread do its next operation; returns when it is about to do the one after."""
        if self.is_alive():
            self.go.release()
            self.arrived.acquire()

    def run(self) -> None:
        self.wait()
        try:
            self.act()
        except (LeaseLost, FileExistsError):
            self.world.losers.append(self.name)
        except BaseException as error:
            self.world.faults.append(error)
        self.arrived.release()

    def act(self) -> None:
        watch = Watch(clock=lambda: self.world.now)
        while True:
            holder = find_holder(self.storage)
            number = holder.number + 1 if holder else 1
            if (holder is None or watch.is_over(holder)) and take(self.storage, number, self.name):
                break
        self.world.taken.append(number)
        held = self.spec.model_copy(update={"attempt": Attempt(id=self.name, number=number)})
        for beat in range(2):
            renew(held, beat)
        check(held)
        assert number == max(self.world.taken), "who passes the check has the highest number of all"
        self.storage.create("manifest", self.name.encode())
        self.world.commits.append(self.name)


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.taken: list[int] = []
        self.commits: list[str] = []
        self.losers: list[str] = []
        self.faults: list[BaseException] = []


TURN = st.tuples(st.integers(0, 2), st.integers(1, 12), st.sampled_from([0.0, LEASE_SECONDS / 2, LEASE_SECONDS + 1]))


@settings(max_examples=60)
@given(st.lists(TURN, max_size=30))
def test_no_two_commit_whatever_comes_in_between(schedule: Sequence[tuple[int, int, float]]) -> None:
    """Three attempts, of which any may stand still before any of its operations for as long as it likes.

    A turn: who goes on, by how many operations, and how much time passes after that.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        spec = Toys(Path(folder)).spec("toy_data")
        world = World()
        actors = [Actor(name, spec, world) for name in ("one", "two", "three")]
        patch.setattr(lease, "open_storage", lambda uri: threading.current_thread().storage)  # type: ignore[attr-defined]
        for actor in actors:
            actor.start()
            actor.arrived.acquire()
        for who, operations, seconds in schedule:
            for _ in range(operations):
                actors[who].step()
            world.now += seconds
        for _ in range(500):  # and now all go on
            world.now += LEASE_SECONDS / 40
            for actor in actors:
                actor.step()
        assert not any(actor.is_alive() for actor in actors)
        assert not world.faults
        assert len(world.commits) == 1
        assert len(world.taken) == len(set(world.taken)), "no number is given twice"
        assert (Path(spec.work) / "manifest").read_text() == world.commits[0]
