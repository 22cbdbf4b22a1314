"""Jobs on a cluster whose node is another machine for all that it sees: other code, another home, other paths."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from toybox import Toys, artifact_of

import genpipe
from genpipe import artifacts
from genpipe.launch.failure import StageError
from genpipe.launch.jobs import cluster
from genpipe.launch.local_ray import TUNING, Head, local_head
from genpipe.pipeline.code import code_digest
from genpipe.pipeline.graph import RayConfig
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources

pytestmark = pytest.mark.slow


class Node(NamedTuple):
    """A head with a folder of its own, where its genpipe is installed; it has no toys."""

    head: Head
    folder: Path


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    installed = folder / "installed" / "genpipe"
    shutil.copytree(Path(genpipe.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    told = (installed / "__init__.py").read_text()
    (installed / "__init__.py").write_text(told.replace(genpipe.__version__, "0.0.9"))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(installed.parent),
        "GENPIPE_REVISION": "of-the-image",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(installed.parent)
        head = stack.enter_context(local_head(os.environ | TUNING | environment))
        patch.chdir(Path(genpipe.__file__).parent.parent)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", head.token)
        yield Node(head, folder)


def planned(spec: StageSpec) -> StageSpec:
    """As the planner writes it: with the code that is here."""
    code = {"version": genpipe.__version__, "git_revision": "1111-dirty", "code": code_digest(spec.stage)}
    return spec.model_copy(update=code)


def run(node: Node, spec: StageSpec, **settings: object) -> None:
    with cluster(RayConfig.model_validate({"address": node.head.address} | settings)) as there:
        there.run(spec, report=lambda progress: None)


def test_other_code_than_was_planned_with_is_refused_by_both_names(node: Node, tmp_path: Path) -> None:
    spec = planned(Toys(tmp_path).spec("toy_data").model_copy(update={"stage": "shard"}))
    with pytest.raises(StageError, match=r"planned with genpipe .* 1111-dirty .* 0\.0\.9 at revision of-the-image"):
        run(node, spec)
    assert artifacts.find(spec.target.uri) is None


def test_a_package_that_the_nodes_lack_is_named(node: Node, tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match="the package toys is not installed here; install it on every node, or set ray"
    ):
        run(node, planned(Toys(tmp_path).spec("toy_data")))


def test_the_checkout_travels_and_the_cluster_runs_it(node: Node, tmp_path: Path) -> None:
    """With the user's package, to the driver, the actors and the ranks."""
    toys = Toys(tmp_path)
    data = planned(toys.spec("toy_data", parts=2))
    run(node, data, code="checkout")
    line = planned(toys.line(artifact_of(data), samples=8))
    run(node, line, code="checkout")
    for spec in (data, line):
        environment = artifacts.verify(spec.target.uri).environment
        assert environment["code"] == code_digest(spec.stage)
        assert (environment["version"], environment["git_revision"]) == (genpipe.__version__, "1111-dirty")


PLACES = """
import os
import tempfile
from pathlib import Path

import genpipe
from genpipe.stage_config import StageConfig

VERSION, MAKES, HEADLINES = 1, "places", ()


class Config(StageConfig):
    pass


def roles(cfg):
    return {}


def check_inputs(cfg, inputs):
    return {}


def parts(cfg, inputs):
    return ["one"]


def here():
    seen = {"home": str(Path.home()), "temporary": tempfile.gettempdir(), "genpipe": genpipe.__file__}
    return seen | {"revision": os.environ["GENPIPE_REVISION"]}


class Worker:
    def __init__(self, cfg, inputs):
        pass

    def __call__(self, part, out):
        (out / "part").write_text("made")
        return here()


def finalize(cfg, inputs, results, out):
    return {"actor": results[0], "driver": here()}, {}
"""


def test_nothing_of_the_submitters_machine_travels_but_its_code(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user/whereabouts").mkdir(parents=True)
    (tmp_path / "user/whereabouts/__init__.py").touch()
    (tmp_path / "user/whereabouts/places.py").write_text(PLACES)
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    spec = (
        Toys(tmp_path)
        .spec("toy_data")
        .model_copy(
            update={"stage": "whereabouts.places", "config": {"resources": Resources().model_dump(mode="json")}}
        )
    )
    run(node, planned(spec), code="checkout")
    meta = artifact_of(spec).meta
    for process in ("driver", "actor"):
        assert meta[process]["home"] == str(node.folder / "home")
        assert meta[process]["temporary"] == str(node.folder / "tmp")
        assert meta[process]["revision"] == "1111-dirty"
        assert str(node.folder / "installed") not in meta[process]["genpipe"] != genpipe.__file__
