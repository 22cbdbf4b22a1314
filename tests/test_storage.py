"""Storage: the same promises in a folder and on a real S3 server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from genpipe.storage import Entry, Storage, check_key, join, local_path, open_storage


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
    assert list(storage.list()) == [Entry("deep/er/there.bin", len(content))]


def test_listing_by_prefix(storage: Storage) -> None:
    for key in ("a/1", "a/2/3", "ab", "b/1"):
        storage.write(key, key.encode())
    assert sorted(storage.list()) == [("a/1", 3), ("a/2/3", 5), ("ab", 2), ("b/1", 3)]
    assert sorted(entry.key for entry in storage.list("a/")) == ["a/1", "a/2/3"]
    assert sorted(entry.key for entry in storage.list("a")) == ["a/1", "a/2/3", "ab"]
    assert list(storage.list("nothing/")) == []


def test_an_empty_storage_lists_nothing(storage: Storage) -> None:
    assert list(storage.list()) == []
    assert list(storage.list("a/")) == []


def test_deletion(storage: Storage) -> None:
    for key in ("a/1", "a/2", "b"):
        storage.write(key, b"x")
    storage.delete("a/1")
    storage.delete("never/was")
    assert sorted(entry.key for entry in storage.list()) == ["a/2", "b"]
    storage.delete_all("a/")
    assert [entry.key for entry in storage.list()] == ["b"]
    storage.delete_all()
    assert list(storage.list()) == []


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


def test_uris() -> None:
    assert join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert local_path("s3://bucket/a") is None
    assert local_path("runs/a") == Path("runs/a")
    assert check_key("a/b.c") == "a/b.c"
