"""Arrays elsewhere; `test_features.py` holds that they are read as those in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_features import SHARDS, features

from genpipe.data.block_cache import BlockCache, RemoteFiles, Stored
from genpipe.data.features import FeatureDataset, write_features


def remote(folder: Path) -> RemoteFiles:
    stored = {
        path.relative_to(folder).as_posix(): Stored(path.stat().st_size, str(path)) for path in folder.rglob("*.npy")
    }
    return RemoteFiles(str(folder), stored, BlockCache(folder / "blocks", max_bytes=10**6, block_bytes=1000))


@pytest.mark.parametrize(("name", "captions"), [("latents", True), ("text_encodings", True), ("image_embeds", False)])
def test_arrays_that_are_unlike_those_of_other_shards_are_refused_before_anything_is_read(
    tmp_path: Path, name: str, captions: bool
) -> None:
    for shard, samples in SHARDS.items():
        arrays = {key: array for key, array in features(samples).items() if captions or key in ("keys", "image_embeds")}
        if shard == "train-00001-00":
            arrays[name] = np.zeros((*arrays[name].shape[:-1], 5), np.float16)
        write_features(tmp_path / shard, arrays)
    with pytest.raises(ValueError, match=f"train-00001-00(/{name}.npy holds other rows than float16|: by their sizes)"):
        FeatureDataset(remote(tmp_path), split="train")


def test_shards_of_another_length_are_as_long_as_they_are(tmp_path: Path) -> None:
    for shard, samples in SHARDS.items():
        write_features(tmp_path / shard, features(samples))
    dataset = FeatureDataset(remote(tmp_path), split="train")
    assert [len(dataset), dataset.keys[3:]] == [5, ["key-3", "key-4"]]
    with pytest.raises(ValueError, match="holds no heldout features"):
        FeatureDataset(remote(tmp_path), split="heldout")
