"""Measure the whole system: do its pictures show what their prompts say, and would the parts' numbers come again?

Prompts are first captions of the data. A generated picture counts as right if CLIP finds its own caption among the
k nearest of all the data's first captions. CLIP also conditions the system, so this says how faithful the pictures
are to the embedding, not how good they are; `ceiling` is the same measure on the real pictures.
"""

from __future__ import annotations

import difflib
import io
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role, fetch, read_manifest
from genpipe.config import StageConfig
from genpipe.data.features import FeatureDataset
from genpipe.data.image_batches import image_batch, to_float, to_uint8
from genpipe.data.loader import sample_batches
from genpipe.data.order import order
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.fidelity import FeatureMoments, frechet_distance
from genpipe.evaluation.grids import hwc, labeled_grid
from genpipe.evaluation.metrics import cosine
from genpipe.evaluation.networks import inception_features, load_inception
from genpipe.evaluation.retrieval import recall_at, retrieval_ranks
from genpipe.generation.system import GenerationConfig, Generator
from genpipe.lineage import check_lineage, check_made_from
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.pinned_files import PinnedFile
from genpipe.stages import load_stage
from genpipe.storage import Storage
from genpipe.training.loop import seeded, to_device
from genpipe.weights import load_weights

VERSION = 1
MAKES = "scores"
HEADLINES = ("train/recall_at_10", "heldout/recall_at_10")

DATA = ("shard", "features")
COSINES = ("prior_cosine", "prior_cosine_unrelated")
INCEPTION = "inception"
CELL = 96


class Config(StageConfig):
    generation: GenerationConfig = GenerationConfig()
    prompts: int = Field(256, ge=1, description="training captions to generate from, chosen at random")
    heldout_prompts: int = Field(64, ge=1, description="captions of held-out subjects to generate from")
    batch_size: int = Field(32, ge=1)
    recall_at: tuple[int, ...] = (1, 5, 10)
    grid: tuple[str, ...] = Field((), description="captions of the grid; default: the first dozen of the prompts")
    fid: PinnedFile | None = Field(
        None, description="Inception as TorchScript; adds the Fréchet distance of the pictures"
    )
    precision: Precision = Field("auto", description="of matrix products")
    seed: int = 0


def roles(cfg: Config) -> dict[str, Role]:
    return {
        "shard": Role("shards"),
        "autoencoder": Role("autoencoder"),
        "clip": Role("clip"),
        "features": Role("features"),
        "decoder": Role("decoder"),
        "prior": Role("prior", optional=True),
        "upsamplers": Role("upsampler", optional=True, several=True),
    }


def trained(inputs: Mapping[str, Artifact]) -> list[str]:
    """The roles that trained parts fill."""
    return [name for name in inputs if name not in DATA]


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    check_lineage(inputs)
    return {name: inputs[name].fingerprint for name in trained(inputs)}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """`grid`, `validate NAME` for each trained stage, and `prompts SPLIT FIRST` for each batch of prompts."""
    batches = []
    for split in SPLITS:
        count = len(_chosen(cfg, open_shards(inputs["shard"], split=split), split))
        batches += [f"prompts {split} {first}" for first in range(0, count, cfg.batch_size)]
    return [*batches, *(f"validate {name}" for name in trained(inputs)), "grid"]


def _chosen(cfg: Config, dataset: ShardDataset, split: Split) -> np.ndarray:
    """Indices of the samples whose captions are the prompts of a split."""
    wanted = cfg.prompts if split == "train" else cfg.heldout_prompts
    return order(np.arange(min(wanted, len(dataset))), n=len(dataset), seed=cfg.seed)


class Worker:
    """Loads the whole system once; a call does one part."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.products = products_of(cfg.precision, self.device)
        self.environment = {"precision_used": self.products}
        check_made_from(inputs)
        self.system = Generator(inputs, device=self.device)
        self.shards = {split: open_shards(inputs["shard"], split=split) for split in SPLITS}
        self.features = {split: FeatureDataset(fetch(inputs["features"]), split=split) for split in SPLITS}
        self.inception = load_inception(cfg.fid, device=self.device) if cfg.fid else None

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        kind, *arguments = part.split()
        with autocast(self.device, self.products):
            if kind == "grid":
                return self._grid(out)
            if kind == "validate":
                return self._validate(arguments[0])
            return self._prompts(cast(Split, arguments[0]), int(arguments[1]), out)

    def _prompts(self, split: Split, first: int, out: Path) -> dict[str, Any]:
        """Generate from a batch of captions: ranks of own captions, and the prior's cosines."""
        chosen = _chosen(self.cfg, self.shards[split], split)
        indices, others = (rows[first : first + self.cfg.batch_size] for rows in (chosen, np.roll(chosen, 1)))
        prompts = [self.shards[split].captions(int(i))[0] for i in indices]
        generator = seeded(self.device, self.cfg.seed, split, first)
        made = self.system.generate(prompts, self.cfg.generation, generator=generator)
        true, unrelated = (
            self.features[split].image_embeds(rows).float().to(self.device) for rows in (indices, others)
        )
        drawn = self.system.clip.encode_image(self._at_clip_size(made.images))
        if self.inception is not None:
            real = to_float(image_batch(self.shards[split], indices, size=self.system.size).to(self.device))
            pairs = (inception_features(self.inception, images) for images in (made.upsampled, real))
            np.save(out / f"{INCEPTION}-{split}-{first:06d}.npy", torch.stack(list(pairs)).cpu().numpy())
        own = torch.from_numpy(indices).to(self.device) + (0 if split == "train" else len(self.features["train"]))
        return {
            "ranks": retrieval_ranks(drawn, self._pool(), own).tolist(),
            "ceiling": retrieval_ranks(true, self._pool(), own).tolist(),
            "prior_cosine": cosine(made.image_embeds, true).tolist(),
            "prior_cosine_unrelated": cosine(made.image_embeds, unrelated).tolist(),
        }

    def _at_clip_size(self, images: Tensor) -> Tensor:
        size = self.system.clip.cfg.image_size
        return images if images.shape[-1] == size else torch.nn.functional.interpolate(
            images, (size, size), mode="bicubic", antialias=True
        )  # fmt: skip

    def _pool(self) -> Tensor:
        """The text embeddings of the first captions of all samples: training ones, then held-out ones."""
        every = []
        for features in self.features.values():
            indices = np.arange(len(features))
            every.append(features.text(indices, np.zeros_like(indices))["text_embeds"].float())
        return torch.cat(every).to(self.device)

    def _validate(self, name: str) -> dict[str, Any]:
        """A stage's own held-out validation, once more, with the weights as they were committed."""
        folder = fetch(self.inputs[name])
        manifest = read_manifest(self.inputs[name].uri)
        assert manifest is not None, "inputs are committed"
        stage = load_stage(manifest.identity["stage"])
        cfg = stage.Config.model_validate(manifest.config)
        objective = stage.objective(cfg, self.inputs, self.device)
        part = self.inputs[name].kind
        state = load_weights(folder, kind=part, device=self.device).module.state_dict()
        objective.trainable[part].load_state_dict(state)
        objective.trainable[part].eval()
        held = stage.data(cfg, self.inputs).heldout
        size, count = cfg.train.validation_batch, cfg.observe.heldout_samples
        batches = sample_batches(held, count=count, batch_size=size, weights=cfg.train.source_weights)
        with autocast(self.device, products_of(cfg.train.precision, self.device)):
            moved = (to_device(batch, self.device) for batch in batches)
            result = objective.validate(moved, seeded(self.device, cfg.train.seed, "validate"))
        return {"metrics": {f"{name}/{key}": value for key, value in result.metrics.items()}}

    def _grid(self, out: Path) -> dict[str, Any]:
        """Two pictures: `grid.png` for training captions, `heldout.png` for subjects never seen."""
        for split, name in zip(SPLITS, ("grid.png", "heldout.png"), strict=True):
            indices = _chosen(self.cfg, self.shards[split], split)[:12]
            if split == "train" and self.cfg.grid:
                indices = find_captions(self.shards[split], self.cfg.grid)
            Image.fromarray(self._rows(split, indices)).save(out / name)
        return {}

    def _rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        cfg, system = self.cfg.generation, self.system
        prompts = [self.shards[split].captions(int(i))[0] for i in indices]
        generator = seeded(self.device, self.cfg.seed, "grid", split)
        text = system.encode_text(prompts)
        true = self.features[split].image_embeds(indices).float().to(self.device)
        latents = self.features[split].latents(indices).float().to(self.device)
        columns = {
            "training example" if split == "train" else "held-out example": image_batch(
                self.shards[split], indices, size=system.size
            ),
            "autoencoder": to_uint8(system.autoencoder.decode(system.latent_statistics.restore(latents), fp32=True)),
        }
        images = system.decode(system.prior_embeds(text, cfg, generator=generator), text, cfg, generator=generator)
        if self.system.prior:
            columns["decoder from true embedding"] = to_uint8(system.decode(true, text, cfg, generator=generator))
        columns["decoder from prior" if self.system.prior else "decoder"] = to_uint8(images)
        for enlarged in system.enlarge(images, cfg, generator=generator):
            columns[f"upsampled to {enlarged.shape[-1]} px"] = to_uint8(enlarged)
        rows = list(zip(*(hwc(column) for column in columns.values()), strict=True))
        return labeled_grid(rows, captions=prompts, columns=list(columns), cell=max(CELL, system.size))


def find_captions(dataset: ShardDataset, captions: Sequence[str]) -> np.ndarray:
    """The samples with these first captions. Raises ValueError that names the nearest caption there is."""
    index = {dataset.captions(i)[0]: i for i in range(len(dataset))}
    for caption in captions:
        if caption not in index:
            near = difflib.get_close_matches(caption, index, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"stages.evaluate.grid: no training sample has the caption {caption!r}{hint}")
    return np.asarray([index[caption] for caption in captions])


def merge_parts(cfg: Config, made: Storage, results: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """With the Fréchet distances, from the Inception features that the parts left beside their results."""
    if cfg.fid is None:
        return results
    distances = dict(_fid(made, split) for split in SPLITS)
    return [*results[:-1], {**results[-1], "metrics": {**results[-1].get("metrics", {}), **distances}}]


def _fid(made: Storage, split: Split) -> tuple[str, float]:
    """Name and value of a split's distance between pictures and the images whose captions they were drawn for."""
    keys = [entry.key for entry in made.list(f"{INCEPTION}-{split}-")]
    pictures, images = (
        reduce(operator.add, (FeatureMoments.of(_features(made, key)[which]) for key in keys)) for which in (0, 1)
    )
    return f"{split}/fid_{pictures.count}", frechet_distance(pictures, images)


def _features(made: Storage, key: str) -> Tensor:
    """fp32 [2, B, 2048]: of the pictures of a part, and of the images that have their captions."""
    return torch.from_numpy(np.load(io.BytesIO(made.read(key)), allow_pickle=False))


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    metrics: dict[str, float] = {}
    for result in results:
        metrics |= result.get("metrics", {})
    for split, done in zip(SPLITS, _by_split(cfg, inputs, results), strict=True):
        ranks, ceiling = (torch.tensor([rank for r in done for rank in r[name]]) for name in ("ranks", "ceiling"))
        for k in cfg.recall_at:
            metrics[f"{split}/recall_at_{k}"] = recall_at(ranks, k)
            metrics[f"{split}/ceiling_at_{k}"] = recall_at(ceiling, k)
        for name in COSINES if "prior" in inputs else ():
            metrics[f"{split}/{name}"] = float(np.mean([value for r in done for value in r[name]]))
        metrics[f"{split}/prompts"] = float(len(ranks))
    metrics["pool"] = float(sum(len(open_shards(inputs["shard"], split=split)) for split in SPLITS))
    return {}, metrics


def _by_split(cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    named = list(zip(parts(cfg, inputs), results, strict=True))
    return [[result for part, result in named if part.startswith(f"prompts {split} ")] for split in SPLITS]
