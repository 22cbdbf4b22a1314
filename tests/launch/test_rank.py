"""What a rank tells the world while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toybox import Toys

from genpipe.files import DiskFull
from genpipe.launch import rank
from genpipe.launch.local import run_local
from genpipe.launch.rank import RankRuntime
from genpipe.pipeline.spec import read_progress
from genpipe.training.averages import AverageStore
from genpipe.training.checkpoint_store import CheckpointStore


def test_progress_that_cannot_be_written_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toys = Toys(tmp_path)
    spec = toys.line(run_local(toys.spec("toy_data", parts=1))).model_copy(update={"tracking_uri": "jsonl"})
    runtime = RankRuntime(
        spec,
        "",
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        checkpoints=CheckpointStore(f"{spec.work}/checkpoints"),
        averages=AverageStore(spec.target.uri),
        total=80,
        should_stop=lambda: False,
        enter=lambda phase: None,
    )
    in_its_place = Path(spec.work, "progress.json")
    with runtime as rt:
        (in_its_place / "folder").mkdir(parents=True)
        rt.log({"samples_per_second": 1.0}, samples_seen=20)
        rt.telling.wait()
        (in_its_place / "folder").rmdir()
        in_its_place.rmdir()
        rt.log({"samples_per_second": 1.0}, samples_seen=40)
    assert "progress could not be written" in capfd.readouterr().out
    progress = read_progress(spec.work)
    assert progress is not None and progress.done == 40, "written by the end of the block"


@pytest.mark.parametrize(("tries", "stops", "works"), [(2, False, True), (3, False, False), (1, True, False)])
def test_a_commit_waits_for_room_unless_it_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int, stops: bool, works: bool
) -> None:
    monkeypatch.setattr(rank, "COMMIT_PAUSES", (0.01, 0.01))
    spec = (toys := Toys(tmp_path)).line(run_local(toys.spec("toy_data", parts=1)))
    finished: list[bool] = []

    def finish() -> None:
        finished.append(len(finished) == tries)
        if not finished[-1]:
            raise DiskFull("/store")

    if works:
        rank._insisting(spec, finish, should_stop=lambda: stops)
    else:
        with pytest.raises(DiskFull, match=r"^/store: no space left; make room there"):
            rank._insisting(spec, finish, should_stop=lambda: stops)
    assert finished == [False] * tries + [True] * works
