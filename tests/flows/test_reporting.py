"""What a run tells those who watch it."""

from __future__ import annotations

import pytest

from flows.reporting import PlainReporter
from genpipe.cli.console import Display
from genpipe.pipeline.spec import Progress

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
