"""Exact and near duplicates of images across all parts of a dataset.

While a part is written, the hashes of its images go to a table beside its shards. When all parts are there, the
tables together say which samples are duplicates, and the indexes are rewritten without them.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.data.perceptual_hash import nearest_kept
from genpipe.data.samples import Reject
from genpipe.data.shards import INDEX_SUFFIX, write_table
from genpipe.storage import Storage

HASH_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("place", pa.string()),  # where the sample came from, as the ledger says it
        ("sha256", pa.binary(32)),  # of the source's bytes
        ("phash", pa.uint64()),  # null for a flat image
    ]
)


@dataclass(frozen=True)
class Duplicate:
    """A sample to be dropped from its index."""

    shard: str
    reject: Reject


def hashes_file(part: int) -> str:
    """The name of a part's table of hashes."""
    return f"hashes-{part:05d}.parquet"


def write_hashes(folder: Path, rows: Sequence[dict[str, Any]], *, part: int) -> None:
    """A part's table, a row for each sample written, in their order; the keys are those of HASH_SCHEMA."""
    write_table(pa.Table.from_pylist(list(rows), HASH_SCHEMA), folder / hashes_file(part))


def read_hashes(made: Storage, *, parts: int) -> pa.Table:
    """The tables of all parts, in their order: some 100 bytes a sample."""
    return pa.concat_tables(pq.read_table(io.BytesIO(made.read(hashes_file(part)))) for part in range(parts))


def find_duplicates(hashes: pa.Table, *, exact: bool, distance: int | None) -> Iterator[Duplicate]:
    """The samples that duplicate an earlier one: with the same bytes, or a perceptual hash within `distance` bits.

    No two samples that remain are duplicates, and for each that is dropped one that remains is named.
    """
    rows = np.arange(len(hashes))
    same = _first_of_equal(hashes["sha256"]) if exact else rows
    near = rows.copy()
    if distance is not None:
        candidates = np.flatnonzero((same == rows) & pc.is_valid(hashes["phash"]).to_numpy())
        values = hashes["phash"].take(candidates).to_numpy()
        near[candidates] = candidates[nearest_kept(values, distance=distance)]
    names = ("shard", "key", "place")
    for row in np.flatnonzero((same != rows) | (near != rows)).tolist():
        shard, key, place = (hashes[name][row].as_py() for name in names)
        reason, verb = ("duplicate_image", "is") if same[row] != row else ("near_duplicate", "looks like")
        original = hashes["key"][int(near[same[row]])].as_py()
        yield Duplicate(shard, Reject(key, place, reason, f"the image {verb} that of {original}"))


def write_index_without(made: Storage, shard: str, *, keys: Collection[str], out: Path) -> pa.Table:
    """Rewrite the shard's index to `out` without the rows of `keys`, and return it."""
    name = f"{shard}{INDEX_SUFFIX}"
    index = pq.read_table(io.BytesIO(made.read(name)))
    kept = index.filter(pc.invert(pc.is_in(index["key"], pa.array(list(keys), pa.string()))))
    write_table(kept, out / name)
    return kept


def _first_of_equal(sha256: pa.ChunkedArray) -> np.ndarray:
    """For each hash the row of the first that equals it: int64 [N]."""
    digests = np.frombuffer(b"".join(sha256.to_pylist()), "V32")
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse]
    return found
