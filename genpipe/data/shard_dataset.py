"""Read shards by index, where they are: a sample is one `pread` in a folder, one ranged GET under S3.

Shape legend: B samples, N samples of a shard, C = 3 channels (RGB), H height, W width.

A sample's image, and its conditioning image if it has one, are its *members*.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genpipe.artifacts import Artifact, FileEntry, cache_folder, fetch_files
from genpipe.data.block_cache import Files, LocalFiles, Piece, remote_files, whole_copy
from genpipe.data.images import ImageError, decode
from genpipe.data.order import pick
from genpipe.data.samples import Reject
from genpipe.data.shards import CONDITION, INDEX_SUFFIX, NO_LABEL, SPLITS, Split
from genpipe.storage import open_storage

Member = Literal["image", "condition"]
BLOCK_BITS = tarfile.BLOCKSIZE.bit_length() - 1
PRINTED = 20
"""Skipped samples that a dataset names on stderr."""
MEMBERS: tuple[Member, ...] = ("image", "condition")

_TEXTS = ("key", "group", "captions", "caption_weights")
_noticed: ContextVar[list[Reject] | None] = ContextVar("noticed", default=None)


@contextmanager
def collect_damaged() -> Iterator[list[Reject]]:
    """The samples that turn out damaged inside the block, in this thread: key, tar, reason and detail."""
    token = _noticed.set([])
    try:
        noticed = _noticed.get()
        assert noticed is not None
        yield noticed
    finally:
        _noticed.reset(token)


class ShardDataset:
    """The samples of one split, shard after shard in the order of their names. Thread-safe; pickled as its arguments.

    In memory are 12 bytes a sample, 4 more with class labels and 8 more with conditioning images; the text of a shard
    (keys, groups, captions) joins at its first use, in Arrow.
    `files` are the tars if they are not beside the indexes in `folder`; `only` names a single shard to open.

    Raises ValueError if the folder holds no shard of this split, or an index that its tar does not bear out.
    """

    def __init__(self, folder: Path, *, split: Split, files: Files | None = None, only: str = "") -> None:
        self.folder = Path(folder)
        self.split, self.only = split, only
        self.files = files or LocalFiles(self.folder)
        indexes = sorted(self.folder.glob(f"{only or f'{split}-*'}{INDEX_SUFFIX}"))
        if not indexes:
            raise ValueError(f"{self.folder} holds no {split} shards (looked for {only or split + '-*'}{INDEX_SUFFIX})")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            every = zip(indexes, pool.map(_read_index, indexes), strict=True)
        filled = {path.name.removesuffix(INDEX_SUFFIX): index for path, index in every if len(index.sizes)}
        if not filled:
            raise ValueError(f"{self.folder}: the {split} shards hold no samples any more; shard again")
        self._numbers = {name: number for number, name in enumerate(filled)}
        self._names, self._tars = list(filled), [f"{name}.tar" for name in filled]
        self._check_sizes([index.end for index in filled.values()])
        self._places = {member: _joined([index.places.get(member) for index in filled.values()]) for member in MEMBERS}
        labels = [index.labels for index in filled.values()]
        self._labels = np.concatenate(labels) if any((own != NO_LABEL).any() for own in labels) else None
        self._sizes = np.concatenate([index.sizes for index in filled.values()])
        self._starts = np.cumsum([0, *(len(index.sizes) for index in filled.values())])
        self._sources = self._ranges([index.source for index in filled.values()])
        self._texts: dict[int, pa.Table] = {}
        self._described: set[int] = set()  # shards whose tar was seen to be the one that the index describes
        self._printed = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return partial(ShardDataset, split=self.split, files=self.files, only=self.only), (self.folder,)

    def __len__(self) -> int:
        """The samples of all shards."""
        return int(self._starts[-1])

    @property
    def has_conditions(self) -> bool:
        """Whether every sample has a conditioning image."""
        return self._places["condition"] is not None

    def shards(self) -> list[str]:
        """Names of the shards, without `.tar`, in the order of the dataset."""
        return list(self._names)

    def rows(self, shard: str) -> range:
        """The indices of this dataset that lie in a shard, in the order of its members."""
        number = self._numbers[shard]
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def sources(self) -> dict[str, range]:
        """The indices of each source of a mix; one source named "" if there is no mix."""
        return dict(self._sources)

    def key(self, i: int) -> str:
        """The sample's key."""
        return str(self._text("key", i))

    def group(self, i: int) -> str:
        """The sample's subject."""
        return str(self._text("group", i))

    def captions(self, i: int) -> list[str]:
        """The sample's captions, at least one; from the index, without reading the tar."""
        return list(self._text("captions", i))

    def caption_weights(self, i: int) -> list[float]:
        """How often each caption is to be chosen, on any scale; empty if equally often."""
        return list(self._text("caption_weights", i) or ())

    def caption(self, i: int, *, draw: float) -> str:
        """The caption on which `draw` in [0, 1) falls; 0 gives the first."""
        options = self.captions(i)
        return options[pick(draw, count=len(options), weights=self.caption_weights(i))]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """int64 [B]: the places of the samples' classes in the list `classes` of the artifact's meta, -1 for none."""
        if self._labels is None:
            return np.full(len(indices), NO_LABEL, np.int64)
        labels: np.ndarray = self._labels[indices].astype(np.int64)
        return labels

    def image(self, i: int) -> np.ndarray:
        """uint8 [H, W, C]: one read and one decode. Raises ImageError if the bytes are damaged."""
        return decode(self.image_bytes(i))

    def image_bytes(self, i: int, *, member: Member = "image") -> bytes:
        """The encoded image, or conditioning image.

        Raises FileNotFoundError if the tar is gone, OSError if it ends early, ValueError if it is another than the
        index describes.
        """
        self._shard_of(i)
        return next(self.images_bytes(np.asarray([i]), member=member))

    def images_bytes(self, indices: np.ndarray, *, member: Member = "image") -> Iterator[bytes]:
        """The encoded images of int64 [B], one after the other; `image_bytes` says what it raises."""
        places = self._places[member]
        assert places is not None, "asked for conditioning images that are not there"
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        if new := set(shards.tolist()) - self._described:
            self._check_headers({shard: int(indices[shards == shard][0]) for shard in new})
        tars = [self._tars[shard] for shard in shards.tolist()]
        blocks, lengths = places[indices].T
        offsets = blocks * np.int64(tarfile.BLOCKSIZE)
        return self._read(zip(tars, offsets.tolist(), lengths.tolist(), strict=True))

    def stored_sizes(self, indices: np.ndarray) -> np.ndarray:
        """int [B, 2]: height and width of the stored images; 0 where the index does not say."""
        sizes: np.ndarray = self._sizes[indices]
        return sizes

    def sizes(self) -> dict[tuple[int, int], np.ndarray]:
        """The samples int64 [N] whose images are stored with each (height, width); (0, 0) is unknown."""
        packed = self._sizes.astype(np.uint32) @ np.asarray([2**16, 1], np.uint32)
        found, inverse = np.unique(packed, return_inverse=True)
        samples = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
        return {divmod(int(size), 2**16): own for size, own in zip(found, samples, strict=True)}

    def skip(self, i: int, error: ImageError, *, member: Member = "image", same_size: bool = False) -> int:
        """The sample to take for one whose `member` is damaged, the next of its source; the damaged one is noticed.

        With `same_size` it is the next that is stored with the same height and width. Raises ValueError if the tar
        holds something else at its place than the index says.
        """
        shard = self._shard_of(i)
        self._check_headers({shard: i})
        digest = "sha256" if member == "image" else f"{CONDITION}_sha256"
        written, found = self._row(digest, i), hashlib.sha256(self.image_bytes(i, member=member)).hexdigest()
        changed = "; its bytes have changed since the index was written" if written not in (None, found) else ""
        reject = Reject(self._row("key", i), self._tars[shard], error.reason, error.detail + changed)
        if (noticed := _noticed.get()) is not None:
            noticed.append(reject)
        with self._lock:
            self._printed += 1
        if self._printed <= PRINTED:
            more = "; further ones are not printed" if self._printed == PRINTED else ""
            print(f"skipped {reject.key} in {reject.source}: {error}{changed}{more}", file=sys.stderr, flush=True)
        rows = next(rows for rows in self._sources.values() if i in rows)
        if not same_size:
            return i + 1 if i + 1 < rows.stop else rows.start
        alike = rows.start + np.flatnonzero((self._sizes[rows.start : rows.stop] == self._sizes[i]).all(1))
        return int(alike[np.searchsorted(alike, i, side="right") % len(alike)])

    def close(self) -> None:
        """Close the tars; reading opens them again."""
        self.files.close()

    def _ranges(self, sources: list[str]) -> dict[str, range]:
        """The indices of each source, given that of each shard."""
        found: dict[str, range] = {}
        for number, source in enumerate(sources):
            start, stop = int(self._starts[number]), int(self._starts[number + 1])
            assert source not in found or found[source].stop == start, "the shards of a source follow one another"
            found[source] = range(found[source].start if source in found else start, stop)
        return found

    def _shard_of(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _text(self, column: str, i: int) -> Any:
        shard = self._shard_of(i)
        table = self._texts.get(shard)
        if table is None:
            table = _read_columns(self._index(shard), _TEXTS).combine_chunks()
            self._texts[shard] = table
        if column not in table.column_names:
            return None
        return table[column].chunk(0)[int(i - self._starts[shard])].as_py()

    def _row(self, column: str, i: int) -> Any:
        """A value of the index, None if it has no such column, without keeping the column in memory."""
        shard = self._shard_of(i)
        table = _read_columns(self._index(shard), (column,))
        return table[column][int(i - self._starts[shard])].as_py() if table.num_columns else None

    def _index(self, shard: int) -> Path:
        return self.folder / f"{self._names[shard]}{INDEX_SUFFIX}"

    def _read(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        try:
            yield from self.files.read(pieces)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: gone since its index was read; restore it or shard again") from None

    def _check_sizes(self, ends: list[int]) -> None:
        """Raise ValueError if a tar is missing or shorter than its index says."""
        missing, short = [], []
        for name, end in zip(self._names, ends, strict=True):
            try:
                if self.files.size(f"{name}.tar") < end:
                    short.append(f"{name}.tar")
            except FileNotFoundError:
                missing.append(name)
        if missing:
            raise ValueError(f"{self.folder}: no tar beside the index of {', '.join(missing)}; shard again")
        if short:
            raise ValueError(f"{self.folder}: {', '.join(short)} ends before its index does; restore it or shard again")

    def _check_headers(self, samples: Mapping[int, int]) -> None:
        """Raise ValueError unless the tar's header before the image of a sample of each shard names its key."""
        places = self._places["image"]
        assert places is not None, "every sample has an image"
        befores = ((int(places[i, 0]) - 1) * tarfile.BLOCKSIZE for i in samples.values())
        pieces = [(self._tars[shard], at, tarfile.BLOCKSIZE) for shard, at in zip(samples, befores, strict=True)]
        for (shard, i), header in zip(samples.items(), self._read(pieces), strict=True):
            key, name = self._row("key", i), header[:100].split(b"\0", 1)[0].decode(errors="replace")
            if not name.startswith(f"{key}."[:100]):
                raise ValueError(
                    f"{self._index(shard)} does not describe {self._names[shard]}.tar: where it has {key!r} stands "
                    f"{name!r}; restore the two from one copy, or shard again"
                )
            self._described.add(shard)


@dataclass(frozen=True)
class _Index:
    """The numbers of an index: 12 bytes a sample, and 4 with labels, 8 with conditioning images."""

    source: str
    end: int  # the least bytes of the tar
    places: dict[Member, np.ndarray]  # uint32 [N, 2]: of each member the offset, in tar blocks, and the length
    sizes: np.ndarray  # uint16 [N, 2], height and width, 0 for unknown
    labels: np.ndarray  # int32 [N]


def _read_index(path: Path) -> _Index:
    of_condition = tuple(f"{CONDITION}_{name}" for name in ("offset", "length"))
    with _opened(path) as file:
        table = _columns(file, ("offset", "length", "height", "width", "label", *of_condition))
        source = _only_source(file, path)
    sizes = np.zeros((len(table), 2), np.uint16)
    for axis, name in enumerate(("height", "width")):
        if name in table.column_names:
            side = table[name].to_numpy()
            sizes[:, axis] = np.where(side < 2**16, side, 0)
    found: dict[Member, tuple[Any, Any]] = {"image": (table["offset"], table["length"])}
    if of_condition[0] in table.column_names and not table[of_condition[0]].null_count:
        found["condition"] = (table[of_condition[0]], table[of_condition[1]])
    places: dict[Member, np.ndarray] = {}
    ends = [0]
    for member, columns in found.items():
        offsets, lengths = (column.to_numpy() for column in columns)
        places[member] = _packed(offsets, lengths, path)
        ends.append(int((offsets + lengths).max()) if len(table) else 0)
    labels = np.full(len(table), NO_LABEL, np.int32)
    if "label" in table.column_names:
        labels = table["label"].fill_null(NO_LABEL).to_numpy()
    return _Index(source, max(ends), places, sizes, labels)


def _packed(offsets: np.ndarray, lengths: np.ndarray, path: Path) -> np.ndarray:
    """uint32 [N, 2]: offsets in tar blocks, and lengths. Raises ValueError for offsets at which no tar has a member."""
    blocks, rest = offsets >> BLOCK_BITS, offsets & (tarfile.BLOCKSIZE - 1)  # many times as fast as // and %
    if len(offsets) and (blocks.min() < 1 or rest.any() or lengths.min() < 0):
        raise ValueError(f"{path}: holds offsets at which no tar has a member; shard again")
    return np.stack([blocks, lengths], 1).astype(np.uint32)


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    """What the indexes of all shards say, one after the other; None unless all of them say it."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if len(there) == len(parts) else None


def _only_source(file: pq.ParquetFile, path: Path) -> str:
    """The source of an index's samples, by the column's statistics: reading a million times one word takes longer."""
    names, groups = file.metadata.schema.names, range(file.metadata.num_row_groups)
    if "source" not in names:
        return ""
    columns = [file.metadata.row_group(group).column(names.index("source")).statistics for group in groups]
    sources = {value or "" for column in columns if column for value in (column.min, column.max)}
    assert len(sources) <= 1, f"{path}: a shard is of one source, this one of {sources}"
    return sources.pop() if sources else ""


def _read_columns(path: Path, columns: tuple[str, ...]) -> pa.Table:
    with _opened(path) as file:
        return _columns(file, columns)


def _columns(file: pq.ParquetFile, columns: tuple[str, ...]) -> pa.Table:
    """Those of `columns` that there are."""
    there = file.schema_arrow.names
    return file.read([name for name in columns if name in there], use_threads=False)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """An index. Raises ValueError for what is none."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable index ({error}); shard again") from None


def open_shards(artifact: Artifact, *, split: Split, only: str = "") -> ShardDataset:
    """The shards of an artifact, where they are: those under S3 are read piece by piece.

    Their indexes are copied whole, into `GENPIPE_CACHE`. Raises ManifestError if one does not arrive as committed.
    """
    here = whole_copy(artifact)
    if here is not None:
        return ShardDataset(here, split=split, only=only)
    files = remote_files(artifact)
    folder = cache_folder(artifact).parent / f"{artifact.fingerprint}.indexes"
    wanted = [name for name in files.stored if name.startswith(only or f"{split}-") and name.endswith(INDEX_SUFFIX)]
    stored = [(name, files.stored[name]) for name in wanted]
    indexes = [FileEntry(path=name, size=size, sha256=sha256) for name, (size, sha256) in stored]
    fetch_files(artifact.uri, indexes, folder)
    return ShardDataset(folder, split=split, files=files, only=only)


def open_splits(artifact: Artifact) -> dict[Split, ShardDataset]:
    """The splits of shards or samples that there are, in the order of SPLITS."""
    storage = open_storage(artifact.uri)
    there = [split for split in SPLITS if any(e.key.endswith(INDEX_SUFFIX) for e in storage.list(f"{split}-"))]
    return {split: open_shards(artifact, split=split) for split in there}
