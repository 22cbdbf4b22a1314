"""A project for each test of flows; what it has started ends with the test, whatever became of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from toy_project import Project


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    while Project.started:
        process = Project.started.pop()
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def project(tmp_path: Path, prefect_home: Path, mlflow_tables: Path) -> Project:
    return Project(tmp_path, prefect_home, mlflow_tables)
