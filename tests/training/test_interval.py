"""The interval between checkpoints loses the least time."""

from __future__ import annotations

from pathlib import Path

import pytest
from folder_runtime import FolderRuntime
from hypothesis import given
from hypothesis import strategies as st
from small_objective import G, stream, train_small

from genpipe.stage_config import Resources
from genpipe.training.interval import LEAST_SECONDS, UNMEASURED_SECONDS, checkpoint_interval


@given(stall=st.floats(0.05, 60), hours=st.floats(1, 100))
def test_no_other_interval_loses_less(stall: float, hours: float) -> None:
    """Of the time: what checkpoints take, and the half interval that a failure throws away."""

    def lost(interval: float) -> float:
        return stall / interval + interval / 2 / (hours * 3600)

    found = checkpoint_interval(Resources(failure_hours=hours), stall_seconds=stall, write_seconds=0.0)
    assert all(lost(found) <= lost(found * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_interval_by_hand() -> None:
    resources = Resources(failure_hours=1)
    assert checkpoint_interval(resources, stall_seconds=1.0, write_seconds=10.0) == pytest.approx(120.0)
    assert checkpoint_interval(resources, stall_seconds=1e-6, write_seconds=0.0) == LEAST_SECONDS
    assert checkpoint_interval(resources, stall_seconds=0.0, write_seconds=0.0) == UNMEASURED_SECONDS
    fixed = Resources(checkpoint_seconds=7)
    assert checkpoint_interval(fixed, stall_seconds=1.0, write_seconds=10.0) == 7


def test_it_is_logged(tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    train_small(stream(), rt, steps=8, checkpoint_seconds=None)
    values = rt.logged[8 * G]
    assert values["checkpoint_interval_seconds"] >= LEAST_SECONDS
    assert 0 < values["checkpoint_stall_seconds"] < 10
