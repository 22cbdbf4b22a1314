"""What training stages read: images, or cached features, of both splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genpipe.artifacts import Artifact
from genpipe.data.features import FeatureDataset, open_features
from genpipe.data.image_batches import Crop, Images
from genpipe.data.loader import Batch, Data, SampleSet
from genpipe.data.order import caption_draws, normal, uniform
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import Split
from genpipe.lineage import check_made_from

_FLIP, _NOISE = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F  # keep their draws apart from others at the same position


def check_image_size(shard: Artifact, size: int, *, setting: str) -> None:
    """Raise ValueError if a stage's `setting` asks for larger images than the shards hold."""
    stored = shard.meta["image_size"]
    if size > stored:
        raise ValueError(
            f"{setting} {size} is larger than the shards' {stored} px; lower it or raise stages.shard.image_size"
        )


def check_buckets(shard: Artifact, *, multiple: int, setting: str) -> None:
    """Raise ValueError unless the sides of the shards' images are multiples of `multiple`, as far as is known yet."""
    resize = shard.meta.get("resize")
    if resize is not None and (resize["kind"] != "buckets" or resize["step"] % multiple):
        raise ValueError(
            f"{setting}: whole images must have sides that are multiples of {multiple} px; set stages.shard.resize to "
            f"{{kind: buckets, step: {multiple}}} (or a multiple of that), or {setting} to false"
        )


def image_data(
    shard: Artifact,
    *,
    size: int | None,
    crop: Crop = "center",
    seed: int = 0,
    labels: bool = False,
    condition: bool = False,
) -> Data:
    """Images without captions: `image_batches.Images`.

    They are squares of `size`, of training samples cut at `crop`; or whole as they are stored, where every batch has
    images of one size, if `size` is None. With `labels` and `condition` batches have class labels and conditioning
    images too. Raises ValueError for shards that do not have what is asked for.
    """
    if labels and not shard.meta.get("classes"):
        raise ValueError(f"{shard.uri}: its samples have no class labels; give shards of a source that has some")

    def split(name: Split, crop: Crop) -> SampleSet:
        dataset = open_shards(shard, split=name)
        if condition and not dataset.has_conditions:
            raise ValueError(f"{shard.uri}: not all {name} samples have a conditioning image; shard a source that has")
        images = Images(dataset, size, crop, seed, labels=labels, condition=condition)
        return SampleSet(len(dataset), images, dataset.sources(), () if size else _buckets(dataset))

    return Data(train=split("train", crop), heldout=split("heldout", "center"))


def _buckets(dataset: ShardDataset) -> tuple[np.ndarray, ...]:
    """The samples of each stored size. Raises ValueError where an index does not say what that is."""
    sizes = dataset.sizes()
    unknown = sizes.get((0, 0))
    if unknown is not None:
        raise ValueError(f"{dataset.folder}: no size is known of {dataset.key(int(unknown[0]))}; shard again")
    return tuple(sizes.values())


@dataclass(frozen=True)
class Cached:
    """Collates those of `arrays` (latents, image_embeds) that the cache has, one caption's text, and labels.

    `FeatureDataset.text` says what the text is; `labels` are int64 [B], -1 for a sample without one.

    Training takes caption, mirror image and the latents' noise by the position in the stream and `seed`; held-out
    samples take their first caption, the image as it is, and the mean.
    """

    dataset: FeatureDataset
    arrays: tuple[str, ...]
    seed: int
    training: bool

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        """The batch of these samples, which stand at `positions` of the stream: int64 [B] each."""
        draws = caption_draws(positions, seed=self.seed) if self.training else np.zeros(len(indices))
        there = [name for name in self.arrays if name in self.dataset.arrays]
        batch = {name: self._array(name, indices, positions) for name in there} | self.dataset.text(indices, draws)
        if "labels" in self.dataset.arrays:
            batch["labels"] = self.dataset.labels(indices)
        return batch

    def _array(self, name: str, indices: np.ndarray, positions: np.ndarray) -> Tensor:
        variants = np.zeros(len(indices), np.int64)
        if self.training:
            variants = (uniform(positions, seed=self.seed, salt=_FLIP) * self.dataset.variants).astype(np.int64)
        if name == "image_embeds":
            return self.dataset.image_embeds(indices, variants=variants)
        if not (self.training and self.dataset.has_spread):
            return self.dataset.latents(indices, variants=variants)
        noise = normal(positions, shape=self.dataset.latent_shape, seed=self.seed, salt=_NOISE)
        return self.dataset.latent_samples(indices, noise=noise, variants=variants)


def cached_data(inputs: Mapping[str, Artifact], *, arrays: tuple[str, ...], seed: int) -> Data:
    """The features among `inputs` as a stage trains on them: `Cached`, with these `arrays` of images.

    Raises ValueError if they were made from another content than other inputs have.
    """
    check_made_from(inputs)
    features = inputs["features"]

    def split(name: Split) -> SampleSet:
        dataset = open_features(features, split=name)
        sources = {source: range(*span) for source, span in features.meta["sources"][name].items()}
        return SampleSet(len(dataset), Cached(dataset, arrays, seed, training=name == "train"), sources)

    return Data(train=split("train"), heldout=split("heldout"))


def example_features(inputs: Mapping[str, Artifact], *, arrays: tuple[str, ...], batch_size: int) -> Batch:
    """Zeros in the shapes of a batch of `cached_data` whose longest caption fills the context."""
    meta = inputs["features"].meta
    shapes: dict[str, tuple[int, ...]] = {}
    if "latent_size" in meta and "latents" in arrays:
        shapes["latents"] = (batch_size, meta["latent_channels"], meta["latent_size"], meta["latent_size"])
    if "embed_dim" in meta:
        images = ["image_embeds"] if "image_embeds" in arrays else []
        shapes |= dict.fromkeys([*images, "text_embeds"], (batch_size, meta["embed_dim"]))
    batch: Batch = {}
    if "text_width" in meta:
        tokens = batch_size * meta["context_length"]
        shapes["text_encodings"] = (tokens, meta["text_width"])
        batch["text_places"] = torch.arange(tokens).view(batch_size, -1)
    if meta.get("classes"):
        batch["labels"] = torch.zeros(batch_size, dtype=torch.int64)
    return batch | {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
