from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.data.images import encode
from genpipe.data.shards import ShardWriter
from genpipe.data.stream import (
    Batch,
    Batches,
    ShardDataset,
    caption_choice,
    image_batch,
    order,
    sequential,
    to_float,
    to_uint8,
)

SIDE = 16


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in four shards of two parts, and one held out."""
    path = tmp_path_factory.mktemp("shards")
    numbers = iter(range(11))
    for split, part, count in (("train", 0, 5), ("train", 1, 5), ("heldout", 0, 1)):
        with ShardWriter(path, split=split, part=part, max_samples=3, max_bytes=10**6) as writer:  # type: ignore[arg-type]
            for number in itertools.islice(numbers, count):
                writer.write(
                    f"key-{number}",
                    group=f"group-{number // 2}",
                    image=encode(picture(number), format="png"),
                    format="png",
                    captions=[f"caption {number}.{n}" for n in range(number % 3 + 1)],
                    meta={},
                )
    return path


def test_samples_by_index(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    assert len(dataset) == 10
    assert dataset.shards() == ["train-00000-00", "train-00000-01", "train-00001-00", "train-00001-01"]
    assert [dataset.rows(shard) for shard in dataset.shards()] == [
        range(3),
        range(3, 5),
        range(5, 8),
        range(8, 10),
    ]
    for i in reversed(range(10)):
        assert (dataset.key(i), dataset.group(i)) == (f"key-{i}", f"group-{i // 2}")
        assert dataset.captions(i) == [f"caption {i}.{n}" for n in range(i % 3 + 1)]
        assert (dataset.image(i) == picture(i)).all()
    assert [ShardDataset(folder, split="heldout").key(0)] == ["key-10"]
    for i in (-1, 10):
        with pytest.raises(IndexError):
            dataset.key(i)
    dataset.close()
    assert (dataset.image(0) == picture(0)).all()
    dataset.close()


def test_threads_read_the_same_bytes(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    wrong: list[int] = []

    def read(offset: int) -> None:
        wrong.extend(i for i in np.roll(np.arange(10), offset) if (dataset.image(int(i)) != picture(int(i))).any())

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset.close()
    assert wrong == []


def test_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no train shards"):
        ShardDataset(tmp_path, split="train")
    index = "train-00000-00.index.parquet"
    (tmp_path / index).write_bytes((folder / index).read_bytes())
    with pytest.raises(ValueError, match="no tar beside the index of train-00000-00; shard again"):
        ShardDataset(tmp_path, split="train")


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 700), seed=st.integers(-5, 2**63), epoch=st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * n, (epoch + 1) * n)
    assert (np.sort(order(positions, n=n, seed=seed)) == np.arange(n)).all()


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 2**40),
    seed=st.integers(0, 100),
    positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=50),
)
def test_order_is_a_function_of_each_position_alone(n: int, seed: int, positions: list[int]) -> None:
    together = order(np.array(positions), n=n, seed=seed)
    assert together.dtype == np.int64 and ((together >= 0) & (together < n)).all()
    assert together.tolist() == [int(order(np.array([p]), n=n, seed=seed)[0]) for p in positions]


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 5000
    orders = [order(np.arange(n) + epoch * n, n=n, seed=seed) for seed in (0, 1) for epoch in (0, 1, 2)]
    for a, b in itertools.combinations([np.arange(n), *orders], 2):
        # For random permutations the correlation is N(0, 1/n) and the number of agreements Poisson(1).
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
        assert (a == b).sum() < 10


@pytest.mark.parametrize("n", [1000, 1024, 1025, 10**6 + 3])
def test_consecutive_positions_are_spread_evenly(n: int) -> None:
    bins = np.bincount(order(np.arange(n // 2), n=n, seed=3) * 20 // n, minlength=20)
    expected = n // 2 / 20
    chi2 = ((bins - expected) ** 2 / expected).sum() * 2  # sampling half without replacement halves the variance
    assert chi2 < 60  # 19 degrees of freedom: the chance is below 1e-5
    steps = np.diff(order(np.arange(1000), n=n, seed=3))
    assert len(np.unique(steps)) > 350


def test_a_billion_samples_need_no_permutation() -> None:
    positions = np.arange(64) + 10**9 * 7 + 123_456_789
    indices = order(positions, n=10**9, seed=0)
    assert len(np.unique(indices)) == 64 and indices.max() > 5 * 10**8


def test_caption_choice_is_even_and_follows_seed_and_position() -> None:
    choice = caption_choice(np.arange(30_000), seed=1)
    assert choice.dtype == np.int64 and (choice >= 0).all()
    counts = np.bincount(choice % 3)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 2 / 3)
    assert (caption_choice(np.arange(100, 200), seed=1) == choice[100:200]).all()
    assert (caption_choice(np.arange(100), seed=2) != choice[:100]).all()


def indices_and_positions(indices: np.ndarray, positions: np.ndarray) -> Batch:
    return {"indices": torch.from_numpy(indices), "positions": torch.from_numpy(positions)}


def batches(n: int, *, rank: int = 0, world_size: int = 1, start: int = 0, **options: int) -> Batches:
    settings = {
        "global_batch_size": 24,
        "micro_batch_size": 2,
        "prefetch": 3,
        "workers": 0,
        "seed": 5,
    } | options
    return Batches(n, collate=indices_and_positions, rank=rank, world_size=world_size, start=start, **settings)  # type: ignore[arg-type]


def delivered(stream: Batches, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    for position, batch in itertools.islice(stream, count):
        assert batch["positions"].tolist() == list(range(position, position + len(batch["positions"])))
        yield position, tuple(batch["indices"].tolist())


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 100),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 10),
    step=st.integers(0, 12),
    workers=st.sampled_from([0, 0, 0, 2]),
)
def test_the_stream_is_the_same_for_any_ranks_and_restart(
    n: int, world_size: int, seed: int, step: int, workers: int
) -> None:
    steps, micro_batches = 3, 12
    reference = dict(delivered(batches(n, seed=seed), (step + steps) * micro_batches))
    everything = order(np.arange((step + steps) * 24), n=n, seed=seed)
    assert [i for _, indices in sorted(reference.items()) for i in indices] == everything.tolist()

    restarted: dict[int, tuple[int, ...]] = {}
    for rank in range(world_size):
        stream = batches(n, seed=seed, rank=rank, world_size=world_size, start=step * 24, workers=workers)
        mine = list(delivered(stream, steps * micro_batches // world_size))
        stream.close()
        assert [position for position, _ in mine] == sorted(position for position, _ in mine)
        assert all((position - step * 24) // 2 % world_size == rank for position, _ in mine)
        restarted |= mine
    assert restarted == {position: indices for position, indices in reference.items() if position >= step * 24}


def test_any_start_continues_where_it_stopped() -> None:
    whole = [indices for _, indices in delivered(batches(50), 24)]
    assert [indices for _, indices in delivered(batches(50, start=14), 17)] == whole[7:]


@pytest.mark.parametrize(
    "sizes, ranks, remedy",
    [
        (
            (24, 5),
            1,
            "24 is not a multiple of micro_batch_size 5 x 1 ranks = 5; set global_batch_size to 20 or 25",
        ),
        (
            (24, 8),
            2,
            "24 is not a multiple of micro_batch_size 8 x 2 ranks = 16; set global_batch_size to 16 or 32",
        ),
        ((4, 8), 1, "4 is not a multiple of micro_batch_size 8 x 1 ranks = 8; set global_batch_size to 8,"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int], ranks: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        batches(10, global_batch_size=sizes[0], micro_batch_size=sizes[1], world_size=ranks)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_at_its_place(workers: int) -> None:
    def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
        if positions[0] == 6:
            raise OSError("shard gone")
        return indices_and_positions(indices, positions)

    stream = Batches(
        10,
        collate=collate,
        seed=0,
        global_batch_size=2,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        start=0,
        prefetch=5,
        workers=workers,
    )
    got = []
    with pytest.raises(OSError, match="shard gone"):
        for position, _ in stream:
            got.append(position)
    stream.close()
    assert got == [0, 2, 4]


def test_prefetch_is_bounded_and_waiting_is_counted() -> None:
    started: list[int] = []

    def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
        started.append(int(positions[0]))
        time.sleep(0.01)
        return {}

    stream = Batches(
        10,
        collate=collate,
        seed=0,
        global_batch_size=1,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        start=0,
        prefetch=4,
        workers=2,
    )
    for _ in itertools.islice(stream, 3):
        pass
    stream.close()
    assert len(started) <= 3 + 4
    assert stream.wait_seconds > 0
    before = len(started)
    assert not any(thread.name.startswith("batches") and thread.is_alive() for thread in threading.enumerate())
    assert len(started) == before


@pytest.mark.parametrize("limit, expected", [(None, [0, 1, 2, 3, 4, 5, 6]), (5, [0, 1, 2, 3, 4]), (99, list(range(7)))])
def test_sequential(limit: int | None, expected: list[int]) -> None:
    got = list(sequential(7, batch_size=3, collate=indices_and_positions, limit=limit))
    assert [position for position, _ in got] == list(range(0, len(expected), 3))
    assert torch.cat([batch["indices"] for _, batch in got]).tolist() == expected


def test_image_batch(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    indices = np.array([7, 0])
    stored = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in (7, 0)])
    full = image_batch(dataset, indices, size=SIDE)
    assert full.dtype == torch.uint8 and full.is_contiguous() and torch.equal(full, stored)
    for size in (8, 4):
        means = torch.nn.functional.avg_pool2d(stored.double(), SIDE // size)
        half_up = torch.floor(means + 0.5).to(torch.uint8)
        assert torch.equal(image_batch(dataset, indices, size=size), half_up)
    for size in (12, 24):
        assert image_batch(dataset, indices, size=size).shape == (2, 3, size, size)


def test_normalisation_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
