"""Fixtures of the tests of launchers: a local Ray, and toy stages to run on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from toybox import Toys, install

from genpipe.artifacts import Artifact
from genpipe.launch.jobs import Cluster, cluster
from genpipe.launch.local import run_local


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    install()  # before Ray's processes inherit the environment
    with cluster() as local:
        yield local


@pytest.fixture
def ray_on_s3(ray: Cluster, s3_server: str) -> Cluster:
    """The same Ray, whose jobs may use the S3 server."""
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Cluster(ray.client, runtime_env={"env_vars": credentials}, capacity=ray.capacity)


@pytest.fixture
def toys(tmp_path: Path, mlflow_tables: Path) -> Toys:
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    return Toys(tmp_path)


@pytest.fixture
def alone(tmp_path: Path) -> Toys:
    """Toys in another store, for what this process runs by itself; the records are plain files."""
    toys = Toys(tmp_path / "alone")
    toys.tracking_uri = "jsonl"
    return toys


@pytest.fixture
def data(toys: Toys) -> Artifact:
    return run_local(toys.spec("toy_data"))
