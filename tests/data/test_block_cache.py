"""The cache of remote blocks, on a real S3 server and on folders that stand for one."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import forkserver

from genpipe.data.block_cache import (
    OPEN_FILES,
    READ_AHEAD_BYTES,
    BlockCache,
    Files,
    LocalFiles,
    Piece,
    RemoteFiles,
    Stored,
)
from genpipe.storage import LocalStorage, open_storage

BLOCK = 1000
SIZE = 10_500


def content(size: int = SIZE, *, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class CountingStorage(LocalStorage):
    """A folder that remembers which ranges were asked of it."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.asked: list[tuple[int, int]] = []

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        return super().read_range(key, offset=offset, length=length)


@pytest.fixture
def storage(tmp_path: Path) -> CountingStorage:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "a.tar").write_bytes(content())
    return CountingStorage(str(tmp_path / "remote"))


def files(storage: LocalStorage, cache: BlockCache) -> RemoteFiles:
    remote = RemoteFiles(storage.uri, {"a.tar": Stored(SIZE, "v1")}, cache)
    remote.storage = storage
    return remote


def read(files: Files, name: str, *, offset: int, length: int) -> bytes:
    (piece,) = files.read([(name, offset, length)])
    return piece


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


@settings(deadline=None, max_examples=60)
@given(ranges=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), min_size=1, max_size=20))
def test_any_range_gives_its_bytes(tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "a.tar").write_bytes(content())
    cache = BlockCache(folder / "cache", max_bytes=4 * BLOCK, block_bytes=BLOCK)
    remote = files(LocalStorage(str(folder)), cache)
    for one, other in ranges:
        offset, stop = sorted((one, other))
        assert read(remote, "a.tar", offset=offset, length=stop - offset) == content()[offset:stop]


def test_a_block_is_fetched_once_and_neighbors_together(storage: CountingStorage, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK)
    remote = files(storage, cache)
    read(remote, "a.tar", offset=2500, length=10)
    read(remote, "a.tar", offset=2000, length=1000)
    assert storage.asked == [(2000, 1000)]
    read(remote, "a.tar", offset=1999, length=3000)
    assert storage.asked[1:] == [(1000, 4000)], "one request for all from the first that is missing to the last"
    read(remote, "a.tar", offset=10_400, length=100)
    assert storage.asked[2:] == [(10_000, 500)], "the last block is short"
    again = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    assert read(again, "a.tar", offset=1500, length=3000) == content()[1500:4500]
    assert len(storage.asked) == 3, "another process finds them"


def test_threads_fetch_a_block_once(storage: CountingStorage, tmp_path: Path) -> None:
    remote = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    wrong: list[int] = []

    def read_some(seed: int) -> None:
        for offset in np.random.default_rng(seed).integers(0, SIZE - 50, 100).tolist():
            if read(remote, "a.tar", offset=offset, length=50) != content()[offset : offset + 50]:
                wrong.append(offset)

    threads = [threading.Thread(target=read_some, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # A range over two blocks holds the lock of its first, so that its second may now and then come twice.
    assert len(storage.asked) <= 2 * 11


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grow"])
def test_a_damaged_block_is_fetched_again(storage: CountingStorage, tmp_path: Path, damage: str) -> None:
    remote = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    read(remote, "a.tar", offset=0, length=BLOCK)
    (path,) = blocks_in(tmp_path / "cache")
    data = path.read_bytes()
    flipped = bytes([*data[:500], data[500] ^ 1, *data[501:]])
    path.write_bytes({"flip": flipped, "cut": data[:600], "empty": b"", "grow": data + b"x"}[damage])
    fresh = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    for _ in range(2):
        assert read(fresh, "a.tar", offset=0, length=BLOCK) == content()[:BLOCK]
    assert len(storage.asked) == 2
    assert path.read_bytes() == data


def test_the_least_recently_used_blocks_are_given_up(storage: CountingStorage, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", max_bytes=6 * BLOCK, block_bytes=BLOCK)
    remote = files(storage, cache)
    for number in range(5):
        read(remote, "a.tar", offset=number * BLOCK, length=1)
    past = time.time() - 1000
    for age, path in enumerate(blocks_in(tmp_path / "cache")):
        os.utime(path, (past + age, past + age))
    fresh = files(storage, BlockCache(tmp_path / "cache", max_bytes=6 * BLOCK, block_bytes=BLOCK))
    read(fresh, "a.tar", offset=0, length=1)  # used again
    for number in (5, 6, 7):
        read(fresh, "a.tar", offset=number * BLOCK, length=1)
    left = sum(path.stat().st_size for path in blocks_in(tmp_path / "cache"))
    assert left <= 6 * BLOCK
    asked = len(storage.asked)
    read(fresh, "a.tar", offset=0, length=1)
    assert len(storage.asked) == asked, "what was used lately is still there"


def read_at_random(uri: str, folder: str, seed: int) -> None:
    cache = BlockCache(Path(folder), max_bytes=4 * BLOCK, block_bytes=BLOCK)
    remote = RemoteFiles(uri, {"a.tar": Stored(SIZE, "v1")}, cache)
    for offset in np.random.default_rng(seed).integers(0, SIZE - 50, 200).tolist():
        assert read(remote, "a.tar", offset=offset, length=50) == content()[offset : offset + 50]


def test_processes_share_a_cache_that_is_too_small_for_them(storage: CountingStorage, tmp_path: Path) -> None:
    """They give up one another's blocks all the time, and always read what is right."""
    context = forkserver()
    arguments = [(storage.uri, str(tmp_path / "cache"), seed) for seed in range(2)]
    workers = [context.Process(target=read_at_random, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    # Each may have written a block or two while the other gave up what was too much.
    assert sum(path.stat().st_size for path in blocks_in(tmp_path / "cache")) <= 8 * (BLOCK + 16)


class NotingStorage(LocalStorage):
    """A folder that takes its time, and notes in a file what was asked of it by any process."""

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        with open(f"{self.uri}/asked", "a") as file:
            file.write(f"{offset}\n")
        time.sleep(0.02)
        return super().read_range(key, offset=offset, length=length)


def read_all_blocks(uri: str, folder: str, begin: Any) -> None:
    remote = files(NotingStorage(uri), BlockCache(Path(folder), max_bytes=10**6, block_bytes=BLOCK))
    begin.wait()
    for offset in range(0, SIZE - 100, BLOCK):
        assert read(remote, "a.tar", offset=offset, length=100) == content()[offset : offset + 100]


def test_processes_that_want_a_block_at_once_fetch_it_once(storage: CountingStorage, tmp_path: Path) -> None:
    context = forkserver()
    begin = context.Barrier(3)
    arguments = (storage.uri, str(tmp_path / "cache"), begin)
    workers = [context.Process(target=read_all_blocks, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    asked = (tmp_path / "remote" / "asked").read_text().split()
    assert sorted(map(int, asked)) == list(range(0, SIZE, BLOCK))


def read_a_block(uri: str, folder: str) -> None:
    NotingStorage.read_range = lambda *_, **__: threading.Event().wait()  # type: ignore[assignment, return-value]
    read(
        files(NotingStorage(uri), BlockCache(Path(folder), max_bytes=10**6, block_bytes=BLOCK)),
        "a.tar",
        offset=0,
        length=1,
    )


def test_a_process_that_dies_while_it_fetches_a_block_holds_nobody_up(storage: CountingStorage, tmp_path: Path) -> None:
    context = forkserver()
    worker = context.Process(target=read_a_block, args=(storage.uri, str(tmp_path / "cache")))
    worker.start()
    remote = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    found: list[bytes] = []
    while not is_locked(tmp_path / "cache" / "fetching"):
        assert worker.is_alive()
        time.sleep(0.05)
    thread = threading.Thread(target=lambda: found.append(read(remote, "a.tar", offset=0, length=10)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not found, "it waits for the other process"
    worker.kill()
    thread.join()
    assert found == [content()[:10]] and storage.asked == [(0, BLOCK)]


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a byte of the file."""
    inode = f":{path.stat().st_ino} "
    return any(inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_a_cache_that_cannot_be_written_costs_speed_alone(storage: CountingStorage, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK)
    for number in range(256):  # a file stands where each folder of blocks would
        (tmp_path / "cache" / f"{number:02x}").write_bytes(b"")
    remote = files(storage, cache)
    for _ in range(2):
        assert read(remote, "a.tar", offset=700, length=600) == content()[700:1300]
    assert len(storage.asked) == 2


def test_versions_are_kept_apart(storage: CountingStorage, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK)
    read(files(storage, cache), "a.tar", offset=0, length=10)
    (tmp_path / "remote" / "a.tar").write_bytes(content(seed=1))
    newer = RemoteFiles(storage.uri, {"a.tar": Stored(SIZE, "v2")}, cache)
    assert read(newer, "a.tar", offset=0, length=10) == content(seed=1)[:10]


def test_beyond_the_end_and_missing(storage: CountingStorage, tmp_path: Path) -> None:
    remote = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    local = LocalFiles(tmp_path / "remote")
    for every in (remote, local):
        assert every.size("a.tar") == SIZE
        with pytest.raises(OSError, match=r"a.tar ends 10 bytes short of 10510"):
            read(every, "a.tar", offset=SIZE - 10, length=20)
        with pytest.raises(FileNotFoundError, match=r"b.tar"):
            every.size("b.tar")


def test_a_real_server_gives_ranges(s3_server: str, tmp_path: Path) -> None:
    uri = f"s3://genpipe/{tmp_path.name}"
    open_storage(uri).write("a.tar", content())
    cache = BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK)
    remote = pickle.loads(pickle.dumps(RemoteFiles(uri, {"a.tar": Stored(SIZE, "v1")}, cache)))
    assert read(remote, "a.tar", offset=1500, length=8600) == content()[1500:10_100]
    assert len(blocks_in(tmp_path / "cache")) == 10


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    for number in range(OPEN_FILES + 20):
        (tmp_path / str(number)).write_bytes(str(number).encode())
    local = LocalFiles(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(OPEN_FILES + 20), 0]:
        assert read(local, str(number), offset=0, length=1) == str(number)[:1].encode()
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES
    local.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_pieces_come_one_by_one_in_their_order_though_some_are_read_ahead(tmp_path: Path) -> None:
    whole = content(4 * READ_AHEAD_BYTES)
    (tmp_path / "a.tar").write_bytes(whole)
    at = np.random.default_rng(1).integers(0, len(whole) - READ_AHEAD_BYTES, 40).tolist()
    sizes = [READ_AHEAD_BYTES // (1 + number % 7) - number for number in range(39)] + [0]
    asked: list[int] = []

    def pieces() -> Iterator[Piece]:
        for number, (offset, length) in enumerate(zip(at, sizes, strict=True)):
            asked.append(number)
            yield "a.tar", offset, length

    ahead = []
    for number, piece in enumerate(LocalFiles(tmp_path).read(pieces())):
        assert piece == whole[at[number] : at[number] + sizes[number]]
        ahead.append(sum(sizes[number : asked[-1] + 1]))
    assert len(ahead) == 40
    assert max(ahead) < 2 * READ_AHEAD_BYTES, "what is held does not grow with the batch"


class PatientStorage(LocalStorage):
    """A folder that answers eight requests together, and none before there are eight."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.together = threading.Barrier(8, timeout=60)

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        self.together.wait()
        return super().read_range(key, offset=offset, length=length)


def test_pieces_are_fetched_at_the_same_time_and_come_in_order(storage: CountingStorage, tmp_path: Path) -> None:
    remote = files(PatientStorage(storage.uri), BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    pieces = [("a.tar", number * BLOCK + 7, 100) for number in (3, 0, 7, 1, 5, 2, 6, 4)]
    for _ in range(2):  # the second time from the cache: nobody asks
        assert list(remote.read(pieces)) == [content()[offset : offset + 100] for _, offset, _ in pieces]


def test_a_failed_fetch_is_raised_at_its_place(storage: CountingStorage, tmp_path: Path) -> None:
    remote = files(storage, BlockCache(tmp_path / "cache", max_bytes=10**6, block_bytes=BLOCK))
    pieces = remote.read([("a.tar", 0, 10), ("a.tar", SIZE - 10, 20), ("a.tar", 50, 10)])
    assert next(pieces) == content()[:10]
    with pytest.raises(OSError, match=r"a.tar ends 10 bytes short of 10510"):
        next(pieces)
