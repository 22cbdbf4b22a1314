from __future__ import annotations

import threading
import time

import pytest

from genpipe.tracking.recorder import Point, Recorder


class Refusal(Exception):
    pass


class Other:
    """The other side: fails as often as it is told to, and keeps what it takes."""

    def __init__(self, *, failures: int = 0) -> None:
        self.failures = failures
        self.taken: list[Point] = []
        self.lock = threading.Lock()

    def write(self, points: list[Point]) -> None:
        if any(point.value < 0 for point in points):
            raise Refusal("negative")
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        self.taken += points


def recorder(other: Other) -> Recorder:
    return Recorder(write=other.write, refused=lambda error: isinstance(error, Refusal), label="test")


def point(value: float) -> list[Point]:
    return [Point("x", value, 0, int(value))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "RETRY_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(Recorder, "PAUSE_SECONDS", 0.01)


def test_keeps_order_and_calls_functions_in_their_place() -> None:
    other = Other()
    seen: list[int] = []
    r = recorder(other)
    for i in range(20):
        r.put(point(i))
        r.put(lambda: seen.append(len(other.taken)))
    r.close()
    assert [p.value for p in other.taken] == list(range(20))
    assert seen == list(range(1, 21)), "each function ran right after the point that was put before it"


def test_an_outage_costs_nothing() -> None:
    other = Other(failures=5)
    r = recorder(other)
    for i in range(10):
        r.put(point(i))
    r.close()
    assert [p.value for p in other.taken] == list(range(10))


def test_a_refused_record_is_dropped_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    other = Other()
    r = recorder(other)
    for value in (1.0, -1.0, -2.0):
        r.put(point(value))
        r.put(lambda: None)  # so that each point is written by itself
    r.put(point(3))
    r.close()
    assert [p.value for p in other.taken] == [1, 3]
    assert capsys.readouterr().err == "test: a record is lost: negative\n"


def test_a_full_buffer_drops_instead_of_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "CAPACITY", 5)
    other, gate = Other(), threading.Event()
    r = recorder(other)
    r.put(lambda: gate.wait(10))
    for i in range(50):
        r.put(point(i))
    gate.set()
    r.close()
    assert 0 < len(other.taken) <= 6
    assert "buffer of records is full" in capsys.readouterr().err


def test_close_ends_though_the_other_side_never_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "CLOSE_SECONDS", 0.3)
    r = recorder(Other(failures=10**9))
    r.put(point(1))
    before = time.monotonic()
    r.close()
    assert not r.thread.is_alive()
    assert time.monotonic() - before < 5
    assert "a record is lost: away" in capsys.readouterr().err
