"""A home that Prefect's own server cannot write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from toy_project import Project

pytestmark = pytest.mark.slow


def test_a_home_that_cannot_be_written_is_named_within_seconds(tmp_path: Path, prefect_home: Path) -> None:
    project = Project(tmp_path, prefect_home)
    project.environment["HOME"] = "/nonexistent"
    del project.environment["PREFECT_HOME"]
    begun = time.monotonic()
    code, output = project.run(stage="toy_data")
    assert code == 2, output
    for named in ("PREFECT_HOME", "/nonexistent/.prefect", "HOME, which is /nonexistent"):
        assert named in output
    assert time.monotonic() - begun < 60
