"""PatchGAN discriminator (Isola et al. 2017) and the adversarial losses of VQGAN (Esser et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from genpipe.config import Config


class DiscriminatorConfig(Config):
    """Sizes; layers after the first double the channels (up to 8 times), all but the last halve it."""

    image_channels: PositiveInt = Field(3, description="channels of an image")
    width: int = Field(32, gt=0, multiple_of=8, description="channels of the first layer")
    layers: PositiveInt = Field(3, description="layers after the first; more of them see larger patches")
    norm: Literal["group", "batch"] = Field(
        "group", description="batch: as published, with its initialization; statistics are each rank's own"
    )


class Discriminator(nn.Module):
    """Scores overlapping patches: images [B, C, H, W] -> logits [B, 1, h, w] in fp32, high for real ones.

    By default GroupNorm replaces the paper's BatchNorm, so that scores depend neither on the micro-batch nor
    on the rank.
    """

    def __init__(self, cfg: DiscriminatorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(cfg.image_channels, cfg.width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = cfg.width
        for layer in range(1, cfg.layers + 1):
            wider = cfg.width * min(2**layer, 8)
            stride = 2 if layer < cfg.layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, wider) if cfg.norm == "group" else nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.net = nn.Sequential(*layers)
        if cfg.norm == "batch":
            self.apply(_initialize)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w] in fp32."""
        return self.net(images_BCHW).float()


def _initialize(module: nn.Module) -> None:
    """Convolutions from N(0, 0.02), gains from N(1, 0.02): pix2pix's (Isola et al. 2017, sec. 6.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017), a scalar."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def logits_right(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of patches classified correctly, scalars: of the real, and of the fake. 0.5 is chance."""
    return (real_logits > 0).float().mean(), (fake_logits < 0).float().mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the generator: minus the mean score, a scalar."""
    return -fake_logits.mean()


_SCALE = 2.0**10
"""Of gradients that are compared: a mean over pixels has such small ones that fp16 would lose them."""


def adaptive_weight(nll: Tensor, g_loss: Tensor, *, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """Factor on `g_loss` that gives it the gradient norm of `nll` at the decoder's last layer; VQGAN eq. 7.

    Both losses are scalars with a graph to `last_layer`, which is kept. Detached, in [0, limit].
    """
    (nll_grad,) = torch.autograd.grad(nll * _SCALE, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss * _SCALE, last_layer, retain_graph=True)
    return (nll_grad.norm() / (g_grad.norm() + 1e-4 * _SCALE)).clamp(0.0, limit).detach()
