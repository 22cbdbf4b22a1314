"""`make chaos` in short: a few faults by the command itself, which holds each of them against an undisturbed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the harness needs prctl(2)")]

SHORT = ("alone: SIGKILL", "alone: SIGTERM", "checkpoint: corrupted", "checkpoint: deleted")


def test_a_few_faults_cost_nothing() -> None:
    chosen = [word for name in SHORT for word in ("--only", name)]
    command = [sys.executable, str(Path(__file__).parent), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SHORT)} faults, 0 failed, 0 skipped" in done.stdout
