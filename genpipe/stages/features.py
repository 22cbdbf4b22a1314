"""Cache what frozen encoders say of every sample: latents, image and text embeddings, text encodings, class labels.

Any of an autoencoder, a CLIP and a text encoder may be given, at least one; what the cache holds follows from that, and
its meta says so by the keys that it has.

Shape legend: B samples, C H W of the latents.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.data.features import NULL_TEXT, write_features, write_null_text
from genpipe.data.image_batches import read_images, to_float
from genpipe.data.prefetch import in_order
from genpipe.data.samples import Reject
from genpipe.data.shard_dataset import ShardDataset, collect_damaged, open_shards, open_splits
from genpipe.data.shards import REJECT_SCHEMA, SPLITS, split_of_shard, write_table
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation.conditions import TOKENIZER_FILE, latent_statistics
from genpipe.lineage import check_lineage, content_digest
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.models.text_encoders import TextEncoder, load_text_encoder
from genpipe.stage_config import StageConfig
from genpipe.weights import load_weights

VERSION = 5
MAKES = "features"
HEADLINES = ("samples",)

COPIED = {
    "shard": ("classes",),
    "autoencoder": ("latent_channels", "latent_size", "latent_mean", "latent_std"),
    "clip": (
        "embed_dim", "image_embed_mean", "image_embed_std", "tokenizer", "text_width", "context_length",
    ),
    "text_encoder": ("text_width", "context_length"),
}  # fmt: skip
"""What the cache's meta repeats of its inputs'; of two that say the same, what the later says."""

REACH = 8.0
"""Deviations from its mean within which a sample of a latent always lies: one in 10^15 does not."""

BAD_SAMPLES = "bad_samples.parquet"


class Config(StageConfig):
    """How the encoders are run, and what of their output is kept."""

    batch_size: int = Field(64, ge=1, description="images, or captions, of one forward pass")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the cached arrays")
    precision: Precision = Field("auto", description="of the encoders' products")
    latent_samples: bool = Field(
        False, description="cache the latents' variances too, and train on samples instead of means"
    )
    flip: bool = Field(False, description="cache mirror images too; training takes either, by its place in the stream")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of damaged images beyond which the stage fails")


def roles(cfg: Config) -> dict[str, Role]:
    """The shards and their encoders: the autoencoder, CLIP and a text encoder are optional, but one is needed."""
    return {
        "shard": Role("shards", "samples"),
        "autoencoder": Role("autoencoder", optional=True),
        "clip": Role("clip", optional=True),
        "text_encoder": Role("text_encoder", optional=True),
    }


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Sizes and statistics of what is cached, each where it is, `classes`, and the fingerprint of each input.

    Text encodings are the text encoder's if there is one, else CLIP's. Raises ValueError for inputs that do not belong
    together, and where no encoder is among them.
    """
    check_lineage(inputs)
    if not {"autoencoder", "clip", "text_encoder"} & inputs.keys():
        raise ValueError("inputs: no encoder is given; name an autoencoder, a clip or a text_encoder")
    meta: dict[str, Any] = {}
    for role, names in COPIED.items():
        held = inputs[role].meta if role in inputs else {}
        meta |= {name: held[name] for name in names if name in held}
    return meta | {role: artifact.fingerprint for role, artifact in inputs.items()}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The shards of all splits, and the text that stands for no caption where text is encoded."""
    shards = [name for dataset in open_splits(inputs["shard"]).values() for name in dataset.shards()]
    return [*shards, NULL_TEXT] if {"clip", "text_encoder"} & inputs.keys() else shards


class Chunk(NamedTuple):
    """Decoded images of some rows, at the size of each encoder that sees them, and the rows that they are of."""

    images: list[Tensor]
    rows: np.ndarray
    damaged: list[Reject]


class Captions(NamedTuple):
    """Captions as the encoders read them: CLIP's tokens int64 [B, L] if there is one; which were cut, bool [B]."""

    texts: list[str]
    tokens_BL: np.ndarray | None
    cut: np.ndarray


class Worker:
    """Loads the encoders once; a call caches one shard.

    The encoders are one call's at a time, from its first batch to its last, and threads that all calls share read,
    decode and tokenize ahead of them. So while a shard is encoded the next has begun to be read, and the last is
    written.
    """

    parts_at_once = 3

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.turn = threading.Lock()
        self.readers = ThreadPoolExecutor(cfg.resources.loader_threads, "read")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.products = products_of(cfg.precision, self.device)
        self.environment = {"precision_used": self.products}
        self.shard = inputs["shard"]
        self.autoencoder: Autoencoder | None = None
        self.clip: CLIP | None = None
        self.text_encoder: TextEncoder | None = None
        self.sizes: list[int] = []
        if "autoencoder" in inputs:
            self.autoencoder = cast(Autoencoder, self._load(inputs["autoencoder"]))
            self.statistics = latent_statistics(inputs["autoencoder"].meta, self.device)
            self.sizes.append(inputs["autoencoder"].meta["image_size"])
        if "clip" in inputs:
            self.clip = cast(CLIP, self._load(inputs["clip"]))
            self.tokenizer = CaptionTokenizer.load(fetch(inputs["clip"]) / TOKENIZER_FILE)
            self.context_length: int = inputs["clip"].meta["context_length"]
            self.sizes.append(inputs["clip"].meta["clip_image_size"])
        if "text_encoder" in inputs:
            self.text_encoder = load_text_encoder(fetch(inputs["text_encoder"]), device=self.device)

    def _load(self, artifact: Artifact) -> nn.Module:
        return load_weights(fetch(artifact), kind=artifact.kind, device=self.device).module

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Cache one shard, or the empty caption, into `out`; how many samples and captions, cut and damaged ones."""
        if part == NULL_TEXT:
            with self.turn, autocast(self.device, self.products):
                texts = [self._text(self._tokenized([""]))]
            write_null_text(out, _joined_texts(texts))
            return {"samples": 0, "captions": 0, "captions_cut": 0, "damaged": []}
        split = split_of_shard(part)
        dataset = open_shards(self.shard, split=split, only=part)
        reads_text = self.clip is not None or self.text_encoder is not None
        captions = [dataset.captions(i) for i in range(len(dataset))] if reads_text else []
        arrays, damaged, cut = self._arrays(dataset, captions)
        dataset.close()
        arrays["keys"] = np.asarray([dataset.key(i) for i in range(len(dataset))])
        if self.shard.meta.get("classes"):
            arrays["labels"] = dataset.labels(np.arange(len(dataset))).astype(np.int32)
        write_features(out / part, arrays)
        return {
            "samples": len(dataset),
            "captions": sum(map(len, captions)),
            "captions_cut": cut,
            "damaged": [vars(reject) for reject in damaged],
            "split": split,
            "source": next(iter(dataset.sources())),
        }

    def _arrays(
        self, dataset: ShardDataset, captions: Sequence[list[str]]
    ) -> tuple[dict[str, np.ndarray], list[Reject], int]:
        """The image and caption arrays of `write_features`, what was damaged, and how many captions were cut."""
        flat = list(chain.from_iterable(captions))
        rows = _chunks(len(dataset), self.cfg.batch_size) if self.sizes else []
        texts = [flat[chunk.start : chunk.stop] for chunk in _chunks(len(flat), self.cfg.batch_size)]
        ahead = self.cfg.resources.loader_threads + 1
        pieces: list[range | list[str]] = [*rows, *texts]
        read = in_order(lambda piece: self.readers.submit(self._read, dataset, piece), pieces, ahead=ahead)
        first = next(read)  # the encoders are others' until there is something to encode
        images: list[dict[str, np.ndarray]] = []
        encoded: list[dict[str, np.ndarray]] = []
        damaged: list[Reject] = []
        cut = 0
        with self.turn, autocast(self.device, self.products):
            for _, piece in chain((first,), read):
                if isinstance(piece, Chunk):
                    images.append({"rows": piece.rows.astype(np.int32), **self._encoded(piece.images)})
                    damaged += piece.damaged
                else:
                    encoded.append(self._text(piece))
                    cut += int(piece.cut.sum())
        arrays = _joined(images)
        if not damaged:
            arrays.pop("rows", None)
        return arrays | (self._caption_arrays(dataset, captions, encoded) if captions else {}), damaged, cut

    def _read(self, dataset: ShardDataset, piece: range | list[str]) -> Chunk | Captions:
        """The images of some rows, or some captions, ready to be encoded."""
        if not isinstance(piece, range):
            return self._tokenized(piece)
        with collect_damaged() as damaged:
            images, stand_ins = read_images(dataset, np.asarray(piece), sizes=self.sizes)
        return Chunk(images, stand_ins, damaged)

    def _tokenized(self, texts: list[str]) -> Captions:
        cut, tokens = np.zeros(len(texts), bool), None
        if self.clip is not None:
            tokens, lengths = self.tokenizer.encode_and_measure(texts, context_length=self.context_length)
            cut |= lengths > self.context_length
        if self.text_encoder is not None:
            cut |= np.asarray(self.text_encoder.cut(texts))
        return Captions(texts, tokens, cut)

    def _encoded(self, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
        variants = [self._encode([to_float(i.to(self.device)) for i in images])]
        if self.cfg.flip:
            variants.append(self._encode([to_float(i.to(self.device)).flip(-1) for i in images]))
        return {name: np.stack([variant[name] for variant in variants], axis=1) for name in variants[0]}

    def _encode(self, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """`images` at the size of the autoencoder and of CLIP, of those that are there."""
        encoded: dict[str, np.ndarray] = {}
        if self.clip is not None:
            encoded["image_embeds"] = self._packed("image_embeds", self.clip.encode_image(images[-1]))
        if self.autoencoder is None:
            return encoded
        mean, logvar = self.autoencoder.encode(images[0])
        mean, logvar = self.statistics.standardize(mean), logvar - 2 * self.statistics.std.log()
        encoded["latents"] = self._packed("latents", mean)
        if self.cfg.latent_samples:
            encoded["latent_logvars"] = self._packed("latent_logvars", logvar)
            self._packed("latents", mean.abs() + REACH * (0.5 * logvar).exp())  # what training may draw from them
        return encoded

    def _caption_arrays(
        self, dataset: ShardDataset, captions: Sequence[list[str]], encoded: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        arrays = _joined_texts(encoded)
        arrays["caption_offsets"] = np.cumsum([0, *map(len, captions)])
        weights = [dataset.caption_weights(i) for i in range(len(dataset))]
        if any(weights):
            each = [shares or [1.0] * len(options) for shares, options in zip(weights, captions, strict=True)]
            arrays["caption_weights"] = np.concatenate(each).astype(np.float32)
        return arrays

    def _text(self, captions: Captions) -> dict[str, np.ndarray]:
        """Those of `TEXT_ARRAYS` that the encoders give of some captions, with their `lengths` in tokens.

        What an encoder says of padding is not kept.
        """
        found: dict[str, np.ndarray] = {}
        if self.clip is not None:
            assert captions.tokens_BL is not None, "there is a CLIP"
            tokens_BL = torch.from_numpy(captions.tokens_BL).to(self.device)
            embed, encodings = self.clip.encode_text(tokens_BL)
            text_mask = self.clip.text_mask(tokens_BL)
            found["text_embeds"] = self._packed("text_embeds", embed)
        if self.text_encoder is not None:
            encodings, text_mask = self.text_encoder.encode(captions.texts)
        found["text_encodings"] = self._packed("text_encodings", encodings[text_mask])
        found["lengths"] = text_mask.sum(1).cpu().numpy()
        return found

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


def _joined(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else ())}


def _joined_texts(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `_text` gives of all captions, with offsets instead of lengths."""
    joined = _joined(batches)
    joined["token_offsets"] = np.cumsum([0, *joined.pop("lengths")])
    return joined


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The cache's meta and metrics. Raises ValueError if more images were damaged than the configuration allows."""
    totals = {name: sum(result[name] for result in results) for name in ("samples", "captions", "captions_cut")}
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
        **check_inputs(cfg, inputs),
        "samples": totals["samples"],
        "captions": totals["captions"],
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
