"""Diffusion and sampler as a scheduler of diffusers: DDIMScheduler or DDPMScheduler, where it takes the same steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from genpipe.diffusion.parameterizations import Predict
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig
from genpipe.diffusion.schedules import BETAS, TABLES

_PREDICTION: dict[Predict, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine_iddpm": "squaredcos_cap_v2"}
_SPACING = {
    None: "trailing",
    "uniform": "trailing",
    "trailing": "trailing",
    "leading": "leading",
    "linspace": "linspace",
}


class Scheduler(NamedTuple):
    """A scheduler's config, its name under `_class_name`, and what its pipeline is called with to draw the same."""

    config: dict[str, Any]
    call: dict[str, Any]


def to_diffusers(diffusion: DiffusionConfig, sampler: SamplerConfig) -> Scheduler:
    """The scheduler that takes the same steps. Raises ValueError, saying what, where there is none."""
    if diffusion.schedule not in TABLES or diffusion.predict not in _PREDICTION:
        raise ValueError(
            f"its schedulers have tables of betas and predict eps, x0 or v, not schedule {diffusion.schedule} with "
            f"predict {diffusion.predict}"
        )
    if diffusion.variance == "learned" or sampler.threshold == "dynamic":
        raise ValueError("a learned variance, or a dynamic threshold, is not written")
    if sampler.kind not in ("ddim", "euler", "ddpm"):
        raise ValueError(f"the sampler {sampler.kind} is not written; ddim, euler and ddpm are")
    spacing, steps = _SPACING.get(sampler.timesteps), diffusion.steps
    if spacing is None or sampler.shift != 1.0:
        raise ValueError("its schedulers stop at evenly spaced steps of the table alone")
    config = {**_table(diffusion), **_bounds(sampler), "timestep_spacing": spacing}
    call: dict[str, Any] = {"num_inference_steps": sampler.steps}
    if sampler.kind == "ddpm":
        if sampler.variance != "small" or spacing == "leading" or (spacing == "trailing" and steps % sampler.steps):
            raise ValueError("its DDPM ends otherwise unless variance is small and the steps divide those of the table")
        return Scheduler({"_class_name": "DDPMScheduler", "variance_type": "fixed_small", **config}, call)
    if spacing == "linspace" or (spacing == "trailing" and steps % sampler.steps):
        raise ValueError(f"its DDIM takes steps of one length, and {sampler.steps} do not divide {steps} evenly")
    config |= {"set_alpha_to_one": spacing != "leading", "steps_offset": int(spacing == "leading")}
    call["eta"] = sampler.eta
    if sampler.threshold == "static":
        call["use_clipped_model_output"] = True
    return Scheduler({"_class_name": "DDIMScheduler", **config}, call)


def _table(diffusion: DiffusionConfig) -> dict[str, Any]:
    name = diffusion.schedule.removesuffix("_zsnr")
    config: dict[str, Any] = {
        "num_train_timesteps": diffusion.steps,
        "beta_schedule": _BETAS[name],
        "rescale_betas_zero_snr": name != diffusion.schedule,
        "prediction_type": _PREDICTION[diffusion.predict],
    }
    if diffusion.schedule in BETAS:
        start, end = BETAS[diffusion.schedule]
        config["beta_start"] = start if diffusion.beta_start is None else diffusion.beta_start
        config["beta_end"] = end if diffusion.beta_end is None else diffusion.beta_end
    return config


def _bounds(sampler: SamplerConfig) -> dict[str, Any]:
    return {"clip_sample": sampler.threshold == "static", "clip_sample_range": sampler.threshold_bound}
