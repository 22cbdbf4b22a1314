"""Cache what the frozen encoders say of every sample: latents, image and text embeddings, text encodings.

Shape legend: B samples, C H W of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import StageConfig
from genpipe.data.features import NULL_TEXT, write_features, write_null_text
from genpipe.data.image_batches import read_images, to_float
from genpipe.data.prefetch import prefetched
from genpipe.data.samples import Reject
from genpipe.data.shard_dataset import ShardDataset, collect_damaged, open_shards
from genpipe.data.shards import REJECT_SCHEMA, SPLITS, Split, write_table
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation.conditions import TOKENIZER_FILE, latent_statistics
from genpipe.lineage import check_lineage, content_digest
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.weights import load_weights

VERSION = 4
MAKES = "features"
HEADLINES = ("samples",)

COPIED = (
    "latent_channels", "latent_size", "latent_mean", "latent_std",
    "embed_dim", "text_width", "context_length", "image_embed_mean", "image_embed_std", "tokenizer",
)  # fmt: skip
BAD_SAMPLES = "bad_samples.parquet"


class Config(StageConfig):
    batch_size: int = Field(64, ge=1, description="images, or captions, of one forward pass")
    dtype: Literal["float16", "float32"] = "float16"
    precision: Precision = Field("auto", description="of the encoders' products")
    latent_samples: bool = Field(
        False, description="cache the latents' variances too, and train on samples instead of means"
    )
    flip: bool = Field(False, description="cache mirror images too; training takes either, by its place in the stream")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of damaged images that is put up with")


def roles(cfg: Config) -> dict[str, Role]:
    return {"shard": Role("shards", "samples"), "autoencoder": Role("autoencoder"), "clip": Role("clip")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_lineage(inputs)
    merged = {**inputs["autoencoder"].meta, **inputs["clip"].meta}
    return {
        **{name: merged[name] for name in COPIED if name in merged},
        **{name: artifact.fingerprint for name, artifact in inputs.items()},
    }


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The shards of both splits, and the text that stands for no caption."""
    shards = [name for split in SPLITS for name in open_shards(inputs["shard"], split=split).shards()]
    return [*shards, NULL_TEXT]


class Chunk(NamedTuple):
    """Decoded images of some rows: at the autoencoder's size and at CLIP's, and the rows that they are of."""

    images: list[Tensor]
    rows: np.ndarray
    damaged: list[Reject]


class Worker:
    """Loads both encoders once; a call caches one shard. Threads decode ahead of the encoders."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.products = products_of(cfg.precision, self.device)
        self.environment = {"precision_used": self.products}
        self.shard = inputs["shard"]
        clip, autoencoder = fetch(inputs["clip"]), fetch(inputs["autoencoder"])
        self.clip = cast(CLIP, load_weights(clip, kind="clip", device=self.device).module)
        self.autoencoder = cast(Autoencoder, load_weights(autoencoder, kind="autoencoder", device=self.device).module)
        self.tokenizer = CaptionTokenizer.load(clip / TOKENIZER_FILE)
        self.statistics = latent_statistics(inputs["autoencoder"].meta, self.device)
        self.sizes: tuple[int, int] = (inputs["autoencoder"].meta["image_size"], inputs["clip"].meta["clip_image_size"])
        self.context_length: int = inputs["clip"].meta["context_length"]

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        with autocast(self.device, self.products):
            if part == NULL_TEXT:
                write_null_text(out, self._texts([[""]]))
                return {"samples": 0, "captions": 0, "damaged": []}
            split: Split = "train" if part.startswith("train-") else "heldout"
            dataset = open_shards(self.shard, split=split, only=part)
            arrays, damaged = self._images(dataset)
            arrays |= self._captions(dataset)
        arrays["keys"] = np.asarray([dataset.key(i) for i in range(len(dataset))])
        write_features(out / part, arrays)
        return {
            "samples": len(dataset),
            "captions": len(arrays["text_embeds"]),
            "damaged": [vars(reject) for reject in damaged],
            "split": split,
            "source": next(iter(dataset.sources())),
        }

    def _images(self, dataset: ShardDataset) -> tuple[dict[str, np.ndarray], list[Reject]]:
        """The image arrays of `write_features`, and what was damaged."""
        batches: list[dict[str, np.ndarray]] = []
        damaged: list[Reject] = []
        threads = self.cfg.resources.loader_threads
        chunks = _chunks(len(dataset), self.cfg.batch_size)
        for _, chunk in prefetched(partial(self._decoded, dataset), chunks, threads=threads, ahead=threads + 1):
            batches.append({"rows": chunk.rows.astype(np.int32), **self._encoded(chunk.images)})
            damaged += chunk.damaged
        dataset.close()
        arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        if not damaged:
            del arrays["rows"]
        return arrays, damaged

    def _decoded(self, dataset: ShardDataset, rows: range) -> Chunk:
        with collect_damaged() as damaged:
            images, stand_ins = read_images(dataset, np.asarray(rows), sizes=self.sizes)
        return Chunk(images, stand_ins, damaged)

    def _encoded(self, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
        variants = [self._encode(*(to_float(i.to(self.device)) for i in images))]
        if self.cfg.flip:
            variants.append(self._encode(*(to_float(i.to(self.device)).flip(-1) for i in images)))
        return {name: np.stack([variant[name] for variant in variants], axis=1) for name in variants[0]}

    def _encode(self, images: Tensor, for_clip: Tensor) -> dict[str, np.ndarray]:
        mean, logvar = self.autoencoder.encode(images)
        encoded = {
            "latents": self._packed("latents", self.statistics.standardize(mean)),
            "image_embeds": self._packed("image_embeds", self.clip.encode_image(for_clip)),
        }
        if self.cfg.latent_samples:
            encoded["latent_logvars"] = self._packed("latent_logvars", logvar - 2 * self.statistics.std.log())
        return encoded

    def _captions(self, dataset: ShardDataset) -> dict[str, np.ndarray]:
        """The caption arrays of `write_features`."""
        captions = [dataset.captions(i) for i in range(len(dataset))]
        flat = [caption for options in captions for caption in options]
        arrays = self._texts([[flat[i] for i in chunk] for chunk in _chunks(len(flat), self.cfg.batch_size)])
        arrays["caption_offsets"] = np.cumsum([0, *map(len, captions)])
        weights = [dataset.caption_weights(i) for i in range(len(dataset))]
        if any(weights):
            each = [shares or [1.0] * len(options) for shares, options in zip(weights, captions, strict=True)]
            arrays["caption_weights"] = np.concatenate(each).astype(np.float32)
        return arrays

    def _texts(self, batches: Sequence[list[str]]) -> dict[str, np.ndarray]:
        """`TEXT_ARRAYS` of the captions of all batches; what the encoder says of padding is not kept."""
        embeds, encodings, lengths = [], [], []
        for captions in batches:
            tokens = self.tokenizer.encode_batch(captions, context_length=self.context_length)
            embed, states = self.clip.encode_text(torch.from_numpy(tokens).to(self.device))
            count = self.tokenizer.lengths(tokens)
            embeds.append(self._packed("text_embeds", embed))
            encodings.append(self._packed("text_encodings", states)[np.arange(tokens.shape[1]) < count[:, None]])
            lengths.append(count)
        return {
            "text_embeds": np.concatenate(embeds),
            "text_encodings": np.concatenate(encodings),
            "token_offsets": np.cumsum([0, *np.concatenate(lengths)]),
        }

    def _packed(self, name: str, tensor: Tensor) -> np.ndarray:
        """In the cache's dtype. Raises ValueError for what is not finite there."""
        with np.errstate(over="ignore"):
            packed = tensor.float().cpu().numpy().astype(self.cfg.dtype)
        if not np.isfinite(packed).all():
            raise ValueError(
                f"{name}: not all are finite in {self.cfg.dtype} (the largest of a batch is {tensor.abs().max():.3g}); "
                "set dtype to float32, or train anew an encoder that gives nan or inf itself"
            )
        return packed


def _chunks(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The cache's meta and metrics. Raises ValueError if more images were damaged than the configuration allows."""
    totals = {name: sum(result[name] for result in results) for name in ("samples", "captions")}
    damaged = [reject for result in results for reject in result["damaged"]]
    if len(damaged) > cfg.max_bad_share * totals["samples"]:
        first = damaged[0]
        raise ValueError(
            f"{len(damaged)} of {totals['samples']} images are damaged, the first {first['key']} in "
            f"{first['source']} ({first['detail']}); restore the shards, take the samples out with `genpipe data "
            f"remove`, or raise max_bad_share ({cfg.max_bad_share})"
        )
    write_table(pa.Table.from_pylist(damaged, REJECT_SCHEMA), out / BAD_SAMPLES)
    meta = {
        **totals,
        "dtype": cfg.dtype,
        "sources": _sources(results),
        "made_from": {name: content_digest(artifact) for name, artifact in inputs.items()},
    }
    return meta, {name: float(total) for name, total in {**totals, "bad_samples": len(damaged)}.items()}


def _sources(results: list[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """By split, the first index and the one past the last of each source of a mix."""
    found: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    for split, sources in found.items():
        start = 0
        for result in (result for result in results if result.get("split") == split):
            stop = start + result["samples"]
            sources[result["source"]] = [sources.get(result["source"], [start])[0], stop]
            start = stop
    return found
