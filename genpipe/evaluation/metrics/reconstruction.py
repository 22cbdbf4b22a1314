"""How well an autoencoder gives back real pictures: the bound of every system that draws its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import Config
from genpipe.data.order import order
from genpipe.data.shards import Split
from genpipe.evaluation.fidelity import frechet_distance
from genpipe.evaluation.metrics.features import moments_of_files, save_features
from genpipe.evaluation.metrics.metric import REFERENCE, Evaluation, Measure, Partial, check_file, part_of
from genpipe.evaluation.networks import inception_features, load_inception, load_lpips
from genpipe.evaluation.per_sample import Better, write_values
from genpipe.evaluation.reconstruction import reconstruction_scores
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.lpips import SMALLEST
from genpipe.pinned_files import PinnedFile
from genpipe.storage import Storage
from genpipe.weights import load_weights

SIDES = ("real", "recon")


class ReconstructionConfig(Config):
    """PSNR and SSIM of an autoencoder's reconstructions; LPIPS and rFID where their networks are given.

    It gives `reconstruction/psnr` (dB), `reconstruction/ssim`, `reconstruction/lpips`, `reconstruction/rfid_N`, over
    N pictures of the reference at the size that the autoencoder was trained at, encoded to the mean of the posterior.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    split: Split = Field("heldout", description="of the reference, whose pictures are reconstructed")
    pictures: int = Field(1000, ge=1, description="of the split, chosen at random; all, if it has fewer")
    lpips: PinnedFile | None = Field(None, description="VGG16 and heads; see docs/methods.md")
    inception: PinnedFile | None = Field(None, description="FID's Inception as TorchScript")

    def roles(self) -> dict[str, Role]:
        """The reference and the autoencoder; no generated pictures."""
        return {**REFERENCE, "autoencoder": Role("autoencoder")}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Those whose networks are given."""
        given = {"psnr": True, "ssim": True, "lpips": self.lpips, "rfid_*": self.inception}
        return [f"reconstruction/{name}" for name, network in given.items() if network]

    def per_sample(self) -> dict[str, Better]:
        """All of each picture, but no distance of two sets."""
        better: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "lpips": "lower"}
        return {f"reconstruction/{name}": of for name, of in better.items() if name != "lpips" or self.lpips}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError for pictures that are too small for LPIPS, and for files of networks that are others."""
        for name in ("lpips", "inception"):
            if (file := getattr(self, name)) is not None:
                check_file(file, setting=f"metrics.reconstruction.{name}")
        size = inputs["autoencoder"].meta["image_size"]
        if self.lpips and size < SMALLEST:
            raise ValueError(
                f"metrics.reconstruction.lpips: needs images of {SMALLEST} px, the autoencoder's have {size}; remove it"
            )

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Parts of the chosen pictures."""
        length = len(evaluation.reference.range_of(self.split))
        if not length:
            raise ValueError(f"metrics.reconstruction.split: the reference (role shard) has no {self.split} split")
        return evaluation.parts_of(self.split, min(self.pictures, length))

    def measure(self, evaluation: Evaluation) -> Measure:
        """Loads the autoencoder and the networks."""
        return _Measure(self, evaluation)

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """Means over the pictures, and the distance of the two sets."""
        count = sum(partial["pictures"] for partial in partials)
        names = partials[0]["sums"]
        metrics = {f"reconstruction/{name}": sum(p["sums"][name] for p in partials) / count for name in names}
        if self.inception:
            real, recon = (moments_of_files(files, f"{side}-") for side in SIDES)
            metrics[f"reconstruction/rfid_{count}"] = frechet_distance(recon, real)
        return metrics


class _Measure:
    """The autoencoder and the networks that judge it."""

    def __init__(self, cfg: ReconstructionConfig, evaluation: Evaluation) -> None:
        self.cfg, self.evaluation = cfg, evaluation
        artifact, device = evaluation.inputs["autoencoder"], evaluation.device
        self.model = cast(Autoencoder, load_weights(fetch(artifact), kind="autoencoder", device=device).module)
        self.size: int = artifact.meta["image_size"]
        self.lpips = load_lpips(cfg.lpips, device=device) if cfg.lpips else None
        self.inception = load_inception(cfg.inception, device=device) if cfg.inception else None

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> Partial:
        split, rows = part_of(part)
        of_split = self.evaluation.reference.range_of(split)
        found: dict[str, list[Tensor]] = {}
        keys: list[str] = []
        features: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for batch in self.evaluation.batches(rows):
            chosen = order(batch, n=len(of_split), seed=0)
            real = self.evaluation.originals(np.asarray(chosen) + of_split.start, size=self.size)
            recon = self.model.decode(self.model.encode(real)[0], fp32=True)
            keys += [self.evaluation.reference.datasets[split].key(int(row)) for row in chosen]
            for name, values_B in reconstruction_scores(recon, real, lpips=self.lpips).items():
                found.setdefault(name, []).append(values_B.double().cpu())
            if self.inception is not None:
                for side, images in zip(SIDES, (real, recon), strict=True):
                    features[side].append(inception_features(self.inception, images))
        if self.inception is not None:
            for side, batches in features.items():
                save_features(out / f"{side}-{rows.start:09d}.npy", batches)
        values = {name: torch.cat(batches) for name, batches in found.items()}
        write_values(
            out,
            f"reconstruction-{split}-{rows.start:09d}",
            {f"reconstruction/{name}": of.numpy() for name, of in values.items()},
            better=self.cfg.per_sample(),
            keys=keys,
            rows=rows,
            seed=None,
        )
        return {"pictures": len(rows), "sums": {name: float(of.sum()) for name, of in values.items()}}
