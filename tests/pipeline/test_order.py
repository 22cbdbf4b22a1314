"""Which stage goes first on one machine: the one with the most work on the way to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toybox
import yaml

from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.order import longest_path_first, work
from genpipe.pipeline.plan import Planned, plan


def line(samples: int, *, kind: str = "toy_line", **inputs: str) -> dict[str, Any]:
    train = {"samples": samples, "global_batch_size": 4}
    return {"kind": f"toys.{kind}", "train": train, "inputs": {"toy_data": "data"} | inputs}


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Planned]:
    """Two chains and a stage by itself: 400 + 100 samples, 40 + 1,000 samples, and 900."""
    toybox.install()
    stages = {
        "data": {"kind": "toys.toy_data"},
        "alone": line(900),
        "first": line(400),
        "second": line(40, kind="toy_slow"),
        "idle": line(40, kind="toy_slow"),
        "end": line(1000, kind="toy_end", toy_line="first", toy_slow="second"),
        "other": line(100, kind="toy_end", toy_line="first", toy_slow="idle"),
    }
    path = tmp_path / "toy.yaml"
    path.write_text(
        yaml.safe_dump({"name": "toy", "store": str(tmp_path / "store"), "stages": stages}, sort_keys=False)
    )
    return {planned.name: planned for planned in plan(load_pipeline(str(path)))}


def test_the_longest_remaining_path_goes_first(plans: dict[str, Planned]) -> None:
    """Remaining samples: data 1,400, first 1,400, second 1,040, end 1,000, alone 900, idle 140, other 100."""
    places = longest_path_first(list(plans.values()))
    assert sorted(places, key=places.__getitem__) == ["data", "first", "second", "end", "alone", "idle", "other"]


def test_work_grows_with_samples_and_is_shared_by_workers(plans: dict[str, Planned]) -> None:
    """A linear layer of one weight: forward 2 FLOPs, gradient of the weight 2, times samples."""
    assert work(plans["data"]) == 0.0
    assert work(plans["end"]) == pytest.approx(2.5 * work(plans["first"]))
    assert work(plans["first"]) == pytest.approx(400 * 4)


def test_a_stage_whose_work_cannot_be_computed_is_reported_and_runs_all_the_same(
    plans: dict[str, Planned], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(plans["alone"].instance.stage, "example_batch", broken)
    places = longest_path_first([plans[name] for name in ("data", "alone", "first", "second")])
    assert places.keys() == {"data", "alone", "first", "second"}
    reported = capsys.readouterr().err
    assert "alone" in reported and "no such shape" in reported
