from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.data.samples import Reject
from genpipe.data.shards import INDEX_SUFFIX, REJECT_SCHEMA, ShardWriter, split_of, write_rejects


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
                captions=[f"caption {number}", "zweite: \u00fc"],
                meta={"number": number},
            )
    return writer


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
        "captions": ["caption 2", "zweite: \u00fc"],
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
        assert (row["key"], row["format"]) == (f"key-{number}", "jpeg")


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


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    assert [shard["samples"] for shard in write(tmp_path, [10, 50_000, 10], max_bytes=20_000).shards] == [
        1,
        1,
        1,
    ]


def test_an_error_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):  # noqa: SIM117
        with ShardWriter(tmp_path, split="heldout", part=0, max_samples=10, max_bytes=10**6) as writer:
            writer.write("a", group="a", image=b"x", format="png", captions=["a"], meta={})
            raise OSError("disk full")
    assert files(tmp_path) == {}


def test_no_samples_no_shard(tmp_path: Path) -> None:
    assert write(tmp_path, []).shards == [] and files(tmp_path) == {}


@pytest.mark.parametrize("key", ["../up", "/root", "a.b", "a/b", ""])
def test_a_key_that_would_be_no_plain_member_is_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, split="train", part=0, max_samples=10, max_bytes=10**6) as writer:  # noqa: SIM117
        with pytest.raises(AssertionError):
            writer.write(key, group="a", image=b"x", format="png", captions=["a"], meta={})


def test_reject_ledger(tmp_path: Path) -> None:
    write_rejects(tmp_path, [Reject("k", "k.jpg", "truncated", "half of it")], part=7)
    write_rejects(tmp_path, [], part=8)
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
