"""Micro-batches in the stream's order, made ahead of their use by threads or by processes.

Shape legend: B samples, N positions.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from genpipe.data.order import bucket_order, order_of, spread
from genpipe.data.prefetch import prefetched
from genpipe.data.samples import Reject
from genpipe.data.shard_dataset import collect_damaged

Batch = dict[str, torch.Tensor]
_Place = tuple[int, np.ndarray]
Collate = Callable[[np.ndarray, np.ndarray], Batch]
ORDERED_AT_ONCE = 16384


class SampleSet(NamedTuple):
    """`length` samples, and how to make a batch of some of them.

    `collate(indices, positions)` takes int64 arrays [B]: which samples, and at which global positions of the
    training stream they stand, so that a choice (caption, crop) can depend on the position alone. With loader
    processes it is pickled. `sources` are the ranges of indices that come from each source of a mix. `buckets` are the
    samples, ascending int64 [N], of each size of images, if they cannot share a batch.
    """

    length: int
    collate: Collate
    sources: Mapping[str, range] = MappingProxyType({})
    buckets: tuple[np.ndarray, ...] = ()

    @property
    def ranges(self) -> Mapping[str, range]:
        """The sources, or all samples as one source named ""."""
        return self.sources or {"": range(self.length)}


class Data(NamedTuple):
    """What a training stage trains on, and what it holds out."""

    train: SampleSet
    heldout: SampleSet


def training_order(
    data: Data, *, weights: Mapping[str, float], seed: int, run: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The sample at each position of the stream that trains on `data`; see `Order` and, for buckets, `BucketOrder`.

    With buckets `run` positions, from each multiple of it on, hold samples of one size: of a micro-batch, or of a
    whole step where micro-batches follow from the number of ranks, which the order must not do.

    Raises ValueError for weights that do not fit the sources, or that leave nothing to validate on.
    """
    train = data.train
    order: Callable[[np.ndarray], np.ndarray] = order_of(train.ranges, weights=weights, seed=seed)
    if train.buckets:
        order = bucket_order(train.ranges, train.buckets, weights=weights, seed=seed, run=run)
    spread(data.heldout.ranges, count=1, weights=weights, repeat=False)  # refuses now what validation would later
    return order


class Batches(Iterator[tuple[int, Batch]]):
    """This rank's micro-batches, for ever, from global position `start` (samples seen by all ranks together).

    Each global batch is the next `global_batch_size` positions, cut into micro-batches of `micro_batch_size`;
    rank r of n gets micro-batches r, r + n, ... of it. So the same samples meet in the same micro-batches
    however many ranks there are, `start` alone restores the place, and no rank ever runs out before another.

    Positions in the ranges [begin, end) of `skip`, which are whole global batches, are left out.

    Iterating yields `(position of the first sample, collate(order(positions), positions))`. Up to `prefetch`
    micro-batches are collated ahead, by `threads` threads or by `processes` worker processes (the collate is then
    pickled to them); with neither the consumer's own thread does it. `pin` puts batches into pinned memory, for
    copies to a GPU. An error in `collate` is raised at its place in the stream.

    `wait_seconds` is how long the consumer waited; `read` samples were asked for.

    Raises ValueError if the global batch does not divide evenly over ranks and micro-batches.
    """

    def __init__(
        self,
        collate: Collate,
        *,
        order: Callable[[np.ndarray], np.ndarray],
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start: int,
        prefetch: int,
        skip: Sequence[tuple[int, int]] = (),
        threads: int = 0,
        processes: int = 0,
        pin: bool = False,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size)
        assert 0 <= rank < world_size and start >= 0
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._pin, self._skip = pin, skip
        load = _Load(collate, micro_batch_size)
        self._processes = _Processes(load, processes) if processes else None
        self._load = self._processes or load
        self._order = order
        self._stream = prefetched(
            self._loaded, self._places(start), threads=processes or threads, ahead=max(prefetch, 1)
        )
        self.wait_seconds = 0.0
        self.read = 0
        self._damaged: list[Reject] = []

    def __next__(self) -> tuple[int, Batch]:
        began = time.perf_counter()
        (position, _), loaded = next(self._stream)
        self.wait_seconds += time.perf_counter() - began
        self.read += self._micro
        self._damaged += loaded.damaged
        return position, loaded.batch

    def take_damaged(self) -> list[Reject]:
        """The samples that gave way to others since this was last asked."""
        taken, self._damaged = self._damaged, []
        return taken

    def close(self) -> None:
        """Stop the threads and processes; what is being collated is finished, what waits is dropped."""
        self._stream.close()
        if self._processes:
            self._processes.close()

    def _positions(self, first: int) -> Iterator[int]:
        while True:
            first = skip_ranges(first, self._skip)
            mine = first + self._rank * self._micro
            yield from range(mine, first + self._global, self._world * self._micro)
            first += self._global

    def _places(self, start: int) -> Iterator[_Place]:
        """The first position of each micro-batch and the samples in it, ordered many at a time: that is cheaper."""
        positions = self._positions(start)
        while True:
            some = list(islice(positions, -(-ORDERED_AT_ONCE // self._micro)))
            samples = self._order(np.add.outer(some, np.arange(self._micro)).ravel())
            yield from zip(some, samples.reshape(len(some), self._micro), strict=True)

    def _loaded(self, place: _Place) -> _Loaded:
        loaded = self._load(place)
        if self._pin:
            return loaded._replace(batch={name: tensor.pin_memory() for name, tensor in loaded.batch.items()})
        return loaded


def sample_batches(
    samples: SampleSet, *, count: int, batch_size: int, weights: Mapping[str, float], repeat: bool = False
) -> Iterator[Batch]:
    """Batches of about `count` samples that stand for all: `order.spread` says which. The last may be short.

    For what is measured over a part of the data: statistics, which take samples as often as training does
    (`repeat`), and validation, which takes each once. The same batches each time. Images of another size come in
    another batch.
    """
    indices = spread(samples.ranges, count=count, weights=weights, repeat=repeat)
    for bucket in samples.buckets or (indices,):
        positions = np.flatnonzero(np.isin(indices, bucket))
        for first in range(0, len(positions), batch_size):
            some = positions[first : first + batch_size]
            yield samples.collate(indices[some], some)


def skip_ranges(position: int, ranges: Sequence[tuple[int, int]]) -> int:
    """The first position from `position` on that is in none of the ranges [begin, end)."""
    while inside := [end for begin, end in ranges if begin <= position < end]:
        position = max(inside)
    return position


def check_batch_sizes(global_batch_size: int, *, micro_batch_size: int, world_size: int) -> None:
    """Raise ValueError, with values that work, unless a step divides evenly over ranks and micro-batches."""
    assert global_batch_size > 0 and micro_batch_size > 0 and world_size > 0
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0:
        return
    below = global_batch_size // unit * unit
    values = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    raise ValueError(
        f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
        f"{world_size} ranks = {unit}; set global_batch_size to {values}, or choose another micro_batch_size"
    )


class _Loaded(NamedTuple):
    batch: Batch
    damaged: list[Reject]


@dataclass(frozen=True)
class _Load:
    """Makes the micro-batch of some samples at a position."""

    collate: Collate
    size: int

    def __call__(self, place: _Place) -> _Loaded:
        position, samples = place
        with collect_damaged() as damaged:
            batch = self.collate(samples, np.arange(position, position + self.size, dtype=np.int64))
        return _Loaded(batch, damaged)


class _Processes:
    """A load that is called in worker processes, by as many threads as there are processes.

    Arrays come back through a pipe and not through shared memory, of which containers often have too little.
    """

    def __init__(self, load: _Load, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(load,))

    def __call__(self, place: _Place) -> _Loaded:
        try:
            batch, damaged = self.pool.submit(_load_in_worker, place).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a loader process died (out of memory, or killed); lower resources.loader_processes, or set it to 0 "
                "and use resources.loader_threads"
            ) from error
        return _Loaded({name: _unpacked(*packed) for name, packed in batch.items()}, damaged)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


_worker: _Load


def _start_worker(load: _Load) -> None:
    global _worker
    _worker = load
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _load_in_worker(place: _Place) -> tuple[dict[str, tuple[np.ndarray, tuple[int, ...]]], list[Reject]]:
    batch, damaged = _worker(place)
    return {name: _packed(tensor) for name, tensor in batch.items()}, damaged


def _packed(tensor: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """An array in the order of its memory, which pickles fastest, and where its axes belong."""
    axes = tuple(np.argsort([-stride for stride in tensor.stride()], kind="stable").tolist())
    return tensor.permute(axes).numpy(), axes


def _unpacked(array: np.ndarray, axes: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(array).permute(tuple(np.argsort(axes).tolist()))
