"""A diffusion process as a setting: what a stage trains with is what samples from its weights.

Shape legend: B batch; x is [B, ...]. Times t lie in [0, 1], noise at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genpipe.config import Config
from genpipe.diffusion.losses import diffusion_loss, min_snr_weight
from genpipe.diffusion.parameterizations import Predict, check_predict, target, to_x0
from genpipe.diffusion.samplers import Denoise, ddim, heun
from genpipe.diffusion.schedules import Schedule, TimeSampling, add_noise, alpha_sigma, sample_t, timesteps

Model = Callable[[Tensor, Tensor], Tensor]
"""A network with its conditions bound: (x_t [B, ...], t [B]) -> prediction [B, ...]."""

FIXED_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where held-out losses are measured, so that they compare across runs."""


class DiffusionConfig(Config):
    """Schedule, what the network predicts, and how training times are drawn and weighted."""

    schedule: Schedule = "flow"
    predict: Predict = "flow"
    time_sampling: TimeSampling = "logit_normal"
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weight; none: unweighted")

    @model_validator(mode="after")
    def _defined(self) -> DiffusionConfig:
        check_predict(self.predict, schedule=self.schedule)
        return self


class SamplerConfig(Config):
    """How a sample is drawn."""

    kind: Literal["ddim", "heun"] = "ddim"
    steps: int = Field(25, ge=1)
    shift: float = Field(1.0, gt=0, description="above 1 spends more of the steps at high noise")
    guidance_scale: float = Field(1.0, ge=0, description="1 is the conditional model alone")


def training_loss(model: Model, x0: Tensor, cfg: DiffusionConfig, *, generator: torch.Generator) -> Tensor:
    """The loss of each sample at a random time, fp32 [B]."""
    t_B = sample_t(len(x0), kind=cfg.time_sampling, generator=generator, device=x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    return loss_at(model, x0, cfg, t_B=t_B, noise=noise, gamma=cfg.min_snr_gamma)


def fixed_time_losses(
    model: Model, x0: Tensor, cfg: DiffusionConfig, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """The unweighted loss of each sample at each of FIXED_TIMES, fp32 [B] by name, and their mean as `loss`."""
    losses = {}
    for t in FIXED_TIMES:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        losses[f"loss_t{t}"] = loss_at(model, x0, cfg, t_B=x0.new_full((len(x0),), t), noise=noise, gamma=None)
    return {**losses, "loss": torch.stack(list(losses.values())).mean(0)}


def loss_at(
    model: Model, x0: Tensor, cfg: DiffusionConfig, *, t_B: Tensor, noise: Tensor, gamma: float | None
) -> Tensor:
    """The loss of each sample at given times and noise, fp32 [B]; min-SNR weighted if `gamma` is given."""
    alpha, sigma = alpha_sigma(t_B, cfg.schedule)
    pred = model(add_noise(x0, noise=noise, t=t_B, schedule=cfg.schedule), t_B)
    weight = None if gamma is None else min_snr_weight(cfg.predict, alpha=alpha, sigma=sigma, gamma=gamma)
    return diffusion_loss(pred, target(cfg.predict, x0=x0, noise=noise, alpha=alpha, sigma=sigma), weight=weight)


def denoiser(model: Model, cfg: DiffusionConfig) -> Denoise:
    """The network as an estimate of x0, whatever it predicts."""

    def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t_B, cfg.schedule)
        return to_x0(cfg.predict, pred=model(x_t, t_B).float(), x_t=x_t, alpha=alpha, sigma=sigma)

    return denoise


def sample(denoise: Denoise, noise: Tensor, cfg: SamplerConfig, *, schedule: Schedule) -> Tensor:
    """Draw x0 of the shape of `noise`, deterministically given the noise."""
    sampler = {"ddim": ddim, "heun": heun}[cfg.kind]
    return sampler(denoise, noise, timesteps(cfg.steps, shift=cfg.shift), schedule=schedule)
