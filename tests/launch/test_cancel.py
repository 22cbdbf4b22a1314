"""`genpipe cancel` against a stage that somebody runs with torch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_ranks import Line, statuses

from genpipe.cli.main import app
from genpipe.launch import stopping


def test_cancel_stops_a_stage_whoever_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path, step_seconds=0.3, observe={"log_every": 2})
    with line.ranks() as ranks:
        line.wait_until_it_trains()
        app(["cancel", str(line.config), "line"], standalone_mode=False)
        assert statuses(ranks) == [stopping.CANCELLED_STATUS]
    at = line.checkpoints[-1]
    assert f"line: cancelled at {at} samples (genpipe cancel on" in " ".join(capsys.readouterr().out.split())


def test_a_stage_that_nobody_runs_gives_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path)
    app(["cancel", str(line.config)], standalone_mode=False)
    assert "line" not in capsys.readouterr().out, "it was not begun"
    line.spec.write()
    assert app(["cancel", str(line.config), "--wait", "2"], standalone_mode=False) == 1
    assert "no answer within 2 s from line" in " ".join(capsys.readouterr().err.split())
    assert stopping.requested(line.spec) is None, "nothing waits for whoever runs it next"
