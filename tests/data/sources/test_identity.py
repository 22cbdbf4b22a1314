from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from genpipe.data.sources import identity
from genpipe.data.sources.identity import content_digests, digest_entries
from genpipe.storage import open_storage


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    for number in range(5):
        path = tmp_path / f"data/{number % 2}/{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 100)
    return tmp_path / "data"


def digests(folder: Path, **options: int) -> dict[str, str]:
    storage = open_storage(str(folder))
    return {entry.key: digest for entry, digest in content_digests(storage, storage.list(), **options)}


def test_the_content_is_what_identifies(files: Path) -> None:
    expected = {f"{n % 2}/{n}.bin": hashlib.sha256(bytes([n]) * 100).hexdigest() for n in range(5)}
    assert digests(files) == expected == digests(files)


def test_what_has_not_changed_is_not_read_again(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digests(files)
    (files / "0/2.bin").write_bytes(b"x" * 100)  # of the same size
    os.utime(files / "1/3.bin")  # touched
    files.rename(files.with_name("moved"))
    read: list[str] = []
    reader = identity._sha256
    monkeypatch.setattr(identity, "_sha256", lambda item: (read.append(item[0].name), reader(item))[1])
    again = digests(files.with_name("moved"))
    assert sorted(read) == ["2.bin", "3.bin"]
    assert again == first | {"0/2.bin": hashlib.sha256(b"x" * 100).hexdigest()}


@pytest.mark.parametrize("broken", ["no folder", "no database"])
def test_without_a_cache_everything_is_read(files: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digests(files)
    if broken == "no folder":
        monkeypatch.setenv("GENPIPE_CACHE", "/proc/nowhere")
    else:
        (files.parent / "cache/digests.sqlite").write_bytes(b"no database" * 1000)
    assert digests(files) == first


def test_what_is_not_read(files: Path) -> None:
    os.truncate(files / "0/0.bin", 2**40)  # of nothing, which takes no space
    (files / "0/2.bin").unlink()
    os.mkfifo(files / "0/2.bin")
    (files / "gone.bin").symlink_to(files / "away")
    found = digests(files, max_bytes=1000)
    assert (found["0/0.bin"], found["0/2.bin"], found["gone.bin"]) == ("too large", "unreadable", "unreadable")


def test_the_etag_stands_for_what_lies_in_s3(s3_server: str, tmp_path: Path) -> None:
    storage = open_storage(f"s3://genpipe/{tmp_path.name}")
    storage.write("a.bin", b"one")
    first = digest_entries(storage, storage.list())
    storage.write("a.bin", b"one")
    assert digest_entries(storage, storage.list()) == first
    storage.write("a.bin", b"two")
    assert digest_entries(storage, storage.list()) != first
