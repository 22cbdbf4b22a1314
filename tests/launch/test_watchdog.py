"""Ranks that hang, by real processes that are stopped, that wait for ever, or that are only slow."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from local_ranks import BATCH, STEPS, Line, statuses
from toybox import wait_for

from genpipe.launch.watchdog import HANGS, Report, behind, last_hang
from genpipe.pipeline.spec import read_progress

LIMIT = 3.0
RESOURCES = {"resources": {"hang_seconds": LIMIT}, "observe": {"log_every": 10}}


def hang_of(line: Line) -> str:
    """What was written of the one rank that was killed."""
    [file] = Path(line.spec.work, HANGS).iterdir()
    return file.read_text()


def test_a_rank_that_waits_for_ever_is_killed_and_its_stack_is_kept(tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    line = Line(tmp_path, hang_while=str(hang), **RESOURCES)
    with line.ranks() as ranks:
        line.wait_until_it_trains()
        began = time.time()
        hang.touch()
        assert statuses(ranks) == [-signal.SIGKILL]
        said = ranks[0].communicate()[1]
    told = hang_of(line)
    assert told.startswith(f"rank 0 (process {ranks[0].pid} on ")
    assert "made no progress for" in told and "in its forward phase" in told
    assert 'toy_line.py", line' in told and "in loss" in told, "where it hung"
    assert last_hang(line.spec.work, since=began) == told.splitlines()[0] and told.splitlines()[0] in said
    assert last_hang(line.spec.work, since=time.time() + 1) == ""
    hang.unlink()
    with line.ranks() as ranks:
        assert statuses(ranks) == [0]


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_its_watchdog_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    line = Line(tmp_path, **RESOURCES)
    with line.ranks(2) as ranks:
        line.wait_until_it_trains()
        ranks[1].send_signal(signal.SIGSTOP)
        first, second = statuses(ranks)
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL), "rank 0 fails as its connection is lost, and nobody kills it"
    told = hang_of(line)
    assert told.startswith(f"rank 1 (process {ranks[1].pid} on {os.uname().nodename}, stopped by a signal (state T))")
    assert "no stack: the process is stopped" in told


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_does_not_hang_nor_do_those_that_wait_for_it(tmp_path: Path) -> None:
    stall = tmp_path / "stall"
    line = Line(tmp_path, stall_while=str(stall), **RESOURCES)
    with line.ranks(2) as ranks:
        line.wait_until_it_trains()
        stall.touch()
        time.sleep(4 * LIMIT)
        assert [process.poll() for process in ranks] == [None, None]
        stall.unlink()
        assert statuses(ranks) == [0, 0]


@pytest.mark.slow
def test_a_rank_that_waits_for_its_checkpoint_to_be_written_does_not_hang(tmp_path: Path) -> None:
    """At the end of training, in a store that takes its time with large files."""
    slow = tmp_path / "slow"
    resources = {"hang_seconds": LIMIT, "checkpoint_seconds": 0.5}
    line = Line(tmp_path, slow_while=str(slow), resources=resources, observe={"log_every": 10})
    with line.ranks() as ranks:
        line.wait_until_it_trains()
        slow.touch()
        wait_for(lambda: (progress := read_progress(line.spec.work)) and progress.done == STEPS * BATCH)
        time.sleep(4 * LIMIT)
        assert ranks[0].poll() is None
        slow.unlink()
        assert statuses(ranks) == [0]
        said = ranks[0].communicate()[1]
    told = re.findall(r"rank 0 \(.*\) has been in its checkpoint phase for (\d+) s, which may take its time", said)
    assert len(told) == 1 and int(told[0]) >= LIMIT
    assert not Path(line.spec.work, HANGS).exists()


def report(rank: int, *, entered: int, hung: bool = True, state: str = "") -> Report:
    return Report(rank, 100 + rank, "host", entered, "backward", 9.0, True, state, hung, 1)


@pytest.mark.parametrize(
    ("reports", "give_up", "blamed"),
    [
        ([report(0, entered=8), report(1, entered=7), report(2, entered=8)], False, [1]),
        ([report(0, entered=8), report(1, entered=8), report(2, entered=8)], False, [0, 1, 2]),
        ([report(0, entered=8), report(1, entered=8, state="stopped"), report(2, entered=9)], False, [1]),
        ([report(0, entered=8), report(1, entered=7, hung=False), report(2, entered=8)], True, []),
        ([report(0, entered=8), report(1, entered=8)], False, []),
        ([report(0, entered=8), report(1, entered=8)], True, [2]),
    ],
    ids=["the one behind", "all alike", "one is stopped", "one is busy", "one is silent", "one is silent for long"],
)
def test_those_that_are_behind_hold_up_the_rest(reports: list[Report], give_up: bool, blamed: list[int]) -> None:
    assert behind({each.rank: each for each in reports}, 3, give_up=give_up) == blamed
