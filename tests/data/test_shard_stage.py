from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from genpipe.data.images import decode
from genpipe.data.stream import ShardDataset
from genpipe.stages import shard


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 80)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty photographs with captions, and five files that cannot be used, each for its own reason."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        (folder / f"photo{number:02d}.jpg").write_bytes(jpeg(number))
        (folder / f"photo{number:02d}.txt").write_text(f"photo number {number}\nanother caption")
    for name, content in {
        "bad-empty": b"",
        "bad-html": b"<html>not found</html>",
        "bad-half": jpeg(99)[:800],
        "bad-uncaptioned": jpeg(98),
        "bad-bomb": jpeg(97),
    }.items():
        (folder / f"{name}.jpg").write_bytes(content)
        if name != "bad-uncaptioned":
            (folder / f"{name}.txt").write_text("caption")
    Image.new("1", (3000, 3000)).save(folder / "bad-bomb.jpg", "PNG")
    return folder


def configured(folder: Path, **options: Any) -> shard.Config:
    settings = {
        "image_size": 32,
        "part_size": 12,
        "heldout_fraction": 0.2,
        "max_image_pixels": 10**6,
    } | options
    return shard.Config.model_validate({"source": {"kind": "folder", "path": str(folder)}, **settings})


def run(cfg: shard.Config, out: Path) -> list[dict[str, Any]]:
    """Every part by a worker of its own, in any order, and the results as they come back as JSON."""
    out.mkdir()
    parts = shard.parts(cfg, {})
    results = {}
    for part in random.Random(0).sample(parts, len(parts)):
        results[part] = json.loads(json.dumps(shard.Worker(cfg, {})(part, out)))
    return [results[part] for part in parts]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_sample_is_in_a_shard_or_in_the_ledger(photos: Path, tmp_path: Path) -> None:
    cfg, out = configured(photos), tmp_path / "out"
    results = run(cfg, out)
    meta, metrics = shard.finish(cfg, {}, results, out)
    ledger = [row for path in sorted(out.glob("rejects-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {row["source"]: row["reason"] for row in ledger} == {
        "bad-bomb.jpg": "too_large",
        "bad-empty.jpg": "empty",
        "bad-half.jpg": "truncated",
        "bad-html.jpg": "not_an_image",
        "bad-uncaptioned.jpg": "no_caption",
    }
    assert metrics["samples_in"] == 35 and metrics["rejected"] == 5
    assert metrics["samples_train"] + metrics["samples_heldout"] == 30
    assert metrics["captions"] == 60 and metrics["rejected_too_large"] == 1
    assert meta["image_size"] == 32 and meta["rejected"]["truncated"] == 1
    for split in ("train", "heldout"):
        dataset = ShardDataset(out, split=split)  # type: ignore[arg-type]
        assert len(dataset) == meta["samples"][split] and dataset.shards() == meta["shards"][split]
        for i in range(len(dataset)):
            assert dataset.image(i).shape == (32, 32, 3)
            assert dataset.captions(i) == [f"photo number {int(dataset.key(i)[5:])}", "another caption"]


def test_stored_images_are_the_centre_of_the_originals(photos: Path, tmp_path: Path) -> None:
    run(configured(photos, format="png"), tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out", split="train")
    for i in range(len(dataset)):
        original = Image.open(photos / f"{dataset.key(i)}.jpg").crop((20, 0, 100, 80))
        reference = np.asarray(original.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(dataset.image(i) - reference)[4:-4, 4:-4].max() <= 1


@pytest.mark.parametrize("format, suffix", [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_any_webdataset_reader_opens_the_shards(photos: Path, tmp_path: Path, format: str, suffix: str) -> None:
    out = tmp_path / "out"
    run(configured(photos, format=format), out)
    urls = [str(path) for path in sorted(out.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    dataset = ShardDataset(out, split="train")
    assert [sample["__key__"] for sample in samples] == [dataset.key(i) for i in range(len(dataset))]
    for i, sample in enumerate(samples):
        assert np.abs(sample[suffix].astype(int) - dataset.image(i)).max() <= 4
        assert sample["txt"] == dataset.captions(i)[0] and sample["json"]["captions"] == dataset.captions(i)


def test_the_same_source_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(configured(photos), tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_parts_and_digest_follow_the_source(photos: Path) -> None:
    cfg = configured(photos)
    assert shard.parts(cfg, {}) == ["00000", "00001", "00002"]
    before = shard.external(cfg)
    (photos / "photo00.txt").write_text("changed caption of another length")
    assert shard.external(cfg) != before
    assert shard.agree(cfg, {}) == {"image_size": 32}


def test_groups_never_straddle_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append(json.dumps({"file_name": f"{number}.jpg", "text": "x", "group": f"subject {number % 8}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    run(configured(folder, heldout_fraction=0.4), tmp_path / "out")
    datasets = [ShardDataset(tmp_path / "out", split=split) for split in ("train", "heldout")]  # type: ignore[arg-type]
    train, heldout = ({dataset.group(i) for i in range(len(dataset))} for dataset in datasets)
    assert train and heldout and not train & heldout and len(train | heldout) == 8


def test_a_preview_of_the_first_part(photos: Path, tmp_path: Path) -> None:
    results = run(configured(photos), tmp_path / "out")
    written = results[0]["samples_in"] - sum(results[0]["rejected"].values())
    assert written == 7
    sheet = decode((tmp_path / "out" / "preview.png").read_bytes())
    assert sheet.shape == (2 + 34, 2 + 8 * 34, 3)


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(b"<html>")
        (folder / f"{name}.txt").write_text("caption")
    cfg = configured(folder)
    with pytest.raises(ValueError, match=r"none of the 2 samples is left to train on \(2 not_an_image; 0 held out\)"):
        shard.finish(cfg, {}, run(cfg, tmp_path / "out"), tmp_path / "out")


def test_an_empty_heldout_split_is_an_error(photos: Path, tmp_path: Path) -> None:
    cfg = configured(photos, heldout_fraction=1e-9)
    with pytest.raises(ValueError, match=r"heldout_fraction 1e-09 of 30 samples left nothing to validate on; raise"):
        shard.finish(cfg, {}, run(cfg, tmp_path / "a"), tmp_path / "a")


def test_large_parts_are_written_as_several_shards(photos: Path, tmp_path: Path) -> None:
    cfg = configured(photos, max_shard_bytes=20_000, part_size=100)
    results = run(cfg, tmp_path / "out")
    names = [entry["name"] for entry in results[0]["shards"] if entry["split"] == "train"]
    assert len(names) > 2 and names == [f"train-00000-{k:02d}" for k in range(len(names))]
