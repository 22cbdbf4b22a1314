"""Duplicates across the parts of a sharding, and where every sample ends up."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import commit, configured, encoded, folder_of, ledger, make, smooth, stored

from genpipe import artifacts
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import check_shard
from genpipe.stages import shard
from genpipe.storage import open_storage


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Twenty pictures and, in other parts, copies of some: the same bytes, and smaller ones at another quality."""
    originals = {f"a{n:02d}.jpg": encoded(smooth(n, (320, 240)), "JPEG", quality=92) for n in range(20)}
    same = {f"b{n:02d}.jpg": originals[f"a{n:02d}.jpg"] for n in range(0, 8)}
    near = {f"c{n:02d}.jpg": encoded(smooth(n, (200, 150)), "JPEG", quality=60) for n in range(4, 12)}
    return folder_of(tmp_path, originals | same | near)


@pytest.mark.parametrize("resize", [{"kind": "center_crop"}, {"kind": "keep"}, {"kind": "shorter_side"}])
def test_duplicates_across_parts(copies: Path, tmp_path: Path, resize: dict[str, Any]) -> None:
    options = {"resize": resize, "image_size": 64, "part_size": 5, "heldout_fraction": 0.2}
    both = {"exact_duplicates": True, "near_duplicates": 6}
    manifest = make(configured(copies, filters=both, **options), tmp_path / "out")
    rows = stored(tmp_path / "out")
    assert sorted(rows) == [f"a{n:02d}" for n in range(20)], "the first of each stays"
    found = {row["key"]: (row["reason"], row["detail"].split()[-1]) for row in ledger(tmp_path / "out")}
    assert found == {f"b{n:02d}": ("duplicate_image", f"a{n:02d}") for n in range(0, 8)} | {
        f"c{n:02d}": ("near_duplicate", f"a{n:02d}") for n in range(4, 12)
    }
    meta, metrics = manifest.artifact.meta, manifest.metrics
    assert meta["rejected"] == {"duplicate_image": 8, "near_duplicate": 8}
    assert metrics["samples_in"] == 36 and metrics["rejected"] == 16 and metrics["captions"] == 20
    statistics = pq.read_table(tmp_path / "out" / "statistics.parquet").to_pylist()
    assert sum(shard["samples"] for shard in statistics) == 20
    assert [shard["name"] for shard in statistics] == sorted(meta["shards"]["train"] + meta["shards"]["heldout"])
    for split in ("train", "heldout"):
        dataset = ShardDataset(tmp_path / "out", split=split)  # type: ignore[arg-type]
        assert len(dataset) == meta["samples"][split]
        assert dataset.shards() == meta["shards"][split], "parts of nothing but copies are not listed"
        assert all(dataset.captions(i) == [f"a picture called {dataset.key(i)}"] for i in range(len(dataset)))


def test_only_exact_duplicates(copies: Path, tmp_path: Path) -> None:
    make(configured(copies, filters={"exact_duplicates": True}, part_size=7), tmp_path / "out")
    assert sorted({row["key"][0] for row in ledger(tmp_path / "out")}) == ["b"]
    assert len(stored(tmp_path / "out")) == 28


def test_merging_again_after_a_cut_gives_the_same(copies: Path, tmp_path: Path, store_uri: str) -> None:
    """The driver died after it had put new indexes in place, before the manifest."""
    cfg = configured(copies, filters={"exact_duplicates": True, "near_duplicates": 6}, part_size=6, image_size=64)
    first = make(cfg, tmp_path / "straight")
    uri = store_uri
    parts = shard.parts(cfg, {})
    for part in parts:
        with tempfile.TemporaryDirectory() as out:
            artifacts.add_part(uri, part, Path(out), shard.Worker(cfg, {})(part, Path(out)))
    done = artifacts.finished_parts(uri)
    with tempfile.TemporaryDirectory() as out:
        shard.merge_parts(cfg, {}, open_storage(uri), [done[part]["stats"] for part in parts], Path(out))
        for path in sorted(Path(out).iterdir())[:3]:
            open_storage(uri).upload(path.name, path)
    second = commit(cfg, uri)
    assert second.files == first.files and second.metrics == first.metrics


pictures = st.lists(
    st.tuples(
        st.sampled_from(["good", "copy", "near", "truncated", "empty", "html", "small", "uncaptioned", "junk"]),
        st.integers(0, 3),
    ),
    min_size=4,
    max_size=16,
)


@settings(max_examples=15, deadline=None)
@given(kinds=pictures, part_size=st.integers(1, 6), kind=st.sampled_from(["center_crop", "keep", "buckets"]))
def test_every_sample_is_once_in_an_index_or_in_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, int]], part_size: int, kind: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    content = {
        "good": lambda n: encoded(smooth(100 + n), "JPEG"),
        "copy": lambda n: encoded(smooth(n % 4), "JPEG"),
        "near": lambda n: encoded(smooth(n % 4, (60, 40)), "JPEG"),
        "truncated": lambda n: encoded(smooth(n), "JPEG")[:900],
        "empty": lambda n: b"",
        "html": lambda n: b"<html>",
        "small": lambda n: encoded(smooth(n, (12, 8)), "PNG"),
        "uncaptioned": lambda n: encoded(smooth(200 + n), "JPEG"),
        "junk": lambda n: encoded(smooth(300 + n), "JPEG"),
    }
    images = {"first.jpg": encoded(smooth(998), "JPEG"), "second.jpg": encoded(smooth(999), "JPEG")}
    images |= {f"{n:02d}-{what}.jpg": content[what](4 * n + other) for n, (what, other) in enumerate(kinds)}
    folder = folder_of(tmp_path, images, {name: "IMG_0001" for name in images if "junk" in name})
    for path in folder.glob("*uncaptioned.txt"):
        path.unlink()
    filters = {"min_side": 20, "junk_captions": True, "exact_duplicates": True, "near_duplicates": 4}
    resize = {"kind": kind, **({"step": 8} if kind == "buckets" else {})}
    seed = next(s for s in range(100) if sides(s) == ("train", "heldout"))
    options = {"filters": filters, "part_size": part_size, "heldout_fraction": 0.5, "split_seed": seed}
    manifest = make(configured(folder, resize=resize, **options), tmp_path / "out")
    kept, lost = sorted(stored(tmp_path / "out")), sorted(row["key"] for row in ledger(tmp_path / "out"))
    assert sorted(kept + lost) == sorted(name.split(".")[0] for name in images)
    assert manifest.metrics["samples_in"] == len(images) == len(kept) + len(lost)
    for path in (tmp_path / "out").glob("*.tar"):
        assert list(check_shard(path.stem, path.parent)) == []


def sides(seed: int) -> tuple[str, ...]:
    """On which sides the two pictures that are always good fall: neither may be empty."""
    return tuple(shard.split_of(name, heldout_fraction=0.5, seed=seed) for name in ("first", "second"))
