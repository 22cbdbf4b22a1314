"""Jobs on a cluster whose node is another machine for all that it sees: other code, another home, other paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from other_node import Node, other_node
from toybox import Toys, artifact_of

import genpipe
from genpipe import artifacts
from genpipe.launch.failure import StageError
from genpipe.pipeline.code import code_digest
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources

pytestmark = pytest.mark.slow
NAMED = {"cpus": 0.5, "accelerator_type": "H100", "memory": 0.5, "custom": {"scratch": 1.5}}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with other_node(tmp_path_factory.mktemp("node")) as node:
        yield node


def planned(spec: StageSpec) -> StageSpec:
    """As the planner writes it: with the code that is here."""
    code = {"version": genpipe.__version__, "git_revision": "1111-dirty", "code": code_digest(spec.stage)}
    return spec.model_copy(update=code)


def run(node: Node, spec: StageSpec, *, carries_code: bool = False) -> None:
    node.cluster(carries_code=carries_code).run(spec, report=lambda progress: None)


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
    """With the user's package, to the driver, the actors and the ranks, which have what they ask for by name."""
    toys = Toys(tmp_path)
    data = planned(toys.spec("toy_data", parts=2))
    run(node, data, carries_code=True)
    line = planned(toys.line(artifact_of(data), samples=8, resources=NAMED | {"placement": "SPREAD"}))
    run(node, line, carries_code=True)
    for spec in (data, line):
        environment = artifacts.verify(spec.target.uri).environment
        assert environment["code"] == code_digest(spec.stage)
        assert (environment["version"], environment["git_revision"]) == (genpipe.__version__, "1111-dirty")
    answer = node.cluster().client._do_request("GET", "/api/v0/placement_groups?detail=true").json()
    bundles = [bundle["unit_resources"] for group in answer["data"]["result"]["result"] for bundle in group["bundles"]]
    assert {"CPU": 0.5, "scratch": 1.5, "accelerator_type:H100": 0.001, "memory": 2.0**29} in bundles


PLACES = """
import os
import tempfile
from pathlib import Path

import genpipe
import ray
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


def given():
    context = ray.get_runtime_context()
    return {"given": context.get_assigned_resources()}


class Worker:
    def __init__(self, cfg, inputs):
        pass

    def __call__(self, part, out):
        (out / "part").write_text("made")
        return here() | given()


def finalize(cfg, inputs, results, out):
    return {"actor": results[0], "driver": here()}, {}
"""


def test_nothing_of_the_submitters_machine_travels_but_its_code(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor has what it asks for by name."""
    (tmp_path / "user/whereabouts").mkdir(parents=True)
    (tmp_path / "user/whereabouts/__init__.py").touch()
    (tmp_path / "user/whereabouts/places.py").write_text(PLACES)
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    config = {"resources": Resources.model_validate(NAMED | {"placement": "SPREAD"}).model_dump(mode="json")}
    spec = Toys(tmp_path).spec("toy_data").model_copy(update={"stage": "whereabouts.places", "config": config})
    run(node, planned(spec), carries_code=True)
    meta = artifact_of(spec).meta
    for process in ("driver", "actor"):
        assert meta[process]["home"] == str(node.folder / "home")
        assert meta[process]["temporary"] == str(node.folder / "tmp")
        assert meta[process]["revision"] == "1111-dirty"
        assert str(node.folder / "installed") not in meta[process]["genpipe"] != genpipe.__file__
    assert meta["actor"]["given"] == {"CPU": 0.5, "scratch": 1.5, "accelerator_type:H100": 0.001, "memory": 2.0**29}
