"""Work beside the loop: one piece after the other, and its errors come back."""

from __future__ import annotations

import threading

import pytest

from genpipe.training.background import Background


def test_work_is_done_beside_and_one_piece_after_the_other() -> None:
    background, go, done = Background(), threading.Event(), list[int]()
    background.start(lambda: (go.wait(), done.append(1)), name="first")  # type: ignore[func-returns-value]
    assert background.busy and not done
    go.set()
    background.start(lambda: done.append(2), name="second")
    background.wait()
    assert done == [1, 2] and not background.busy


def test_what_work_raises_is_raised_once_by_the_next_call() -> None:
    background = Background()
    background.start(lambda: [][0], name="faulty")
    with pytest.raises(IndexError):
        background.start(lambda: None, name="next")
    background.wait()


def test_canceled_work_is_told_so_and_its_error_dropped() -> None:
    background, told = Background(), list[bool]()

    def work() -> None:
        told.append(background.canceled.wait(60))
        raise ValueError

    background.start(work, name="slow")
    background.cancel(grace_seconds=0)
    assert told == [True] and not background.busy
    background.wait()
