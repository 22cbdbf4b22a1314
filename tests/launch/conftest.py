"""Fixtures of the tests of launchers: a local Ray, and toy stages to run on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from toybox import Toys, install

from genpipe.launch.jobs import Cluster, cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    install()  # before Ray's processes inherit the environment
    with cluster() as local:
        yield local


@pytest.fixture
def toys(tmp_path: Path) -> Toys:
    return Toys(tmp_path)
