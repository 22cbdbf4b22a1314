"""What metrics are tested on: pictures with captions, generated ones, and a CLIP's view of them, all committed."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import Config
from genpipe.data.features import write_features
from genpipe.data.shards import NO_LABEL, ShardWriter, Split
from genpipe.evaluation.metrics.features import FeatureMetric, Features, FeatureWorker, parts_of_sets
from genpipe.evaluation.metrics.metric import Evaluation, Metric
from genpipe.lineage import content_digest
from genpipe.models.autoencoder import AutoencoderConfig, build_autoencoder
from genpipe.models.clip import CLIP, CLIPConfig
from genpipe.stages import evaluate
from genpipe.storage import open_storage
from genpipe.weights import save_weights

CPU = torch.device("cpu")
SIDE = 16
DIMS = 8
Pictures = Sequence[tuple[np.ndarray, str]]
"""uint8 [H, W, 3], and the caption, or several parted by `|`."""


def picture(seed: int) -> np.ndarray:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pictures(seeds: Sequence[int], captions: Sequence[str]) -> list[tuple[np.ndarray, str]]:
    """Pictures of these seeds."""
    return [(picture(seed), caption) for seed, caption in zip(seeds, captions, strict=True)]


@dataclass
class Gallery:
    """Commits artifacts to a folder."""

    store: Path

    def commit(
        self, kind: str, folder: Path, *, name: str = "", inputs: Mapping[str, Artifact] | None = None, **meta: Any
    ) -> Artifact:
        """What lies in a folder as an artifact of this kind, made from `inputs`."""
        inputs = inputs or {}
        identity = artifacts.identity(kind, version=1, settings={"name": name}, inputs=inputs)
        fingerprint = artifacts.fingerprint(identity)
        uri = artifacts.artifact_uri(str(self.store), kind, fingerprint)
        target = Artifact(kind=kind, uri=uri, fingerprint=fingerprint, meta=meta)
        open_storage(target.uri).delete_all()  # a manifest is never replaced
        return artifacts.commit(target, folder=folder, identity=identity, config={}, inputs=inputs, metrics={})

    def shards(
        self,
        splits: Mapping[Split, Pictures],
        *,
        kind: str = "shards",
        name: str = "",
        each: int = 4,
        inputs: Mapping[str, Artifact] | None = None,
        labels: Mapping[Split, Sequence[int]] | None = None,
        **meta: Any,
    ) -> Artifact:
        """Pictures as shards of `each` samples, with class labels if they are given."""
        with tempfile.TemporaryDirectory() as out:
            for split, samples in splits.items():
                with ShardWriter(Path(out), split=split, part=0, max_samples=each, max_bytes=2**30) as writer:
                    for number, (image, captions) in enumerate(samples):
                        file = io.BytesIO()
                        Image.fromarray(image).save(file, "PNG")
                        height, width = image.shape[:2]
                        writer.write(
                            f"s{number:03d}",
                            group=str(number),
                            image=file.getvalue(),
                            format="png",
                            height=height,
                            width=width,
                            captions=captions.split("|"),
                            label=labels[split][number] if labels else NO_LABEL,
                            meta={},
                        )
            return self.commit(kind, Path(out), name=name, inputs=inputs, **meta)

    def samples(self, splits: Mapping[Split, Pictures], clip: Artifact) -> Artifact:
        """Pictures that a system drew which a CLIP conditions."""
        with tempfile.TemporaryDirectory() as out:
            digests = {"made_from": {"clip": content_digest(clip)}}
            system = self.commit("system", Path(out), inputs={"clip": clip}, **digests)
        return self.shards(splits, kind="samples", inputs={"system": system})

    def clip(self, *, dims: int = DIMS, name: str = "") -> Artifact:
        """A CLIP that nobody trained."""
        tower = {"width": 16, "depth": 1, "heads": 2}
        sizes = {"embed_dim": dims, "image_size": SIDE, "patch_size": 4, "image": tower, "text": tower}
        torch.manual_seed(0)
        cfg = CLIPConfig.model_validate(sizes)
        vocabulary = {"vocab_size": 8, "context_length": 4, "eot_id": 2}
        return self.weights("clip", CLIP(cfg, **vocabulary), cfg, sizes=vocabulary, name=name, clip_image_size=SIDE)

    def autoencoder(self, **settings: Any) -> Artifact:
        """An autoencoder that nobody trained."""
        cfg = TypeAdapter(AutoencoderConfig).validate_python(settings)
        torch.manual_seed(0)
        return self.weights("autoencoder", build_autoencoder(cfg), cfg, sizes={}, image_size=SIDE)

    def weights(self, kind: str, module: nn.Module, cfg: Config, *, sizes: dict[str, int], **meta: Any) -> Artifact:
        """The weights of a module."""
        with tempfile.TemporaryDirectory() as out:
            save_weights(module, Path(out), kind=kind, config=cfg, sizes=sizes, extra={})
            return self.commit(kind, Path(out), **meta)

    def features(
        self, shard: Artifact, clip: Artifact, splits: Mapping[Split, tuple[np.ndarray, np.ndarray]], *, each: int = 4
    ) -> Artifact:
        """A cache of image and text embeddings [N, D], unit vectors, one caption a sample, in shards of `each`."""
        with tempfile.TemporaryDirectory() as out:
            for split, (images, texts) in splits.items():
                for shard_number, first in enumerate(range(0, len(images), each)):
                    here = slice(first, first + each)
                    count = len(images[here])
                    arrays = {
                        "keys": np.asarray([f"s{i:03d}" for i in range(first, first + count)]),
                        "latents": np.zeros((count, 1, 1, 1, 1), np.float32),
                        "image_embeds": images[here, None].astype(np.float32),
                        "text_embeds": texts[here].astype(np.float32),
                        "text_encodings": np.zeros((count, 1), np.float32),
                        "caption_offsets": np.arange(count + 1),
                        "token_offsets": np.arange(count + 1),
                    }
                    write_features(Path(out, f"{split}-00000-{shard_number:02d}"), arrays)
            made = {name: content_digest(artifact) for name, artifact in {"shard": shard, "clip": clip}.items()}
            lineage = {"shard": shard.fingerprint, "clip": clip.fingerprint}
            return self.commit("features", Path(out), name=shard.fingerprint, made_from=made, **lineage)


def unit(rows: int, *, seed: int) -> np.ndarray:
    """Random unit vectors float32 [rows, DIMS]."""
    return F.normalize(torch.randn(rows, DIMS, generator=torch.Generator().manual_seed(seed)), dim=-1).numpy()


def features_of(metric: FeatureMetric, of: Evaluation, out: Path) -> Features:
    """The features that a metric reads, each part computed by a worker of its own."""
    networks = [network for network, _ in metric.sets()]
    counts = []
    for number, part in enumerate(parts_of_sets(metric.sets(), of)):
        (folder := out / "parts" / str(number)).mkdir(parents=True)
        counts.append(FeatureWorker(networks, of)(part, folder))
        shutil.copytree(folder, out, dirs_exist_ok=True)
    return Features(open_storage(str(out)), counts)


def evaluation(inputs: Mapping[str, Artifact], *, part_size: int = 5, batch_size: int = 2) -> Evaluation:
    """On the CPU, in small parts."""
    return Evaluation(
        inputs=inputs,
        part_size=part_size,
        batch_size=batch_size,
        device=CPU,
        validate=evaluate.validate,
        pixel_model=evaluate.pixel_model,
    )


def measured(
    metric: Metric | FeatureMetric, inputs: Mapping[str, Artifact], out: Path, **sizes: int
) -> dict[str, float]:
    """The numbers of a metric, its files in `out`."""
    out.mkdir(exist_ok=True)
    of = evaluation(inputs, **sizes)
    metric.check_inputs(inputs)
    if isinstance(metric, FeatureMetric):
        metric.check(of)
        return metric.score(features_of(metric, of, out), of, out)
    measure = metric.measure(of)
    partials = [measure(part, out) for part in metric.parts(of)]
    return metric.merge(partials, open_storage(str(out)))
