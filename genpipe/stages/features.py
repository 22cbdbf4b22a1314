"""Cache what the frozen encoders say of every sample: latents, image and text embeddings, text encodings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, fetch
from genpipe.config import StageConfig
from genpipe.data.features import FeatureDataset, write_features
from genpipe.data.shards import Split
from genpipe.data.stream import Batch, ShardDataset, caption_choice, image_batch, to_float
from genpipe.data.tokenizer import CaptionTokenizer
from genpipe.generation import TOKENIZER_FILE, check_lineage, latent_statistics
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.training.objective import Data
from genpipe.training.objective import Split as DataSplit
from genpipe.weights import load_weights

VERSION = 1
CONSUMES: tuple[str, ...] = ("shard", "autoencoder", "clip")

COPIED = (
    "latent_channels", "latent_size", "latent_mean", "latent_std",
    "embed_dim", "text_width", "context_length", "image_embed_mean", "image_embed_std", "tokenizer",
)  # fmt: skip


class Config(StageConfig):
    batch_size: int = Field(64, ge=1, description="images, or captions, of one forward pass")
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the encoders")


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_lineage(inputs)
    merged = {**inputs["autoencoder"].meta, **inputs["clip"].meta}
    return {
        **{name: merged[name] for name in COPIED if name in merged},
        **{name: inputs[name].fingerprint for name in CONSUMES},
    }


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    folder = fetch(inputs["shard"])
    return [name for split in ("train", "heldout") for name in ShardDataset(folder, split=split).shards()]


class Worker:
    """Loads both encoders once; a call caches one shard."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = fetch(inputs["shard"])
        clip, autoencoder = fetch(inputs["clip"]), fetch(inputs["autoencoder"])
        self.clip = cast(CLIP, load_weights(clip, kind="clip", device=self.device).module)
        self.autoencoder = cast(Autoencoder, load_weights(autoencoder, kind="autoencoder", device=self.device).module)
        self.tokenizer = CaptionTokenizer.load(clip / TOKENIZER_FILE)
        self.statistics = latent_statistics(inputs["autoencoder"].meta, self.device)
        self.image_size: int = inputs["autoencoder"].meta["image_size"]
        self.clip_size: int = inputs["clip"].meta["clip_image_size"]
        self.context_length: int = inputs["clip"].meta["context_length"]

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        dataset = ShardDataset(self.folder, split="train" if part.startswith("train-") else "heldout")
        rows = np.asarray(dataset.rows(part))
        captions = [dataset.captions(int(i)) for i in rows]
        flat = [caption for options in captions for caption in options]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            images = [self._images(dataset, chunk) for chunk in self._chunks(rows)]
            texts = [self._texts(list(chunk)) for chunk in self._chunks(np.asarray(flat, dtype=object))]
        arrays = {name: np.concatenate([batch[name] for batch in images]) for name in images[0]}
        arrays |= {name: np.concatenate([batch[name] for batch in texts]) for name in texts[0]}
        arrays["keys"] = np.asarray([dataset.key(int(i)) for i in rows])
        arrays["caption_offsets"] = np.cumsum([0, *map(len, captions)])
        write_features(out / part, arrays)
        return {"samples": len(rows), "captions": len(flat)}

    def _chunks(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[i : i + self.cfg.batch_size] for i in range(0, len(rows), self.cfg.batch_size)]

    def _images(self, dataset: ShardDataset, rows: np.ndarray) -> dict[str, np.ndarray]:
        images = to_float(image_batch(dataset, rows, size=self.image_size).to(self.device))
        mean, _ = self.autoencoder.encode(images)
        if self.clip_size != self.image_size:
            images = to_float(image_batch(dataset, rows, size=self.clip_size).to(self.device))
        return {
            "latents": self._packed(self.statistics.standardise(mean)),
            "image_embeds": self._packed(self.clip.encode_image(images)),
        }

    def _texts(self, captions: list[str]) -> dict[str, np.ndarray]:
        tokens = self.tokenizer.encode_batch(captions, context_length=self.context_length)
        embeds, encodings = self.clip.encode_text(torch.from_numpy(tokens).to(self.device))
        return {
            "text_embeds": self._packed(embeds),
            "text_encodings": self._packed(encodings),
            "text_tokens": tokens.astype(np.int32),
            "text_lengths": self.tokenizer.lengths(tokens),
        }

    def _packed(self, tensor: Tensor) -> np.ndarray:
        return tensor.float().cpu().numpy().astype(self.cfg.dtype)


def finish(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    totals = {name: sum(result[name] for result in results) for name in ("samples", "captions")}
    return {**totals, "dtype": cfg.dtype}, {name: float(total) for name, total in totals.items()}


def cached_data(features: Artifact, *, arrays: Sequence[str], seed: int) -> Data:
    """The cache as a stage trains on it: `arrays` (latents, image_embeds) and the text of one caption a sample.

    Training takes a caption by its position in the stream and `seed`, held-out samples take their first.
    """
    folder = fetch(features)

    def split(name: Split) -> DataSplit:
        dataset = FeatureDataset(folder, split=name)

        def collate(indices: np.ndarray, positions: np.ndarray) -> Batch:
            choices = caption_choice(positions, seed=seed) if name == "train" else np.zeros_like(positions)
            return {array: getattr(dataset, array)(indices) for array in arrays} | dataset.text(indices, choices)

        return DataSplit(len(dataset), collate)

    return Data(train=split("train"), heldout=split("heldout"))
