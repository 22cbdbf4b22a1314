"""Storage: the same promises in a folder and on a real S3 server."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.storage import (
    LocalStorage,
    S3Storage,
    Storage,
    check_key,
    join,
    local_path,
    open_object,
    open_storage,
    read_file,
)


@pytest.fixture
def storage(store_uri: str) -> Storage:
    return open_storage(store_uri)


def test_what_is_written_is_read_and_replaced(storage: Storage) -> None:
    storage.write("a/b.bin", b"first")
    assert storage.read("a/b.bin") == b"first"
    storage.write("a/b.bin", b"second, and longer")
    assert storage.read("a/b.bin") == b"second, and longer"
    storage.write("empty", b"")
    assert storage.read("empty") == b""


def test_files_go_up_and_come_down(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000  # 12.8 MB: S3 takes it in parts
    (tmp_path / "here.bin").write_bytes(content)
    storage.upload("deep/er/there.bin", tmp_path / "here.bin")
    storage.download("deep/er/there.bin", tmp_path / "new" / "folder" / "back.bin")
    assert (tmp_path / "new" / "folder" / "back.bin").read_bytes() == content
    assert [entry[:2] for entry in storage.list()] == [("deep/er/there.bin", len(content))]


def test_what_is_there_is_not_created_again(storage: Storage) -> None:
    storage.create("a/new", b"first")
    for data in (b"second", b""):
        with pytest.raises(FileExistsError, match="a/new"):
            storage.create("a/new", data)
    assert storage.read("a/new") == b"first"
    storage.delete("a/new")
    storage.create("a/new", b"third")
    assert storage.read("a/new") == b"third"
    assert [entry.key for entry in storage.list()] == ["a/new"], "no temporary file stays"


def test_of_many_who_create_at_once_one_does(storage: Storage) -> None:
    def create(key: str, name: int) -> bool:
        try:
            storage.create(key, str(name).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for key in ("a", "b", "c"):
            created = list(pool.map(lambda name, key=key: create(key, name), range(8)))
            assert created.count(True) == 1
            assert storage.read(key) == str(created.index(True)).encode()


CREATOR = """
import sys
from genpipe.storage import open_storage
storage, name = open_storage(sys.argv[1]), sys.argv[2]
input()
for key in range(200):
    try:
        storage.create(str(key), name.encode())
        print(key)
    except FileExistsError:
        pass
"""


def test_of_processes_that_create_at_once_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATOR, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    creators = {name: subprocess.Popen([*command, name], **pipes) for name in ("one", "two", "three")}  # type: ignore[call-overload]
    for creator in creators.values():
        creator.stdin.write("go\n")
        creator.stdin.flush()
    keys = {name: creator.stdout.read().split() for name, creator in creators.items()}
    assert sorted(int(key) for won in keys.values() for key in won) == list(range(200))
    assert all((tmp_path / key).read_text() == name for name in keys for key in keys[name])
    assert all(creator.wait() == 0 for creator in creators.values())


def test_where_files_have_no_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT and some network file systems; none is to be had here."""

    def refuse(*_: object) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(str(tmp_path))
    storage.create("new", b"first")
    with pytest.raises(FileExistsError):
        storage.create("new", b"second")
    assert storage.read("new") == b"first"


def test_listing_by_prefix(storage: Storage) -> None:
    for key in ("a/1", "a/2/3", "ab", "b/1"):
        storage.write(key, key.encode())
    assert sorted(entry[:2] for entry in storage.list()) == [("a/1", 3), ("a/2/3", 5), ("ab", 2), ("b/1", 3)]
    assert sorted(entry.key for entry in storage.list("a/")) == ["a/1", "a/2/3"]
    assert sorted(entry.key for entry in storage.list("a")) == ["a/1", "a/2/3", "ab"]
    assert list(storage.list("nothing/")) == []


def test_more_objects_than_s3_lists_at_once(s3_server: str, tmp_path: Path) -> None:
    storage = S3Storage(f"s3://genpipe/{tmp_path.name}")
    keys = [f"{number:04d}" for number in range(1001)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: storage.write(key, b""), keys))
    assert sorted(entry.key for entry in storage.list()) == keys
    storage.delete_many(keys[:-1])
    assert [entry.key for entry in storage.list()] == keys[-1:]
    storage.delete_all()
    assert not list(storage.list())


def test_a_version_changes_with_the_content(storage: Storage) -> None:
    storage.write("key", b"first")
    before = storage.stat("key")
    assert before == next(storage.list()) == storage.stat("key")
    storage.write("key", b"other")
    after = storage.stat("key")
    assert (after.key, after.size) == ("key", 5) and after.version != before.version
    storage.write("folder/key", b"x")
    for missing in ("none", "folder"):
        with pytest.raises(FileNotFoundError, match=missing):
            storage.stat(missing)


def test_an_entry_says_when_it_was_written(storage: Storage) -> None:
    before = time.time()
    storage.write("a/b", b"1")
    [listed] = storage.list("a/")
    for entry in (listed, storage.stat("a/b")):
        assert before - 2 < entry.modified < time.time() + 2, "S3 tells whole seconds"


def test_ranges_are_whole_or_an_error(storage: Storage) -> None:
    content = bytes(range(256))
    storage.write("key", content)
    assert storage.read_range("key", offset=0, length=256) == content
    assert storage.read_range("key", offset=17, length=5) == content[17:22]
    assert storage.read_range("key", offset=300, length=0) == b""
    for offset, length in ((250, 7), (0, 257), (256, 1), (1000, 5)):
        with pytest.raises(OSError, match="key"):
            storage.read_range("key", offset=offset, length=length)
    with pytest.raises(FileNotFoundError, match="no/such"):
        storage.read_range("no/such", offset=0, length=1)


@settings(deadline=None)
@given(
    st.binary(max_size=300),
    st.integers(1, 64),
    st.lists(
        st.one_of(st.tuples(st.just("read"), st.integers(-1, 80)), st.tuples(st.just("seek"), st.integers(0, 400)))
    ),
)
def test_an_object_reads_as_a_file_does(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, block: int, moves: list[tuple[str, int]]
) -> None:
    storage = LocalStorage(str(tmp_path_factory.mktemp("store")))
    storage.write("key", content)
    file, reference = open_object(storage, storage.stat("key"), block=block), io.BytesIO(content)
    for what, count in moves:
        if what == "read":
            assert file.read(count) == reference.read(count)
        else:
            assert file.seek(count) == reference.seek(count)
    assert file.seek(0, os.SEEK_END) == len(content)


def test_an_object_that_shrank_since_it_was_listed_is_an_error(storage: Storage) -> None:
    storage.write("key", b"x" * 100)
    entry = storage.stat("key")
    storage.write("key", b"x" * 50)
    with pytest.raises(OSError, match=r"key: 50 bytes at offset 0 where 100 were expected|key: .*InvalidRange"):
        open_object(storage, entry, block=1000).read()


def test_an_empty_storage_lists_nothing(storage: Storage) -> None:
    assert list(storage.list()) == []
    assert list(storage.list("a/")) == []


def test_deletion(storage: Storage) -> None:
    for key in ("a/1", "a/2", "a/3", "b"):
        storage.write(key, b"x")
    storage.delete("a/1")
    storage.delete("never/was")
    storage.delete_many(["a/3", "never/was"])
    storage.delete_many([])
    assert sorted(entry.key for entry in storage.list()) == ["a/2", "b"]
    storage.delete_all("a/")
    assert [entry.key for entry in storage.list()] == ["b"]
    storage.delete_all()
    assert list(storage.list()) == []


def test_links_to_folders_are_followed_once_and_never_deleted_through(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "a").write_bytes(b"a")
    (root / "one").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (outside / "up").symlink_to(root)  # and the other way round, for ever
    (root / "one" / "self").symlink_to(root / "one")
    (root / "one" / "b").write_bytes(b"b")
    storage = LocalStorage(str(root))
    assert [entry.key for entry in storage.list()] == ["link/deep/a", "one/b"]
    storage.delete_all()
    assert not root.exists() and (outside / "deep" / "a").read_bytes() == b"a"


def test_links_that_lead_nowhere_are_listed(tmp_path: Path) -> None:
    """A file that is not there is found when it is read: one that was not listed would be missed by nobody."""
    (tmp_path / "gone").symlink_to(tmp_path / "away")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    storage = LocalStorage(str(tmp_path))
    assert [entry.key for entry in storage.list()] == ["gone", "round"]
    for key in ("gone", "round"):
        with pytest.raises(OSError, match=key):
            storage.read(key)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_not_read(tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / "key")
    else:
        (tmp_path / "key").symlink_to("/dev/zero")
    storage = LocalStorage(str(tmp_path))
    for read in (lambda: storage.read("key"), lambda: storage.read_range("key", offset=0, length=1)):
        with pytest.raises(OSError, match="key is no ordinary file"):
            read()


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    try:
        if user == 0:  # whom nothing is closed to
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            list(LocalStorage(str(tmp_path)).list())
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


def test_objects_that_mark_folders_are_no_files_and_go_with_the_rest(s3_server: str, tmp_path: Path) -> None:
    """pyarrow and the S3 console leave them, named like a folder with its slash."""
    storage = S3Storage(f"s3://genpipe/{tmp_path.name}")
    storage.write("folder/file", b"x")
    for marker in ("", "folder/"):
        storage.client.put_object(Bucket="genpipe", Key=f"{tmp_path.name}/{marker}", Body=b"")
    assert [entry.key for entry in storage.list()] == ["folder/file"]
    storage.delete_all()
    left = storage.client.list_objects_v2(Bucket="genpipe", Prefix=f"{tmp_path.name}/")
    assert left["KeyCount"] == 0


def test_a_missing_key_is_a_missing_file(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        storage.read("no/such")
    with pytest.raises(FileNotFoundError, match="no/such"):
        storage.download("no/such", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    with pytest.raises(FileNotFoundError):
        storage.upload("key", tmp_path / "not-here")
    assert list(storage.list()) == []


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd", "", ".."])
def test_unsafe_keys_are_refused(storage: Storage, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for act in (
        lambda: storage.read(key),
        lambda: storage.write(key, b"x"),
        lambda: storage.upload(key, tmp_path / "file"),
        lambda: storage.download(key, tmp_path / "copy"),
        lambda: storage.delete(key),
        lambda: storage.delete_many([key]),
    ):
        with pytest.raises(ValueError, match="unsafe storage key"):
            act()
    if key:
        with pytest.raises(ValueError, match="unsafe storage key"):
            list(storage.list(key))
        with pytest.raises(ValueError, match="unsafe storage key"):
            storage.delete_all(key)


def test_a_reader_never_sees_half_a_write(storage: Storage) -> None:
    """Every read while another thread replaces the object is one of the two whole contents."""
    old, new = b"o" * 300_000, b"n" * 500_000
    storage.write("object", old)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            storage.write("object", new)
            storage.write("object", old)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = {storage.read("object") for _ in range(40)}
    finally:
        stop.set()
        writer.join()
    assert seen <= {old, new}


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    storage.write("key", b"old")
    with pytest.raises(TypeError):
        storage.write("key", 3)  # type: ignore[arg-type]
    assert storage.read("key") == b"old"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["key"], "no temporary file is left"


def test_unknown_schemes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        open_storage("gs://bucket/prefix")
    assert str(error.value) == (
        "gs://bucket/prefix: storage of kind 'gs' is not supported; use a folder or s3://bucket/prefix"
    )


def test_a_file_by_its_uri(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("folder/file", b"content")
    assert read_file(join(storage.uri, "folder", "file")) == b"content"
    monkeypatch.chdir(tmp_path)
    Path("no-such-file-at-the-root").write_bytes(b"another")
    assert read_file("no-such-file-at-the-root") == b"another"
    with pytest.raises(FileNotFoundError):
        read_file("/no-such-file-at-the-root")


def test_uris() -> None:
    assert join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert local_path("s3://bucket/a") is None
    assert local_path("runs/a") == Path("runs/a")
    assert check_key("a/b.c") == "a/b.c"
