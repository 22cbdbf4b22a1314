from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.data.samples import Reject
from genpipe.data.shards import (
    INDEX_SCHEMA,
    INDEX_SUFFIX,
    REJECT_SCHEMA,
    ShardWriter,
    check_shard,
    read_index,
    rewrite_shard,
    split_of,
    write_rejects,
    write_statistics,
    write_table,
)


def write(folder: Path, sizes: list[int], **options: Any) -> ShardWriter:
    """A writer that has written images of these sizes, of arbitrary bytes."""
    limits = {"max_samples": 1000, "max_bytes": 2**30} | options
    with ShardWriter(folder, split="train", part=3, **limits) as writer:
        for number, size in enumerate(sizes):
            writer.write(
                f"key-{number}",
                group=f"group {number}",
                image=bytes([number % 256]) * size,
                format="jpeg",
                height=number + 1,
                width=2 * number + 1,
                captions=[f"caption {number}", "zweite: \u00fc"],
                caption_weights=[] if number % 2 else [0.25, 3.0],
                source="photos",
                meta={"number": number},
            )
    return writer


def add(writer: ShardWriter, key: str, image: bytes = b"x") -> None:
    writer.write(key, group="a", image=image, format="png", height=1, width=1, captions=["a"], meta={})


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_webdataset_reads_our_tars(tmp_path: Path) -> None:
    write(tmp_path, [1, 511, 512, 513, 100_000])
    samples = list(webdataset.WebDataset(str(tmp_path / "train-00003-00.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"key-{number}" for number in range(5)]
    assert [len(sample["jpg"]) for sample in samples] == [1, 511, 512, 513, 100_000]
    assert samples[2]["txt"].decode() == "caption 2"
    assert json.loads(samples[2]["json"]) == {
        "key": "key-2",
        "group": "group 2",
        "source": "photos",
        "captions": ["caption 2", "zweite: \u00fc"],
        "caption_weights": [0.25, 3.0],
        "meta": {"number": 2},
    }


def test_the_index_points_at_each_image(tmp_path: Path) -> None:
    write(tmp_path, [1, 511, 512, 513, 100_000])
    rows = pq.read_table(tmp_path / f"train-00003-00{INDEX_SUFFIX}").to_pylist()
    data = (tmp_path / "train-00003-00.tar").read_bytes()
    with tarfile.open(tmp_path / "train-00003-00.tar") as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith(".jpg")]
    assert [row["offset"] for row in rows] == offsets
    for number, row in enumerate(rows):
        assert data[row["offset"] : row["offset"] + row["length"]] == bytes([number]) * row["length"]
        assert row["captions"] == [f"caption {number}", "zweite: \u00fc"] and row["group"] == f"group {number}"
        assert (row["key"], row["format"], row["source"]) == (f"key-{number}", "jpeg", "photos")
        assert (row["height"], row["width"]) == (number + 1, 2 * number + 1)
        assert row["caption_weights"] == (None if number % 2 else [0.25, 3.0])
        assert row["sha256"] == hashlib.sha256(bytes([number]) * row["length"]).hexdigest()


def test_members_carry_no_owner_or_time_and_no_other_kind(tmp_path: Path) -> None:
    write(tmp_path, [10])
    with tarfile.open(tmp_path / "train-00003-00.tar") as tar:
        for member in tar:
            assert member.isreg() and (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [10, 600, 2000], max_samples=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 4


def test_rolls_over_by_samples(tmp_path: Path) -> None:
    writer = write(tmp_path, [1] * 7, max_samples=3)
    assert [(shard["name"], shard["samples"]) for shard in writer.shards] == [
        ("train-00003-00", 3),
        ("train-00003-01", 3),
        ("train-00003-02", 1),
    ]


def test_rolls_over_by_bytes(tmp_path: Path) -> None:
    writer = write(tmp_path, [40_000] * 5, max_bytes=100_000)
    assert [shard["samples"] for shard in writer.shards] == [2, 2, 1]
    for shard in writer.shards:
        assert shard["bytes"] == (tmp_path / f"{shard['name']}.tar").stat().st_size


def test_statistics(tmp_path: Path) -> None:
    writer = write(tmp_path, [10, 20, 30], max_samples=2)
    write_statistics(tmp_path, writer.shards)
    first, second = pq.read_table(tmp_path / "statistics.parquet").to_pylist()
    assert second == {
        "name": "train-00003-01",
        "split": "train",
        "samples": 1,
        "captions": 2,
        "caption_chars": len("caption 2") + len("zweite: ü"),
        "pixels": 3 * 5,
        "image_bytes": 30,
        "bytes": (tmp_path / "train-00003-01.tar").stat().st_size,
    }
    assert (first["samples"], first["pixels"], first["image_bytes"]) == (2, 1 * 1 + 2 * 3, 30)


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    assert [shard["samples"] for shard in write(tmp_path, [10, 50_000, 10], max_bytes=20_000).shards] == [
        1,
        1,
        1,
    ]


def test_an_error_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):  # noqa: SIM117
        with ShardWriter(tmp_path, split="heldout", part=0, max_samples=10, max_bytes=10**6) as writer:
            add(writer, "a")
            raise OSError("disk full")
    assert files(tmp_path) == {}


FULL_DISK = """
import resource, sys
from pathlib import Path
from genpipe.data.shards import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
with ShardWriter(Path(sys.argv[1]), split="train", part=0, max_samples=2, max_bytes=10**9) as writer:
    for number in range(3):
        image = bytes(20_000)
        writer.write(f"key{number}", group="", image=image, format="png", height=1, width=1, captions=["a"], meta={})
"""


@pytest.mark.parametrize("limit", [0, 1000, 30_000, 50_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, limit: int) -> None:
    """The limit falls at the first write, within a member, and at the end of the archive."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr
    assert files(tmp_path) == {}


def test_no_samples_no_shard(tmp_path: Path) -> None:
    assert write(tmp_path, []).shards == [] and files(tmp_path) == {}


@pytest.mark.parametrize("key", ["../up", "/root", "a.b", "a/b", ""])
def test_a_key_that_would_be_no_plain_member_is_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, split="train", part=0, max_samples=10, max_bytes=10**6) as writer:  # noqa: SIM117
        with pytest.raises(AssertionError):
            add(writer, key)


def test_reject_ledger(tmp_path: Path) -> None:
    write_rejects(tmp_path, [Reject("k", "k.jpg", "truncated", "half of it")], name="00007")
    write_rejects(tmp_path, [], name="00008")
    assert pq.read_table(tmp_path / "rejects-00007.parquet").to_pylist() == [
        {"key": "k", "source": "k.jpg", "reason": "truncated", "detail": "half of it"}
    ]
    assert pq.read_table(tmp_path / "rejects-00008.parquet").schema == REJECT_SCHEMA


@settings(deadline=None)
@given(group=st.text(), seed=st.integers(0, 5), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_heldout_fraction_only_adds_groups(group: str, seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    if split_of(group, heldout_fraction=low, seed=seed) == "heldout":
        assert split_of(group, heldout_fraction=high, seed=seed) == "heldout"
    assert split_of(group, heldout_fraction=0, seed=seed) == "train"
    assert split_of(group, heldout_fraction=1, seed=seed) == "heldout"


def test_the_heldout_fraction_is_met_and_seeds_differ() -> None:
    sides = [[split_of(str(n), heldout_fraction=0.1, seed=seed) for n in range(10_000)] for seed in (0, 1)]
    counts = [side.count("heldout") for side in sides]
    assert all(abs(count - 1000) < 4 * 30 for count in counts)  # binomial, four standard deviations
    both = sum(a == b == "heldout" for a, b in zip(*sides, strict=True))
    assert abs(both - 100) < 4 * 10


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_index(folder / f"{name}{INDEX_SUFFIX}").to_pylist()


def images(folder: Path, name: str) -> dict[str, bytes]:
    """What the index says of each image, out of the tar."""
    data = (folder / f"{name}.tar").read_bytes()
    return {row["key"]: data[row["offset"] : row["offset"] + row["length"]] for row in rows(folder, name)}


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=12), data=st.data())
def test_a_shard_written_anew_without_some_samples(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    old, out, straight = (tmp_path_factory.mktemp(name) for name in ("old", "out", "straight"))
    name = "train-00003-00"
    write(old, sizes)
    gone = data.draw(st.sets(st.sampled_from([f"key-{n}" for n in range(len(sizes))])))
    rewrite_shard(name, old, out, without=gone)
    before, after = rows(old, name), rows(out, name)
    assert [row | {"offset": 0} for row in after] == [row | {"offset": 0} for row in before if row["key"] not in gone]
    assert images(out, name) == {key: image for key, image in images(old, name).items() if key not in gone}
    assert list(check_shard(name, out)) == []
    with tarfile.open(out / f"{name}.tar") as tar:
        assert [member.name.split(".")[0] for member in tar][::3] == [row["key"] for row in after]
    rewrite_shard(name, old, straight, without=())
    assert files(straight) == files(old), "without anything to leave out, it is the same shard"


def test_what_no_index_names_leaves_with_the_next_writing(tmp_path: Path) -> None:
    name = "train-00003-00"
    write(tmp_path, [10, 20, 30])
    path = tmp_path / f"{name}{INDEX_SUFFIX}"
    write_table(pq.read_table(path).slice(1, 1), path)
    assert list(check_shard(name, tmp_path)) == [], "bytes that no index names are no fault"
    (tmp_path / "out").mkdir()
    rewrite_shard(name, tmp_path, tmp_path / "out", without=())
    with tarfile.open(tmp_path / "out" / f"{name}.tar") as tar:
        assert tar.getnames() == ["key-1.jpg", "key-1.txt", "key-1.json"]


def test_long_keys_keep_their_place(tmp_path: Path) -> None:
    """A name of more than 100 characters takes extra blocks in a tar."""
    keys = ["k" * 40, "x" * 150, "y" * 99]
    with ShardWriter(tmp_path, split="train", part=0, max_samples=10, max_bytes=10**6) as writer:
        for key in keys:
            add(writer, key, image=key.encode())
    assert images(tmp_path, "train-00000-00") == {key: key.encode() for key in keys}
    assert list(check_shard("train-00000-00", tmp_path)) == []
    samples = webdataset.WebDataset(str(tmp_path / "train-00000-00.tar"), shardshuffle=False)
    assert [sample["png"].decode() for sample in samples] == keys


def test_an_index_of_before_has_its_newer_columns_empty(tmp_path: Path) -> None:
    write(tmp_path, [10])
    path = tmp_path / f"train-00003-00{INDEX_SUFFIX}"
    before = ["key", "group", "captions", "offset", "length", "format"]
    write_table(pq.read_table(path, columns=before), path)
    table = read_index(path)
    assert table.schema == INDEX_SCHEMA
    assert {name for name in table.column_names if table[name].null_count} == set(table.column_names) - set(before)
    assert list(check_shard("train-00003-00", tmp_path)) == []


def moved(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"offset": row["offset"] + 512}


def longer(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"length": row["length"] + 1}


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"key": "key-9"}


def elsewhere(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"offset": -512, "length": 2**62}


def nowhere(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"offset": None}


def of_no_format(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"format": "jpog"}


def other_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"sha256": "0" * 64}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (moved, "key-1: no member of the tar begins at byte 4096, where the index has key-1.jpg"),
        (longer, "key-1: key-1.jpg has 20 bytes, the index says 21"),
        (renamed, "key-9: the tar has key-1.jpg where the index has key-9.jpg"),
        (elsewhere, "key-1: no member of the tar begins at byte -512, where the index has key-1.jpg"),
        (nowhere, "key-1: no member of the tar begins at byte None, where the index has key-1.jpg"),
        (of_no_format, "key-1: the tar has key-1.jpg where the index has key-1.jpog"),
        (other_bytes, "key-1: the bytes of key-1.jpg differ from the sha256 in the index"),
    ],
)
def test_an_index_that_disagrees_with_its_tar(tmp_path: Path, damage: Any, says: str) -> None:
    name = "train-00003-00"
    write(tmp_path, [10, 20, 30])
    table = rows(tmp_path, name)
    table[1] = damage(table[1])
    write_table(pa.Table.from_pylist(table, INDEX_SCHEMA), tmp_path / f"{name}{INDEX_SUFFIX}")
    assert list(check_shard(name, tmp_path)) == [f"{name}: {says}"]


def test_whatever_is_wrong_with_an_index_is_a_sentence(tmp_path: Path) -> None:
    name = "train-00003-00"
    write(tmp_path, [10, 20, 30])
    path = tmp_path / f"{name}{INDEX_SUFFIX}"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        assert all(fault.startswith(f"{name}: ") for fault in check_shard(name, tmp_path))


def test_a_tar_that_ends_early_or_is_gone(tmp_path: Path) -> None:
    name = "train-00003-00"
    write(tmp_path, [10, 2000, 30])
    tar = tmp_path / f"{name}.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    (fault,) = check_shard(name, tmp_path)
    assert fault.startswith(f"{name}: cannot be read: ")
    tar.unlink()
    (fault,) = check_shard(name, tmp_path)
    assert fault.startswith(f"{name}: cannot be read: [Errno 2] No such file or directory")
