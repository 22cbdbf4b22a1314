"""Records in the store itself, in a folder and on S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_runtime import full_disk
from toybox import Toys

from genpipe.files import DiskFull
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage
from genpipe.tracking.jsonl import FILE, StageKeeper, kept, mark_handed_in, runs_uri
from genpipe.tracking.recorder import Facts, File, Picture, Point, Status
from genpipe.tracking.recording import open_stage_run, pipeline_run


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
    assert sum("metrics" in line and "loss" in line["metrics"] for line in lines) == 1, "one history"
    keys = {entry.key for entry in open_storage(runs_uri(spec)).list()}
    logged = {"images/deep/picture-000000000064.png", "files/test_jsonl.py", "files/preview.png"}
    assert keys == {"metrics.jsonl", *logged}, "the pictures of the artifact, too"
    assert open_storage(runs_uri(spec)).read("files/test_jsonl.py") == Path(__file__).read_bytes()


def test_points_of_one_moment_are_one_line(tmp_path: Path) -> None:
    spec = spec_in(str(tmp_path / "store"), tmp_path)
    StageKeeper(spec).write([Point("a", 1.0, 1000, 8), Point("b", 2.0, 1000, 8), Point("a", 3.0, 2500, 16)])
    assert records(spec) == [
        {"time": "1970-01-01T00:00:01.000+00:00", "samples_seen": 8, "metrics": {"a": 1.0, "b": 2.0}},
        {"time": "1970-01-01T00:00:02.500+00:00", "samples_seen": 16, "metrics": {"a": 3.0}},
    ]


def test_a_resumed_run_goes_on_after_a_line_that_was_cut_off(store_uri: str, tmp_path: Path) -> None:
    spec = spec_in(store_uri, tmp_path)
    first = StageKeeper(spec)
    first.open()
    first.write([Point("a", 1.0, 1000, 8), Point("a", 2.0, 2000, 16)])
    storage = open_storage(runs_uri(spec))
    storage.write(FILE, storage.read(FILE) + b'{"time": "1970-01-01T00:00:03.000+00:00", "samples_s')
    second = StageKeeper(spec)
    second.open()
    second.write([Point("a", 2.0, 4000, 16), Point("a", 3.0, 5000, 24)])
    assert [record.step for record in kept(spec) if isinstance(record, Point)] == [8, 16, 24]


def test_lines_that_find_no_room_are_written_once_when_they_do(tmp_path: Path) -> None:
    """A write is cut short where the disk is full: what is there of it goes, so that it can be repeated."""
    spec = spec_in(str(tmp_path / "store"), tmp_path)
    keeper, lines = StageKeeper(spec), [Point("a", float(k), 1000 * k, 8 * k) for k in range(1, 31)]
    keeper.open()
    keeper.write(lines[:5])
    with full_disk(), pytest.raises(DiskFull, match=r"runs/.*: no space left"):
        keeper.write(lines[5:])
    assert [line["samples_seen"] for line in records(spec)] == [8, 16, 24, 32, 40]
    keeper.write(lines[5:])
    assert [line["samples_seen"] for line in records(spec)] == [8 * k for k in range(1, 31)]


def test_what_is_kept_is_what_was_written_until_it_is_handed_in(store_uri: str, tmp_path: Path) -> None:
    spec = spec_in(store_uri, tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    written = [
        Status("RUNNING", 1000),
        Point("a/b", float("inf"), 2000, 8),
        Picture("deep/picture", picture, 2000, 8),
        File("notes.txt", b"\x00 notes"),
        Facts({"precision_used": "fp32"}),
        Status("FAILED", 3000, "ValueError: no luck"),
    ]
    keeper = StageKeeper(spec)
    keeper.write(written)
    found = kept(spec)
    assert [type(record) for record in found] == [type(record) for record in written]
    for before, after in zip(written, found, strict=True):
        if isinstance(before, Picture) and isinstance(after, Picture):
            assert np.array_equal(before.image, after.image) and before[2:] == after[2:]
        else:
            assert before == after
    mark_handed_in(spec, "r1")
    assert kept(spec) == []
    keeper.write([Point("a/b", 1.0, 4000, 16)])
    assert kept(spec) == [Point("a/b", 1.0, 4000, 16)]


def test_a_pipeline_run_is_kept_in_the_store(store_uri: str, tmp_path: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text("name: toys\n")
    with pipeline_run("jsonl", store=store_uri, experiment="x", name="toys 10:00", tags={}, files=[config]) as run:
        run.summarize([{"stage": "toy_data", "status": "failed", "run_id": ""}])
    storage = open_storage(f"{store_uri}/runs/pipelines/{run.run_id}")
    assert json.loads(storage.read("summary.json"))["status"] == "FAILED"
    assert storage.read("config/pipeline.yaml") == b"name: toys\n"
    assert not list(open_storage(f"{store_uri}/runs/open").list())
