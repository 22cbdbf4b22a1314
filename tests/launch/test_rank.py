"""What a rank tells the world while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toybox import Toys

from genpipe.files import DiskFull
from genpipe.launch import rank
from genpipe.launch.local import run_local
from genpipe.launch.rank import RankRuntime
from genpipe.pipeline.curves import read_curve
from genpipe.pipeline.spec import Progress, StageSpec, read_progress, write_progress
from genpipe.training.averages import AverageStore
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.handover import HandOverStore


def quick(store: Path) -> Toys:
    """Toys whose runs are kept in plain files."""
    toys = Toys(store)
    toys.tracking_uri = "jsonl"
    return toys


def runtime_of(spec: StageSpec) -> RankRuntime:
    """Of a training by itself."""
    return RankRuntime(
        spec,
        "",
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        checkpoints=CheckpointStore(f"{spec.work}/checkpoints"),
        averages=AverageStore(spec.target.uri),
        handovers=HandOverStore(f"{spec.work}/validations"),
        total=80,
        should_stop=lambda: False,
        enter=lambda phase: None,
    )


def test_a_curve_is_kept_across_checkpoints(tmp_path: Path) -> None:
    toys = quick(tmp_path)
    spec = toys.line(run_local(toys.spec("toy_data", parts=1)))
    write_progress(spec.work, Progress(done=0, total=80))
    with runtime_of(spec) as rt:
        rt.log({"heldout/loss": 0.5, "line/loss": 3.0}, samples_seen=20)
        rt.log({"heldout/loss": 0.4}, samples_seen=40)
        rt.before_checkpoint()
        rt.log({"heldout/loss": 0.3}, samples_seen=60)  # lost, as its checkpoint is
    with runtime_of(spec) as rt:
        assert rt.curve == {20: {"loss": 0.5}, 40: {"loss": 0.4}}


def test_a_run_that_leaves_what_others_did_is_told_once_and_early(tmp_path: Path) -> None:
    toys = quick(tmp_path)
    data = run_local(toys.spec("toy_data", parts=1))
    often = {"validate_every": 20}
    made = [run_local(toys.line(data, train={"seed": seed}, observe=often)) for seed in range(3)]
    losses = [read_curve(line.uri)[40]["loss"] for line in made]
    assert all(set(read_curve(line.uri)) == {20, 40, 60, 80} for line in made)
    spec = toys.line(data, train={"seed": 9})
    with runtime_of(spec) as rt:
        rt.log({"heldout/loss": losses[1]}, samples_seen=40)
        assert read_progress(spec.work) is None, "as expected"
        rt.log({"heldout/loss": 99.0}, samples_seen=50)
        rt.log({"heldout/loss": 98.0}, samples_seen=60)
        rt.telling.wait()
        progress = read_progress(spec.work)
        assert progress is not None and progress.done == 50
        assert progress.note.startswith("after 50 samples held-out loss is 99, not as expected (")
        assert progress.note.endswith(", by 3 runs of like settings)")
        rt.log({"heldout/loss": read_curve(made[0].uri)[80]["loss"]}, samples_seen=80)
        assert rt.note.startswith("after 80 samples") and ", as expected" in rt.note
    folder = Path(spec.store, "runs", spec.target.name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    at_40 = {name: of for line in lines if line.get("samples_seen") == 40 for name, of in line["metrics"].items()}
    assert at_40["expected/loss_low"] < min(losses) <= max(losses) < at_40["expected/loss_high"]
    assert at_40["expected/loss_mean"] == pytest.approx(sum(losses) / 3)


def test_progress_that_cannot_be_written_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toys = quick(tmp_path)
    spec = toys.line(run_local(toys.spec("toy_data", parts=1)))
    in_its_place = Path(spec.work, "progress.json")
    with runtime_of(spec) as rt:
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
