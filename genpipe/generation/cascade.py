"""A chain of trained upsamplers: each enlarges what the one before it made (Ho et al. 2022, cascaded diffusion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, fetch, several
from genpipe.config import Config
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, UpsamplerSamplerConfig
from genpipe.generation.conditions import latent_statistics
from genpipe.generation.parts import check_part_sampler
from genpipe.generation.upsampling import Space, space_of, upsample
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.upsampler import Upsampler
from genpipe.weights import load_weights


class CascadeConfig(Config):
    """How the upsamplers of a system draw."""

    upsamplers: tuple[UpsamplerSamplerConfig, ...] = Field(
        (), description="one for each upsampler; default: 8 steps of ddim"
    )
    noise_aug: float = Field(0.1, ge=0, lt=1, description="noise level on the upsamplers' low_res")


class Step(NamedTuple):
    """A trained upsampler and how it draws. `size` is the side of what it makes, in pixels."""

    model: Upsampler
    diffusion: DiffusionConfig
    space: Space
    size: int
    sampler: SamplerConfig


class Cascade:
    """The upsamplers of a system, loaded; there may be none."""

    def __init__(
        self,
        cfg: CascadeConfig,
        parts: Mapping[str, Artifact],
        *,
        device: torch.device,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        """`autoencoder`, that of the parts, serves upsamplers that draw latents."""
        statistics = None if autoencoder is None else latent_statistics(parts["autoencoder"].meta, device)
        self.noise_aug = cfg.noise_aug
        self.steps: list[Step] = []
        for artifact, sampler in zip(several(parts, "upsamplers"), _samplers(cfg, parts), strict=True):
            module, extra = load_weights(fetch(artifact), kind="upsampler", device=device)
            space = space_of(extra, autoencoder=autoencoder, statistics=statistics)
            diffusion = DiffusionConfig.model_validate(extra["diffusion"])
            self.steps.append(Step(cast(Upsampler, module), diffusion, space, artifact.meta["image_size"], sampler))

    @torch.no_grad()
    def enlarge(self, images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
        """The images [B, 3, H, W] in [-1, 1] as each step of the cascade makes them."""
        made: list[Tensor] = []
        for step in self.steps:
            images = upsample(
                step.model,
                images,
                size=step.size,
                space=step.space,
                noise_aug=self.noise_aug,
                diffusion=step.diffusion,
                sampler=step.sampler,
                generator=generator,
            )
            made.append(images)
        return made


def check_cascade(cfg: CascadeConfig, parts: Mapping[str, Artifact], *, size: int) -> int:
    """The side of what the cascade makes of pictures of `size` pixels.

    Raises ValueError unless each step takes what the one below it makes, and draws as it was trained to.
    """
    below = "the pictures that it enlarges"
    if len(cfg.upsamplers) > (count := len(several(parts, "upsamplers"))):
        raise ValueError(
            f"model.upsamplers has {len(cfg.upsamplers)} samplers for {count} upsamplers; name the upsamplers in "
            "inputs.upsamplers, or remove samplers"
        )
    for i, (artifact, sampler) in enumerate(zip(several(parts, "upsamplers"), _samplers(cfg, parts), strict=True)):
        role = f"inputs.upsamplers[{i}]"
        if artifact.meta["low_size"] != size:
            raise ValueError(
                f"{role}: its low_size is {artifact.meta['low_size']}, but {below} are {size} px; train one with "
                f"low_size {size}, or order the upsamplers by size"
            )
        check_part_sampler(sampler, artifact, setting=f"model.upsamplers[{i}]")
        size, below = artifact.meta["image_size"], f"{role}'s"
    return size


def _samplers(cfg: CascadeConfig, parts: Mapping[str, Artifact]) -> Sequence[SamplerConfig]:
    """The sampler of each upsampler."""
    missing = len(several(parts, "upsamplers")) - len(cfg.upsamplers)
    return [*cfg.upsamplers, *[UpsamplerSamplerConfig()] * missing]
