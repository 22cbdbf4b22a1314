"""sample: a system and a list of prompts to pictures, as ordinary shards.

A data stage: a part is a batch of prompts of one split. A sample of the shards is a picture, with its prompt as the
caption; its `meta` says how it came to be: `seed`, `batch` (the first picture drawn together with it), `prompt` (the
place of its prompt in the list) and `reference` (the key of the sample whose caption the prompt is, if it is one).

What drawing cost is among the metrics (`speed/...`): of the day on which it was drawn, and no part of what was made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field

from genpipe.artifacts import Artifact, Role, find
from genpipe.data.image_batches import to_uint8
from genpipe.data.images import ImageFormat, encode
from genpipe.data.shards import SPLITS, ShardWriter, Split, write_rejects, write_statistics
from genpipe.data.sheets import contact_sheet
from genpipe.generation.conditions import Conditions
from genpipe.generation.prompts import (
    CaptionPrompts,
    ListPrompts,
    Prompt,
    PromptsConfig,
    check_prompts,
    needs_shards,
    open_prompts,
    prompts_digest,
)
from genpipe.generation.speed import Meter, parameters_of, peak_bytes, speed_metrics
from genpipe.generation.systems import load_system
from genpipe.lineage import clips_behind
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.release.record import machine_of
from genpipe.stage_config import StageConfig
from genpipe.training.stream import seeded

VERSION = 1
MAKES = "samples"
HEADLINES = ("samples_train", "samples_combinations", "samples_heldout")

PREVIEW_IMAGES = 64
PREVIEW_CELL = 128


class Config(StageConfig):
    """What is drawn, how often, and how it is stored."""

    prompts: PromptsConfig = Field(CaptionPrompts(), description="what is drawn")
    each: int = Field(1, ge=1, description="pictures of each prompt")
    batch_size: int = Field(32, ge=1, description="pictures drawn at a time, of one part and one shard")
    format: ImageFormat = Field("png", description="of the stored pictures")
    quality: int = Field(95, ge=1, le=100, description="of jpeg and webp; png is lossless")
    precision: Precision = Field("auto", description="of matrix products")
    seed: int = Field(0, description="of the choice of captions and of all noise")


def roles(cfg: Config) -> dict[str, Role]:
    """The system, and the shards if the prompts are captions of theirs."""
    shard = {"shard": Role("shards", "samples")} if needs_shards(cfg.prompts) else {}
    return {"system": Role("system"), **shard}


def source_digest(cfg: Config) -> str:
    """The digest of a prompt file."""
    return prompts_digest(cfg.prompts)


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What shards promise: `image_size`, and `classes` where they are known; `clips`, those behind the system.

    Raises ValueError for prompts that do not say what the system is conditioned on and, once the shards are there, for
    captions that no sample has.
    """
    system, shard = inputs["system"], inputs.get("shard")
    check_prompts(cfg.prompts, system=system, shard=shard)
    if isinstance(cfg.prompts, ListPrompts) and shard is not None and find(shard.uri) is not None:
        open_prompts(cfg.prompts, shard=shard, classes=(), seed=cfg.seed)
    promised = {"image_size": system.meta["size"], "condition": False, "clips": sorted(clips_behind(system))}
    labels_of = shard if shard is not None else system
    return {**promised, "classes": labels_of.meta["classes"]} if "classes" in labels_of.meta else promised


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """`SPLIT FIRST` for each batch: FIRST is the number of its first picture among those of the split."""
    counts = {split: len(prompts) * cfg.each for split, prompts in _prompts(cfg, inputs).items()}
    batches = [f"{split} {first}" for split, count in counts.items() for first in range(0, count, cfg.batch_size)]
    if not batches:
        raise ValueError("prompts: there is nothing to draw; ask for at least one")
    return batches


def _prompts(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[Split, Sequence[Prompt]]:
    classes = inputs["system"].meta.get("classes", ())
    return open_prompts(cfg.prompts, shard=inputs.get("shard"), classes=classes, seed=cfg.seed)


class Worker:
    """Loads the whole system once; a call draws one batch and writes it as a shard, while another call draws."""

    parts_at_once = 2

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.turn = threading.Lock()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.prompts = _prompts(cfg, inputs)
        self.products = products_of(cfg.precision, self.device)
        self.environment = {"precision_used": self.products, "hardware": machine_of(self.device).hardware}
        self.system = load_system(inputs["system"], device=self.device)
        self.parameters = parameters_of(inputs["system"])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Write the shard of a batch and, of the first of each split, a contact sheet; its statistics."""
        name, start = part.split()
        split, first = cast(Split, name), int(start)
        prompts = self.prompts[split]
        numbers = range(first, min(first + self.cfg.batch_size, len(prompts) * self.cfg.each))
        batch = [prompts[number // self.cfg.each] for number in numbers]
        meter = Meter(self.system)
        with self.turn, meter.running():
            pictures = self._drawn(split, first, batch)
        limits = {"max_samples": len(batch), "max_bytes": 2**62}
        with ShardWriter(out, split=split, part=first // self.cfg.batch_size, **limits) as writer:
            for number, prompt, picture in zip(numbers, batch, pictures, strict=True):
                self._write(writer, prompt, picture, number=number, first=first)
        if first == 0:
            self._preview(out / f"preview-{split}.png", batch, pictures)
        cost = {
            "pictures": len(batch),
            "seconds": meter.seconds,
            "evaluated": dict(meter.evaluated),
            "peak_bytes": peak_bytes(self.device),
            "parameters": self.parameters,
        }
        return {"shards": writer.shards, "cost": cost}

    @torch.no_grad()
    def _drawn(self, split: Split, first: int, batch: Sequence[Prompt]) -> list[np.ndarray]:
        """Pictures of a batch, uint8 [H, W, 3]: the same whichever worker draws it."""
        asked = self.system.conditioned_on
        conditions = Conditions(
            len(batch),
            texts=[prompt.text for prompt in batch] if "text" in asked else None,
            labels=[prompt.label for prompt in batch] if "label" in asked else None,
        )
        generator = seeded(self.device, self.cfg.seed, split, first)
        with autocast(self.device, self.products):
            images = self.system.sample(conditions, generator=generator)
        return list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())

    def _write(self, writer: ShardWriter, prompt: Prompt, picture: np.ndarray, *, number: int, first: int) -> None:
        height, width = picture.shape[:2]
        facts = {"seed": self.cfg.seed, "batch": first, "prompt": number // self.cfg.each}
        writer.write(
            f"{writer.split}-{number:08d}",
            group=prompt.group or prompt.text,
            image=encode(picture, format=self.cfg.format, quality=self.cfg.quality),
            format=self.cfg.format,
            height=height,
            width=width,
            captions=[prompt.text],
            label=prompt.label,
            meta={**facts, "reference": prompt.reference} if prompt.reference else facts,
        )

    def _preview(self, path: Path, batch: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> None:
        few, captions = pictures[:PREVIEW_IMAGES], [prompt.text for prompt in batch[:PREVIEW_IMAGES]]
        cell = max(PREVIEW_CELL, min(256, len(few[0])))
        path.write_bytes(contact_sheet(few, columns=min(8, len(few)), cell=cell, captions=captions))


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The samples' meta and metrics, with the tables that shards have."""
    shards = [shard for result in results for shard in result["shards"]]
    drawn = {shard["split"] for shard in shards}
    splits = [split for split in SPLITS if split != "combinations" or split in drawn]
    by_split = {split: [shard for shard in shards if shard["split"] == split] for split in splits}
    samples = {split: sum(shard["samples"] for shard in of_split) for split, of_split in by_split.items()}
    write_statistics(out, shards)
    write_rejects(out, [], name="00000")
    meta = {
        **check_inputs(cfg, inputs),
        "format": cfg.format,
        "samples": samples,
        "shards": {split: sorted(shard["name"] for shard in of_split) for split, of_split in by_split.items()},
        "rejected": {},
    }
    metrics = {f"samples_{split}": float(count) for split, count in samples.items()}
    metrics["bytes"] = float(sum(shard["bytes"] for shard in shards))
    costs = [result["cost"] for result in results if "cost" in result]  # an earlier genpipe drew the others
    return meta, {**metrics, **(speed_metrics(costs) if costs else {})}
