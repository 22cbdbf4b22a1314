"""Graphs of stage instances as YAML says them: roles, references, matrices, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toybox
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.config import ConfigError
from genpipe.pipeline.graph import Pipeline, load_pipeline

LINE = {"kind": "toys.toy_line", "train": {"samples": 8, "global_batch_size": 4}}
DATA = {"kind": "toys.toy_data"}
END = LINE | {"kind": "toys.toy_end"}
SLOW = LINE | {"kind": "toys.toy_slow"}


@pytest.fixture(autouse=True)
def toys() -> None:
    toybox.install()


def load(folder: Path, stages: dict[str, Any], *overrides: str) -> Pipeline:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "store": str(folder / "store"), "stages": stages}, sort_keys=False))
    return load_pipeline(str(path), overrides)


def refused(folder: Path, stages: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, stages, *overrides)
    return str(error.value)


def test_a_role_takes_the_instance_of_its_own_name_or_the_one_that_is_mapped(tmp_path: Path) -> None:
    other = LINE | {"inputs": {"toy_data": "other_data"}}
    made = load(tmp_path, {"line": LINE, "other": other, "toy_data": DATA, "other_data": DATA})
    assert made.instances["line"].inputs == {"toy_data": ("toy_data",)}
    assert made.instances["other"].inputs == {"toy_data": ("other_data",)}
    assert made.needed(["other"]) == {"other", "other_data"}


def test_the_order_runs_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    made = load(tmp_path, {"toy_end": END, "toy_slow": SLOW, "toy_line": LINE, "toy_data": DATA})
    assert list(made.instances) == ["toy_data", "toy_slow", "toy_line", "toy_end"]


@settings(deadline=None, max_examples=30)
@given(st.permutations([(f"s{i}", i) for i in range(5)]), st.data())
def test_every_instance_comes_after_what_it_needs(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Chains of lines that take one another: any references from later ones to earlier ones are a graph."""
    stages: dict[str, Any] = {"data": DATA}
    for name, i in names:
        stages[name] = END | {"inputs": {"toy_data": "data", "toy_line": f"line{i}", "toy_slow": f"slow{i}"}}
        stages[f"line{i}"] = LINE | {"inputs": {"toy_data": "data"}}
        stages[f"slow{i}"] = SLOW | {"inputs": {"toy_data": "data"}}
    order = data.draw(st.permutations(list(stages)))
    made = load(tmp_path_factory.mktemp("graph"), {name: stages[name] for name in order})
    place = {name: i for i, name in enumerate(made.instances)}
    assert place.keys() == stages.keys()
    assert all(place[need] < place[name] for name, instance in made.instances.items() for need in instance.needs)


def test_a_matrix_makes_an_instance_of_each_combination(tmp_path: Path) -> None:
    seeds = LINE | {"matrix": {"train.seed": [5, 6], "width": [1, 2, 3]}}
    made = load(tmp_path, {"toy_data": DATA, "line": seeds}).instances
    assert [name for name in made if name != "toy_data"] == [f"line@{i}-{j}" for i in (0, 1) for j in (0, 1, 2)]
    assert made["line@1-2"].cells == {"train.seed": 6, "width": 3}
    cfg: Any = made["line@1-2"].cfg
    assert (cfg.train.seed, cfg.width, cfg.train.samples) == (6, 3, 8)


def test_a_matrix_may_run_over_inputs(tmp_path: Path) -> None:
    data = DATA | {"matrix": {"slope": [1.0, 2.0]}}
    lines = LINE | {"matrix": {"inputs.toy_data": ["data@0", "data@1"]}}
    made = load(tmp_path, {"data": data, "line": lines}).instances
    assert [made[f"line@{i}"].inputs["toy_data"] for i in (0, 1)] == [("data@0",), ("data@1",)]


def test_a_matrix_of_one_goes_by_its_base_name(tmp_path: Path) -> None:
    made = load(tmp_path, {"toy_data": DATA | {"matrix": {"parts": [2]}}, "line": LINE}).instances
    assert made["line"].inputs == {"toy_data": ("toy_data@0",)}


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ({"toy_line": LINE}, ("stages.toy_line.inputs.toy_data", "toy_data")),
        ({"toy_data": DATA, "line": LINE | {"inputs": {"toy_dta": "toy_data"}}}, ("'toy_dta'", "'toy_data'")),
        ({"toy_data": DATA, "line": LINE | {"inputs": {"toy_data": "toy_date"}}}, ("'toy_date'", "'toy_data'")),
        ({"toy_data": DATA, "a": LINE, "b": LINE | {"inputs": {"toy_data": "a"}}}, ("a is of kind toy_line",)),
        ({"toy_data": DATA, "line": LINE | {"inputs": {"toy_data": ["toy_data", "toy_data"]}}}, ("takes one",)),
        ({"toy_data": DATA, "line": LINE | {"inputs": "toy_data"}}, ("stages.line.inputs", "mapping")),
        ({"toy_data": DATA | {"matrix": {"parts": [1, 2]}}, "line": LINE}, ("toy_data@0, toy_data@1",)),
        ({"toy_data": DATA | {"matrix": {"parts": 3}}}, ("stages.toy_data.matrix", "lists")),
        ({"toy_data": DATA | {"matrix": {"prts": [3]}}}, ("prts", "parts")),
        ({"toy@data": DATA}, ("stages.toy@data", "@")),
        ({"shrad": {}}, ("stages.shrad.kind", "'shard'")),
        ({"mine": {"kind": "my_package.stage"}}, ("stages.mine.kind", "my_package.stage", "PYTHONPATH")),
        ({"mine": {"kind": "json.decoder"}}, ("json.decoder", "VERSION")),
        ({"mine": {"kind": 3}}, ("stages.mine.kind", "3")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, stages: dict[str, Any], names: tuple[str, ...]) -> None:
    message = refused(tmp_path, stages)
    assert str(tmp_path / "toy.yaml") in message
    assert all(name in message for name in names), message


def test_what_would_fit_is_named(tmp_path: Path) -> None:
    stages = {
        "first": DATA,
        "second": DATA,
        "a": LINE | {"inputs": {"toy_data": "b"}},
        "b": SLOW | {"inputs": {"toy_data": "first"}},
    }
    assert "first, second would fit" in refused(tmp_path, stages)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package outside of genpipe whose stage takes what it makes: as a distilled decoder does."""
    folder = tmp_path / "chains"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "again.py").write_text(
        "from genpipe.artifacts import Role\n"
        "from toys.toy_data import HEADLINES, VERSION, Config, Worker, check_inputs, finalize, parts\n"
        'MAKES = "chain"\n'
        "def roles(cfg):\n"
        '    return {"before": Role("chain", optional=True), "beside": Role("chain", optional=True, several=True)}\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "chains.again"
    for name in ("chains", "chains.again"):
        sys.modules.pop(name, None)


def test_a_stage_may_take_another_of_its_kind(tmp_path: Path, own_package: str) -> None:
    stage = {"kind": own_package}
    made = load(
        tmp_path, {"a": stage, "b": stage | {"inputs": {"before": "a"}}, "c": stage | {"inputs": {"before": "b"}}}
    )
    assert list(made.instances) == ["a", "b", "c"]
    assert made.needed(["c"]) == {"a", "b", "c"}


def test_cycles_are_named(tmp_path: Path, own_package: str) -> None:
    stage = {"kind": own_package}
    stages = {name: stage | {"inputs": {"before": need}} for name, need in {"a": "c", "b": "a", "c": "b"}.items()}
    message = refused(tmp_path, stages)
    cycle = re.search(r"cycle: (\w -> \w -> \w -> \w)", message)
    assert cycle and cycle[1] in ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"), message


def test_a_role_may_take_several_and_a_whole_matrix(tmp_path: Path, own_package: str) -> None:
    stage = {"kind": own_package}
    seeds = stage | {"matrix": {"slope": [1.0, 2.0, 3.0]}}
    made = load(tmp_path, {"a": stage, "s": seeds, "all": stage | {"inputs": {"beside": ["a", "s", "/store/x"]}}})
    assert made.instances["all"].inputs == {"beside": ("a", "s@0", "s@1", "s@2", "/store/x")}
    assert made.instances["all"].needs == ["a", "s@0", "s@1", "s@2"]


def test_an_override_maps_a_role(tmp_path: Path) -> None:
    made = load(tmp_path, {"line": LINE}, "stages.line.inputs.toy_data=s3://bucket/artifacts/toy_data/0123")
    assert made.instances["line"].inputs == {"toy_data": ("s3://bucket/artifacts/toy_data/0123",)}
    assert made.instances["line"].needs == []


def test_an_unknown_instance_is_told_with_the_nearest(tmp_path: Path) -> None:
    made = load(tmp_path, {"toy_data": DATA, "line": LINE})
    with pytest.raises(ConfigError, match=r"'lin'.*'line'"):
        made.needed(["lin"])
