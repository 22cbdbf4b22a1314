"""Stages that are asked to stop, by real signals to real ranks and by requests in the work folder."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch
from local_ranks import BATCH, STEPS, Line, statuses
from toybox import Toys, wait_for

from genpipe import artifacts
from genpipe.launch import stopping
from genpipe.launch.local import run_local
from genpipe.launch.stopping import StageStopped

RARELY = {"observe": {"log_every": 40}}
"""Metrics are due twice in a training: a stop that waits for them is seen."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A training that nothing happened to."""
    line = Line(tmp_path_factory.mktemp("straight"))
    with line.ranks() as ranks:
        assert statuses(ranks) == [0]
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_gives_a_checkpoint_and_the_same_weights_in_the_end(
    straight: Line, tmp_path: Path, number: signal.Signals
) -> None:
    line = Line(tmp_path, **RARELY)
    with line.ranks() as ranks:
        line.wait_until_it_trains()
        ranks[0].send_signal(number)
        assert statuses(ranks) == [stopping.PREEMPTED_STATUS]
        told = ranks[0].communicate()[0]
    at = line.checkpoints[-1]
    assert 40 * BATCH < at < STEPS * BATCH and at % (40 * BATCH), "at the step that it was in"
    assert f"line: preempted at {at} samples (SIGTERM to" in told.replace("SIGUSR1", "SIGTERM")
    assert stopping.requested(line.spec) is None, "answered"
    with line.ranks() as ranks:
        assert statuses(ranks) == [0]
    assert all(torch.equal(straight.weights[name], tensor) for name, tensor in line.weights.items())


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    """And two ranks, interrupted, end as two that were not."""
    whole, line = Line(tmp_path / "whole"), Line(tmp_path / "cut", **RARELY)
    with whole.ranks(2) as ranks:
        assert statuses(ranks) == [0, 0]
    with line.ranks(2) as ranks:
        line.wait_until_it_trains()
        ranks[1].send_signal(signal.SIGTERM)
        assert statuses(ranks) == [stopping.PREEMPTED_STATUS] * 2
        told = ranks[0].communicate()[0]
    assert f"(SIGTERM to process {ranks[1].pid} on" in told
    with line.ranks(2) as ranks:
        assert statuses(ranks) == [0, 0]
    assert all(torch.equal(whole.weights[name], tensor) for name, tensor in line.weights.items())


@pytest.mark.slow
def test_a_preempted_group_goes_on_with_another_number_of_ranks(straight: Line, tmp_path: Path) -> None:
    """The steps hold the same samples, so the weights are those of one rank that did it all, up to rounding."""
    line = Line(tmp_path)
    with line.ranks(2) as ranks:
        line.wait_until_it_trains()
        ranks[0].send_signal(signal.SIGTERM)
        assert statuses(ranks) == [stopping.PREEMPTED_STATUS] * 2
    assert 0 < line.checkpoints[-1] < STEPS * BATCH
    with line.ranks(1) as ranks:
        assert statuses(ranks) == [0]
    for name, tensor in line.weights.items():
        torch.testing.assert_close(tensor, straight.weights[name], rtol=0, atol=1e-5)


def test_a_request_in_the_work_folder_is_heard_and_answered(tmp_path: Path) -> None:
    line = Line(tmp_path, step_seconds=0.3, observe={"log_every": 2})
    with line.ranks() as ranks:
        line.wait_until_it_trains()
        stopping.request_stop(line.spec, "cancelled", by="somebody")
        assert statuses(ranks) == [stopping.CANCELLED_STATUS]
    answer = wait_for(lambda: stopping.outcome(line.spec))
    assert answer.describe() == f"cancelled at {line.checkpoints[-1]} samples (somebody)"
    assert answer.status == stopping.CANCELLED_STATUS


def test_a_data_stage_stops_between_its_parts(tmp_path: Path) -> None:
    spec = Toys(tmp_path).spec("toy_data", parts=4, seconds=0.7)

    def request() -> None:
        wait_for(lambda: artifacts.finished_parts(spec.target.uri))
        stopping.request_stop(spec, "cancelled", by="somebody")

    threading.Thread(target=request).start()
    with pytest.raises(StageStopped, match=r"cancelled at [123] of 4 parts \(somebody\); the same command goes on"):
        run_local(spec)
    assert run_local(spec).meta["samples"] == 400, "the same command finishes it"


def test_a_preemption_does_not_take_a_cancellation_back(tmp_path: Path) -> None:
    spec = Toys(tmp_path).spec("toy_data")
    stopping.request_stop(spec, "preempted", by="Slurm")
    stopping.request_stop(spec, "cancelled", by="somebody")
    stopping.request_stop(spec, "preempted", by="Slurm")
    stopped = stopping.answer(spec, done="3 parts").stopped
    assert (stopped.reason, stopped.by, stopped.status) == ("cancelled", "somebody", 130)
    assert stopping.follow(spec, done="3 parts").stopped == stopped, "what the other ranks raise"
    assert stopping.requested(spec) is None and stopping.outcome(spec) == stopped


def test_what_the_ranks_of_a_dead_driver_are_told_is_not_for_the_next_attempt(tmp_path: Path) -> None:
    first, second = (
        Toys(tmp_path).spec("toy_data").model_copy(update={"links": {"ray_job": name}}) for name in ("first", "second")
    )
    stopping.request_stop(first, "preempted", by="Ray")
    assert stopping.requested(first) is not None and stopping.requested(second) is None
    stopping.request_stop(second, "cancelled", by="somebody")
    assert stopping.requested(first) == stopping.requested(second) is not None
