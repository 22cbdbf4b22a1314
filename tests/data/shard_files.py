"""What the tests of sharding share: folders of pictures, and shards made and committed as a launcher does."""

from __future__ import annotations

import io
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from genpipe import artifacts
from genpipe.artifacts import Artifact, Manifest
from genpipe.data.shards import INDEX_SUFFIX, read_index
from genpipe.stages import shard
from genpipe.storage import open_storage


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 80)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def configured(folder: Path, **options: Any) -> shard.Config:
    settings = {
        "image_size": 32,
        "part_size": 12,
        "heldout_fraction": 0.2,
        "max_image_pixels": 10**6,
    } | options
    return shard.Config.model_validate({"source": {"kind": "folder", "path": str(folder)}, **settings})


def make(cfg: shard.Config, folder: Path | str) -> Manifest:
    """Every part by a worker of its own, in any order, then committed: what a launcher does."""
    uri = str(folder)
    parts = shard.parts(cfg, {})
    for part in random.Random(0).sample(parts, len(parts)):
        with tempfile.TemporaryDirectory() as out:
            artifacts.add_part(uri, part, Path(out), shard.Worker(cfg, {})(part, Path(out)))
    return commit(cfg, uri)


def commit(cfg: shard.Config, uri: str) -> Manifest:
    """Merge, finalize and commit the parts that lie at `uri`."""
    parts = shard.parts(cfg, {})
    done = artifacts.finished_parts(uri)
    with tempfile.TemporaryDirectory() as out:
        results = shard.merge_parts(cfg, {}, open_storage(uri), [done[part]["stats"] for part in parts], Path(out))
        meta, metrics = shard.finalize(cfg, {}, results, Path(out))
        identity = artifacts.identity("shard", version=shard.VERSION, settings={}, inputs={}, source=uri)
        target = Artifact(kind="shards", uri=uri, fingerprint=artifacts.fingerprint(identity), meta=meta)
        needs: dict[str, Any] = {"identity": identity, "config": {}, "inputs": {}, "metrics": metrics}
        artifacts.commit(target, folder=Path(out), parts=parts, **needs)
    return artifacts.verify(uri)


def ledger(folder: Path) -> list[dict[str, str]]:
    return [row for path in sorted(folder.glob("rejects-*.parquet")) for row in pq.read_table(path).to_pylist()]


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of all indexes by key."""
    rows = [row for path in sorted(folder.glob(f"*{INDEX_SUFFIX}")) for row in read_index(path).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def folder_of(tmp_path: Path, images: dict[str, bytes], captions: dict[str, str] | None = None) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in images.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(
            (captions or {}).get(name, f"a picture called {Path(name).stem}")
        )
    return folder


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth(seed: int, size: tuple[int, int] = (120, 80)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
