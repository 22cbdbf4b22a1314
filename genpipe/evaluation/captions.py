"""Captions of shards as columns, shard by shard: no dataset is held in memory, however many captions it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import INDEX_SUFFIX


def captions_by_shard(dataset: ShardDataset) -> Iterator[tuple[range, pa.ListArray]]:
    """The samples of each shard, and the list of captions of each."""
    for shard in dataset.shards():
        yield dataset.rows(shard), _captions(dataset, shard)


def first_captions(dataset: ShardDataset, rows: range) -> list[str]:
    """The first captions of consecutive samples."""
    found: list[str] = []
    for shard in dataset.shards():
        here = dataset.rows(shard)
        first, stop = max(rows.start, here.start), min(rows.stop, here.stop)
        if first < stop:
            captions = _captions(dataset, shard).slice(first - here.start, stop - first)
            found += pc.list_element(captions, 0).to_pylist()
    return found


def rows_with_captions(dataset: ShardDataset, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which samples have any of these captions, which are distinct: (sample, number of the caption), int64 [M] each.

    Samples come in order; one that has several of the captions stands there once for each.
    """
    wanted = pa.array(captions, pa.string())
    samples, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for rows, lists in captions_by_shard(dataset):
        found = pc.index_in(lists.flatten(), value_set=wanted)
        is_wanted = found.is_valid()
        samples.append(pc.list_parent_indices(lists).filter(is_wanted).to_numpy() + rows.start)
        numbers.append(found.filter(is_wanted).to_numpy().astype(np.int64))
    return np.concatenate(samples), np.concatenate(numbers)


def _captions(dataset: ShardDataset, shard: str) -> pa.ListArray:
    column = pq.read_table(dataset.folder / f"{shard}{INDEX_SUFFIX}", columns=["captions"], use_threads=False)[0]
    captions = column.combine_chunks()
    return captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions
