"""Who is served when several stages wait for one machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.launch import resource_queue
from genpipe.launch.resource_queue import SETTLE_SECONDS, Turns

MACHINE = {"CPU": 4.0, "GPU": 1.0}


class Crowd:
    """Threads that each take a turn; who was let in when, and the most that was held at once."""

    def __init__(self, capacity: Mapping[str, float]) -> None:
        self.interrupted = threading.Event()
        self.turns = Turns(capacity, interrupted=self.interrupted)
        self.served: list[int] = []
        self.held = dict.fromkeys(capacity, 0.0)
        self.most = dict.fromkeys(capacity, 0.0)
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []

    def come(self, order: int, needs: Mapping[str, float], *, leave: threading.Event | None = None) -> None:
        thread = threading.Thread(target=self._take, args=(order, needs, leave))
        self.threads.append(thread)
        thread.start()

    def _take(self, order: int, needs: Mapping[str, float], leave: threading.Event | None) -> None:
        with self.turns.take(needs, order=order) as granted:
            if not granted:
                return
            self._count(needs, sign=1)
            self.served.append(order)
            if leave is not None:
                leave.wait()
            self._count(needs, sign=-1)

    def _count(self, needs: Mapping[str, float], *, sign: int) -> None:
        with self.lock:
            for kind, amount in needs.items():
                self.held[kind] += sign * amount
                self.most[kind] = max(self.most[kind], self.held[kind])

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "somebody was never served"


def test_the_earliest_goes_first_whoever_asked_first() -> None:
    crowd = Crowd({"CPU": 1.0})
    for order in (3, 1, 2, 0):
        crowd.come(order, {"CPU": 1.0})
        time.sleep(SETTLE_SECONDS / 8)
    crowd.wait()
    assert crowd.served == [0, 1, 2, 3]


def test_a_small_stage_does_not_overtake_a_large_one_that_waits() -> None:
    crowd, leave = Crowd({"CPU": 2.0}), threading.Event()
    crowd.come(0, {"CPU": 1.0}, leave=leave)
    while not crowd.served:
        time.sleep(0.01)
    crowd.come(1, {"CPU": 2.0})
    crowd.come(2, {"CPU": 1.0})
    time.sleep(2 * SETTLE_SECONDS)
    assert crowd.served == [0], "one core is free, but a stage that was there before needs two"
    leave.set()
    crowd.wait()
    assert crowd.served == [0, 1, 2]


def test_what_waited_for_the_one_that_leaves_comes_before_who_is_behind_it_in_order() -> None:
    """As the features of an autoencoder do, on which a decoder waits, where an upsampler is ready since long."""
    crowd, leave = Crowd({"CPU": 1.0}), threading.Event()
    crowd.come(0, {"CPU": 1.0}, leave=leave)
    while not crowd.served:
        time.sleep(0.01)
    crowd.come(2, {"CPU": 1.0})
    time.sleep(2 * SETTLE_SECONDS)
    leave.set()
    time.sleep(SETTLE_SECONDS / 4)
    crowd.come(1, {"CPU": 1.0})
    crowd.wait()
    assert crowd.served == [0, 1, 2]


def test_those_who_wait_leave_without_a_turn_when_interrupted() -> None:
    crowd, leave = Crowd({"CPU": 1.0}), threading.Event()
    crowd.come(0, {"CPU": 1.0}, leave=leave)
    while not crowd.served:
        time.sleep(0.01)
    crowd.come(1, {"CPU": 1.0})
    crowd.interrupted.set()
    leave.set()
    crowd.wait()
    assert crowd.served == [0]
    assert crowd.turns.free == {"CPU": 1.0}


@settings(max_examples=5, deadline=None)
@given(st.lists(st.fixed_dictionaries({"CPU": st.integers(1, 4), "GPU": st.integers(0, 1)}), min_size=1, max_size=12))
def test_all_are_served_and_never_more_than_there_is(needs: list[dict[str, int]]) -> None:
    crowd = Crowd(MACHINE)
    with mock.patch.object(resource_queue, "SETTLE_SECONDS", 0.02):
        for order, each in enumerate(needs):
            crowd.come(order, each)
        crowd.wait()
    assert sorted(crowd.served) == list(range(len(needs)))
    assert all(crowd.most[kind] <= there for kind, there in MACHINE.items())
    assert crowd.turns.free == MACHINE
