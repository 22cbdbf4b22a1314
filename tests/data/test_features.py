from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.data.features import TEXT_ARRAYS, FeatureDataset, open_features, write_features, write_null_text
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import ShardWriter

CAPTIONS = (1, 3, 2, 1, 4)  # of samples 0 to 4; samples 0-2 in the first shard, 3-4 in the second
SHARDS = {"train-00000-00": range(3), "train-00001-00": range(3, 5)}


def features(samples: range, *, dtype: type = np.float16, variants: int = 1) -> dict[str, np.ndarray]:
    """Arrays whose values say whose they are: sample + 100 x variant, and 10 x sample + caption."""
    images = np.array(samples, dtype)[:, None] + 100 * np.arange(variants, dtype=dtype)
    labels = np.array([10 * i + caption for i in samples for caption in range(CAPTIONS[i])], dtype)
    lengths = [tokens_of(label) for label in labels.astype(int).tolist()]
    return {
        "keys": np.array([f"key-{i}" for i in samples]),
        "latents": images[:, :, None, None, None] + np.zeros((1, 1, 2, 4, 4), dtype),
        "image_embeds": images[:, :, None] + np.zeros((1, 1, 6), dtype),
        "caption_offsets": np.cumsum([0, *(CAPTIONS[i] for i in samples)]),
        "text_embeds": labels[:, None] + np.zeros((1, 6), dtype),
        "text_encodings": np.repeat(labels, lengths)[:, None] + np.zeros((1, 7), dtype),
        "token_offsets": np.cumsum([0, *lengths]),
    }


def tokens_of(label: int) -> int:
    """How many tokens the caption 10 x sample + caption has."""
    return 2 + label % 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, samples in SHARDS.items():
        write_features(tmp_path / "features" / name, features(samples))
    return tmp_path / "features"


def write_shards(
    folder: Path, *, captions: tuple[int, ...] = CAPTIONS, prefix: str = "key", only: int = len(SHARDS)
) -> ShardDataset:
    folder.mkdir(exist_ok=True)
    for part, samples in enumerate(list(SHARDS.values())[:only]):
        with ShardWriter(folder, split="train", part=part, max_samples=9, max_bytes=10**6) as writer:
            for i in samples:
                names = [f"{i}.{n}" for n in range(captions[i])]
                writer.write(
                    f"{prefix}-{i}", group="g", image=b"x", format="png", height=1, width=1, captions=names, meta={}
                )
    return ShardDataset(folder, split="train")


def test_batches_cross_shards_in_the_asked_order(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    indices = np.array([4, 0, 3, 3, 2])
    assert len(dataset) == 5 and dataset.keys == [f"key-{i}" for i in range(5)]
    latents = dataset.latents(indices)
    assert latents.shape == (5, 2, 4, 4) and latents.dtype == torch.float16
    assert latents[:, 0, 0, 0].tolist() == indices.tolist()
    assert dataset.image_embeds(indices)[:, 5].tolist() == indices.tolist()
    assert dataset.variants == 1 and dataset.latent_shape == (2, 4, 4) and not dataset.has_spread


def test_text_takes_the_chosen_caption(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    indices, draws = np.array([4, 1, 1, 0, 4]), np.array([0.75, 0.7, 0.1, 0.99, 0.49])
    expected = [10 * i + c for i, c in zip(indices.tolist(), (3, 2, 0, 0, 1), strict=True)]
    text = dataset.text(indices, draws)
    assert set(text) == {"text_embeds", "text_encodings", "text_places"}
    assert text["text_embeds"].shape == (5, 6) and text["text_embeds"][:, 0].tolist() == expected
    check_tokens(text, expected)


def check_tokens(text: dict[str, torch.Tensor], labels: list[int]) -> None:
    """Every caption has its own tokens, in their order, and no others."""
    encodings, places = text["text_encodings"], text["text_places"]
    assert places.shape == (len(labels), max(map(tokens_of, labels))) and places.dtype == torch.int64
    for label, row in zip(labels, places.tolist(), strict=True):
        count = tokens_of(label)
        assert row[count:] == [-1] * (len(row) - count)
        assert row[:count] == list(range(row[0], row[0] + count))
        assert encodings[row[:count]].eq(label).all()
    assert len(encodings) == sum(map(tokens_of, labels))


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
    before = features(SHARDS["train-00000-00"]) | {"rows": np.arange(3)}
    write_features(folder / "train-00000-00", before)
    write_features(folder / "train-00000-00", arrays)
    assert sorted(path.name for path in folder.iterdir()) == sorted(SHARDS)
    assert not (folder / "train-00000-00" / "rows.npy").exists()
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
        good | {"caption_weights": good["text_embeds"][:-1, 0]},
        good | {"text_encodings": good["text_encodings"][:-1]},
        good | {"token_offsets": good["token_offsets"][1:]},
        {"keys": good["keys"]},
        {name: array for name, array in good.items() if name != "caption_offsets"},
        {name: array for name, array in good.items() if name != "token_offsets"},
        {"keys": good["keys"], "latent_logvars": good["latents"]},
        good | {"labels": np.zeros(2, np.int32)},
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


@settings(max_examples=40, deadline=None)
@given(indices=st.lists(st.integers(0, 4), min_size=1, max_size=30), data=st.data())
def test_any_batch_holds_its_own_rows(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], data: st.DataObject
) -> None:
    """Several times the same sample, any order, either variant, any caption."""
    folder = tmp_path_factory.getbasetemp() / "any-batch"
    if not folder.exists():
        for name, samples in SHARDS.items():
            write_features(folder / name, features(samples, variants=2))
    each = {"min_size": len(indices), "max_size": len(indices)}
    variants = np.array(data.draw(st.lists(st.integers(0, 1), **each)))  # type: ignore[arg-type]
    draws = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), **each)))  # type: ignore[arg-type]
    dataset = FeatureDataset(folder, split="train")
    expected = np.array(indices) + 100 * variants
    assert dataset.latents(np.array(indices), variants=variants)[:, 1, 2, 3].tolist() == expected.tolist()
    assert dataset.image_embeds(np.array(indices), variants=variants)[:, 5].tolist() == expected.tolist()
    captions = [10 * i + int(draw * CAPTIONS[i]) for i, draw in zip(indices, draws, strict=True)]
    text = dataset.text(np.array(indices), draws)
    assert text["text_embeds"][:, 0].tolist() == captions
    check_tokens(text, captions)


def test_what_is_not_cached_is_not_given(tmp_path: Path) -> None:
    """Labels alone with latents; pooled embeddings alone of the text."""
    every = features(range(3)) | {"labels": np.array([1, -1, 0], np.int32)}
    some = {"keys", "latents", "labels", "caption_offsets", "text_embeds"}
    write_features(tmp_path / "train-00000-00", {name: every[name] for name in some})
    dataset = FeatureDataset(tmp_path, split="train")
    assert dataset.arrays == some and dataset.variants == 1
    assert dataset.labels(np.array([2, 0, 1])).tolist() == [0, 1, -1]
    assert dataset.text(np.array([1]), np.array([0.0]))["text_embeds"][0, 0] == 10
    assert dataset.text(np.array([1]), np.array([0.0])).keys() == {"text_embeds"}
    write_features(tmp_path / "heldout-00000-00", {name: every[name] for name in ("keys", "latents")})
    assert FeatureDataset(tmp_path, split="heldout").text(np.array([1]), np.array([0.0])) == {}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_chunks_are_all_pooled_embeddings_in_order(tmp_path: Path, size: int) -> None:
    """Of first captions, and of images as they are; another row stands for a damaged one here, too."""
    for name, samples in SHARDS.items():
        write_features(tmp_path / name, features(samples, variants=2))
    write_features(tmp_path / "train-00001-00", features(range(3, 5), variants=2) | {"rows": np.array([1, 1])})
    dataset = FeatureDataset(tmp_path, split="train")
    for pooled, expected in (("text_embeds", [0, 10, 20, 40, 40]), ("image_embeds", [0, 1, 2, 4, 4])):
        chunks = list(dataset.chunks(pooled, size=size))  # type: ignore[arg-type]
        assert all(len(chunk) <= size and chunk.shape[1:] == (6,) for chunk in chunks)
        assert torch.cat(chunks)[:, 3].tolist() == expected
        assert torch.equal(torch.cat(chunks), getattr(dataset, pooled)(np.arange(5)))


def test_captions_by_their_weights(tmp_path: Path) -> None:
    arrays = features(range(3)) | {"caption_weights": np.array([1, 7, 2, 1, 0.5, 2])}
    write_features(tmp_path / "train-00000-00", arrays)
    draws = np.array([0.69, 0.7, 0.899, 0.95, 0.19, 0.2, 0.999])
    text = FeatureDataset(tmp_path, split="train").text(np.array([1, 1, 1, 1, 2, 2, 0]), draws)
    assert text["text_embeds"][:, 0].tolist() == [10, 11, 11, 12, 20, 21, 0]


def test_samples_of_the_latents(tmp_path: Path) -> None:
    """mean + exp(logvar / 2) noise, by numpy."""
    arrays = features(range(3), dtype=np.float32)
    arrays["latent_logvars"] = np.random.default_rng(0).normal(size=arrays["latents"].shape).astype(np.float32)
    write_features(tmp_path / "train-00000-00", arrays)
    dataset = FeatureDataset(tmp_path, split="train")
    indices, noise = np.array([2, 0]), np.random.default_rng(1).normal(size=(2, 2, 4, 4)).astype(np.float32)
    expected = arrays["latents"][indices, 0] + np.exp(arrays["latent_logvars"][indices, 0] / 2) * noise
    assert dataset.has_spread
    np.testing.assert_allclose(dataset.latent_samples(indices, noise=noise).numpy(), expected, rtol=1e-6)
    assert torch.equal(dataset.latents(indices), torch.from_numpy(arrays["latents"][indices, 0]))


def test_another_row_stands_for_a_damaged_one(tmp_path: Path) -> None:
    """Its image and its captions; what the damaged row itself holds is never seen."""
    arrays = features(range(3)) | {"rows": np.array([0, 2, 2])}
    write_features(tmp_path / "train-00000-00", arrays)
    dataset = FeatureDataset(tmp_path, split="train")
    assert dataset.latents(np.array([1, 0]))[:, 0, 0, 0].tolist() == [2, 0]
    assert dataset.text(np.array([1]), np.array([0.6]))["text_embeds"][0, 0] == 21
    dataset.verify_alignment(write_shards(tmp_path / "shards", only=1))


def test_the_empty_captions_text_is_kept_once(folder: Path) -> None:
    arrays = features(range(1))
    null = {name: arrays[name] for name in ("text_embeds", "text_encodings", "token_offsets")}
    write_null_text(folder, null)
    text = FeatureDataset(folder, split="train").null_text()
    assert text["text_embeds"].tolist() == null["text_embeds"].tolist()
    assert text["text_encodings"].tolist() == null["text_encodings"].tolist()
    assert text["text_places"].tolist() == [list(range(tokens_of(0)))]
    assert len(FeatureDataset(folder, split="train").shards()) == 2


def test_a_pickled_cache_is_its_folder(folder: Path) -> None:
    dataset = FeatureDataset(folder, split="train")
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).latents(np.array([4, 1])), dataset.latents(np.array([4, 1])))


def test_shards_of_another_dtype_are_named(folder: Path) -> None:
    write_features(folder / "train-00001-00", features(SHARDS["train-00001-00"], dtype=np.float32))
    dataset = FeatureDataset(folder, split="train")
    assert dataset.latents(np.array([0, 2])).dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"train-00001-00/latents.npy holds .*float32.*, other shards .*float16.*again"
    ):
        dataset.latents(np.array([0, 4]))


def test_shards_with_another_number_of_variants_are_named(folder: Path) -> None:
    write_features(folder / "train-00001-00", features(SHARDS["train-00001-00"], variants=2))
    with pytest.raises(ValueError, match=r"train-00001-00/latents.npy holds .*\(2, 2, 4, 4\).*\(1, 2, 4, 4\); cache"):
        FeatureDataset(folder, split="train").latents(np.array([0, 4]))


def commit(folder: Path, uri: str) -> Artifact:
    identity = artifacts.identity("features", version=1, settings={}, inputs={})
    made = Artifact(kind="features", uri=uri, fingerprint=artifacts.fingerprint(identity))
    return artifacts.commit(made, folder=folder, identity=identity, config={}, inputs={}, metrics={})


def everything(samples: range) -> dict[str, np.ndarray]:
    """All arrays that there are but `rows`, of random numbers."""
    random = np.random.default_rng(samples.start)
    arrays = features(samples, variants=2)
    captions = int(arrays["caption_offsets"][-1])
    numbers = {
        name: random.normal(size=array.shape).astype(array.dtype)
        for name, array in arrays.items()
        if array.dtype.kind == "f"
    }
    return arrays | numbers | {
        "latent_logvars": random.normal(size=arrays["latents"].shape).astype(np.float16),
        "caption_weights": random.random(captions).astype(np.float32),
        "labels": random.integers(-1, 5, len(samples)).astype(np.int32),
    }  # fmt: skip


def test_features_are_read_where_they_are(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under S3 piece by piece, and to the bit as from a folder."""
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    first, second = (everything(samples) for samples in SHARDS.values())
    del second["caption_weights"]
    write_features(tmp_path / "made" / "train-00000-00", first)
    write_features(tmp_path / "made" / "train-00001-00", second | {"rows": np.array([1, 1], np.int32)})
    write_null_text(tmp_path / "made", {name: features(range(1))[name] for name in TEXT_ARRAYS})
    here = FeatureDataset(tmp_path / "made", split="train")
    artifact = commit(tmp_path / "made", f"s3://genpipe/{tmp_path.name}")
    there = open_features(artifact, split="train")
    for dataset in (there, pickle.loads(pickle.dumps(there))):
        for seed in range(5):
            random = np.random.default_rng(seed)
            indices, variants = random.integers(0, 5, 7), random.integers(0, 2, 7)
            noise = random.normal(size=(7, *here.latent_shape)).astype(np.float32)
            same(dataset.latents(indices, variants=variants), here.latents(indices, variants=variants))
            same(dataset.image_embeds(indices, variants=variants), here.image_embeds(indices, variants=variants))
            same(*(each.latent_samples(indices, noise=noise, variants=variants) for each in (dataset, here)))
            same(dataset.labels(indices), here.labels(indices))
            draws = random.random(7)
            mine, own = dataset.text(indices, draws), here.text(indices, draws)
            assert mine.keys() == own.keys()
            for name, array in mine.items():
                same(array, own[name])
        for name in ("text_embeds", "image_embeds"):
            same(*(torch.cat(list(each.chunks(name, size=2))) for each in (dataset, here)))
        assert len(dataset) == 5 and dataset.keys == here.keys and dataset.shards() == here.shards()
        assert (dataset.variants, dataset.latent_shape, dataset.arrays) == (2, (2, 4, 4), here.arrays)
        for name, array in dataset.null_text().items():
            same(array, here.null_text()[name])
    assert not list((tmp_path / "cache").rglob("*.npy")), "no file was copied whole"
    assert artifacts.fetch(artifact) == open_features(artifact, split="train").source, (
        "a copy is used where there is one"
    )


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype and torch.equal(one, other)
