"""Train CLIP on the captions and images of the shards (Radford et al. 2021), and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact
from genpipe.config import StageConfig
from genpipe.data.loader import sequential
from genpipe.data.order import caption_draws
from genpipe.data.pixels import Crop, crop_draws, read_images, to_float
from genpipe.data.shards import Split as SplitName
from genpipe.data.stream import ShardDataset, open_shards
from genpipe.data.tokenizer import CaptionTokenizer, train_tokenizer
from genpipe.evaluation.metrics import recall_at, retrieval_ranks
from genpipe.generation import TOKENIZER_FILE
from genpipe.models.clip import CLIP, CLIPConfig, contrastive_loss
from genpipe.stages.shard import check_image_size
from genpipe.training.objective import Batch, Data, Metrics, Split, Step, Validation
from genpipe.training.optim import TrainConfig
from genpipe.weights import save_weights

VERSION = 1
CONSUMES: tuple[str, ...] = ("shard",)

MIN_STD = 1e-4
"""Floor under the standard deviation of an embedding's dimension, so that a dead one divides by no zero."""


class Config(StageConfig):
    model: CLIPConfig = CLIPConfig()
    crop: Crop = Field("center", description="where squares are cut from images that are stored with another shape")
    context_length: int = Field(32, ge=4, description="tokens of a caption, first and last included")
    vocab_size: int = Field(2048, ge=259)
    tokenizer_captions: int = Field(1_000_000, ge=1, description="captions that the tokenizer is trained on")
    statistics_samples: int = Field(4096, ge=1, description="images over which the embeddings' statistics are measured")
    train: TrainConfig


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_image_size(inputs["shard"], cfg.model.image_size, setting="model.image_size")
    if cfg.train.micro_batch_size is not None:
        raise ValueError("train.micro_batch_size: the contrastive loss compares the whole batch at once, so it "
                         "cannot be cut; remove the setting, or lower global_batch_size or add workers")  # fmt: skip
    return {
        "embed_dim": cfg.model.embed_dim,
        "text_width": cfg.model.text.width,
        "context_length": cfg.context_length,
        "clip_image_size": cfg.model.image_size,
    }


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    return Data(train=_split(cfg, inputs, "train"), heldout=_split(cfg, inputs, "heldout"))


def _split(cfg: Config, inputs: Mapping[str, Artifact], name: SplitName) -> Split:
    dataset = open_shards(inputs["shard"], split=name)
    captioned = Captioned(
        dataset,
        _tokenizer(cfg, inputs),
        context_length=cfg.context_length,
        size=cfg.model.image_size,
        crop=cfg.crop if name == "train" else "center",
        seed=cfg.train.seed if name == "train" else None,
    )
    return Split(len(dataset), captioned, dataset.sources())


@dataclass(frozen=True)
class Captioned:
    """Collates `images`, uint8 [B, 3, size, size], and `tokens`, int64 [B, L], of one caption each.

    Caption and crop follow from the position in the stream and `seed`; without a seed it is the first caption.
    """

    dataset: ShardDataset
    tokenizer: CaptionTokenizer
    context_length: int
    size: int
    crop: Crop
    seed: int | None

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        crops = crop_draws(positions, crop=self.crop, seed=self.seed or 0)
        (images,), indices = read_images(self.dataset, indices, sizes=(self.size,), draws=crops)
        draws = np.zeros(len(indices)) if self.seed is None else caption_draws(positions, seed=self.seed)
        pairs = zip(indices.tolist(), draws.tolist(), strict=True)
        captions = [self.dataset.caption(i, draw=draw) for i, draw in pairs]
        tokens = self.tokenizer.encode_short(captions, context_length=self.context_length)
        return {"images": images, "tokens": torch.from_numpy(tokens)}


def _tokenizer(cfg: Config, inputs: Mapping[str, Artifact]) -> CaptionTokenizer:
    shard = inputs["shard"]
    return _train_tokenizer(shard.uri, shard.fingerprint, cfg.vocab_size, cfg.tokenizer_captions)


@lru_cache(maxsize=1)
def _train_tokenizer(uri: str, fingerprint: str, vocab_size: int, captions: int) -> CaptionTokenizer:
    """The tokenizer of these shards: trained anew, the same each time, by every rank for itself."""
    dataset = open_shards(Artifact(kind="shard", uri=uri, fingerprint=fingerprint), split="train")

    def every() -> Iterator[str]:
        for i in range(len(dataset)):
            yield from dataset.captions(i)

    return train_tokenizer(islice(every(), captions), vocab_size=vocab_size)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    return Objective(cfg, vocab_size=_tokenizer(cfg, inputs).vocab_size, device=device)


class Objective:
    """Symmetric InfoNCE over the global batch."""

    def __init__(self, cfg: Config, *, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.model = CLIP(cfg.model, vocab_size=vocab_size, context_length=cfg.context_length).to(device)
        self.trainable: dict[str, nn.Module] = {"clip": self.model}

    def parts(self, samples_seen: int) -> Sequence[str]:
        return ("clip",)

    def loss(self, part: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        image_embed, text_embed = self.model(to_float(batch["images"]), batch["tokens"])
        scale = self.model.logit_scale
        loss = contrastive_loss(image_embed, text_embed, logit_scale=scale)
        return loss, {"logit_scale": scale.detach().exp()}

    def after_step(self) -> None:
        self.model.clamp_logit_scale_()

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        embeds = [self.model(to_float(batch["images"]), batch["tokens"]) for batch in batches]
        images, texts = (torch.cat(part) for part in zip(*embeds, strict=True))
        own = torch.arange(len(images), device=images.device)
        loss = contrastive_loss(images, texts, logit_scale=self.model.logit_scale, gather=False)
        metrics = {"loss": loss.item(), "pool": float(len(images))}
        for name, queries, pool in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            ranks = retrieval_ranks(queries, pool, own)
            metrics |= {f"{name}_r{k}": recall_at(ranks, k) for k in (1, 5)}
        return Validation(metrics)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    tokenizer = _tokenizer(cfg, inputs)
    tokenizer.save(folder / TOKENIZER_FILE)
    sizes = {"vocab_size": objective.vocab_size, "context_length": cfg.context_length}
    save_weights(objective.model, folder, kind="clip", config=cfg.model, sizes=sizes, extra={})
    embeds = image_embeds(objective.model, data(cfg, inputs).train, limit=cfg.statistics_samples)
    return {
        "tokenizer": tokenizer.digest,
        "image_embed_mean": embeds.mean(0).tolist(),
        "image_embed_std": embeds.std(0, correction=0).clamp(min=MIN_STD).tolist(),
    }


def image_embeds(model: CLIP, split: Split, *, limit: int) -> Tensor:
    """Image embeddings of the first training images, fp32 [N, D]."""
    device = model.logit_scale.device
    batches = sequential(split.length, batch_size=128, collate=split.collate, limit=limit)
    return torch.cat([model.encode_image(to_float(batch["images"].to(device))) for _, batch in batches])
