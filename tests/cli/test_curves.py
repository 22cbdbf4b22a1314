"""`genpipe curves`: what one store's trainings did is what another's are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from toybox import install

from genpipe.config import ConfigError
from genpipe.launch.local import run_local, spec_of_stage
from genpipe.pipeline.curves import Expectation, read_curve
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.spec import Curve

TRAIN = {"samples": 80, "global_batch_size": 4, "optim": {"kind": "adamw", "lr": 0.05}, "precision": "fp32"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A pipeline of a line through some points."""
    install()
    line = {"kind": "toys.toy_line", "train": TRAIN, "observe": {"log_every": 5, "validate_every": 40}}
    return written(tmp_path / "toy.yaml", {"toy_data": {"kind": "toys.toy_data", "parts": 1}, "line": line})


def written(path: Path, stages: dict[str, Any], **settings: Any) -> Path:
    head = {"name": "toy", "store": str(path.parent / "store"), "tracking": {"uri": "jsonl"}}
    path.write_text(yaml.safe_dump(head | settings | {"stages": stages}))
    return path


def trained(path: Path, *overrides: str) -> str:
    """The URI of the line."""
    run_local(spec_of_stage(str(path), "toy_data", overrides))
    return run_local(spec_of_stage(str(path), "line", overrides)).uri


def losses(curve: Curve) -> dict[int, float]:
    return {samples: found["loss"] for samples, found in curve.items()}


def test_curves_go_from_one_store_to_another(toy: Path, tmp_path: Path, genpipe: Command) -> None:
    made = [trained(toy, f"stages.line.train.seed={seed}") for seed in (0, 1)]
    trained(toy, "stages.line.train.grad_clip=0.5")
    file = tmp_path / "kept" / "curves.json"
    file.parent.mkdir()
    code, told, error = genpipe("curves", str(toy), "--out", str(file))
    assert code == 0, error
    assert "line" in told and "toy_data" not in told and str(file) in told

    stages = yaml.safe_load(toy.read_text())["stages"]
    renamed = {"points": stages["toy_data"], "fit": stages["line"] | {"inputs": {"toy_data": "points"}}}
    other = written(file.parent / "other.yaml", renamed, curves="curves.json")
    run_local(spec_of_stage(str(other), "points"))
    expected = Expectation.of(spec_of_stage(str(other), "fit", ["stages.fit.train.seed=7"])).curves
    found = sorted((losses(curve) for curve in expected), key=str)
    assert found == [pytest.approx(each, rel=1e-4) for each in sorted(map(losses, map(read_curve, made)), key=str)]
    assert not Expectation.of(spec_of_stage(str(other), "fit", ["stages.fit.train.grad_clip=0.1"])).curves


def test_a_file_is_extended_by_what_a_store_has(toy: Path, tmp_path: Path, genpipe: Command) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    trained(toy)
    assert genpipe("curves", str(toy), "--out", str(first))[0] == 0
    elsewhere = [f"store={tmp_path / 'elsewhere'}", f"curves={first}"]
    assert genpipe("curves", str(toy), *elsewhere, "--out", str(second))[0] == 0
    assert second.read_text() == first.read_text(), "where nothing is trained it is copied"
    trained(toy, *elsewhere)
    assert genpipe("curves", str(toy), *elsewhere, "--out", str(second))[0] == 0
    assert second.read_text() == first.read_text(), "the same training, made twice, is one"
    trained(toy, *elsewhere, "stages.line.train.seed=1")
    assert genpipe("curves", str(toy), *elsewhere, "--out", str(second))[0] == 0
    [before], [after] = (json.loads(file.read_text()).values() for file in (first, second))
    assert before["likeness"] == after["likeness"] and before["curves"].items() < after["curves"].items()
    assert len(after["curves"]) == 2


def test_members_of_a_matrix_are_kept_together(toy: Path, tmp_path: Path, genpipe: Command) -> None:
    stages = yaml.safe_load(toy.read_text())["stages"]
    stages["line"]["matrix"] = {"train.seed": [0, 1, 2]}
    seeds = written(tmp_path / "seeds.yaml", stages)
    trained(toy)
    trained(toy, "stages.line.train.seed=2")
    assert genpipe("curves", str(seeds), "--out", str(tmp_path / "curves.json"))[0] == 0
    [kept] = json.loads((tmp_path / "curves.json").read_text()).values()
    assert len(kept["curves"]) == 2


def test_what_cannot_be_kept_or_read_is_said(toy: Path, tmp_path: Path, genpipe: Command) -> None:
    code, _, error = genpipe("curves", str(toy))
    assert code == 2 and "has no held-out curve" in " ".join(error.split())
    with pytest.raises(ConfigError, match=r"none\.json: the held-out curves cannot be read .*`genpipe curves`"):
        load_pipeline(str(toy), [f"curves={tmp_path / 'none.json'}"])
    for content, fault in (("{", "Invalid JSON"), ('{"line": {"likeness": "0"}}', "line.curves: Field required")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"bad\.json: no file of held-out curves \(.*{fault}"):
            load_pipeline(str(toy), [f"curves={tmp_path / 'bad.json'}"])
