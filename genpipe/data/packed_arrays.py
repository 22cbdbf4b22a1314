"""Reading `SHARD/NAME.npy` of a feature cache: mapped in a folder, piece by piece through the block cache elsewhere.

The entries of an array are its rows; those of `VARIANT_ARRAYS`, [N, V, ...], the N * V versions of the images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

from genpipe.data.block_cache import RemoteFiles

VARIANT_ARRAYS = ("latents", "latent_logvars", "image_embeds")
ROW_ARRAYS = (*VARIANT_ARRAYS, "labels", "rows")  # [N, ...] for N samples of a shard
OPEN_ARRAYS = 4096
HEADER_BYTES = 4096


class Layout(NamedTuple):
    """What the header of a `.npy` file says: where the entries begin, their dtype, and the whole shape."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Of all that belongs to one place of the first axis."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class Arrays(Protocol):
    """The arrays of some shards, by the number of the shard: alike but for their lengths. Thread-safe."""

    where: str
    names: list[str]

    def held(self, shard: int) -> frozenset[str]:
        """The names of a shard's arrays."""
        ...

    def samples(self, shard: int) -> int:
        """How many rows a shard has."""
        ...

    def layout(self, shard: int, name: str) -> Layout:
        """How an array is laid out."""
        ...

    def whole(self, shard: int, name: str) -> np.ndarray:
        """All of an array, not to be written to."""
        ...

    def beside(self, folder: str) -> dict[str, np.ndarray]:
        """All arrays of a folder that is no shard; none if it is not there."""
        ...

    def read(
        self, name: str, shards: Sequence[int], starts: Iterable[int], stops: Iterable[int], *, like: int
    ) -> bytearray:
        """Bytes of an array of these shards, joined: from `starts` to `stops`, counted from the first entry on.

        Raises ValueError if one is laid out unlike that of the shard `like`.
        """
        ...


class MappedArrays:
    """Those in a folder, of shards whose names begin with `prefix`; `OPEN_ARRAYS` arrays are mapped at a time."""

    def __init__(self, folder: Path, *, prefix: str) -> None:
        self.folder, self.where = folder, str(folder)
        self.names = sorted(path.name for path in folder.glob(f"{prefix}*") if path.is_dir())
        self._mapped = lru_cache(maxsize=OPEN_ARRAYS)(self.whole)
        self._bytes = lru_cache(maxsize=OPEN_ARRAYS)(self._view)

    def held(self, shard: int) -> frozenset[str]:
        """The names of a shard's arrays."""
        return frozenset(path.stem for path in (self.folder / self.names[shard]).glob("*.npy"))

    def samples(self, shard: int) -> int:
        """How many rows a shard has."""
        return len(self.whole(shard, "keys"))

    def layout(self, shard: int, name: str) -> Layout:
        """How an array is laid out, but for its header: the map begins behind it."""
        array = self._mapped(shard, name)
        return Layout(0, array.dtype, array.shape)

    def whole(self, shard: int, name: str) -> np.ndarray:
        """An array on a map of its own: what is read of it leaves the memory when the array does."""
        # As a plain array on the map: numpy's own class for maps is slow to index.
        return np.asarray(np.load(self._path(shard, name), mmap_mode="r", allow_pickle=False))

    def beside(self, folder: str) -> dict[str, np.ndarray]:
        """All arrays of a folder that is no shard; none if it is not there."""
        return {path.stem: np.load(path, allow_pickle=False) for path in (self.folder / folder).glob("*.npy")}

    def read(
        self, name: str, shards: Sequence[int], starts: Iterable[int], stops: Iterable[int], *, like: int
    ) -> bytearray:
        """Bytes of an array of these shards, joined. Raises ValueError if one is laid out unlike that of `like`."""
        # A batch meets most shards once or twice, and indexing costs more than copying.
        bytes_of = {shard: self._bytes(shard, name, like) for shard in set(shards)}
        spans = zip(shards, starts, stops, strict=True)
        return bytearray().join([bytes_of[shard][start:stop] for shard, start, stop in spans])

    def _view(self, shard: int, name: str, like: int) -> memoryview:
        array, first = self._mapped(shard, name), self._mapped(like, name)
        if (array.dtype, array.shape[1:]) != (first.dtype, first.shape[1:]):
            held = f"{array.dtype} {array.shape[1:]} a row, other shards {first.dtype} {first.shape[1:]}"
            raise ValueError(f"{self._path(shard, name)} holds {held}; cache again")
        return array.data.cast("B")

    def _path(self, shard: int, name: str) -> Path:
        return self.folder / self.names[shard] / f"{name}.npy"


class RemoteArrays:
    """Those of an artifact elsewhere. That arrays are alike is seen by their sizes, without reading all headers."""

    def __init__(self, files: RemoteFiles, *, prefix: str) -> None:
        self.files, self.where = files, files.storage.uri
        held: dict[str, list[str]] = {}
        for path in files.stored:
            shard, _, name = path.rpartition("/")
            if shard.startswith(prefix) and name.endswith(".npy"):
                held.setdefault(shard, []).append(name.removesuffix(".npy"))
        self.names = sorted(held)
        self._held = [frozenset(held[shard]) for shard in self.names]
        self._first = {name: shard for shard in reversed(range(len(held))) for name in self._held[shard]}
        self._read_layout = lru_cache(maxsize=OPEN_ARRAYS)(self.layout)

    def held(self, shard: int) -> frozenset[str]:
        """The names of a shard's arrays."""
        return self._held[shard]

    def samples(self, shard: int) -> int:
        """How many rows a shard has. Raises ValueError if one of its arrays is not of so many, or unlike others."""
        lengths = {name: self._length(shard, name) for name in self._held[shard] if name != "keys"}
        rows = {name: lengths[name] for name in ROW_ARRAYS if name in lengths}
        if "caption_offsets" in lengths:
            rows["caption_offsets"] = lengths["caption_offsets"] - 1
        if len(set(rows.values())) != 1:
            where = f"{self.where}/{self.names[shard]}"
            raise ValueError(f"{where}: by their sizes its arrays are of {rows} samples; cache again")
        return min(rows.values())

    def layout(self, shard: int, name: str) -> Layout:
        """How an array is laid out."""
        path = self._path(shard, name)
        [head] = self.files.read([(path, 0, min(HEADER_BYTES, self.files.size(path)))])
        file = io.BytesIO(head)
        version = np.lib.format.read_magic(file)
        assert version == (1, 0), "as numpy writes arrays of numbers"
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return Layout(file.tell(), dtype, shape)

    def whole(self, shard: int, name: str) -> np.ndarray:
        """All of an array."""
        return self._load(self._path(shard, name))

    def beside(self, folder: str) -> dict[str, np.ndarray]:
        """All arrays of a folder that is no shard; none if it is not there."""
        paths = [path for path in map(PurePosixPath, self.files.stored) if path.parent.name == folder]
        return {path.stem: self._load(str(path)) for path in paths if path.suffix == ".npy"}

    def read(
        self, name: str, shards: Sequence[int], starts: Iterable[int], stops: Iterable[int], *, like: int
    ) -> bytearray:
        """Bytes of an array of these shards, joined."""
        begin, spans = self._read_layout(like, name).start, zip(shards, starts, stops, strict=True)
        pieces = ((self._path(shard, name), begin + start, stop - start) for shard, start, stop in spans)
        return bytearray().join(self.files.read(piece for piece in pieces if piece[2]))

    def _load(self, path: str) -> np.ndarray:
        size, block = self.files.size(path), self.files.cache.block_bytes
        data = b"".join(self.files.read((path, at, min(block, size - at)) for at in range(0, size, block)))
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return array

    def _length(self, shard: int, name: str) -> int:
        """The entries of an array's first axis, if it is laid out as that of the first shard that has one."""
        layout = self._read_layout(self._first[name], name)
        length, rest = divmod(self.files.size(self._path(shard, name)) - layout.start, layout.row_bytes)
        if rest or length < 0:
            raise ValueError(
                f"{self.where}/{self._path(shard, name)} holds other rows than {layout.dtype} {layout.shape[1:]}, as "
                f"{self.names[self._first[name]]} does; cache again"
            )
        return length

    def _path(self, shard: int, name: str) -> str:
        return f"{self.names[shard]}/{name}.npy"
