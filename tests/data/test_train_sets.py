from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genpipe.artifacts import Artifact
from genpipe.data.images import encode
from genpipe.data.loader import Batches, sample_batches, training_order
from genpipe.data.shards import SPLITS, ShardWriter
from genpipe.data.train_sets import check_image_size, image_data

SIZES = [(8, 12), (12, 8), (8, 12), (8, 8), (12, 8), (8, 12), (8, 12)]


def shard(folder: Path, *, labels: bool = True) -> Artifact:
    """In each split images of three sizes, whose color is their number."""
    for split in SPLITS:
        with ShardWriter(folder, split=split, part=0, max_samples=4, max_bytes=10**6) as writer:
            for number, (height, width) in enumerate(SIZES):
                image = np.full((height, width, 3), 30 * number, np.uint8)
                writer.write(
                    f"{split}-{number}",
                    group="g",
                    image=encode(image, format="png"),
                    format="png",
                    height=height,
                    width=width,
                    captions=["c"],
                    label=number % 2 if labels else -1,
                    meta={},
                )
    classes = ["even", "odd"] if labels else []
    return Artifact(kind="shards", uri=str(folder), fingerprint="0" * 64, meta={"image_size": 8, "classes": classes})


def test_whole_images_reach_training_in_batches_of_one_size(tmp_path: Path) -> None:
    """Every sample comes once an epoch, with its own label."""
    data = image_data(shard(tmp_path), size=None, labels=True)
    order = training_order(data, weights={}, seed=0, run=2)
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1, "start": 0}
    stream = Batches(data.train.collate, order=order, prefetch=1, **sizes)
    numbers = []
    for _, (_, batch) in zip(range(7), stream, strict=False):  # two epochs, which leave nothing over
        colors, labels = batch["images"][:, 0, 0, 0] // 30, batch["labels"]
        assert batch["images"].shape[2:] == SIZES[int(colors[0])] and torch.equal(labels, colors % 2)
        numbers += colors.tolist()
    assert np.bincount(numbers).tolist() == [2] * 7
    held = list(sample_batches(data.heldout, count=99, batch_size=3, weights={}))
    assert sorted(tuple(batch["images"].shape) for batch in held) == [
        (1, 3, 8, 8),
        (1, 3, 8, 12),
        (2, 3, 12, 8),
        (3, 3, 8, 12),
    ]


def test_squares_of_images_of_several_sizes(tmp_path: Path) -> None:
    data = image_data(shard(tmp_path), size=8)
    batch = data.train.collate(np.arange(7), np.arange(7))
    assert set(batch) == {"images"} and batch["images"].shape == (7, 3, 8, 8) and data.train.buckets == ()


def test_what_the_shards_lack_is_refused(tmp_path: Path) -> None:
    plain = shard(tmp_path, labels=False)
    with pytest.raises(ValueError, match="no class labels"):
        image_data(plain, size=8, labels=True)
    with pytest.raises(ValueError, match="not all train samples have a conditioning image"):
        image_data(plain, size=8, condition=True)
    with pytest.raises(ValueError, match=r"image_size 16 .* 8 px; lower it or raise stages.shard.image_size"):
        check_image_size(plain, 16, setting="image_size")
