"""What is refused before anything is submitted, with a real head that sees other things than this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from other_node import Node, other_node
from PIL import Image

from genpipe.config import ConfigError
from genpipe.launch import submission
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.pipeline.plan import plan

pytestmark = pytest.mark.slow

ONLY_HERE = "/proc/self/cwd/only-here"
"""Of this process another folder than of a job."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with other_node(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "only-here").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "only-here/a.png")
    (tmp_path / "only-here/a.txt").write_text("black")
    return tmp_path


def pipeline(folder: Path, node: Node, *, pictures: str, **resources: Any) -> Pipeline:
    stages = {"shard": {"source": {"kind": "folder", "path": pictures}, "resources": resources}}
    settings = {"name": "p", "store": str(folder / "store"), "ray": {"address": node.head.address}, "stages": stages}
    (folder / "p.yaml").write_text(yaml.safe_dump(settings))
    return load_pipeline(str(folder / "p.yaml"))


def check(node: Node, given: Pipeline, *, autoscales: bool = False) -> None:
    submission.check(node.cluster(autoscales=autoscales), given, plan(given))


def test_a_folder_that_only_the_submitter_has_is_refused_by_its_setting(node: Node, folder: Path) -> None:
    check(node, pipeline(folder, node, pictures=str(folder / "only-here")))  # both see it by this path
    said = rf"p\.yaml: stages\.shard\.source\.path: {ONLY_HERE} is here and not on the cluster at http.*s3://"
    with pytest.raises(ConfigError, match=said):
        check(node, pipeline(folder, node, pictures=ONLY_HERE))


def test_every_fault_is_told_at_once(node: Node, folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        check(node, pipeline(folder, node, pictures=ONLY_HERE, custom={"disk": 1}))
    placed, absent = str(refused.value).splitlines()
    assert "stages.shard.resources: a worker takes 1 CPU, 1 disk, and no node has room" in placed
    assert ONLY_HERE in absent


@pytest.mark.parametrize("wrong", [{"accelerator_type": "H200"}, {"custom": {"scrach": 1}}, {"memory": 1e6}])
def test_what_the_nodes_do_not_have_is_refused_with_what_they_have(
    node: Node, folder: Path, wrong: dict[str, Any]
) -> None:
    """Unless others may come."""
    right = {"cpus": 0.5, "accelerator_type": "H100", "memory": 0.5, "custom": {"scratch": 1.5}, "workers": 2}
    check(node, pipeline(folder, node, pictures=str(folder / "only-here"), **right))  # its two actors take turns
    given = pipeline(folder, node, pictures=str(folder / "only-here"), **right | wrong)
    said = (
        r"shard.resources: a worker takes 0.5 CPU, .* no node has .*; there are 1 node with . CPU, .*H100.* 2 scratch"
    )
    with pytest.raises(ConfigError, match=said):
        check(node, given)
    check(node, given, autoscales=True)
