"""How close an autoencoder's reconstructions are to the images, summed up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genpipe.evaluation.fidelity import SSIM_WINDOW, FeatureMoments, frechet_distance, psnr, ssim
from genpipe.evaluation.networks import inception_features, lpips_distance
from genpipe.models.lpips import Lpips


def reconstruction_scores(images: Tensor, reference: Tensor, *, lpips: Lpips | None = None) -> dict[str, Tensor]:
    """`psnr` (dB), `ssim` and `lpips` of each reconstruction, fp32 [B]; both [B, 3, H, W] in [-1, 1].

    SSIM is left out below its window's size, LPIPS without its network.
    """
    found = {"psnr": psnr(images, reference)}
    if min(images.shape[-2:]) >= SSIM_WINDOW:
        found["ssim"] = ssim(images, reference)
    if lpips is not None:
        found["lpips"] = lpips_distance(lpips, images, reference)
    return found


class ReconstructionScores:
    """`reconstruction_scores` over many batches; rFID where Inception is given. Memory does not grow with features."""

    def __init__(self, *, lpips: Lpips | None = None, inception: nn.Module | None = None) -> None:
        self.lpips = lpips
        self.inception = inception
        self.values: dict[str, list[Tensor]] = {}
        self.moments: tuple[FeatureMoments, FeatureMoments] | None = None

    def add(self, images: Tensor, reference: Tensor) -> None:
        """One batch of reconstructions and of what they should be, [B, 3, H, W] in [-1, 1]."""
        for name, values_B in reconstruction_scores(images, reference, lpips=self.lpips).items():
            self.values.setdefault(name, []).append(values_B)
        if self.inception is not None:
            one, other = (FeatureMoments.of(inception_features(self.inception, part)) for part in (images, reference))
            self.moments = (self.moments[0] + one, self.moments[1] + other) if self.moments else (one, other)

    def metrics(self) -> dict[str, float]:
        """Means over the images; `rfid_N` over N of them, as a Frechet distance means nothing without its N."""
        found = {name: torch.cat(values).mean().item() for name, values in self.values.items()}
        if self.moments:
            found[f"rfid_{self.moments[0].count}"] = frechet_distance(*self.moments)
        return found
