"""A system without training: pictures of 4 x 4 pixels that are Gaussian, and the decoder that is exact for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genpipe.diffusion.process import DiffusionConfig, SamplerConfig
from genpipe.diffusion.schedules import alpha_sigma
from genpipe.generation.cascade import Cascade, CascadeConfig
from genpipe.generation.conditions import Conditions, Given

SIZE = 4
PIXELS = 3 * SIZE * SIZE
SCHEDULE = "cosine"


def covariance() -> Tensor:
    """Of the pixels of a picture, fp64 [48, 48]: neighbors and channels are correlated; the deviation is 0.2."""
    along = 0.8 ** (torch.arange(SIZE) - torch.arange(SIZE)[:, None]).abs().double()
    channels = torch.full((3, 3), 0.5).double().fill_diagonal_(1.0)
    return 0.04 * torch.kron(channels, torch.kron(along, along))


class GaussianDecoder(nn.Module):
    """Predicts x0 of pictures N(mean, covariance): it is conditioned on nothing."""

    embed_dim = text_width = classes = 0

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = mean
        self.variances, self.axes = torch.linalg.eigh(covariance())

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        """E[x0 | x_t], fp32 [B, 3, 4, 4]; all times of a batch are one."""
        alpha, sigma = alpha_sigma(t[0].double(), SCHEDULE)
        shares = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        off = x.flatten(1).double() - alpha * self.mean
        return (self.mean + off @ self.axes * shares @ self.axes.T).float().view_as(x)


class GaussianSystem:
    """One of pixels without upsamplers, whose pictures are not clamped, as the tails of the Gaussian would be."""

    device = torch.device("cpu")
    decoder_diffusion = DiffusionConfig(schedule=SCHEDULE, predict="x0")
    grid = (3, SIZE, SIZE)
    base_size = SIZE

    def __init__(self, sampler: SamplerConfig, *, mean: float = 0.2) -> None:
        self.decoder: Any = GaussianDecoder(mean)
        self.decoder_sampler = sampler
        self.cascade = Cascade(CascadeConfig(), {}, device=self.device)

    def given(self, conditions: Conditions, *, generator: torch.Generator) -> Given:
        """Nothing."""
        return Given()

    def encode(self, images: Tensor) -> Tensor:
        """As they are."""
        return images

    def decode(self, x0: Tensor) -> Tensor:
        """As they are."""
        return x0
