"""One stage by `python -m genpipe.launch.local`, as on a machine that has torch and neither Ray, Prefect nor MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from toybox import TOYS, Toys, install

from genpipe import artifacts
from genpipe.launch import local
from genpipe.launch.local import main, run_local

BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "prefect", "mlflow"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None

sys.meta_path.insert(0, Blocker())
from genpipe.launch.local import main, run_local
for stage in sys.argv[2:]:
    status = main([sys.argv[1], stage])
    assert status == 0, (stage, status)
assert not {"ray", "prefect", "mlflow"} & {name.split(".")[0] for name in sys.modules}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    install()
    train = {"samples": 80, "global_batch_size": 4, "precision": "fp32"}
    line = {"kind": "toys.toy_line", "inputs": {"toy_data": "points"}, "train": train, "observe": {"log_every": 5}}
    stages = {"points": {"kind": "toys.toy_data", "parts": 2}, "line": line}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "store": str(tmp_path / "store"), "stages": stages}))
    return path


def environment() -> dict[str, str]:
    there = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{TOYS}:{TOYS.parent.parent}:{there}", "OMP_NUM_THREADS": "1"}


def records(store: Path, kind: str) -> list[dict[str, Any]]:
    [file] = (store / "runs" / kind).glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_pipeline_runs_stage_by_stage_with_torch_alone(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(config), "points", "line"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "MLflow is not installed" in done.stdout
    store = tmp_path / "store"
    [folder] = (store / "artifacts" / "toy_line").iterdir()
    manifest = artifacts.verify(str(folder))
    assert f"loss {manifest.metrics['loss']:.4g}" in done.stdout
    assert manifest.environment["precision_used"] == "fp32"

    lines = records(store, "toy_line")
    assert [line["status"] for line in lines if "status" in line] == ["RUNNING", "FINISHED"]
    assert lines[0]["config"]["train"]["samples"] == 80
    assert lines[-1]["final_metrics"] == manifest.metrics
    steps = [line for line in lines if "line/loss" in line.get("metrics", {})]
    assert [line["samples_seen"] for line in steps] == [20, 40, 60, 80]
    assert {"line/grad_norm", "line/lr", "samples_per_second"} <= set(steps[0]["metrics"])
    assert {"precision_used": "fp32"} in [line.get("tags") for line in lines]
    [picture] = (store / "runs" / "toy_line").glob("*/images/picture-*.png")
    assert Image.open(picture).size == (8, 8)
    assert records(store, "toy_data")[-1]["final_metrics"] == {"samples": 200.0}


def test_a_line_says_now_and_then_how_far_it_is(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "TELL_SECONDS", 0.05)
    assert main([str(config), "points", "tracking.uri=jsonl", "stages.points.seconds=0.4"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if " parts" in line]
    assert "points: 1/2 parts" in told
    assert len(told) == len({*told}) <= 3, "once each"


def test_a_worker_that_takes_three_parts_at_a_time_gets_them(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    one, three = (
        artifacts.verify(run_local(spec).uri).files
        for spec in (toys.spec("toy_data", parts=5), toys.spec("toy_at_once", parts=5, log=str(tmp_path / "log")))
    )
    assert three == one
    assert (tmp_path / "log").read_text().count("ended") == 5


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_one_stage(config: Path, tmp_path: Path) -> None:
    assert main([str(config), "points", "tracking.uri=jsonl"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "genpipe.launch.local", str(config), "line", "tracking.uri=jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines(keepends=True) if "/80 samples" not in line]
    assert "".join(made).count("line: ") == 1, "rank 0 speaks for both"
    again = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (again.returncode, again.stdout) == (0, "".join(made)), again.stderr
    assert [line["status"] for line in records(tmp_path / "store", "toy_line") if "status" in line][-1] == "FINISHED"


def test_an_input_that_is_not_committed_is_named_with_its_remedy(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "line"]) == 2
    told = capsys.readouterr().err
    assert "stages.line: its input points is not committed" in told
    assert f"python -m genpipe.launch.local {config} points" in told
    assert main([str(config)]) == 2
    assert "usage: python -m genpipe.launch.local CONFIG STAGE" in capsys.readouterr().err
