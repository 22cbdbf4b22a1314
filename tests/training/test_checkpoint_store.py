"""Checkpoints in a folder and on a real S3 server: what is kept, what is none, what ranks tell each other."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from genpipe.files import DiskFull
from genpipe.storage import open_storage
from genpipe.training import checkpoint_store
from genpipe.training.checkpoint import Snapshot
from genpipe.training.checkpoint_store import Canceled, CheckpointStore, KeepBest, name_of, samples_of
from genpipe.training.slices import share_of


def snapshot(value: float, *, rank: int = 0, world_size: int = 1) -> Snapshot:
    copy = Snapshot()
    share = share_of({"weight": torch.full((4, 2), value)}, rank=rank, world_size=world_size)
    copy.copy(share, {"value": value}, device=torch.device("cpu"))
    return copy


def put(
    store: CheckpointStore, seen: int, *, rank: int = 0, world_size: int = 1, canceled: threading.Event | None = None,
    **metrics: float,
) -> str:  # fmt: skip
    name = name_of(seen, attempt=1, count=seen)
    copy = snapshot(seen, rank=rank, world_size=world_size)
    canceled = canceled or threading.Event()
    store.put(name, copy, rank=rank, world_size=world_size, metrics=metrics, canceled=canceled)
    return name


def kept(store: CheckpointStore) -> list[int]:
    return [samples_of(name) for name in reversed(store.names())]


def test_the_newest_are_kept(store_uri: str) -> None:
    store = CheckpointStore(f"{store_uri}/checkpoints", keep=2)
    assert store.names() == []
    for seen in (5, 10, 100, 1000):
        put(store, seen)
    assert kept(store) == [100, 1000]
    assert {entry.key.split("/")[0] for entry in open_storage(store.uri).list()} == set(store.names()), "and no more"
    for name in store.names():
        assert store.fault(name, rank=0, world_size=1) is None
        checkpoint = store.open(name)
        seen = samples_of(name)
        assert checkpoint.record == {"value": seen}
        assert torch.equal(checkpoint.tensor("weight"), torch.full((4, 2), float(seen)))


@pytest.mark.parametrize(("goal", "best"), [("min", 20), ("max", 10)])
def test_the_best_is_kept_too(tmp_path: Path, goal: str, best: int) -> None:
    store = CheckpointStore(str(tmp_path), keep=1, best=KeepBest.model_validate({"metric": "loss", "goal": goal}))
    put(store, 5)
    for seen, loss in ((10, 3.0), (20, 1.0), (30, 1.0), (40, 2.0)):  # the third carries on what the second measured
        put(store, seen, loss=loss, psnr=20.0)
    put(store, 50)
    assert kept(store) == [best, 50]


def test_what_is_not_committed_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    put(store, 10)
    old, cut = tmp_path / "000000000000020", tmp_path / name_of(20, attempt=1, count=1)
    old.mkdir()
    (old / "manifest.json").touch()
    cut.mkdir()
    (cut / "rank-00000.safetensorsabc.part").write_bytes(bytes(100))
    assert kept(store) == [10], "neither one of an earlier version nor one cut off"
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == store.names()


def test_a_rank_that_is_ahead_does_not_lose_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "PATIENCE_SECONDS", 1.0)
    store = CheckpointStore(str(tmp_path), keep=1)
    for seen in (10, 20):
        put(store, seen, rank=1, world_size=2)
    for seen in (10, 20):
        put(store, seen, rank=0, world_size=2)
    assert kept(store) == [20]


def test_each_rank_looks_at_its_share_of_the_files(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    with ThreadPoolExecutor(2) as ranks:
        [name, _] = ranks.map(lambda rank: put(store, 10, rank=rank, world_size=2), range(2))
    assert [store.fault(name, rank=rank, world_size=2) for rank in range(2)] == [None, None]
    file = tmp_path / name / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    one, other = (store.fault(name, rank=rank, world_size=2) for rank in range(2))
    assert one is None and other == f"{file}: its content differs from the manifest's sha256"
    file.unlink()
    assert all("rank-00001.safetensors: is missing" in str(store.fault(name, rank=r, world_size=2)) for r in range(2))
    (tmp_path / name / "manifest.json").write_text("{}")
    assert "not a readable manifest" in str(store.fault(name, rank=0, world_size=2))


def test_a_damaged_one_neither_counts_nor_outlives_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    put(store, 10)
    store.damaged.add(put(store, 20))
    put(store, 15)
    assert kept(store) == [10, 15]


class FullDisk(Snapshot):
    """Of one number, to be written to a disk that has no room for it at so many tries."""

    def __init__(self, tries: int) -> None:
        super().__init__()
        self.copy(share_of({"weight": torch.ones(1)}, rank=0, world_size=1), {}, device=torch.device("cpu"))
        self.tries = tries

    def write(self, path: Path) -> tuple[int, str]:
        self.tries -= 1
        if self.tries < 0:
            return super().write(path)
        path.write_bytes(bytes(10))
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_moment_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "RETRY_SECONDS", (0.01, 0.01))
    store, nobody = CheckpointStore(str(tmp_path)), threading.Event()
    name = name_of(10, attempt=1, count=1)
    store.put(name, FullDisk(tries=2), rank=0, world_size=1, metrics={}, canceled=nobody)
    assert kept(store) == [10] and store.fault(name, rank=0, world_size=1) is None
    with pytest.raises(DiskFull, match=f"^{tmp_path}/.*: no space left"):
        store.put(name_of(20, attempt=1, count=2), FullDisk(9), rank=0, world_size=1, metrics={}, canceled=nobody)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is left of the other"


def test_a_rank_that_fails_says_so_to_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "RETRY_SECONDS", ())
    store = CheckpointStore(str(tmp_path))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(put, store, 10, rank=0, world_size=2)
        name = name_of(10, attempt=1, count=10)
        with pytest.raises(OSError, match=r"(?i)no space left"):
            store.put(name, FullDisk(1), rank=1, world_size=2, metrics={}, canceled=threading.Event())
        with pytest.raises(OSError, match=r"(?i)rank 1: .*no space left"):
            waiting.result()
    assert not list(tmp_path.iterdir())


def test_a_rank_that_says_nothing_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(checkpoint_store, "PATIENCE", 0.0)
    store = CheckpointStore(str(tmp_path))
    with pytest.raises(OSError, match="2 of 3 ranks did not put their parts in place"):
        put(store, 10, world_size=3)
    assert not list(tmp_path.iterdir()), "there may be no room for the next one beside it"
    put(store, 10, rank=1, world_size=3)
    put(store, 20)
    assert kept(store) == [20] and len(list(tmp_path.iterdir())) == 1, "what a late rank left is deleted with the next"


def test_a_canceled_one_is_none(tmp_path: Path) -> None:
    canceled = threading.Event()
    store = CheckpointStore(str(tmp_path))
    threading.Timer(0.1, canceled.set).start()
    with pytest.raises(Canceled):
        put(store, 10, world_size=2, canceled=canceled)
    assert store.names() == []


def test_who_may_not_commit_does_not(tmp_path: Path) -> None:
    class LeaseLost(Exception):
        pass

    def refuse() -> None:
        raise LeaseLost

    with pytest.raises(LeaseLost):
        put(CheckpointStore(str(tmp_path), before_commit=refuse), 10)
    assert CheckpointStore(str(tmp_path)).names() == []


@pytest.mark.parametrize(("failures", "works"), [(2, True), (3, False)])
def test_a_storage_that_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch, failures: int, works: bool) -> None:
    monkeypatch.setattr(checkpoint_store, "RETRY_SECONDS", (0.01, 0.01))
    tries: list[int] = []

    def action() -> str:
        tries.append(1)
        if len(tries) <= failures:
            raise ConnectionError("503")
        return "done"

    insist: Callable[[], str] = lambda: checkpoint_store.insisting(action, canceled=threading.Event())  # noqa: E731
    if works:
        assert insist() == "done"
    else:
        with pytest.raises(ConnectionError):
            insist()
    assert len(tries) == 3
