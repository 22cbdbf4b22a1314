"""What a run tells those who watch it."""

from __future__ import annotations

import pytest

from flows.reporting import PlainReporter, StageResult
from genpipe.cli.console import Display
from genpipe.evaluation.comparison import Difference, Judgment
from genpipe.pipeline.spec import Progress
from genpipe.stage_config import Gate

NOTE = "was preempted by SIGTERM to process 7 on node, goes on from 72 samples"


@pytest.mark.parametrize("reporter", [PlainReporter, Display])
def test_a_preemption_is_told_once_and_as_no_failure(
    reporter: type[PlainReporter] | type[Display], capsys: pytest.CaptureFixture[str]
) -> None:
    watching = reporter()
    watching.update("decoder", "running", progress=Progress(done=60, total=400))
    for done in (72, 80, 92):
        watching.update("decoder", "running", progress=Progress(done=done, total=400, note=NOTE))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count(f"decoder: {NOTE}") == 1
    assert "fail" not in told


def judged(judgment: Judgment) -> StageResult:
    name = "train/recall_at_10"
    return StageResult("evaluate", "ran", metrics={name: 0.5}, gates={name: judgment.gate}, judged={name: judgment})


def test_a_number_that_is_worse_than_its_baseline_is_missed() -> None:
    gate = Gate(not_worse_than="runs/scores/1", margin=0.02)
    worse = judged(Judgment(gate, Difference(-0.1, -0.15, -0.05, 256, better="higher")))
    told = "differs by -0.1 (95 % interval -0.15 to -0.05, 256 pictures) from runs/scores/1"
    assert not worse.held
    assert worse.missed == [f"evaluate: train/recall_at_10 {told}, and may be worse by 0.02"]
    perhaps = judged(Judgment(gate, Difference(-0.1, -0.2, -0.01, 256, better="higher")))
    assert not perhaps.missed
    assert perhaps.held == [
        "evaluate: train/recall_at_10 differs by -0.1 (95 % interval -0.2 to -0.01, 256 pictures) from runs/scores/1, "
        "and may be worse by 0.02"
    ]


def test_a_number_that_cannot_be_compared_is_missed() -> None:
    refused = judged(Judgment(Gate(not_worse_than="x/y"), None, "drawn with seed 0, the baseline with 1"))
    assert refused.missed == [
        "evaluate: train/recall_at_10 cannot be held against x/y: drawn with seed 0, the baseline with 1"
    ]
