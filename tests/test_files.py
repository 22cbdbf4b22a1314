"""Files on a disk that is really full: a small tmpfs of the test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genpipe.files import DiskFull, may_pass
from genpipe.storage import LocalStorage
from genpipe.weights import save_tensors


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder with 256 KiB, half of which are taken."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    (tmp_path / "old").write_bytes(bytes(128 * 2**10))
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_says_where_it_is_and_leaves_what_was_there(
    full: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage, data = LocalStorage(str(full)), bytes(200 * 2**10)
    source = tmp_path_factory.mktemp("source") / "file"
    source.write_bytes(data)
    for write in (
        lambda: storage.write("old", data),
        lambda: storage.create("new", data),
        lambda: storage.upload("deep/er/new", source),
    ):
        with pytest.raises(DiskFull, match=rf"^{full}[/a-z]*: no space left; make room"):
            write()
    assert (full / "old").read_bytes() == bytes(128 * 2**10)
    assert [entry.key for entry in storage.list()] == ["old"]
    assert not list(full.rglob("*.part"))


def test_weights_that_find_no_room_may_find_it_later(full: Path) -> None:
    with pytest.raises(OSError, match="No space left") as error:
        save_tensors({"weight": torch.zeros(200, 2**8)}, full / "weights.safetensors")
    assert may_pass(error.value) and error.value.filename == str(full / "weights.safetensors")


def test_what_may_pass() -> None:
    passing = [ConnectionError(), TimeoutError(), DiskFull("/store"), OSError(5, "EIO"), OSError(122, "EDQUOT")]
    lasting = [PermissionError(13, "EACCES"), FileNotFoundError(2, "ENOENT"), OSError("whatever"), OSError(27, "EFBIG")]
    assert [may_pass(error) for error in passing + lasting] == [True] * 5 + [False] * 4
