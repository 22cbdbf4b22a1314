"""Reading pieces of files: by `pread` in a folder, by ranged GETs through a bounded cache on local disk elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from genpipe.artifacts import Artifact, ManifestError, cache_folder, cache_root, read_manifest
from genpipe.data.prefetch import Done, Pending, in_order
from genpipe.storage import Storage, local_path, open_storage

CACHE_GB = "GENPIPE_CACHE_GB"
DEFAULT_CACHE_GB = 20.0
OPEN_FILES = 512
REQUESTS = 32
READ_AHEAD_BYTES = 256 * 2**10
BLOCK_BYTES = 256 * 2**10
DIGEST_BYTES = 16
SWEEP_SHARE, SWEEP_TO = 1 / 64, 7 / 8
NOTE_SECONDS = 60.0


class Stored(NamedTuple):
    """A file whose pieces are read: its bytes, and what names its content (a digest)."""

    size: int
    version: str


Piece = tuple[str, int, int]
"""A file's name, and the offset and length in it of the bytes that are wanted."""


class Files(Protocol):
    """Files that are read in pieces, by several threads at once."""

    def size(self, name: str) -> int:
        """Its bytes. Raises FileNotFoundError."""
        ...

    def read(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """The bytes of each piece, whole. Raises FileNotFoundError, or OSError if a file ends before its piece."""
        ...

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        ...


class LocalFiles:
    """The files of a folder, at most `OPEN_FILES` of them open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A descriptor is closed when its last user lets go of it, so one that is pushed out may still be read from.
        self._open = lru_cache(maxsize=OPEN_FILES)(lambda name: _Descriptor(folder / name))

    def __reduce__(self) -> Any:
        return LocalFiles, (self.folder,)

    def size(self, name: str) -> int:
        """Its bytes. Raises FileNotFoundError."""
        return (self.folder / name).stat().st_size

    def read(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """The bytes of each piece. Raises FileNotFoundError, or OSError if a file ends before its piece."""
        # Some are read before the first is decoded: a run of either finds more of its own in the processor's caches.
        ready: list[bytes] = []
        ahead = 0
        for name, offset, length in pieces:
            file = self._open(name)
            data = os.pread(file.number, length, offset)
            if len(data) != length:
                raise OSError(f"{self.folder / name} ends {length - len(data)} bytes short of {offset + length}")
            ready.append(data)
            ahead += length
            if ahead >= READ_AHEAD_BYTES:
                yield from ready
                ready, ahead = [], 0
        yield from ready

    def close(self) -> None:
        """Close the open files; reading opens them again."""
        self._open.cache_clear()


class _Descriptor:
    """An open file that closes with its last reference."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class RemoteFiles:
    """Files of the storage at `uri`, read block by block through a cache, `REQUESTS` pieces at a time."""

    def __init__(self, uri: str, stored: Mapping[str, Stored], cache: BlockCache) -> None:
        self.storage, self.stored, self.cache = open_storage(uri), stored, cache
        self._requests = ThreadPoolExecutor(REQUESTS, "blocks")

    def __reduce__(self) -> Any:
        return RemoteFiles, (self.storage.uri, self.stored, self.cache)

    def size(self, name: str) -> int:
        """Its bytes, as its artifact's manifest says. Raises FileNotFoundError."""
        if name not in self.stored:
            raise FileNotFoundError(f"{self.storage.uri}/{name}")
        return self.stored[name].size

    def read(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """The bytes of each piece. Raises FileNotFoundError, or OSError if a file ends before its piece."""
        yield from (data for _, data in in_order(self._begin, pieces, ahead=REQUESTS))

    def _begin(self, piece: Piece) -> Pending[bytes]:
        name, offset, length = piece
        here = self.cache.cached(self.stored[name], offset=offset, length=length)
        return self._requests.submit(self._fetch, piece) if here is None else Done(here)  # which costs no thread

    def _fetch(self, piece: Piece) -> bytes:
        name, offset, length = piece
        return self.cache.read(self.storage, name, self.stored[name], offset=offset, length=length)

    def close(self) -> None:
        """Nothing: no file is open."""


def whole_copy(artifact: Artifact) -> Path | None:
    """The folder that holds an artifact on this machine: itself if it is local, or a copy that somebody fetched."""
    here = local_path(artifact.uri)
    if here is None and cache_folder(artifact).exists():
        return cache_folder(artifact)
    return here


def remote_files(artifact: Artifact) -> RemoteFiles:
    """The files of an artifact elsewhere, as its manifest lists them; one client and cache for all who read them here.

    Blocks are kept in `GENPIPE_CACHE` (default `~/.cache/genpipe`), up to GENPIPE_CACHE_GB (default 20) of all
    artifacts together. Raises ManifestError where nothing is committed.
    """
    return _remote_files(artifact.uri, cache_root() / "blocks", _cache_bytes())


@lru_cache(maxsize=8)
def _remote_files(uri: str, blocks: Path, max_bytes: int) -> RemoteFiles:
    manifest = read_manifest(uri, check_files=False)  # the plan has; every rank listing all files would be too much
    if manifest is None:
        raise ManifestError(f"{uri}: no manifest here, so nothing was committed")
    stored = {file.path: Stored(file.size, file.sha256) for file in manifest.files}
    return RemoteFiles(uri, stored, BlockCache(blocks, max_bytes=max_bytes))


def _cache_bytes() -> int:
    text = os.environ.get(CACHE_GB, str(DEFAULT_CACHE_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if limit <= 0:
        raise ValueError(f"{CACHE_GB}={text!r}: give the gigabytes that blocks of remote files may take, e.g. 20")
    return int(limit * 1e9)


class BlockCache:
    """Blocks of remote files in a folder that several processes share, the least recently used given up first.

    A block is a file: a digest, then the bytes; it appears whole or not at all. What fails its digest when this
    process first reads it is fetched again. Of several who want a block at once, in whatever process, one fetches it
    and the others wait. A process that has written 1/64 of `max_bytes` gives up blocks until 7/8
    is left, so that eight processes that fill it at once stay within it. A full disk costs speed and nothing else.
    """

    def __init__(self, folder: Path, *, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.max_bytes, self.block_bytes = folder, max_bytes, block_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._used: dict[bytes, float] = {}  # blocks that passed their digest, and when their last use was noted
        self._written = self.max_bytes  # so that the first write looks at what earlier runs left
        self._locks = [threading.Lock() for _ in range(1024)]  # many times as many as there are requests under way
        self._fetching = _Descriptor(folder / "fetching", os.O_RDWR | os.O_CREAT)
        self._sweeping = threading.Lock()

    def __reduce__(self) -> Any:
        return partial(BlockCache, max_bytes=self.max_bytes, block_bytes=self.block_bytes), (self.folder,)

    def cached(self, stored: Stored, *, offset: int, length: int) -> bytes | None:
        """Bytes of a file of which all blocks are here; None if they are not."""
        pieces = [self._cached(stored, number, offset, length) for number in self._numbers(offset, length)]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)

    def read(self, storage: Storage, name: str, stored: Stored, *, offset: int, length: int) -> bytes:
        """Bytes of a file of `storage`; blocks that are not here come with one ranged GET."""
        assert offset >= 0 and length >= 0
        if offset + length > stored.size:
            raise OSError(f"{storage.uri}/{name} ends {offset + length - stored.size} bytes short of {offset + length}")
        numbers = self._numbers(offset, length)
        first = numbers.start
        # Neighbors ask for the same blocks at once, and ranks that validate for the same samples.
        with self._locks[hash((name, first)) % len(self._locks)], self._alone(stored, first):
            pieces = [self._cached(stored, number, offset, length) for number in numbers]
            missing = [first + at for at, piece in enumerate(pieces) if piece is None]
            if missing:
                start = missing[0] * self.block_bytes
                stop = min((missing[-1] + 1) * self.block_bytes, stored.size)
                data = storage.read_range(name, offset=start, length=stop - start)
                for number in range(missing[0], missing[-1] + 1):
                    at = number * self.block_bytes - start
                    block = data[at : at + self.block_bytes]
                    self._keep(stored, number, block)
                    pieces[number - first] = block[self._within(number, offset, length)]
        return b"".join(piece for piece in pieces if piece is not None)

    @contextmanager
    def _alone(self, stored: Stored, number: int) -> Iterator[None]:
        """Keep other processes of this machine from fetching a block in the meantime, where its system can do that.

        The lock is one byte of a file, at a place that the block gives; the system takes it back from who is killed.
        """
        _, identity = self._path(stored, number)
        place = int.from_bytes(identity[:7])
        with suppress(OSError, AttributeError):  # only Linux has them; without, a block may come twice
            fcntl.fcntl(self._fetching.number, fcntl.F_OFD_SETLKW, _lock(fcntl.F_WRLCK, place))
        try:
            yield
        finally:
            with suppress(OSError, AttributeError):
                fcntl.fcntl(self._fetching.number, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, place))

    def _numbers(self, offset: int, length: int) -> range:
        """The blocks that a range lies in."""
        return range(offset // self.block_bytes, (offset + max(length, 1) - 1) // self.block_bytes + 1)

    def _within(self, number: int, offset: int, length: int) -> slice:
        """The part of a block that a range covers."""
        start = number * self.block_bytes
        return slice(max(offset - start, 0), min(offset + length - start, self.block_bytes))

    def _cached(self, stored: Stored, number: int, offset: int, length: int) -> bytes | None:
        """The wanted part of a block, None if it is not here or is damaged."""
        path, identity = self._path(stored, number)
        wanted = self._within(number, offset, length)
        size = wanted.stop - wanted.start
        now, used = time.monotonic(), self._used.get(identity)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if used is None:
                    data = os.pread(file, DIGEST_BYTES + self.block_bytes + 1, 0)  # and what should not be there
                    block = data[DIGEST_BYTES:]
                    if data[:DIGEST_BYTES] != _digest(block):
                        return None
                    piece = block[wanted]
                else:
                    piece = os.pread(file, size, DIGEST_BYTES + wanted.start)
                if used is None or now > used + NOTE_SECONDS:
                    os.utime(file)
                    self._used[identity] = now
            finally:
                os.close(file)
        except OSError:
            return None
        return piece if len(piece) == size else None

    def _keep(self, stored: Stored, number: int, block: bytes) -> None:
        name, identity = self._path(stored, number)
        path = Path(name)
        with suppress(OSError):  # a full disk, or a folder that a sweep is looking at
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            try:
                with open(handle, "wb", buffering=0) as file:
                    whole = file.write(_digest(block) + block) == DIGEST_BYTES + len(block)
                if whole:
                    os.replace(temporary, path)
                    self._used[identity] = time.monotonic()
            finally:
                Path(temporary).unlink(missing_ok=True)
        self._written += len(block)
        with self._sweeping:
            if self._written > self.max_bytes * SWEEP_SHARE:
                self._sweep()

    def _sweep(self) -> None:
        """Give up the least recently used blocks, one process after the other."""
        if len(self._used) > 2 * self.max_bytes // self.block_bytes:
            self._used.clear()  # most of them are no longer here
        with suppress(OSError), (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._written = 0
            found = []
            for path in self.folder.glob("??/*"):
                with suppress(OSError):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in found)
            if total <= self.max_bytes * SWEEP_TO:
                return
            for _, size, path in sorted(found):
                path.unlink(missing_ok=True)
                total -= size
                if total <= self.max_bytes * SWEEP_TO:
                    break

    def _path(self, stored: Stored, number: int) -> tuple[str, bytes]:
        identity = _digest(f"{stored.version}/{self.block_bytes}/{number}".encode())
        name = identity.hex()
        return f"{self.folder}/{name[:2]}/{name}", identity


def _lock(kind: int, place: int) -> bytes:
    """`struct flock` of one byte: l_type, l_whence, l_start, l_len, l_pid."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
