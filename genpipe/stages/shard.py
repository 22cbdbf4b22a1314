"""shard: a source's images and captions to WebDataset tars with indexes and a ledger of rejects.

A data stage: the parts are slices of the source, and each is written by one call of `Worker`. Every sample of
the source is either in a shard or in the ledger. Files of part p: `{train,heldout}-{p:05d}-{k:02d}.tar` with
their `.index.parquet`, `rejects-{p:05d}.parquet`, and beside part 0 a contact sheet, `preview.png`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from genpipe.artifacts import Artifact, fetch
from genpipe.config import StageConfig
from genpipe.data.images import ImageError, ImageFormat, contact_sheet, encode, prepare
from genpipe.data.samples import Reject, Sample
from genpipe.data.shards import SPLITS, ShardWriter, Split, split_of, write_rejects
from genpipe.data.sources import SourceConfig, open_source
from genpipe.data.stream import ShardDataset, image_batch
from genpipe.training.objective import Data
from genpipe.training.objective import Split as DataSplit

VERSION = 1
CONSUMES: tuple[str, ...] = ()
PREVIEW_IMAGES = 64


class Config(StageConfig):
    """Every image becomes a square of `image_size`: the centre crop, resized with antialiasing."""

    source: SourceConfig
    image_size: int = Field(64, ge=8, description="side of the stored images in pixels")
    format: ImageFormat = "jpeg"
    quality: int = Field(95, ge=1, le=100, description="of jpeg and webp; png is lossless")
    max_image_pixels: int = Field(2**26, gt=0, description="larger source images are rejected undecoded")
    heldout_fraction: float = Field(0.05, gt=0, lt=1, description="share of subjects kept from training")
    split_seed: int = 0
    part_size: int = Field(10_000, gt=0, description="samples in a part of work and at most in a shard")
    max_shard_bytes: int = Field(256 * 2**20, gt=0, description="a larger part is written as several shards")


def external(cfg: Config) -> str:
    """The digest of the source's listing, which lies outside the pipeline."""
    return open_source(cfg.source, part_size=cfg.part_size).digest()


def agree(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What consumers may rely on before the stage has run."""
    return {"image_size": cfg.image_size}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The source's parts. Raises ValueError for a source that is missing, empty or without captions."""
    return open_source(cfg.source, part_size=cfg.part_size).parts()


class Worker:
    """Lists the source once, then writes one part a call."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.source = open_source(cfg.source, part_size=cfg.part_size)
        self.number = {part: number for number, part in enumerate(self.source.parts())}

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Write the part's shards and ledger into `out`; its counts: samples_in = written + rejected."""
        number = self.number[part]
        rejects: list[Reject] = []
        keys: set[str] = set()
        preview: list[np.ndarray] = []
        samples_in = captions = 0
        with self._writer(out, "train", number) as train, self._writer(out, "heldout", number) as heldout:
            writers = {"train": train, "heldout": heldout}
            for item in self.source.read(part):
                samples_in += 1
                if isinstance(item, Reject):
                    rejects.append(item)
                    continue
                image = self._prepare(item, keys=keys)
                if isinstance(image, Reject):
                    rejects.append(image)
                    continue
                writers[self._split(item)].write(
                    item.key,
                    group=item.group,
                    image=encode(image, format=self.cfg.format, quality=self.cfg.quality),
                    format=self.cfg.format,
                    captions=item.captions,
                    meta=item.meta,
                )
                keys.add(item.key)
                captions += len(item.captions)
                if number == 0 and len(preview) < PREVIEW_IMAGES:
                    preview.append(image)
        write_rejects(out, rejects, part=number)
        if preview:
            (out / "preview.png").write_bytes(contact_sheet(preview, columns=8))
        return {
            "samples_in": samples_in,
            "captions": captions,
            "rejected": dict(sorted(Counter(reject.reason for reject in rejects).items())),
            "shards": [*train.shards, *heldout.shards],
        }

    def _writer(self, out: Path, split: Split, number: int) -> ShardWriter:
        limits = {"max_samples": self.cfg.part_size, "max_bytes": self.cfg.max_shard_bytes}
        return ShardWriter(out, split=split, part=number, **limits)

    def _split(self, sample: Sample) -> Split:
        return split_of(sample.group, heldout_fraction=self.cfg.heldout_fraction, seed=self.cfg.split_seed)

    def _prepare(self, sample: Sample, *, keys: set[str]) -> np.ndarray | Reject:
        source = str(sample.meta.get("file_name", sample.key))
        if sample.key in keys:
            return Reject(sample.key, source, "duplicate_key", "an earlier sample of this part has the key")
        try:
            return prepare(sample.image, size=self.cfg.image_size, max_pixels=self.cfg.max_image_pixels)
        except ImageError as error:
            return Reject(sample.key, source, error.reason, error.detail)


def finish(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The dataset's meta and metrics. Raises ValueError if a split that was asked for came out empty."""
    shards = [shard for result in results for shard in result["shards"]]
    by_split = {split: [shard for shard in shards if shard["split"] == split] for split in SPLITS}
    samples = {split: sum(shard["samples"] for shard in of_split) for split, of_split in by_split.items()}
    rejected: Counter[str] = sum((Counter(result["rejected"]) for result in results), Counter())
    samples_in = sum(result["samples_in"] for result in results)
    written = sum(samples.values())
    assert samples_in == written + rejected.total(), "every sample is in a shard or in the ledger"
    if not samples["train"]:
        why = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none rejected"
        raise ValueError(
            f"source: none of the {samples_in} samples is left to train on ({why}; {samples['heldout']} held "
            "out); look at the images and captions, or lower heldout_fraction"
        )
    if not samples["heldout"]:
        raise ValueError(
            f"heldout_fraction {cfg.heldout_fraction} of {written} samples left nothing to validate on; "
            "raise it, add images, or change split_seed"
        )
    meta = {
        **agree(cfg, inputs),
        "format": cfg.format,
        "samples": samples,
        "shards": {split: sorted(shard["name"] for shard in of_split) for split, of_split in by_split.items()},
        "rejected": dict(sorted(rejected.items())),
    }
    metrics = {
        "samples_in": samples_in,
        "samples_train": samples["train"],
        "samples_heldout": samples["heldout"],
        "captions": sum(result["captions"] for result in results),
        "rejected": rejected.total(),
        "bytes": sum(shard["bytes"] for shard in shards),
        **{f"rejected_{reason}": count for reason, count in rejected.items()},
    }
    return meta, {name: float(value) for name, value in metrics.items()}


def check_image_size(shard: Artifact, size: int, *, setting: str) -> None:
    """Raise ValueError if a stage's `setting` asks for larger images than the shards hold."""
    stored = shard.meta["image_size"]
    if size > stored:
        raise ValueError(
            f"{setting} {size} is larger than the shards' {stored} px; lower it or raise stages.shard.image_size"
        )


def image_data(shard: Artifact, *, size: int) -> Data:
    """The images alone, as uint8 [B, 3, size, size]: what stages without captions train on."""
    folder = fetch(shard)

    def split(name: Split) -> DataSplit:
        dataset = ShardDataset(folder, split=name)
        return DataSplit(len(dataset), lambda indices, _: {"images": image_batch(dataset, indices, size=size)})

    return Data(train=split("train"), heldout=split("heldout"))
