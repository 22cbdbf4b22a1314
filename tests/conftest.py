"""Fixtures that several rooms share: a folder of captioned shapes, the tiny pipeline on it, and a real S3 server."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from seaweed import Seaweed
from shapes import draw_shapes

from genpipe.artifacts import Artifact
from genpipe.cli import main as cli
from genpipe.launch.local import run_local
from genpipe.pipeline import graph
from genpipe.pipeline.plan import Planned, plan, spec_of
from genpipe.pipeline.spec import StageSpec, sqlite_uri
from genpipe.tracking import store

MARKS = {"services": ("s3_server", "prefect_home"), "pipelines": ("tiny", "pixel_tiny")}
"""Marks of the tests that take one of these fixtures."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark tests by their fixtures; the slow files first, so that at the end no process waits for another's.

    Of those, the ones that are given the most time.
    """
    most: dict[Path, float] = {}
    for item in items:
        for mark, fixtures in MARKS.items():
            if any(name in item.fixturenames for name in fixtures):
                item.add_marker(mark)
        if hasattr(item, "callspec") and item.callspec.params.get("store_uri") == "s3":
            item.add_marker("services")
        if given := item.get_closest_marker("timeout"):
            most[item.path] = max(most.get(item.path, 0.0), given.args[0])
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, -most.get(item.path, 0.0)))


torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
hypothesis.settings.register_profile("landing", deadline=None, derandomize=True)  # the same examples for the same code
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "untimed"))

TINY = Path(__file__).parent.parent / "configs/pipeline/tiny.yaml"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """Products of fp32 in fp32: a stage that an earlier test ran in this process may have asked for less."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own: that of the user is left alone, and none of it is believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def genpipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["genpipe", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        code = exited.value.code
        printed = capsys.readouterr()
        return (code if isinstance(code, int) else 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 pictures of 40 pixels, each with its caption in a `.txt` beside it."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder)
    return folder


class TinyPipeline:
    """A small pipeline on a folder of shapes, in one store, so that a stage runs once a session."""

    def __init__(self, store: Path | str, shapes: Path, config: Path = TINY) -> None:
        self.store, self.shapes, self.config = store, shapes, config

    def load(self, *overrides: str) -> graph.Pipeline:
        return graph.load_pipeline(
            str(self.config), [f"store={self.store}", f"stages.shard.source.path={self.shapes}", *overrides]
        )

    def plan(self, *overrides: str) -> dict[str, Planned]:
        return {planned.name: planned for planned in plan(self.load(*overrides))}

    def spec(self, stage: str, *overrides: str) -> StageSpec:
        """What a launcher is given for `stage`, with the stages it needs run before."""
        pipeline = self.load(*overrides)
        for planned in plan(pipeline, only=[stage]):
            if planned.name != stage and planned.status == "run":
                self.run(planned.name, *overrides)
        return spec_of(plan(pipeline, only=[stage])[-1], pipeline)

    def run(self, stage: str, *overrides: str) -> Artifact:
        """The committed artifact of `stage`; it and what it needs are run unless they were."""
        return run_local(self.spec(stage, *overrides))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> TinyPipeline:
    return TinyPipeline(tmp_path_factory.mktemp("store"), shapes)


@pytest.fixture(scope="session")
def shape_classes(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The pictures of `shapes` in a folder for each shape, without captions."""
    folder = tmp_path_factory.mktemp("classes")
    for path in shapes.glob("*.png"):
        shape = path.stem.rpartition("-")[2]
        (folder / shape).mkdir(exist_ok=True)
        shutil.copy(path, folder / shape / path.name)
    return folder


@pytest.fixture(scope="session")
def pixel_tiny(tmp_path_factory: pytest.TempPathFactory, shape_classes: Path) -> TinyPipeline:
    """`configs/pipeline/pixel-tiny.yaml`."""
    return TinyPipeline(tmp_path_factory.mktemp("store"), shape_classes, TINY.with_name("pixel-tiny.yaml"))


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home whose database has its tables, which take a server seconds to make."""
    home = tmp_path_factory.mktemp("prefect")
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=os.environ | {"PREFECT_HOME": str(home)}, check=True, capture_output=True)
    return home


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make, and nothing in them; tests copy it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store.check(sqlite_uri(path))
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server (SeaweedFS) that checks keys and secrets; AWS_* point there."""
    server = Seaweed(tmp_path_factory.mktemp("seaweedfs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server.endpoint
        finally:
            server.kill()


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store, in a folder and under S3 in turn."""
    if request.param == "folder":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_server")
    return f"s3://genpipe/{tmp_path.name}"
