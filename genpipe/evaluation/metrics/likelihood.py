"""How likely are real pictures to a diffusion model of pixels? Bits per dimension, by an ODE and by a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.order import order
from genpipe.data.shards import Split
from genpipe.data.train_sets import check_image_size
from genpipe.diffusion.bounds import FixedVariance, continuous_bound, stepwise_bound
from genpipe.diffusion.likelihood import bits_per_dimension, log_likelihood
from genpipe.diffusion.process import DiffusionConfig
from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import TABLES
from genpipe.evaluation.metrics.metric import REFERENCE, Evaluation, Measure, Partial, part_of
from genpipe.evaluation.per_sample import Better, write_values
from genpipe.storage import Storage

BIN = 2.0 / 255.0
"""From one value of 8-bit data in [-1, 1] to the next."""

Estimate = Literal["ode", "vlb"]


class LikelihoodConfig(Config):
    """Bits per dimension of real pictures under a system of pixels, given their labels or first captions.

    `likelihood/bits_per_dim_ode` is by the probability-flow ODE (Song et al. 2021), of pictures with uniform noise of
    one bin's width, which makes it a bound for the 8-bit pictures themselves. `likelihood/bits_per_dim_vlb` is the
    variational bound: for a table of betas, discrete times or a learned variance that of the model's steps (Ho et al.
    2020; Nichol & Dhariwal 2021), else that of infinitely many (Kingma et al. 2021). It is the decoder's, without
    guidance, which has no density of its own, and without upsamplers, at the side that the decoder draws.
    """

    kind: Literal["likelihood"] = "likelihood"
    estimates: tuple[Estimate, ...] = Field(("ode", "vlb"), min_length=1, description="which of the two")
    split: Split = Field("heldout", description="of the reference")
    pictures: PositiveInt = Field(1000, description="of the split, chosen at random; all, if it has fewer")
    ode_steps: PositiveInt = Field(50, description="of the ODE's solver: four evaluations and their gradients each")
    vlb_terms: PositiveInt = Field(64, description="terms of the bound that are measured for each picture")
    batch_size: PositiveInt = Field(16, description="pictures at a time: the ODE keeps what their gradients take")
    vlb_variance: FixedVariance = Field("small", description="of the bound's steps, unless the model learned it")

    def roles(self) -> dict[str, Role]:
        """The system and the reference; no generated pictures."""
        return {**REFERENCE, "system": Role("system")}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """One of each estimate."""
        return [_name(estimate) for estimate in self.estimates]

    def per_sample(self) -> dict[str, Better]:
        """All of each picture."""
        return {_name(estimate): "lower" for estimate in self.estimates}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError for a system of latents, of other classes than the reference has, or of larger pictures."""
        system, shard = inputs["system"].meta, inputs["shard"].meta
        if system["kind"] != "pixel":
            raise ValueError(
                f"metrics.likelihood: a system of kind {system['kind']} draws latents of an autoencoder, which say "
                "nothing of the density of pixels; measure a system of kind pixel, or leave the metric out"
            )
        if not any(role.startswith("upsamplers") for role in system["parts"]):
            check_image_size(inputs["shard"], system["size"], setting="metrics.likelihood: the system's size")
        if system.get("classes") and "classes" in shard and shard["classes"] != system["classes"]:
            raise ValueError(
                "metrics.likelihood: the reference (role shard) does not have the classes of the system; map the "
                "shards that it was trained on"
            )

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Parts of the chosen pictures."""
        length = len(evaluation.reference.range_of(self.split))
        if not length:
            raise ValueError(f"metrics.likelihood.split: the reference (role shard) has no {self.split} split")
        return evaluation.parts_of(self.split, min(self.pictures, length))

    def measure(self, evaluation: Evaluation) -> Measure:
        """Loads the system."""
        return _Measure(self, evaluation)

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """Means over the pictures."""
        count = sum(partial["pictures"] for partial in partials)
        return {name: sum(partial["sums"][name] for partial in partials) / count for name in partials[0]["sums"]}


class _Measure:
    """The system's model, and what it makes of pictures."""

    def __init__(self, cfg: LikelihoodConfig, evaluation: Evaluation) -> None:
        self.cfg, self.evaluation = cfg, evaluation
        self.model = evaluation.pixel_model(evaluation.inputs["system"], evaluation.device)

    def __call__(self, part: str, out: Path) -> Partial:
        split, rows = part_of(part)
        reference, dataset = self.evaluation.reference, self.evaluation.reference.datasets[split]
        found: dict[str, list[Tensor]] = {_name(estimate): [] for estimate in self.cfg.estimates}
        keys: list[str] = []
        for first in range(rows.start, rows.stop, self.cfg.batch_size):
            batch = np.arange(first, min(first + self.cfg.batch_size, rows.stop))
            chosen = np.asarray(order(batch, n=len(dataset), seed=0))
            images = self.evaluation.originals(chosen + reference.range_of(split).start, size=self.model.size)
            captions = [dataset.captions(int(row))[0] for row in chosen]
            denoise = self.model.told(captions, dataset.labels(chosen).tolist())
            for estimate in self.cfg.estimates:
                generator = torch.Generator(images.device).manual_seed(first)
                bits = self._bits(estimate, denoise, images, generator)
                found[_name(estimate)].append(bits.double().cpu())
            keys += [dataset.key(int(row)) for row in chosen]
        values = {name: torch.cat(batches).numpy() for name, batches in found.items()}
        name = f"likelihood-{split}-{rows.start:09d}"
        write_values(out, name, values, better=self.cfg.per_sample(), keys=keys, rows=rows, seed=None)
        return {"pictures": len(rows), "sums": {name: float(of.sum()) for name, of in values.items()}}

    def _bits(self, estimate: Estimate, denoise: Denoise, images: Tensor, generator: torch.Generator) -> Tensor:
        """Bits per dimension of 8-bit pictures [B, 3, S, S] in [-1, 1], fp32 [B]."""
        schedule = self.model.diffusion.noise_schedule
        if estimate == "ode":
            shift = torch.rand(images.shape, generator=generator, device=images.device) - 0.5
            log_p = log_likelihood(
                denoise, images + BIN * shift, schedule=schedule, steps=self.cfg.ode_steps, generator=generator
            )
            return bits_per_dimension(log_p, dimensions=images[0].numel(), bin_width=BIN)
        terms = self.cfg.vlb_terms
        if _has_steps(self.model.diffusion):
            variance = self.cfg.vlb_variance
            return stepwise_bound(
                denoise, images, schedule=schedule, terms=terms, generator=generator, variance=variance
            )
        return continuous_bound(denoise, images, schedule=schedule, terms=terms, generator=generator)


def _has_steps(diffusion: DiffusionConfig) -> bool:
    """Whether the model is of a process of a number of steps."""
    return diffusion.schedule in TABLES or diffusion.discrete or diffusion.variance == "learned"


def _name(estimate: Estimate) -> str:
    return f"likelihood/bits_per_dim_{estimate}"
