from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genpipe.data.features import FeatureDataset, write_features
from genpipe.data.shards import ShardWriter
from genpipe.data.stream import ShardDataset

CAPTIONS = (1, 3, 2, 1, 4)  # of samples 0 to 4; samples 0-2 in the first shard, 3-4 in the second
SHARDS = {"train-00000-00": range(3), "train-00001-00": range(3, 5)}


def features(samples: range, *, dtype: type = np.float16) -> dict[str, np.ndarray]:
    """Arrays whose values say whose they are: 10 x sample + caption."""
    labels = np.array([10 * i + caption for i in samples for caption in range(CAPTIONS[i])], dtype)
    tokens = labels.astype(np.int32)
    return {
        "keys": np.array([f"key-{i}" for i in samples]),
        "latents": np.array(samples, dtype)[:, None, None, None] + np.zeros((1, 2, 4, 4), dtype),
        "image_embeds": np.array(samples, dtype)[:, None] + np.zeros((1, 6), dtype),
        "caption_offsets": np.cumsum([0, *(CAPTIONS[i] for i in samples)]),
        "text_embeds": labels[:, None] + np.zeros((1, 6), dtype),
        "text_tokens": tokens[:, None] + np.zeros((1, 5), np.int32),
        "text_encodings": labels[:, None, None] + np.zeros((1, 5, 7), dtype),
        "text_lengths": tokens,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, samples in SHARDS.items():
        write_features(tmp_path / "features" / name, features(samples))
    return tmp_path / "features"


def write_shards(folder: Path, *, captions: tuple[int, ...] = CAPTIONS, prefix: str = "key") -> ShardDataset:
    folder.mkdir(exist_ok=True)
    for part, samples in enumerate(SHARDS.values()):
        with ShardWriter(folder, split="train", part=part, max_samples=9, max_bytes=10**6) as writer:
            for i in samples:
                names = [f"{i}.{n}" for n in range(captions[i])]
                writer.write(f"{prefix}-{i}", group="g", image=b"x", format="png", captions=names, meta={})
    return ShardDataset(folder, split="train")


def test_batches_cross_shards_in_the_asked_order(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    indices = np.array([4, 0, 3, 3, 2])
    assert len(dataset) == 5 and dataset.keys == [f"key-{i}" for i in range(5)]
    latents = dataset.latents(indices)
    assert latents.shape == (5, 2, 4, 4) and latents.dtype == torch.float16
    assert latents[:, 0, 0, 0].tolist() == indices.tolist()
    assert dataset.image_embeds(indices)[:, 5].tolist() == indices.tolist()
    assert dataset.caption_counts(indices).tolist() == [4, 1, 1, 1, 2]


def test_text_takes_the_chosen_caption(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    indices, choice = np.array([4, 1, 1, 0, 4]), np.array([3, 2, 3, 7, 2**62 + 1])
    expected = [10 * i + c % CAPTIONS[i] for i, c in zip(indices.tolist(), choice.tolist(), strict=True)]
    text = dataset.text(indices, choice)
    assert set(text) == {"text_embeds", "text_encodings", "text_lengths", "text_tokens"}
    assert text["text_encodings"].shape == (5, 5, 7) and text["text_embeds"].shape == (5, 6)
    assert all(values.reshape(5, -1)[:, 0].tolist() == expected for values in text.values())


def test_reading_leaves_the_cache_untouched(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    dataset.latents(np.array([0])).fill_(99)
    assert dataset.latents(np.array([0]))[0, 0, 0, 0] == 0


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_beyond_the_end(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        FeatureDataset(folder, split="train").latents(np.array([0, index]))


def test_writing_again_replaces_and_leaves_no_rest(folder: Path) -> None:
    arrays = features(SHARDS["train-00000-00"], dtype=np.float32)
    arrays.pop("text_tokens")
    write_features(folder / "train-00000-00", arrays)
    assert sorted(path.name for path in folder.iterdir()) == sorted(SHARDS)
    assert not (folder / "train-00000-00" / "text_tokens.npy").exists()
    for file in folder.rglob("*.npy"):
        np.load(file, allow_pickle=False)


def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    good = features(range(3))
    bad = [
        good | {"latents": good["latents"][:2]},
        good | {"text_embeds": good["text_embeds"][:2]},
        good | {"caption_offsets": good["caption_offsets"][:-1]},
        good | {"keys": good["keys"].astype(object)},
        good | {"extra": good["latents"]},
        {name: array for name, array in good.items() if name != "latents"},
    ]
    for arrays in bad:
        with pytest.raises(AssertionError):
            write_features(tmp_path / "train-00000-00", arrays)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no train features"):
        FeatureDataset(tmp_path, split="train")


def test_alignment_with_the_shards(folder: Path, tmp_path: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    dataset.verify_alignment(write_shards(tmp_path / "same"))
    with pytest.raises(ValueError, match=r"train-00000-00 holds other samples than .*; cache again"):
        dataset.verify_alignment(write_shards(tmp_path / "keys", prefix="other"))
    with pytest.raises(ValueError, match=r"train-00001-00 holds other samples"):
        dataset.verify_alignment(write_shards(tmp_path / "captions", captions=(1, 3, 2, 1, 1)))
    (tmp_path / "same" / "train-00001-00.index.parquet").unlink()
    with pytest.raises(ValueError, match="other shards; cache again"):
        dataset.verify_alignment(ShardDataset(tmp_path / "same", split="train"))
