"""The files of runs that are open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toybox import Toys

from genpipe.pipeline.presence import Presence
from genpipe.storage import open_storage
from genpipe.tracking.open_runs import OpenRun, PipelineRecord, all_open, find_stage, is_alive, open_stage


def parent_of(store: str, run_id: str) -> OpenRun:
    record = PipelineRecord(name="p", experiment="x", tags={})
    return OpenRun(presence=Presence.here(), store=store, tracking_uri="", run_id=run_id, pipeline=record)


def test_what_is_written_is_found_until_it_is_removed(store_uri: str, tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    toys.store = store_uri
    spec = toys.spec("toy_data")
    assert find_stage(spec) is None
    stage, parent = open_stage(spec, "r1"), parent_of(store_uri, "p1")
    parent.write()
    stage.write()
    open_storage(f"{store_uri}/runs/open").write("stage-of-a-later-version.json", b'{"new": 1}')
    found = find_stage(spec)
    assert found is not None and (found.run_id, found.stage) == ("r1", spec)
    assert [run.key for run in all_open(store_uri)] == [stage.key, parent.key], "stages first"
    stage.remove()
    assert find_stage(spec) is None


def test_a_stage_whose_pipeline_run_is_alive_waits_for_its_turn(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    gone = Presence(machine="elsewhere", pid=1, started="1", beat=0)
    stage = open_stage(toys.spec("toy_data").model_copy(update={"pipeline_run_id": "p1"}), "r1")
    dead = stage.model_copy(update={"presence": gone})
    parent = parent_of(toys.store, "p1")
    assert is_alive(stage, [])
    assert not is_alive(dead, []) and not is_alive(dead, [parent_of(toys.store, "p2")])
    assert is_alive(dead, [parent])
    assert not is_alive(dead, [parent.model_copy(update={"presence": gone})])
    left = stage.model_copy(update={"presence": Presence.here(left=True)})
    assert not is_alive(left, [parent]), "its job has ended, and only its records are not complete"


def test_a_store_that_was_moved_knows_its_runs(tmp_path: Path) -> None:
    old, new = Toys(tmp_path / "old"), Toys(tmp_path / "new")
    open_stage(old.spec("toy_data"), "r1").write()
    shutil.move(old.store, new.store)
    [found] = all_open(new.store)
    assert found.stage == new.spec("toy_data")
    assert found.tracking_uri == new.tracking_uri
    assert old.store not in found.model_dump_json()


def test_a_store_that_takes_no_more_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("in the way")
    open_stage(Toys(tmp_path).spec("toy_data"), "r1").write()
    assert "is not written" in capsys.readouterr().err
