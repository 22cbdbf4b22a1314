"""One checkpoint: how a state's tensors are copied, written, found again and read, by any number of ranks.

Every rank writes one safetensors file with its share of each tensor. Its metadata says in JSON which part of which
whole each entry is, and the numbers of the state beside its tensors. A reader takes the parts that it needs from
whichever files they are in: from as many ranks as there were to as many as there are, sharded or not. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genpipe.storage import Storage
from genpipe.training.slices import Box, Piece, overlap, within

FORMAT = "genpipe-checkpoint-1"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their names in safetensors files."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = 8 * 2**20
"""Bytes that are hashed and written at a time."""

MEMORY = 2**30
"""Bytes of a piece of host memory: torch rounds pinned memory up to a power of two, which no more is then lost to."""

READ_BYTES, READ_GAP, READ_THREADS = 32 * 2**20, 2**18, 8
"""Reads are joined up to so many bytes, over gaps of so many, and so many are under way at once."""


class _Entry(NamedTuple):
    """A tensor of a file: the part `box` of a whole of that shape."""

    name: str
    dtype: torch.dtype
    box: Box
    whole: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


class Snapshot:
    """A rank's share of a state in host memory of its own, as the bytes of a safetensors file.

    The memory, pinned where tensors come from a GPU, is used again for the next copy of the same layout.
    """

    def __init__(self) -> None:
        self._layout: list[_Entry] = []
        self._memory: list[Tensor] = []
        self._views: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._record = "{}"

    @torch.no_grad()
    def copy(self, pieces: Mapping[str, Piece], record: Mapping[str, Any], *, device: torch.device) -> None:
        """Copy tensors aside, and `record` (JSON values).

        From a GPU on a stream of its own: the host goes on at once, and what is put on the device's current stream
        after this waits for the copies.
        """
        ordered = sorted(pieces.items(), key=lambda item: -_alignment(item[1].local.nbytes))
        layout = [_Entry(name, piece.local.dtype, piece.box, piece.whole) for name, piece in ordered]
        if layout != self._layout:
            self._allocate(layout, pinned=device.type == "cuda")
        self._record = json.dumps(record)
        sources = [piece.local for _, piece in ordered]
        if device.type != "cuda":
            for view, source in zip(self._views, sources, strict=True):
                view.copy_(source)
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for view, source in zip(self._views, sources, strict=True):
                view.copy_(source, non_blocking=True)
        current.wait_stream(self._stream)

    def write(self, path: Path) -> tuple[int, str]:
        """Write the file to `path`; its size and sha256. Waits for copies that are under way."""
        if self._stream is not None:
            self._stream.synchronize()
        digest, header = hashlib.sha256(), self._header()
        with path.open("wb") as file:
            # Both let other threads run: training goes on beside them.
            digest.update(header)
            file.write(header)
            for block in self._blocks():
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return len(header) + sum(memory.numel() for memory in self._memory), digest.hexdigest()

    def _blocks(self) -> Iterator[memoryview]:
        for memory in self._memory:
            for block in memory.split(BLOCK):
                yield memoryview(block.numpy())

    def _allocate(self, layout: list[_Entry], *, pinned: bool) -> None:
        self._views, self._memory = [], []  # the old memory goes first
        for entries in _in_pieces(layout):
            sizes = [entry.nbytes for entry in entries]
            memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
            self._memory.append(memory)
            for part, entry in zip(memory.split(sizes), entries, strict=True):
                self._views.append(part.view(entry.dtype).view(entry.box.shape))
        self._layout = layout

    def _header(self) -> bytes:
        entries: dict[str, Any] = {}
        offset = 0
        for entry in self._layout:
            end = offset + entry.nbytes
            entries[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.box.shape, "data_offsets": (offset, end)}
            offset = end
        places = {entry.name: {"start": entry.box.start, "whole": entry.whole} for entry in self._layout}
        told = {"format": FORMAT, "places": json.dumps(places), "record": self._record}
        raw = json.dumps({"__metadata__": told, **entries}).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw


def _alignment(nbytes: int) -> int:
    """The largest power of two that divides a size: in descending order each begins at a multiple of its own."""
    return nbytes & -nbytes


def _in_pieces(layout: list[_Entry]) -> list[list[_Entry]]:
    """The entries in runs of at most `MEMORY` bytes, or of one that is larger."""
    runs: list[list[_Entry]] = []
    size = 0
    for entry in layout:
        if not runs or size + entry.nbytes > MEMORY:
            runs.append([])
            size = 0
        runs[-1].append(entry)
        size += entry.nbytes
    return runs


class _Part(NamedTuple):
    """Where a box of a tensor is stored."""

    key: str
    offset: int
    box: Box


class _Read(NamedTuple):
    """Bytes of one file that are wanted, and the tensor that gets some of them."""

    key: str
    begin: int
    end: int
    source: Box
    target: Piece
    common: Box
    dtype: torch.dtype


class Checkpoint:
    """A committed checkpoint, open for reading: the names, shapes and dtypes of its tensors, and its record."""

    def __init__(self, storage: Storage, files: Sequence[str]) -> None:
        self.storage = storage
        self.record: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._parts: dict[str, list[_Part]] = {}
        for key in files:
            self._open(key)

    def _open(self, key: str) -> None:
        size = int.from_bytes(self.storage.read_range(key, offset=0, length=8), "little")
        header = json.loads(self.storage.read_range(key, offset=8, length=size))
        told = header.pop("__metadata__")
        self.record = json.loads(told["record"])
        places = json.loads(told["places"])
        for name, entry in header.items():
            box = Box(tuple(places[name]["start"]), tuple(entry["shape"]))
            self.shapes[name], self.dtypes[name] = tuple(places[name]["whole"]), DTYPES[entry["dtype"]]
            self._parts.setdefault(name, []).append(_Part(key, 8 + size + entry["data_offsets"][0], box))

    def load(self, targets: Mapping[str, Piece]) -> None:
        """Fill each piece with the tensor of its name, reading what it needs and little more.

        Raises ValueError where the checkpoint holds no such tensor, one of another shape, or not all of it.
        """
        reads: list[_Read] = []
        for name, target in targets.items():
            if not math.prod(target.whole):
                continue  # nothing was written of it
            if self.shapes.get(name) != target.whole:
                found = f"has shape {list(self.shapes[name])}" if name in self.shapes else "is not in it"
                raise ValueError(f"{self.storage.uri}: {name} {found}, where the model's has {list(target.whole)}")
            found_reads = self._reads(name, target)
            if sum(read.common.numel for read in found_reads) != target.box.numel:
                raise ValueError(f"{self.storage.uri}: does not hold all of {name}")
            reads += found_reads
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(self._fill, _joined(reads)))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.load({name: Piece(tensor, Box((0,) * tensor.ndim, tuple(tensor.shape)), tuple(tensor.shape))})
        return tensor

    def _reads(self, name: str, target: Piece) -> list[_Read]:
        """What is to be read for a piece: whole rows of the parts that overlap with it."""
        reads: list[_Read] = []
        dtype = self.dtypes[name]
        for part in self._parts[name]:
            common = overlap(part.box, target.box)
            if common is None:
                continue
            row = math.prod(part.box.shape[1:]) * dtype.itemsize
            first = common.start[0] - part.box.start[0] if common.start else 0
            rows = common.shape[0] if common.shape else 1
            source = Box(common.start[:1] + part.box.start[1:], common.shape[:1] + part.box.shape[1:])
            begin = part.offset + first * row
            reads.append(_Read(part.key, begin, begin + rows * row, source, target, common, dtype))
        return reads

    @torch.no_grad()
    def _fill(self, reads: list[_Read]) -> None:
        """Read bytes that lie together, and put them where they belong."""
        begin, end = reads[0].begin, max(read.end for read in reads)
        content = bytearray(self.storage.read_range(reads[0].key, offset=begin, length=end - begin))
        for read in reads:
            raw = torch.frombuffer(content, dtype=torch.uint8, offset=read.begin - begin, count=read.end - read.begin)
            rows = raw.clone().view(read.dtype).view(read.source.shape)  # a copy is aligned
            place = read.target.local[within(read.target.box, read.common)]
            place.copy_(rows[within(read.source, read.common)])


def _joined(reads: list[_Read]) -> list[list[_Read]]:
    """The reads in groups, each of which is one stretch of a file."""
    groups: list[list[_Read]] = []
    end = 0
    for read in sorted(reads, key=lambda read: (read.key, read.begin)):
        near = groups and groups[-1][0].key == read.key and read.begin <= end + READ_GAP
        if near and max(end, read.end) - groups[-1][0].begin <= READ_BYTES:
            groups[-1].append(read)
            end = max(end, read.end)
        else:
            groups.append([read])
            end = read.end
    return groups
