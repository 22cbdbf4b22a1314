"""How close an autoencoder's reconstructions are to the images, summed up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genpipe.evaluation.fidelity import SSIM_WINDOW, FeatureMoments, frechet_distance, psnr, ssim
from genpipe.evaluation.networks import inception_features, lpips_distance
from genpipe.models.lpips import Lpips


class ReconstructionScores:
    """PSNR and SSIM; LPIPS and rFID where their networks are given. Memory does not grow with features."""

    def __init__(self, *, lpips: Lpips | None = None, inception: nn.Module | None = None) -> None:
        self.lpips = lpips
        self.inception = inception
        self.values: dict[str, list[Tensor]] = {}
        self.moments: tuple[FeatureMoments, FeatureMoments] | None = None

    def add(self, images: Tensor, reference: Tensor) -> None:
        """One batch of reconstructions and of what they should be, [B, 3, H, W] in [-1, 1]."""
        self._append("psnr", psnr(images, reference))
        if min(images.shape[-2:]) >= SSIM_WINDOW:
            self._append("ssim", ssim(images, reference))
        if self.lpips is not None:
            self._append("lpips", lpips_distance(self.lpips, images, reference))
        if self.inception is not None:
            one, other = (FeatureMoments.of(inception_features(self.inception, part)) for part in (images, reference))
            self.moments = (self.moments[0] + one, self.moments[1] + other) if self.moments else (one, other)

    def _append(self, name: str, values_B: Tensor) -> None:
        self.values.setdefault(name, []).append(values_B)

    def metrics(self) -> dict[str, float]:
        """Means over the images; `rfid_N` over N of them, as a Frechet distance means nothing without its N."""
        found = {name: torch.cat(values).mean().item() for name, values in self.values.items()}
        if self.moments:
            found[f"rfid_{self.moments[0].count}"] = frechet_distance(*self.moments)
        return found
