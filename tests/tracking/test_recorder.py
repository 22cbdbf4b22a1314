from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from genpipe.tracking.recorder import Facts, Point, Record, Recorder, Steps


class Refusal(Exception):
    pass


class Memory:
    """A keeper that fails as often as it is told to, and keeps what it takes; opened, it hands in what `other` has."""

    pause_seconds = 0.01

    def __init__(self, *, failures: float = 0, other: Memory | None = None, where: str = "test") -> None:
        self.failures = failures
        self.other = other
        self.where = where
        self.taken: list[Record] = []
        self.calls = 0
        self.steps = Steps()
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> None:
        if self.other is not None and self.other.taken:
            self.write(self.other.taken)
            self.other.taken = []

    def write(self, records: Sequence[Record]) -> None:
        self.gate.wait(10)
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        if any(isinstance(record, Point) and record.value < 0 for record in records):
            raise Refusal("negative")
        for record in filter(self.steps.is_new, records):
            self.taken.append(record)
            self.steps.note(record)

    def refuses(self, error: Exception) -> bool:
        return isinstance(error, Refusal)

    @property
    def values(self) -> list[float]:
        return [record.value for record in self.taken if isinstance(record, Point)]


def point(value: float) -> list[Record]:
    return [Point("x", value, 0, int(value))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "RETRY_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(Recorder, "PATIENCE_SECONDS", 0.1)


def test_keeps_the_order_of_all_kinds_of_records() -> None:
    memory = Memory()
    recorder = Recorder(memory)
    put = [record for i in range(20) for record in (*point(i), Facts({"at": str(i)}))]
    for record in put:
        recorder.put([record])
    recorder.close()
    assert memory.taken == put
    assert recorder.complete


def test_a_short_outage_costs_nothing() -> None:
    memory = Memory(failures=3)
    recorder = Recorder(memory)
    for i in range(10):
        recorder.put(point(i))
    recorder.close()
    assert memory.values == list(range(10))
    assert recorder.complete


def test_the_reserve_stands_in_until_the_keeper_is_back(capsys: pytest.CaptureFixture[str]) -> None:
    reserve = Memory(where="the reserve")
    memory = Memory(failures=float("inf"), other=reserve)
    recorder = Recorder(memory, reserve=reserve)
    recorder.put(point(1))
    recorder.flush()
    recorder.put(point(2))
    recorder.flush()
    assert reserve.values == [1, 2] and not memory.taken
    memory.failures = 0
    time.sleep(0.1)
    recorder.put(point(3))
    recorder.close()
    assert memory.values == [1, 2, 3], "in the order of training"
    assert recorder.complete
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "test: no answer; records are kept in the reserve and handed in later: away",
        "test: answers again; what was kept meanwhile is handed in",
    ]


def test_what_the_keeper_never_took_is_not_complete() -> None:
    reserve = Memory()
    recorder = Recorder(Memory(failures=float("inf")), reserve=reserve)
    recorder.put(point(1))
    recorder.close()
    assert reserve.values == [1]
    assert not recorder.complete


def test_a_step_stands_once() -> None:
    """As a training that resumes from a checkpoint before the last point makes points a second time."""
    memory = Memory()
    for first, last in ((0, 6), (3, 9)):
        recorder = Recorder(memory)
        for i in range(first, last):
            recorder.put(point(i))
        recorder.close()
    assert memory.values == list(range(9))


def test_a_refused_record_is_dropped_alone_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory()
    recorder = Recorder(memory)
    recorder.put([*point(1), *point(-1), *point(-2), *point(3)])
    recorder.close()
    assert memory.values == [1, 3]
    assert capsys.readouterr().err == "test: a record is lost: negative\n"


def test_a_full_buffer_drops_instead_of_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "CAPACITY", 5)
    memory = Memory()
    memory.gate.clear()
    recorder = Recorder(memory)
    for i in range(50):
        recorder.put(point(i))
    memory.gate.set()
    recorder.close()
    assert 0 < len(memory.taken) <= 11
    assert "buffer of records is full" in capsys.readouterr().err


def test_flush_returns_when_all_is_kept() -> None:
    memory = Memory()
    memory.pause_seconds = 60
    recorder = Recorder(memory)
    recorder.flush()
    recorder.put(point(1))
    begun = time.monotonic()
    recorder.flush()
    assert memory.values == [1]
    assert time.monotonic() - begun < 30
    recorder.close()


def test_close_ends_though_the_other_side_never_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "CLOSE_SECONDS", 0.3)
    recorder = Recorder(Memory(failures=float("inf")))
    recorder.put(point(1))
    recorder.close()
    assert not recorder.thread.is_alive()
    said = capsys.readouterr().err
    assert "no answer: away" in said and "records are lost" in said
