"""How long a run takes: by hand for a few stages, and against bounds that any order obeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toybox
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genpipe.launch.local import run_local
from genpipe.pipeline.forecast import STAGE_SECONDS, forecast, makespan
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.order import works_of
from genpipe.pipeline.plan import Planned, plan, spec_of

ONE = {"CPU": 1.0}


def spanned(seconds: dict[str, float], needs: dict[str, list[str]] | None = None, **given: Any) -> float:
    """On two cores, of which each stage takes one, in the order of `seconds`."""
    settings: dict[str, Any] = {
        "needs": {name: (needs or {}).get(name, []) for name in seconds},
        "shares": dict.fromkeys(seconds, ONE),
        "capacity": {"CPU": 2.0},
        "order": {name: place for place, name in enumerate(seconds)},
    }
    return makespan(seconds, **{**settings, **given})


def test_stages_run_side_by_side_as_far_as_there_are_cores() -> None:
    assert spanned({}) == 0
    assert spanned({"a": 3, "b": 2, "c": 2}) == 4, "c begins when b has ended"
    assert spanned({"a": 3, "b": 2, "c": 2}, capacity={"CPU": 3.0}) == 3
    assert spanned({"a": 3, "b": 2, "c": 2}, capacity={}) == 3, "a cluster that has enough"
    assert spanned({"a": 3, "b": 2, "c": 2}, {"c": ["a"], "b": ["a"]}) == 5
    both = {"a": ONE, "b": {"CPU": 2.0}, "c": ONE}
    assert spanned({"a": 3, "b": 2, "c": 2}, shares=both) == 7, "nobody overtakes"
    assert spanned({"c": 2, "a": 3, "b": 2}, begun=frozenset({"b"})) == 5, "what has begun goes on: a after b or c"
    assert spanned({"a": 1, "b": 2}, shares={"a": {"CPU": 8.0}, "b": ONE}) == 3, "more than there is takes all"


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, list[str]]]:
    names = [str(number) for number in range(draw(st.integers(1, 7)))]
    seconds = {name: float(draw(st.integers(1, 9))) for name in names}
    needs = {name: draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, name in enumerate(names)}
    return seconds, needs


@given(graphs(), st.integers(1, 4))
def test_no_run_beats_its_longest_path_or_all_cores_at_work(
    graph: tuple[dict[str, float], dict[str, list[str]]], cores: int
) -> None:
    seconds, needs = graph
    path: dict[str, float] = {}
    for name in seconds:
        path[name] = seconds[name] + max((path[need] for need in needs[name]), default=0.0)
    found = spanned(seconds, needs, capacity={"CPU": float(cores)})
    assert max(max(path.values()), sum(seconds.values()) / cores) <= found <= sum(seconds.values())
    assert spanned(seconds, needs, capacity={}) == max(path.values())


def line(samples: int, **inputs: str) -> dict[str, Any]:
    train = {"samples": samples, "global_batch_size": 4}
    return {"kind": "toys.toy_line", "train": train, "inputs": {"toy_data": "data"} | inputs}


@pytest.fixture
def source(tmp_path: Path) -> str:
    toybox.install()
    stages = {"data": {"kind": "toys.toy_data"}, "one": line(4000), "two": line(8000), "three": line(12000)}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"name": "t", "store": str(tmp_path / "s"), "stages": stages}))
    return str(tmp_path / "toy.yaml")


def planned(source: str) -> list[Planned]:
    return plan(load_pipeline(source))


def test_more_work_takes_longer_by_the_rate_of_this_machine(source: str) -> None:
    plans = planned(source)
    found = forecast(plans, capacity={"CPU": 1.0}, works=works_of(plans), probe=True)
    assert found is not None and found.seconds["data"] == STAGE_SECONDS
    beyond = {name: seconds - STAGE_SECONDS for name, seconds in found.seconds.items()}
    assert beyond["one"] > 0, "it trains"
    assert found.total() == pytest.approx(sum(found.seconds.values()))
    later = found.after(left={"two": 5.0, "three": 7.0}, running=["two"])
    assert later.total() == pytest.approx(12.0)
    assert forecast(plans, capacity={}, works=works_of(plans), probe=False) is None, "nothing says how fast"


def test_what_was_trained_says_how_fast_the_rest_goes(source: str) -> None:
    """Whatever the machine: a cluster is not probed, and what it has made tells."""
    pipeline = load_pipeline(source)
    for name in ("data", "one"):
        run_local(spec_of({p.name: p for p in plan(pipeline)}[name], pipeline))
    plans = planned(source)
    found = forecast(plans, capacity={}, works=works_of(plans), probe=False)
    assert found is not None and found.seconds.keys() == {"two", "three"}
    beyond = {name: seconds - STAGE_SECONDS for name, seconds in found.seconds.items()}
    assert beyond["three"] == pytest.approx(1.5 * beyond["two"]), "half as many samples again"
