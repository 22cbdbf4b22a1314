"""Records in the store itself, in a folder and on S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toybox import Toys

from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage
from genpipe.tracking.jsonl import append_points, open_stage_run, runs_uri
from genpipe.tracking.recorder import Point


def spec_in(store: str, tmp_path: Path) -> StageSpec:
    toys = Toys(tmp_path)
    toys.store, toys.tracking_uri = store, "jsonl"
    return toys.spec("toy_data", parts=1)


def records(spec: StageSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open_storage(runs_uri(spec)).read("metrics.jsonl").splitlines()]


def test_attempts_follow_one_another_in_one_file(store_uri: str, tmp_path: Path) -> None:
    spec = spec_in(store_uri, tmp_path)
    for error in (ValueError("no luck"), KeyboardInterrupt("Ctrl-C")):
        with pytest.raises(type(error)), open_stage_run(spec) as run:
            run.log({"loss": 1.5, "rate": 2.0}, samples_seen=64)
            run.log_image("deep/picture", np.zeros((4, 4, 3), np.uint8), samples_seen=64)
            run.log_file(Path(__file__))
            raise error
    run_local(spec)
    lines = records(spec)
    status = [line["status"] for line in lines if "status" in line]
    assert status == ["RUNNING", "FAILED", "RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert [line["error"] for line in lines if "error" in line] == ["ValueError: no luck", "KeyboardInterrupt: Ctrl-C"]
    assert lines[1]["metrics"] == {"loss": 1.5, "rate": 2.0} and lines[1]["samples_seen"] == 64
    assert all(line["time"].endswith("+00:00") for line in lines)
    keys = {entry.key for entry in open_storage(runs_uri(spec)).list()}
    logged = {"images/deep/picture-000000000064.png", "files/test_jsonl.py", "files/preview.png"}
    assert keys == {"metrics.jsonl", *logged}, "the pictures of the artifact, too"
    assert open_storage(runs_uri(spec)).read("files/test_jsonl.py") == Path(__file__).read_bytes()


def test_points_of_one_moment_are_one_line(tmp_path: Path) -> None:
    spec = spec_in(str(tmp_path / "store"), tmp_path)
    append_points(spec, [Point("a", 1.0, 1000, 8), Point("b", 2.0, 1000, 8), Point("a", 3.0, 2500, 16)])
    assert records(spec) == [
        {"time": "1970-01-01T00:00:01.000+00:00", "samples_seen": 8, "metrics": {"a": 1.0, "b": 2.0}},
        {"time": "1970-01-01T00:00:02.500+00:00", "samples_seen": 16, "metrics": {"a": 3.0}},
    ]
