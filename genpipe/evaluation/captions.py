"""Captions of shards as columns, shard by shard: no dataset is held in memory, however many captions it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import INDEX_SUFFIX

NEAREST_AMONG = 20_000
"""Captions that a mistyped one is compared with: comparing takes some 10 us each."""


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


def check_captions(dataset: ShardDataset, captions: Sequence[str], *, setting: str) -> None:
    """Raise ValueError unless every one of `captions` is one of the dataset's; it names the nearest there is."""
    distinct = list(dict.fromkeys(captions))
    _, numbers = rows_with_captions(dataset, distinct)
    for number in sorted(set(range(len(distinct))) - set(numbers.tolist())):
        caption = distinct[number]
        near = get_close_matches(caption, _some_captions(dataset), n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{setting}: no {dataset.split} sample has the caption {caption!r}{hint}")


def _captions(dataset: ShardDataset, shard: str) -> pa.ListArray:
    column = pq.read_table(dataset.folder / f"{shard}{INDEX_SUFFIX}", columns=["captions"], use_threads=False)[0]
    captions = column.combine_chunks()
    return captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions


def _some_captions(dataset: ShardDataset) -> list[str]:
    found: list[str] = []
    for _, lists in captions_by_shard(dataset):
        found += lists.flatten().slice(0, NEAREST_AMONG - len(found)).to_pylist()
        if len(found) >= NEAREST_AMONG:
            break
    return found
