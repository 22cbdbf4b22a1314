from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from genpipe.data.image_batches import Images
from genpipe.data.images import encode
from genpipe.data.loader import Batch, Batches, Data, SampleSet, sample_batches, training_order
from genpipe.data.order import Order, order, order_of
from genpipe.data.prefetch import prefetched
from genpipe.data.samples import Reject
from genpipe.data.shard_dataset import ShardDataset, collect_damaged
from genpipe.data.shards import ShardWriter

SIDE = 16


def indices_and_positions(indices: np.ndarray, positions: np.ndarray) -> Batch:
    return {"indices": torch.from_numpy(indices), "positions": torch.from_numpy(positions)}


def batches(
    n: int,
    *,
    collate: Callable[[np.ndarray, np.ndarray], Batch] = indices_and_positions,
    place: Order | None = None,
    **options: Any,
) -> Batches:
    sizes = {"global_batch_size": 24, "micro_batch_size": 2, "prefetch": 3}
    ranks = {"rank": 0, "world_size": 1, "start": 0}
    return Batches(
        collate, order=place or order_of({"": range(n)}, weights={}, seed=5), **{**sizes, **ranks, **options}
    )


def delivered(stream: Batches, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    for position, batch in itertools.islice(stream, count):
        assert batch["positions"].tolist() == list(range(position, position + len(batch["positions"])))
        yield position, tuple(batch["indices"].tolist())


@given(
    start=st.integers(0, 9),
    windows=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=4),
    rank=st.integers(0, 1),
)
def test_skipped_ranges_are_left_out_and_nothing_else(start: int, windows: list[tuple[int, int]], rank: int) -> None:
    """Against a list of steps: those of no window, in order, whether windows touch, overlap or hold the start."""
    skip = [(24 * begin, 24 * (begin + length)) for begin, length in windows]
    left_out = {step for begin, length in windows for step in range(begin, begin + length)}
    kept = [step for step in range(start, 60) if step not in left_out][:8]
    with closing(batches(50, start=24 * start, skip=skip, rank=rank, world_size=2)) as stream:
        found = [position for position, _ in itertools.islice(stream, 8 * 6)]
    assert found == [24 * step + 2 * rank + 4 * micro for step in kept for micro in range(6)]


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weighted=st.booleans(),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 12) | st.integers(0, 10**9),
    threads=st.sampled_from([0, 0, 0, 2]),
)
def test_the_stream_is_the_same_for_any_shards_ranks_workers_and_restart(
    shards: list[int], weighted: bool, world_size: int, seed: int, step: int, threads: int
) -> None:
    ends = list(itertools.accumulate(shards, initial=0))
    sources = {str(k): range(*span) for k, span in enumerate(itertools.pairwise(ends))}
    place = order_of(sources, weights=dict.fromkeys(sources, 1.0) if weighted else {}, seed=seed)
    steps, n = 3, sum(shards)
    expected = place(np.arange(step * 24, (step + steps) * 24)).tolist()
    found: dict[int, tuple[int, ...]] = {}
    for rank in range(world_size):
        stream = batches(n, place=place, rank=rank, world_size=world_size, start=step * 24, threads=threads)
        mine = list(delivered(stream, steps * 12 // world_size))
        stream.close()
        assert [position for position, _ in mine] == sorted(position for position, _ in mine)
        assert all((position - step * 24) // 2 % world_size == rank for position, _ in mine)
        found |= mine
    assert [i for _, indices in sorted(found.items()) for i in indices] == expected


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 150),
    world_size=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
def test_an_epoch_delivers_each_sample_once_whatever_interrupts_it(
    n: int, world_size: int, seed: int, cuts: list[int]
) -> None:
    """Runs that stop after some steps, each followed by one with another number of ranks."""
    place = order_of({"": range(n)}, weights={}, seed=seed)
    steps = -(-n // 12)
    samples: dict[int, int] = {}
    start = 0
    for cut, ranks in itertools.cycle(zip([*cuts, steps], [world_size, 3 - world_size // 2], strict=False)):
        for rank in range(ranks):
            stream = batches(n, place=place, rank=rank, world_size=ranks, start=start, global_batch_size=12)
            for position, indices in delivered(stream, cut * 6 // ranks):
                samples |= dict(enumerate(indices, position))
        start += cut * 12
        if start >= n:
            break
    assert sorted(samples[position] for position in range(n)) == list(range(n))


def test_any_start_continues_where_it_stopped() -> None:
    whole = [indices for _, indices in delivered(batches(50), 24)]
    assert [indices for _, indices in delivered(batches(50, start=14), 17)] == whole[7:]


@pytest.mark.parametrize(
    "sizes, ranks, remedy",
    [
        ((24, 5), 1, "24 is not a multiple of micro_batch_size 5 x 1 ranks = 5; set global_batch_size to 20 or 25"),
        ((24, 8), 2, "24 is not a multiple of micro_batch_size 8 x 2 ranks = 16; set global_batch_size to 16 or 32"),
        ((4, 8), 1, "4 is not a multiple of micro_batch_size 8 x 1 ranks = 8; set global_batch_size to 8,"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int], ranks: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        batches(10, global_batch_size=sizes[0], micro_batch_size=sizes[1], world_size=ranks)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_is_raised_at_its_place(threads: int) -> None:
    def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
        if positions[0] == 6:
            raise OSError("shard gone")
        return indices_and_positions(indices, positions)

    stream = batches(10, collate=collate, global_batch_size=2, prefetch=5, threads=threads)
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

    stream = batches(10, collate=collate, global_batch_size=1, micro_batch_size=1, prefetch=4, threads=2)
    for _ in itertools.islice(stream, 3):
        pass
    stream.close()
    assert len(started) <= 3 + 4
    assert stream.wait_seconds > 0 and stream.read == 3
    assert not any(thread.name.startswith("loader") and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_is_loaded_ahead_comes_in_order(threads: int, count: int) -> None:
    def load(item: int) -> int:
        time.sleep(0.001 * (count - item))  # the first takes longest
        return item**2

    assert list(prefetched(load, range(count), threads=threads, ahead=3)) == [(i, i**2) for i in range(count)]


@settings(deadline=None, max_examples=20)
@given(
    counts=st.lists(st.integers(20, 90), min_size=1, max_size=4),
    cuts=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 6])), min_size=1, max_size=5),
    micro=st.sampled_from([None, 2, 4]),
    seed=st.integers(0, 99),
)
def test_buckets_come_in_the_same_batches_whatever_interrupts(
    counts: list[int], cuts: list[tuple[int, int]], micro: int | None, seed: int
) -> None:
    """Steps of 24, each after a resume with another number of ranks, against one rank that never stops.

    Micro-batches are of `micro` samples, or else as large as the number of ranks allows.
    """
    size_of = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    buckets = tuple(np.flatnonzero(size_of == size) for size in range(len(counts)))
    data = Data(*2 * [SampleSet(len(size_of), indices_and_positions, buckets=buckets)])
    place = training_order(data, weights={}, seed=seed, run=micro or 24)
    found: dict[int, int] = {}
    start = 0
    for steps, ranks in cuts:
        size = micro or 24 // ranks
        ranks = ranks if 24 % (size * ranks) == 0 else 1
        for rank in range(ranks):
            given = {"rank": rank, "world_size": ranks, "start": start, "micro_batch_size": size}
            for at, indices in delivered(batches(1, place=place, **given), steps * 24 // size // ranks):
                assert len(set(size_of[list(indices)])) == 1
                assert not found.keys() & range(at, at + size)
                found |= dict(enumerate(indices, at))
        start += steps * 24
    assert [found[at] for at in range(start)] == place(np.arange(start)).tolist()


def test_what_stands_for_all_comes_in_batches_of_one_size() -> None:
    buckets = (np.arange(0, 90, 3), np.setdiff1d(np.arange(90), np.arange(0, 90, 3)))
    samples = SampleSet(90, indices_and_positions, buckets=buckets)
    got = list(sample_batches(samples, count=80, batch_size=32, weights={}))
    assert all(len(set((batch["indices"] % 3 > 0).tolist())) == 1 for batch in got)
    assert sorted(torch.cat([batch["positions"] for batch in got]).tolist()) == list(range(80))
    assert len(set(torch.cat([batch["indices"] for batch in got]).tolist())) == 80


def test_weights_that_leave_nothing_to_validate_on_are_refused_before_training() -> None:
    train = SampleSet(9, indices_and_positions, {"a": range(5), "b": range(5, 9)})
    held = SampleSet(2, indices_and_positions, {"b": range(2)})
    training_order(Data(train, held), weights={"a": 1, "b": 1}, seed=0, run=1)
    with pytest.raises(ValueError, match="source_weights: only 'b' has held-out samples"):
        training_order(Data(train, held), weights={"a": 1, "b": 0}, seed=0, run=1)


@pytest.mark.parametrize(("count", "taken"), [(7, 7), (5, 5), (99, 7)])
def test_batches_that_stand_for_all(count: int, taken: int) -> None:
    samples = SampleSet(7, indices_and_positions)
    got = list(sample_batches(samples, count=count, batch_size=3, weights={}))
    assert [len(batch["indices"]) for batch in got] == [3] * (taken // 3) + [taken % 3] * (taken % 3 > 0)
    assert torch.cat([batch["positions"] for batch in got]).tolist() == list(range(taken))
    indices = torch.cat([batch["indices"] for batch in got]).tolist()
    assert len(set(indices)) == taken and set(indices) <= set(range(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1, 7 and 3 samples, whose pictures are of one color each; the last of the middle shard is damaged."""
    path = tmp_path_factory.mktemp("uneven")
    numbers = iter(range(11))
    for part, count in enumerate((1, 7, 3)):
        with ShardWriter(path, split="train", part=part, max_samples=100, max_bytes=10**6) as writer:
            for number in itertools.islice(numbers, count):
                data = encode(np.full((SIDE, SIDE, 3), 20 * number, np.uint8), format="png")
                writer.write(
                    f"key-{number}",
                    group="g",
                    image=data[: len(data) // 2] if number == 7 else data,
                    format="png",
                    height=SIDE,
                    width=SIDE,
                    captions=["a plain color"],
                    meta={},
                )
    return path


def test_processes_deliver_what_threads_do(folder: Path) -> None:
    """The same images in the same order, and the same damage noticed, from the dataset opened anew in each."""
    dataset = ShardDataset(folder, split="train")
    seen: list[list[tuple[int, list[int]]]] = []
    damaged: list[list[Reject]] = []
    for options in ({}, {"threads": 2}, {"processes": 2}):
        stream = batches(len(dataset), collate=Images(dataset, SIDE), **options)
        seen.append([(at, batch["images"][:, 0, 0, 0].tolist()) for at, batch in itertools.islice(stream, 24)])
        stream.close()
        damaged.append(stream.take_damaged())
    assert seen[0] == seen[1] == seen[2]
    indices = order(np.arange(48), n=11, seed=5).tolist()
    assert [value for _, values in seen[0] for value in values] == [20 * (8 if i == 7 else i) for i in indices]
    assert damaged[0] == damaged[1] == damaged[2]
    assert [reject.key for reject in damaged[0]] == ["key-7"] * indices.count(7)


@dataclass(frozen=True)
class Fails:
    """Collates until a position, where it kills its process or raises."""

    at: int
    kill: bool

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        if positions[0] == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("shard gone")
        return indices_and_positions(indices, positions)


def test_a_process_that_fails_or_dies_is_told_of() -> None:
    for kill, error in ((False, "shard gone"), (True, "a loader process died .* lower resources.loader_processes")):
        stream = batches(10, collate=Fails(6, kill), processes=1)
        with pytest.raises((OSError, RuntimeError), match=error):
            for position, _ in stream:
                assert position < 6
        stream.close()


def hold_loader_processes(pids: Any) -> None:
    stream = batches(10, processes=2, prefetch=6)
    next(stream)
    pids.put([child.pid for child in psutil.Process().children(recursive=True)])
    time.sleep(60)


def test_loader_processes_end_with_their_trainer() -> None:
    """Also when it is killed, and can tell nobody."""
    context = mp.get_context("spawn")
    pids = context.Queue()
    trainer = context.Process(target=hold_loader_processes, args=(pids,))
    trainer.start()
    children = [psutil.Process(pid) for pid in pids.get(timeout=60)]
    assert len(children) >= 3, "a fork server, a resource tracker and the workers"
    trainer.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def run_rank(rank: int, folder: str, ranks: int) -> None:
    """Two epochs and more over uneven shards, with a collective at every step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    dataset = ShardDataset(Path(folder), split="train")
    stream = batches(
        len(dataset),
        collate=Images(dataset, SIDE),
        rank=rank,
        world_size=ranks,
        global_batch_size=2,
        micro_batch_size=1,
    )
    totals = []
    for _, batch in itertools.islice(stream, 16):
        total = batch["images"][:, 0, 0, 0].sum().long()
        dist.all_reduce(total)
        totals.append(int(total))
    Path(folder, f"totals-{rank}").write_text(repr(totals))
    dist.destroy_process_group()


@pytest.mark.services
def test_uneven_shards_never_hang_a_collective(folder: Path) -> None:
    """Eleven samples in shards of 1, 7 and 3, on two ranks, past the end of two epochs."""
    run_ranks(run_rank, str(folder), 2, ranks=2)
    values = [20 * (8 if i == 7 else i) for i in order(np.arange(32), n=11, seed=5).tolist()]
    expected = [values[at] + values[at + 1] for at in range(0, 32, 2)]
    assert [Path(folder, f"totals-{rank}").read_text() for rank in (0, 1)] == [repr(expected)] * 2


def test_only_the_blocks_own_damage_is_noticed(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    collate = Images(dataset, SIDE)
    with collect_damaged() as outer:
        collate(np.array([7]), np.array([0]))
        with collect_damaged() as inner:
            collate(np.array([7, 6]), np.array([0, 1]))
    collate(np.array([7]), np.array([0]))
    assert [reject.key for reject in outer] == [reject.key for reject in inner] == ["key-7"]
