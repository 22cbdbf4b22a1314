"""What a rank tells the world while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toybox import Toys

from genpipe.launch.local import run_local
from genpipe.launch.rank import RankRuntime
from genpipe.pipeline.spec import read_progress
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
