"""What identifies a source: names, sizes and content of its files, wherever they lie and whenever they were touched.

Under S3 the ETag stands for the content. Of local files it is their sha256, which is kept in
`GENPIPE_CACHE/digests.sqlite` by device, inode, size and modification time, so that a file is read once.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from genpipe.artifacts import cache_root
from genpipe.data.prefetch import prefetched
from genpipe.storage import Entry, Storage, local_path

T = TypeVar("T")
THREADS = 8
BATCH = 1000  # files whose digests are looked up, read and kept together
TOLD_BYTES = 2 * 10**9
"""Bytes to read for which it is said on stderr why that takes a while."""

UNREADABLE = "unreadable"


class _File(NamedTuple):
    """What a file's content is kept by."""

    device: int
    inode: int
    size: int
    mtime: int  # ns


def digest_entries(storage: Storage, entries: Iterable[Entry], *, max_bytes: int = sys.maxsize) -> str:
    """sha256 (hex) over the name, size and content of each file, in their order.

    Of a file of more than `max_bytes`, which nothing reads, and of one that cannot be read, only that goes in.
    """
    digest = hashlib.sha256()
    for entry, content in content_digests(storage, entries, max_bytes=max_bytes):
        digest.update(os.fsencode(entry.key) + f"\0{entry.size}\0{content}\n".encode())
    return digest.hexdigest()


def content_digests(
    storage: Storage, entries: Iterable[Entry], *, max_bytes: int = sys.maxsize
) -> Iterator[tuple[Entry, str]]:
    """Each file and what stands for its content."""
    root = local_path(storage.uri)
    if root is None:
        yield from ((entry, entry.version) for entry in entries)
        return
    with closing(_Kept()) as kept:
        for batch in in_batches(entries):
            files = [(entry, root / entry.key, _identity(root / entry.key)) for entry in batch]
            known = {file: found for _, _, file in files if file and (found := kept.find(file))}
            to_read = [(path, file) for _, path, file in files if file and file not in known and file.size <= max_bytes]
            known |= kept.add(_read_all(to_read))
            for entry, _, file in files:
                fallback = "too large" if file and file.size > max_bytes else UNREADABLE
                yield entry, known.get(file, fallback) if file else UNREADABLE


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of at most `BATCH` items, in their order."""
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _identity(path: Path) -> _File | None:
    """None for what is no ordinary file, or is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _File(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _read_all(files: list[tuple[Path, _File]]) -> dict[_File, str]:
    """The sha256 of each file, read by several threads; those that cannot be read are left out."""
    if (size := sum(file.size for _, file in files)) > TOLD_BYTES:
        where = os.path.commonpath([path for path, _ in files])
        print(f"reading {size / 1e9:.0f} GB of {where} once, for what identifies them", file=sys.stderr, flush=True)
    read = prefetched(_sha256, files, threads=THREADS if len(files) > 1 else 0, ahead=2 * THREADS)
    return {file: digest for (_, file), digest in read if digest}


def _sha256(item: tuple[Path, _File]) -> str:
    try:
        with item[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


class _Kept:
    """Digests of earlier runs, of any process of this user. Without a cache that can be written there are none."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None
        with suppress(OSError, sqlite3.Error):
            path = cache_root() / "digests.sqlite"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=10)
            self._database.execute(
                "create table if not exists digests (device integer, inode integer, size integer, mtime integer, "
                "sha256 text, primary key (device, inode)) without rowid"
            )

    def find(self, file: _File) -> str:
        """The digest of a file that has not changed since it was read, else ""."""
        if self._database is not None:
            with suppress(sqlite3.Error):
                query = "select sha256 from digests where device = ? and inode = ? and size = ? and mtime = ?"
                row = self._database.execute(query, _signed(file)).fetchone()
                return str(row[0]) if row else ""
        return ""

    def add(self, digests: dict[_File, str]) -> dict[_File, str]:
        """Keep digests, and return them."""
        if self._database is not None and digests:
            with suppress(sqlite3.Error), self._database:
                rows = [(*_signed(file), digest) for file, digest in digests.items()]
                self._database.executemany("insert or replace into digests values (?, ?, ?, ?, ?)", rows)
        return digests

    def close(self) -> None:
        if self._database is not None:
            self._database.close()


def _signed(file: _File) -> tuple[int, ...]:
    """Numbers that SQLite takes: of 64 bits with a sign."""
    return tuple((number + 2**63) % 2**64 - 2**63 for number in file)
