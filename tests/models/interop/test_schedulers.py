"""Samplers written as schedulers of diffusers: they take a fixed network to the same place, and the rest is refused."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import diffusers
import pytest
import torch
from torch import Tensor, nn

from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, denoiser, sample
from genpipe.models.interop.schedulers import to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

SAMPLERS: list[dict[str, Any]] = [
    {"kind": "ddim", "steps": 10},
    {"kind": "euler", "steps": 20},
    {"kind": "ddim", "steps": 10, "eta": 0.7},
    {"kind": "ddim", "steps": 7, "timesteps": "leading"},
    {"kind": "ddim", "steps": 10, "threshold": "static", "threshold_bound": 0.8},
    {"kind": "ddpm", "steps": 50, "threshold": "static"},
    {"kind": "ddpm", "steps": 9, "timesteps": "linspace"},
]
DIFFUSIONS: list[dict[str, Any]] = [
    {"schedule": "scaled_linear", "predict": "v"},
    {"schedule": "scaled_linear", "predict": "eps"},
    {"schedule": "cosine_iddpm", "predict": "x0"},
    {"schedule": "scaled_linear_zsnr", "predict": "v"},
    {"schedule": "linear", "predict": "v", "beta_end": 0.01, "steps": 500},
]


class Network(nn.Module):
    """A fixed random network of an image and a step's index."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + torch.sin(index.float() / 300.0).reshape(-1, 1, 1, 1)))


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
@pytest.mark.parametrize("process", DIFFUSIONS, ids=str)
@torch.no_grad()
def test_the_written_scheduler_takes_the_same_steps(process: dict[str, Any], settings: dict[str, Any]) -> None:
    """With the same noise, drawn in the same order; to 1e-4 of the largest number, as their table is fp32."""
    diffusion = DiffusionConfig(time_sampling="uniform", **process)
    sampler = SamplerConfig(**settings)
    written, net = to_diffusers(diffusion, sampler), Network()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(
        denoiser(lambda x, t: net(x, 1000.0 * t), diffusion),
        noise,
        sampler,
        diffusion=diffusion,
        generator=torch.Generator().manual_seed(1),
    )
    config, call = dict(written.config), dict(written.call)
    scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    scheduler.set_timesteps(call.pop("num_inference_steps"))
    x, generator = noise, torch.Generator().manual_seed(1)
    for index in scheduler.timesteps:
        x = scheduler.step(net(x, index.expand(2)), index, x, generator=generator, **call).prev_sample
    assert (x - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize(
    ("process", "settings", "named"),
    [
        ({"schedule": "flow", "predict": "flow"}, {}, "schedule flow"),
        ({"variance": "learned"}, {}, "learned variance"),
        ({}, {"kind": "heun"}, "heun"),
        ({}, {}, "unipc"),
        ({}, {"kind": "ddim", "steps": 7}, "7 do not divide 1000"),
        ({}, {"kind": "ddim", "timesteps": "linspace"}, "one length"),
        ({}, {"kind": "ddim", "timesteps": "karras"}, "evenly spaced"),
        ({}, {"kind": "ddpm", "variance": "large"}, "variance is small"),
        ({}, {"threshold": "dynamic"}, "dynamic"),
    ],
    ids=str,
)
def test_what_its_schedulers_do_otherwise_is_refused(
    process: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    diffusion = DiffusionConfig(**{"schedule": "scaled_linear", "predict": "eps", "time_sampling": "uniform"} | process)
    with pytest.raises(ValueError, match=named):
        to_diffusers(diffusion, SamplerConfig(**settings))
