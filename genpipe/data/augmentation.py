"""Views of training images that keep their captions true: a part of the image, enlarged, and perhaps mirrored.

Shape legend: B samples, C = 3 channels, S the side of a square image.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from genpipe.config import Config
from genpipe.data.order import uniform

_VIEW = 0x5851F42D4C957F2D  # keeps its draws apart from others at the same position


class Augmentation(Config):
    """Random resized crops (Szegedy et al. 2015) that stay square, as CLIPs are trained with, and mirror images."""

    least_area: float = Field(1.0, gt=0, le=1, description="a square of at least this share of the image is enlarged")
    flip: bool = Field(False, description="mirror half of the images; wrong where captions say left, right, or letters")

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.flip or self.least_area < 1

    def views(self, positions: np.ndarray, *, seed: int) -> Tensor:
        """What is shown of the samples at int64 [B] positions of the stream: float32 [B, 4].

        Left, top and side of the square, in shares of the image's side, and 1 for a mirror image, else 0. They follow
        from position and seed; areas are uniform in [least_area, 1].
        """
        area, left, top, mirrored = (uniform(positions, seed=seed, salt=_VIEW + i) for i in range(4))
        side = np.sqrt(self.least_area + (1 - self.least_area) * area)
        mirror = (mirrored < 0.5) if self.flip else np.zeros(len(side))
        return torch.from_numpy(
            np.stack([left * (1 - side), top * (1 - side), side, mirror], axis=1).astype(np.float32)
        )


def seen(images_BCSS: Tensor, views_B4: Tensor) -> Tensor:
    """Images as `views` shows them, float [B, C, S, S] of the same range: bilinear, as parts are only enlarged."""
    left, top, side, mirrored = views_B4.unbind(1)
    zero, sign = torch.zeros_like(side), 1 - 2 * mirrored
    # affine_grid maps [-1, 1] of the output to that of the input: to the square's middle, by its side.
    across = torch.stack([sign * side, zero, 2 * left + side - 1], dim=1)
    down = torch.stack([zero, side, 2 * top + side - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images_BCSS.shape), align_corners=False)
    return F.grid_sample(images_BCSS, grid.to(images_BCSS.dtype), padding_mode="border", align_corners=False)
