"""Train CLIP on the captions and images of the shards (Radford et al. 2021), and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config as Block
from genpipe.data.augmentation import Augmentation, seen
from genpipe.data.image_batches import Crop, crop_draws, read_images, to_float
from genpipe.data.loader import Data, SampleSet, sample_batches
from genpipe.data.order import caption_draws, spread
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import Split
from genpipe.data.tokenizer import (
    CLIP_EOT_ID,
    CLIP_VOCAB_SIZE,
    EOT_ID,
    CaptionTokenizer,
    clip_tokenizer,
    train_tokenizer,
)
from genpipe.data.train_sets import check_image_size
from genpipe.evaluation.retrieval import retrieval_recalls
from genpipe.evaluation.zeroshot import ZeroShotConfig, class_embeds, named_class, zero_shot_accuracy
from genpipe.generation.conditions import TOKENIZER_FILE
from genpipe.models.clip import CLIP, CLIPConfig, keep_patches
from genpipe.models.contrastive import encode_in_chunks
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.settings import TrainConfig
from genpipe.training.statistics import Moments
from genpipe.weights import InitialWeights, load_initial_weights, save_weights

VERSION = 2
MAKES = "clip"
HEADLINES = ("text_to_image_r5",)

PROMPTS = 1024
"""Zero-shot prompts that pass the text tower at a time."""

ROWS = 1024
"""Held-out pairs that are compared with all others at a time."""


class ClipVocabulary(Block):
    """CLIP's own tokenizer instead of one that is trained on the captions: what imported weights need."""

    kind: Literal["clip"]
    vocabulary: Path = Field(description="OpenAI's bpe_simple_vocab_16e6.txt.gz, where every worker can read it")
    sha256: str = Field(
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        description="of the vocabulary's file, in hex",
    )


class Config(StageConfig):
    """Both towers, the tokenizer, and what validation measures beside retrieval."""

    model: CLIPConfig = CLIPConfig()
    crop: Crop = Field("center", description="where squares are cut from images that are stored with another shape")
    augmentation: Augmentation = Field(Augmentation(), description="views of the training images; none by default")
    context_length: int = Field(32, ge=4, description="tokens of a caption, first and last included")
    vocab_size: int = Field(2048, ge=259, description="most tokens of the tokenizer that is trained on the captions")
    tokenizer_captions: int = Field(1_000_000, ge=1, description="captions that the tokenizer is trained on")
    tokenizer: ClipVocabulary | None = Field(None, description="a published tokenizer; none is trained then")
    tower_batch_size: int | None = Field(
        None, ge=1, description="rows that pass a tower at once, computed twice to save memory; default: a rank's share"
    )
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="share of each image's patches left out in training")
    zero_shot: ZeroShotConfig | None = Field(None, description="classify the held-out images in validation")
    statistics_samples: int = Field(4096, ge=1, description="images over which the embeddings' statistics are measured")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObserveTraining = ObserveTraining()


def roles(cfg: Config) -> dict[str, Role]:
    """Images with captions: shards, or generated samples with their prompts."""
    return {"shard": Role("shards", "samples")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The embeddings that it promises. Raises ValueError where sizes do not fit one another."""
    check_image_size(inputs["shard"], cfg.model.image_size, setting="model.image_size")
    if cfg.train.micro_batch_size is not None:
        raise ValueError("train.micro_batch_size: the contrastive loss compares the whole batch at once, so it "
                         "cannot be cut; set tower_batch_size instead, which saves the same memory")  # fmt: skip
    return {
        "embed_dim": cfg.model.embed_dim,
        "text_width": cfg.model.text.width,
        "context_length": cfg.context_length,
        "clip_image_size": cfg.model.image_size,
    }


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """A training batch of the longest captions, all zero."""
    size = cfg.model.image_size
    views = {"views": torch.ones(batch_size, 4)} if cfg.augmentation.active else {}
    return {
        "images": torch.zeros(batch_size, 3, size, size, dtype=torch.uint8),
        "tokens": torch.zeros(batch_size, cfg.context_length, dtype=torch.int64),
        **views,
    }


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Images with the tokens of one caption each, of both splits."""
    return Data(train=_split(cfg, inputs, "train"), heldout=_split(cfg, inputs, "heldout"))


def _split(cfg: Config, inputs: Mapping[str, Artifact], name: Split) -> SampleSet:
    dataset = open_shards(inputs["shard"], split=name)
    captioned = Captioned(
        dataset,
        _tokenizer(cfg, inputs),
        context_length=cfg.context_length,
        size=cfg.model.image_size,
        crop=cfg.crop if name == "train" else "center",
        seed=cfg.train.seed if name == "train" else None,
        classes=cfg.zero_shot.classes if cfg.zero_shot and name == "heldout" else (),
        augmentation=cfg.augmentation if name == "train" and cfg.augmentation.active else None,
    )
    return SampleSet(len(dataset), captioned, dataset.sources())


@dataclass(frozen=True)
class Captioned:
    """Collates `images`, uint8 [B, 3, size, size], and `tokens`, int64 [B, L], of one caption each.

    Caption and crop follow from the position in the stream and `seed`; without a seed it is the first caption. With
    `classes` there are `labels` too, int64 [B]: the class that the caption names, or -1; with an `augmentation` there
    are its `views`, float32 [B, 4].
    """

    dataset: ShardDataset
    tokenizer: CaptionTokenizer
    context_length: int
    size: int
    crop: Crop
    seed: int | None
    classes: tuple[str, ...] = ()
    augmentation: Augmentation | None = None

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        """The batch of these samples at these positions of the stream."""
        crops = crop_draws(positions, crop=self.crop, seed=self.seed or 0)
        (images,), indices = read_images(self.dataset, indices, sizes=(self.size,), draws=crops)
        draws = np.zeros(len(indices)) if self.seed is None else caption_draws(positions, seed=self.seed)
        pairs = zip(indices.tolist(), draws.tolist(), strict=True)
        captions = [self.dataset.caption(i, draw=draw) for i, draw in pairs]
        tokens = self.tokenizer.encode_short(captions, context_length=self.context_length)
        batch = {"images": images, "tokens": torch.from_numpy(tokens)}
        if self.classes:
            batch["labels"] = torch.tensor([named_class(caption, self.classes) for caption in captions])
        if self.augmentation is not None:
            batch["views"] = self.augmentation.views(positions, seed=self.seed or 0)
        return batch


def _tokenizer(cfg: Config, inputs: Mapping[str, Artifact]) -> CaptionTokenizer:
    if cfg.tokenizer is not None:
        return clip_tokenizer(cfg.tokenizer.vocabulary, sha256=cfg.tokenizer.sha256)
    weights = tuple(sorted(cfg.train.source_weights.items()))
    return _train_tokenizer(
        inputs["shard"].uri, inputs["shard"].fingerprint, cfg.vocab_size, cfg.tokenizer_captions, weights
    )


@lru_cache(maxsize=1)
def _train_tokenizer(
    uri: str, fingerprint: str, vocab_size: int, captions: int, weights: tuple[tuple[str, float], ...]
) -> CaptionTokenizer:
    """The tokenizer of these shards: trained anew, the same each time, by every rank for itself."""
    dataset = open_shards(Artifact(kind="shards", uri=uri, fingerprint=fingerprint), split="train")
    indices = spread(dataset.sources(), count=captions, weights=dict(weights), repeat=True)
    chosen = (caption for i in indices.tolist() for caption in dataset.captions(i))
    return train_tokenizer(islice(chosen, captions), vocab_size=vocab_size)


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train; on the meta device no tokenizer is read."""
    return Objective(cfg, None if device.type == "meta" else _tokenizer(cfg, inputs), device)


def text_sizes(cfg: Config, tokenizer: CaptionTokenizer | None) -> dict[str, int]:
    """What `CLIP` must know of its texts; without the tokenizer, what they will be at most."""
    if tokenizer is not None:
        vocab_size, eot_id = tokenizer.vocab_size, tokenizer.eot_id
    else:
        vocab_size, eot_id = (cfg.vocab_size, EOT_ID) if cfg.tokenizer is None else (CLIP_VOCAB_SIZE, CLIP_EOT_ID)
    return {"vocab_size": vocab_size, "context_length": cfg.context_length, "eot_id": eot_id}


class Objective:
    """The contrastive loss over the global batch. On the meta device no tokenizer is needed."""

    def __init__(self, cfg: Config, tokenizer: CaptionTokenizer | None, device: torch.device) -> None:
        self.cfg = cfg
        self.sizes = text_sizes(cfg, tokenizer)
        self.model = CLIP(cfg.model, **self.sizes).to(device)
        load_initial_weights(self.model, cfg.initial, kind="clip")
        self.trainable: dict[str, nn.Module] = {"clip": self.model}
        self.prompts: Tensor | None = None
        if cfg.zero_shot is not None and tokenizer is not None:
            prompts = tokenizer.encode_short(cfg.zero_shot.prompts(), context_length=cfg.context_length)
            self.prompts = torch.from_numpy(prompts).to(device)

    def active(self, samples_seen: int) -> Sequence[str]:
        """Both towers, as one module."""
        return ("clip",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The contrastive loss of the global batch, gathered over ranks (Radford et al. 2021, figure 3)."""
        images, tokens, size = batch["images"], batch["tokens"], self.cfg.tower_batch_size
        parts = {"views_B4": batch["views"]} if self.cfg.augmentation.active else {}
        if self.cfg.patch_dropout:
            parts["patches_BK"] = self._patches(images, step.generator)

        def embed(images: Tensor, *of_them: Tensor) -> Tensor:
            return self._image_embed(images, **dict(zip(parts, of_them, strict=True)))

        image_embed = encode_in_chunks(embed, images, *parts.values(), size=size)
        text_embed = encode_in_chunks(self._text_embed, tokens, size=size)
        scale = self.model.logit_scale
        return self.model.loss(image_embed, text_embed), {"logit_scale": scale.detach().exp()}

    def _image_embed(
        self, images: Tensor, *, views_B4: Tensor | None = None, patches_BK: Tensor | None = None
    ) -> Tensor:
        floats = to_float(images) if views_B4 is None else seen(to_float(images), views_B4)
        return self.model.encode_image(floats, patches_BK=patches_BK)

    def _text_embed(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)[0]

    def _patches(self, images: Tensor, generator: torch.Generator) -> Tensor:
        patches, drop = self.cfg.model.patches, self.cfg.patch_dropout
        return keep_patches(images, patches=patches, drop=drop, generator=generator)

    def after_step(self) -> None:
        """Keep the scale of the logits at most 100."""
        self.model.clamp_logit_scale_()

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Loss and retrieval among the held-out pairs, and zero-shot accuracy where classes are configured."""
        embeds, labels, captions = [], [], []
        for batch in batches:
            embeds.append(self.model(to_float(batch["images"]), batch["tokens"]))
            captions += list(batch["tokens"] * self.model.text_mask(batch["tokens"]))
            labels.append(batch.get("labels", batch["tokens"].new_empty(0)))
        images, texts = (torch.cat(part) for part in zip(*embeds, strict=True))
        loss = self.model.heldout_loss(images, texts, size=ROWS)
        metrics = {"loss": loss.item(), "pool": float(len(images))}
        # A picture whose caption another has word for word belongs to either.
        groups = nn.utils.rnn.pad_sequence(captions, batch_first=True).unique(dim=0, return_inverse=True)[1]
        metrics |= retrieval_recalls(images, texts, image_groups=groups, text_groups=groups)
        if self.cfg.zero_shot is not None and self.prompts is not None:
            prompts = torch.cat([self._text_embed(tokens) for tokens in self.prompts.split(PROMPTS)])
            classes = class_embeds(prompts, classes=len(self.cfg.zero_shot.classes))
            metrics |= _zero_shot(images, torch.cat(labels), classes)
        return Validation(metrics)


def _zero_shot(images: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float]:
    """The accuracy over the images whose caption names a class, and how many they are."""
    named = labels >= 0
    count = {"zero_shot_images": named.sum().item()}
    return count | zero_shot_accuracy(images[named], labels[named], classes) if named.any() else count


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write weights and tokenizer; the meta gets the image embeddings' statistics by dimension."""
    tokenizer = _tokenizer(cfg, inputs)
    tokenizer.save(folder / TOKENIZER_FILE)
    save_weights(objective.model, folder, kind="clip", config=cfg.model, sizes=objective.sizes, extra={})
    moments = embed_moments(objective.model, data(cfg, inputs).train, cfg)
    return {
        "tokenizer": tokenizer.digest,
        "image_embed_mean": moments.mean(),
        "image_embed_std": moments.std(),
    }


def embed_moments(model: CLIP, samples: SampleSet, cfg: Config) -> Moments:
    """Of the image embeddings [B, D] of training images that stand for all, taken as training takes them."""
    device = model.logit_scale.device
    moments = Moments()
    weights = cfg.train.source_weights
    for batch in sample_batches(samples, count=cfg.statistics_samples, batch_size=128, weights=weights, repeat=True):
        moments.add(model.encode_image(to_float(batch["images"].to(device))))
    return moments
