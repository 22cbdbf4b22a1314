"""Read shards by index, in an order that is a pure function of (seed, position), for any number of ranks.

Shape legend: B samples, C = 3 channels (RGB), H height, W width, N positions.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from genpipe.data.images import decode
from genpipe.data.shards import INDEX_SUFFIX, Split

Batch = dict[str, torch.Tensor]
Collate = Callable[[np.ndarray, np.ndarray], Batch]

_FEISTEL_ROUNDS = 6
_UINT = np.uint64


class ShardDataset:
    """The samples of one split, shard after shard in the order of their names. Thread-safe.

    Raises ValueError if the folder holds no shard of this split, or an index whose tar is missing.
    """

    def __init__(self, folder: Path, *, split: Split) -> None:
        self.folder = Path(folder)
        indexes = sorted(self.folder.glob(f"{split}-*{INDEX_SUFFIX}"))
        if not indexes:
            raise ValueError(f"{self.folder} holds no {split} shards (looked for {split}-*{INDEX_SUFFIX})")
        self._names = [path.name.removesuffix(INDEX_SUFFIX) for path in indexes]
        missing = [name for name in self._names if not (self.folder / f"{name}.tar").exists()]
        if missing:
            raise ValueError(f"{self.folder}: no tar beside the index of {', '.join(missing)}; shard again")
        tables = [pq.read_table(path).combine_chunks() for path in indexes]
        texts = ("key", "group", "captions")
        self._columns = [{name: table[name].chunk(0) for name in texts} for table in tables]
        self._offsets = np.concatenate([table["offset"].to_numpy() for table in tables])
        self._lengths = np.concatenate([table["length"].to_numpy() for table in tables])
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def shards(self) -> list[str]:
        """Names of the shards, without `.tar`, in the order of the dataset."""
        return list(self._names)

    def rows(self, shard: str) -> range:
        """The indices of this dataset that lie in a shard, in the order of its members."""
        number = self._names.index(shard)
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def key(self, i: int) -> str:
        """The sample's key, unique within the dataset."""
        return str(self._value("key", i))

    def group(self, i: int) -> str:
        """The sample's subject."""
        return str(self._value("group", i))

    def captions(self, i: int) -> list[str]:
        """The sample's captions, at least one; from the index, without reading the tar."""
        return list(self._value("captions", i))

    def image(self, i: int) -> np.ndarray:
        """uint8 [H, W, C]: one `pread` and one decode. Raises ImageError if the bytes are damaged."""
        return decode(self.image_bytes(i))

    def image_bytes(self, i: int) -> bytes:
        """The encoded image."""
        return os.pread(self._file(self._shard_of(i)), int(self._lengths[i]), int(self._offsets[i]))

    def close(self) -> None:
        """Close the tars; reading opens them again."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _shard_of(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _value(self, column: str, i: int) -> Any:
        shard = self._shard_of(i)
        return self._columns[shard][column][int(i - self._starts[shard])].as_py()

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.folder / f"{self._names[shard]}.tar", os.O_RDONLY)
            return self._files[shard]


def order(positions: np.ndarray, *, n: int, seed: int) -> np.ndarray:
    """The sample at each global position: int64 [N] in, int64 [N] in [0, n) out.

    Epoch e = p // n is the permutation of range(n) keyed by (seed, e), evaluated at p % n: a balanced Feistel
    network (Luby & Rackoff 1988) over the smallest even number of bits that holds n, with cycle walking for
    the values beyond it (Black & Rogaway 2002, section 3). Nothing of size n is ever in memory.
    """
    positions = np.asarray(positions, np.int64)
    assert n > 0 and (positions >= 0).all()
    epochs = (positions // n).astype(_UINT)
    key = _mix(_mix(np.full_like(epochs, seed % 2**64)) + epochs)
    half = _UINT(max(1, ((n - 1).bit_length() + 1) // 2))
    values = _feistel((positions % n).astype(_UINT), key=key, half=half)
    # Walking the cycle from a value in range must come back into range: at most 4 values per one that counts.
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], key=key[outside], half=half)
    return values.astype(np.int64)


def caption_choice(positions: np.ndarray, *, seed: int) -> np.ndarray:
    """int64 [N], uniform in [0, 2**63), a function of (seed, position): `% captions` picks one."""
    key = _mix(np.asarray([(seed + 0x632BE59BD9B4E019) % 2**64], _UINT))
    return (_mix(key + np.asarray(positions).astype(_UINT)) >> _UINT(1)).astype(np.int64)


def _feistel(values: np.ndarray, *, key: np.ndarray, half: np.uint64) -> np.ndarray:
    mask = (_UINT(1) << half) - _UINT(1)
    left, right = values >> half, values & mask
    for number in range(_FEISTEL_ROUNDS):
        round_key = _mix(key + _UINT(number))
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): uint64 to well-mixed uint64, wrapping on overflow."""
    x = x + _UINT(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _UINT(30))) * _UINT(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _UINT(27))) * _UINT(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> _UINT(31))
    return mixed


class Batches:
    """This rank's micro-batches, for ever, from global position `start` (samples seen by all ranks together).

    Each global batch is the next `global_batch_size` positions, cut into micro-batches of `micro_batch_size`;
    rank r of n gets micro-batches r, r + n, ... of it. So the same samples meet in the same micro-batches
    however many ranks there are, and `start` alone restores the place.

    Iterating yields `(position of the first sample, collate(indices, positions))`. `workers` threads collate
    up to `prefetch` micro-batches ahead, in order; with `workers=0` the consumer's own thread does it. An
    error in `collate` is raised at its place in the stream. `wait_seconds` is how long the consumer waited.

    Raises ValueError if the global batch does not divide evenly over ranks and micro-batches.
    """

    def __init__(
        self,
        dataset_len: int,
        *,
        collate: Collate,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start: int,
        prefetch: int,
        workers: int,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size)
        assert dataset_len > 0 and 0 <= rank < world_size and start >= 0
        self._n, self._collate, self._seed = dataset_len, collate, seed
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._start = start
        self._prefetch = max(prefetch, 1)
        self._pool = ThreadPoolExecutor(workers, "batches") if workers else None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        positions = self._positions()
        if self._pool is None:
            for position in positions:
                began = time.perf_counter()
                batch = self._load(position)
                self.wait_seconds += time.perf_counter() - began
                yield position, batch
        else:
            yield from self._ahead(positions, self._pool)

    def close(self) -> None:
        """Stop the threads; what is being collated is finished, what waits is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _positions(self) -> Iterator[int]:
        first = self._start
        while True:
            mine = first + self._rank * self._micro
            yield from range(mine, first + self._global, self._world * self._micro)
            first += self._global

    def _load(self, position: int) -> Batch:
        positions = np.arange(position, position + self._micro, dtype=np.int64)
        return self._collate(order(positions, n=self._n, seed=self._seed), positions)

    def _ahead(self, positions: Iterator[int], pool: ThreadPoolExecutor) -> Iterator[tuple[int, Batch]]:
        pending: deque[tuple[int, Future[Batch]]] = deque()
        for position in positions:
            pending.append((position, pool.submit(self._load, position)))
            if len(pending) < self._prefetch:
                continue
            ready, future = pending.popleft()
            began = time.perf_counter()
            batch = future.result()
            self.wait_seconds += time.perf_counter() - began
            yield ready, batch


def sequential(n: int, *, batch_size: int, collate: Collate, limit: int | None = None) -> Iterator[tuple[int, Batch]]:
    """`(position, batch)` of the samples 0, 1, ... once, at most `limit` of them; the last may be short."""
    stop = n if limit is None else min(n, limit)
    for first in range(0, stop, batch_size):
        indices = np.arange(first, min(first + batch_size, stop), dtype=np.int64)
        yield first, collate(indices, indices)


def image_batch(dataset: ShardDataset, indices: np.ndarray, *, size: int) -> torch.Tensor:
    """uint8 [B, C, size, size]: averaged over boxes from a whole multiple of `size`, else interpolated."""
    images_BHWC = np.stack([dataset.image(int(i)) for i in indices])
    stored = images_BHWC.shape[1]
    if stored % size == 0:
        images_BHWC = _box_downsample(images_BHWC, factor=stored // size)
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
    if stored % size:
        resized = F.interpolate(images_BCHW.float(), (size, size), mode="bicubic", antialias=True)
        images_BCHW = resized.round().clamp(0, 255).to(torch.uint8)
    return images_BCHW.contiguous()


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: the one place where images are normalised."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_float`, clamped: float in [-1, 1] to uint8 in [0, 255]."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _box_downsample(images_BHWC: np.ndarray, *, factor: int) -> np.ndarray:
    """The mean of every factor x factor box, rounded half up; in integers, where floats are much slower."""
    if factor == 1:
        return images_BHWC
    batch, height, width, channels = images_BHWC.shape
    dtype = np.uint32 if factor > 16 else np.uint16  # 16 * 16 * 255 fits 16 bits
    rows = np.zeros((batch, height // factor, width, channels), dtype)
    sums = np.zeros((batch, height // factor, width // factor, channels), dtype)
    for offset in range(factor):
        rows += images_BHWC[:, offset::factor]
    for offset in range(factor):
        sums += rows[:, :, offset::factor]
    means: np.ndarray = (sums + factor**2 // 2) // factor**2
    return means.astype(np.uint8)


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
