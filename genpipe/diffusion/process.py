"""A diffusion process as a setting: what a stage trains with is what samples from its weights.

Shape legend: B batch, C channels; x is [B, C, ...]. Times t lie in [0, 1], noise at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from genpipe.config import Config
from genpipe.diffusion.guidance import GuidanceSchedule, Threshold, guided, scale_at, thresholded
from genpipe.diffusion.losses import diffusion_loss, edm_weight, min_snr_weight
from genpipe.diffusion.parameterizations import (
    SIGMA_DATA,
    Predict,
    check_predict,
    network_input,
    target,
    to_noise,
    to_x0,
)
from genpipe.diffusion.samplers import Denoise, Estimate, Variance, ddim, ddpm, heun, invert
from genpipe.diffusion.schedules import (
    BETAS,
    STEPS,
    TABLES,
    Schedule,
    ScheduleName,
    Table,
    add_noise,
    alpha_sigma,
    check_shift,
    expand_like,
    network_time,
    steps_of,
)
from genpipe.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc
from genpipe.diffusion.times import NORMAL, TimeGrid, TimeSampling, sample_t, timesteps
from genpipe.diffusion.variance import variational_loss

Model = Callable[[Tensor, Tensor], Tensor]
"""A network with its conditions bound: (input [B, C, ...], its time [B]) -> prediction [B, C or 2C, ...].

Input and time are what `network_input` and `network_time` make of x_t and t; on cosine and flow they are x_t and t.
"""

FIXED_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where held-out losses are measured, so that they compare across runs."""

VLB_WEIGHT = 0.001
"""Of the bound, in bits, beside the squared error (Nichol & Dhariwal 2021, eq. 16). One term stands for all steps."""


class DiffusionConfig(Config):
    """Schedule, what the network predicts, and how training times are drawn and weighted."""

    schedule: ScheduleName = Field(
        "flow",
        description="how much signal and noise there is at each time: a formula, or one of the papers' tables of betas",
    )
    steps: int = Field(STEPS, ge=2, description="how many betas there are, of a schedule that is a table")
    beta_start: float | None = Field(None, gt=0, lt=1, description="of linear and scaled_linear; none: as published")
    beta_end: float | None = Field(None, gt=0, lt=1, description="of linear and scaled_linear; none: as published")
    predict: Predict = Field(
        "flow", description="what the network gives: the noise, the data, a velocity, or EDM's preconditioned mix"
    )
    sigma_data: PositiveFloat = Field(
        SIGMA_DATA,
        description="the data's deviation, for schedule edm and variance analytic; 1 if standardized, 0.5 for pixels",
    )
    variance: Literal["fixed", "learned"] = Field("fixed", description="learned: the network has as many channels more")
    time_sampling: TimeSampling = Field(
        "logit_normal", description="distribution of the training times; discrete: the steps of the table"
    )
    time_mean: float | None = Field(None, description="of logit_normal and log_normal; none: the papers' 0 and -1.2")
    time_std: PositiveFloat | None = Field(None, description="of logit_normal and log_normal; none: the papers' 1, 1.2")
    shift: PositiveFloat = Field(1.0, description="above 1 trains more at high noise, for images of high resolution")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weight; none: unweighted")
    weighting: Literal["none", "edm"] = Field("none", description="edm: by the noise level, as Karras et al. 2022")

    @model_validator(mode="after")
    def _defined(self) -> DiffusionConfig:
        self._check_table()
        check_predict(self.predict, schedule=self.schedule)
        check_shift(self.shift, schedule=self.schedule)
        if self.min_snr_gamma is not None and self.weighting != "none":
            raise ValueError("min_snr_gamma and weighting are two weights for one loss: set one of them")
        if self.time_sampling not in NORMAL and (self.time_mean, self.time_std) != (None, None):
            raise ValueError(
                f"time_mean and time_std have no effect on time_sampling={self.time_sampling!r}: leave them out, or "
                f"use {' or '.join(NORMAL)}"
            )
        if self.variance == "learned" and self.schedule in ("flow", "edm"):
            raise ValueError(
                f"variance='learned' is that of DDPM's steps, which schedule={self.schedule!r} does not have: use a "
                "variance-preserving schedule, or variance='fixed'"
            )
        return self

    def _check_table(self) -> None:
        if self.steps != STEPS and self.schedule not in TABLES:
            raise ValueError(
                f"steps has no effect on schedule={self.schedule!r}, which is no table: leave it out, or use one of "
                f"{', '.join(TABLES)}"
            )
        if (self.beta_start, self.beta_end) != (None, None) and self.schedule not in BETAS:
            raise ValueError(
                f"beta_start and beta_end have no effect on schedule={self.schedule!r}: leave them out, or use one of "
                f"{', '.join(BETAS)}"
            )

    @property
    def noise_schedule(self) -> Schedule:
        """The schedule as functions take it: by its name, or a table where its steps or betas are others."""
        table = Table(self.schedule, self.steps, self.beta_start, self.beta_end) if self.schedule in TABLES else None
        return self.schedule if table is None or table == Table(table.name) else table

    @property
    def discrete(self) -> bool:
        """Whether the network knows the times i / steps alone."""
        return self.time_sampling == "discrete"

    def channels(self, data: int) -> int:
        """How many channels the network has to give for data of so many."""
        return 2 * data if self.variance == "learned" else data


SamplerKind = Literal[
    "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"
]
KIND = "the sampler; euler is ddim with eta 0, euler_ancestral ddim with eta 1"


class SamplerConfig(Config):
    """How a sample is drawn."""

    kind: SamplerKind = Field("unipc", description=KIND)
    steps: int = Field(25, ge=1, description="steps from noise to data")
    timesteps: TimeGrid | None = Field(
        None,
        description="where the steps end: uniform, in t; trailing, leading, linspace: at steps of the table; karras, "
        "logsnr: by the noise; none: trailing for a model of discrete times, else uniform",
    )
    shift: float = Field(1.0, gt=0, description="of uniform: above 1 spends more of the steps at high noise")
    eta: float = Field(0.0, ge=0, le=1, description="of ddim: share of the noise of ancestral sampling")
    variance: Variance = Field(
        "small", description="of ddpm: the step's; learned: as the model says; analytic: the best for the data's size"
    )
    lower_order_final: bool = Field(False, description="of dpmpp_2m, dpmpp_2m_sde, unipc: last step of first order")
    s_churn: NonNegativeFloat = Field(0.0, description="of heun: noise added over all the steps; Karras et al. 2022")
    s_tmin: NonNegativeFloat = Field(0.0, description="of s_churn: least sigma / alpha at which it acts")
    s_tmax: PositiveFloat | None = Field(None, description="of s_churn: largest sigma / alpha; none: no bound")
    s_noise: PositiveFloat = Field(1.0, description="of s_churn: standard deviation of the noise")
    guidance_scale: float = Field(1.0, ge=0, description="1 is the conditional model alone")
    guidance_schedule: GuidanceSchedule = Field("constant", description="or growing as the noise goes, mean kept")
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="times at which there is guidance")
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the guided prediction's excess size undone")
    threshold: Threshold = Field("none", description="keeps x0 in bounds: clipped, or scaled down by its largest")
    threshold_bound: PositiveFloat = Field(1.0, description="1 for pixels; standardized latents reach some 4")
    threshold_percentile: float = Field(0.995, gt=0, le=1, description="of dynamic: the share kept within the bound")
    threshold_max: PositiveFloat | None = Field(
        None, description="of dynamic: what is larger is clipped and not scaled down; none: no bound"
    )

    @model_validator(mode="after")
    def _has_effect(self) -> SamplerConfig:
        for setting, kinds in OF_KINDS.items():
            if getattr(self, setting) != type(self).model_fields[setting].default and self.kind not in kinds:
                raise ValueError(
                    f"{setting} has no effect on kind={self.kind!r}: leave it out, or use kind={' or '.join(kinds)}"
                )
        if self.s_churn == 0.0 and (self.s_tmin, self.s_tmax, self.s_noise) != (0.0, None, 1.0):
            raise ValueError("s_tmin, s_tmax and s_noise have no effect without s_churn: set it, or leave them out")
        if self.shift != 1.0 and self.timesteps not in (None, "uniform"):
            raise ValueError(f"shift has no effect on timesteps={self.timesteps!r}: leave it out, or use 'uniform'")
        if self.threshold_max is not None and self.threshold != "dynamic":
            raise ValueError(
                f"threshold_max has no effect on threshold={self.threshold!r}: leave it out, or use 'dynamic'"
            )
        if self.threshold_max is not None and self.threshold_max < self.threshold_bound:
            raise ValueError("threshold_max is less than threshold_bound, to which all is scaled down: raise it")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError("guidance_interval is two times in [0, 1], the lower first")
        return self


class UpsamplerSamplerConfig(SamplerConfig):
    """How an upsampler draws: in a few steps, in which unipc leaves more noise in its pictures than ddim."""

    kind: SamplerKind = Field("ddim", description=KIND)
    steps: int = Field(8, ge=1, description="steps from noise to data")


OF_KINDS = {
    "eta": ("ddim",),
    "variance": ("ddpm",),
    "lower_order_final": ("dpmpp_2m", "dpmpp_2m_sde", "unipc"),
    "s_churn": ("heun",),
}
"""The kinds of sampler that a setting is for."""


def check_sampler(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """Raise ValueError for a sampler that does not fit what the model was trained with."""
    check_shift(sampler.shift, schedule=diffusion.noise_schedule)
    sampling_times(sampler, diffusion)
    if sampler.variance == "learned" and diffusion.variance != "learned":
        raise ValueError(
            "sampler.variance='learned' needs a model that learned it: set diffusion.variance='learned', or "
            "sampler.variance to 'small', 'large' or 'analytic'"
        )


def sampling_times(sampler: SamplerConfig, diffusion: DiffusionConfig) -> Tensor:
    """The times at which a sampler stops, fp32 [steps + 1] on the CPU: as set, or the model's own.

    Raises ValueError as `timesteps` does.
    """
    return timesteps(
        sampler.steps,
        schedule=diffusion.noise_schedule,
        grid=sampler.timesteps or ("trailing" if diffusion.discrete else "uniform"),
        shift=sampler.shift,
        discrete=diffusion.discrete,
    )


def training_loss(model: Model, x0: Tensor, cfg: DiffusionConfig, *, generator: torch.Generator) -> Tensor:
    """The loss of each sample at a random time, fp32 [B]."""
    t_B = sample_t(
        len(x0),
        kind=cfg.time_sampling,
        schedule=cfg.noise_schedule,
        generator=generator,
        device=x0.device,
        mean=cfg.time_mean,
        std=cfg.time_std,
        shift=cfg.shift,
    )
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    vlb_weight = VLB_WEIGHT * steps_of(cfg.noise_schedule)
    return loss_at(model, x0, cfg, t_B=t_B, noise=noise, weight=_weight(cfg, t_B), vlb_weight=vlb_weight)


def fixed_time_losses(
    model: Model, x0: Tensor, cfg: DiffusionConfig, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """The unweighted squared error of each sample at each of FIXED_TIMES, fp32 [B] by name; their mean as `loss`."""
    losses = {}
    for t in FIXED_TIMES:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        losses[f"loss_t{t}"] = loss_at(model, x0, cfg, t_B=x0.new_full((len(x0),), t), noise=noise)
    return {**losses, "loss": torch.stack(list(losses.values())).mean(0)}


def loss_at(
    model: Model,
    x0: Tensor,
    cfg: DiffusionConfig,
    *,
    t_B: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    vlb_weight: float = 0.0,
) -> Tensor:
    """The loss of each sample at given times and noise, fp32 [B].

    The squared error of the prediction times `weight` [B]; if the variance is learned, plus `vlb_weight` times the
    bound's term in bits (L_hybrid; Nichol & Dhariwal 2021, eq. 16).
    """
    alpha, sigma = alpha_sigma(t_B, cfg.noise_schedule)
    x_t = add_noise(x0, noise=noise, t=t_B, schedule=cfg.noise_schedule)
    pred, fraction = _predictions(model, x_t, cfg, t_B=t_B, sigma=sigma)
    tgt = target(cfg.predict, x0=x0, noise=noise, alpha=alpha, sigma=sigma, sigma_data=cfg.sigma_data)
    loss = diffusion_loss(pred, tgt, weight=weight)
    if fraction.shape[1] == 0 or vlb_weight == 0.0:
        return loss
    x0_pred = _x0(pred.detach().float(), x_t, cfg, alpha=alpha, sigma=sigma)
    bits = variational_loss(x0=x0, x_t=x_t, x0_pred=x0_pred, fraction=fraction, t_B=t_B, schedule=cfg.noise_schedule)
    return loss + vlb_weight * bits


def denoiser(model: Model, cfg: DiffusionConfig) -> Denoise:
    """The network as an estimate of x0, whatever it predicts; the fraction of a learned variance stays behind it."""

    def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t_B, cfg.noise_schedule)
        pred, fraction = _predictions(model, x_t, cfg, t_B=t_B, sigma=sigma)
        x0 = _x0(pred.float(), x_t, cfg, alpha=alpha, sigma=sigma)
        return torch.cat([x0, fraction.float()], dim=1) if fraction.shape[1] else x0

    return denoise


def estimator(model: Model, cfg: DiffusionConfig) -> Estimate:
    """The network as an estimate of x0 and noise at a state whose levels are those of one time, told another.

    Of a predicted x0 the noise is read at the time that the network is told, because at t = 0 it cannot be read.
    """

    def estimate(x_t: Tensor, t_B: Tensor, told_B: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha_sigma(t_B, cfg.noise_schedule)
        pred = _predictions(model, x_t, cfg, t_B=told_B, sigma=sigma)[0].float()
        x0 = _x0(pred, x_t, cfg, alpha=alpha, sigma=sigma)
        if cfg.predict == "x0":
            alpha, sigma = alpha_sigma(told_B, cfg.noise_schedule)
        noise = to_noise(cfg.predict, pred=pred, x_t=x_t, alpha=alpha, sigma=sigma, sigma_data=cfg.sigma_data)
        return x0, noise

    return estimate


def sample(
    denoise: Denoise,
    noise: Tensor,
    cfg: SamplerConfig,
    *,
    diffusion: DiffusionConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw x0 of the shape of `noise` [B, C, ...], which is standard normal, from a model of `diffusion`.

    Deterministic given the noise for ddim with eta 0, euler, heun without churn, dpmpp_2m and unipc; the others draw
    more from `generator` and raise ValueError without one.
    """
    ts = sampling_times(cfg, diffusion)
    # As large as x_t is for data of unit variance: 1 but on edm, where it is 80.
    x = noise * torch.hypot(*alpha_sigma(ts[0], diffusion.noise_schedule)).item()
    return sample_from(denoise, x, ts, cfg, diffusion=diffusion, generator=generator)


def sample_from(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    cfg: SamplerConfig,
    *,
    diffusion: DiffusionConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """As `sample`, but from the state `x` [B, C, ...] at ts[0] and over the times `ts` [N + 1], which decrease."""
    schedule = diffusion.noise_schedule
    return _sampler(cfg, diffusion)(bounded(denoise, cfg), x, ts, schedule=schedule, generator=generator)


def inverted(
    model: Model, x0: Tensor, cfg: SamplerConfig, *, diffusion: DiffusionConfig, refinements: int = 0
) -> Tensor:
    """The noise [B, C, ...], of unit size, from which `sample` with kind ddim and eta 0 comes near x0 [B, C, ...].

    Over the sampler's times, and with its threshold; `refinements` as in `samplers.invert`. Raises ValueError for
    another kind of sampler: only ddim's steps are inverted.
    """
    if cfg.kind not in ("ddim", "euler") or cfg.eta > 0:
        raise ValueError(f"kind={cfg.kind!r} with eta={cfg.eta} cannot be inverted: use kind='ddim' with eta=0")
    schedule, ts = diffusion.noise_schedule, sampling_times(cfg, diffusion)
    x = invert(
        estimator(model, diffusion),
        x0,
        ts.flip(0),
        schedule=schedule,
        bounded=partial(_thresholded, cfg=cfg),
        refinements=refinements,
    )
    return x / torch.hypot(*alpha_sigma(ts[0], schedule)).item()


def with_guidance(conditional: Model, both: Model, *, cfg: SamplerConfig, steps: int = STEPS) -> Model:
    """Classifier-free guidance; `both` is the model bound to the conditions and then, doubled, to their absence.

    Times of the schedule and interval of the guidance are the network's (`network_time`), as shares of `steps`, those
    of the model's table. A learned variance is that of the conditional model.
    """
    if cfg.guidance_scale == 1.0:
        return conditional

    def model(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = both(torch.cat([x, x]), torch.cat([t, t])).float().chunk(2)
        channels = x.shape[1]
        scale = _scale(t * (STEPS / steps), x, cfg)
        out = guided(cond[:, :channels], uncond[:, :channels], scale=scale, rescale=cfg.guidance_rescale)
        return torch.cat([out, cond[:, channels:]], dim=1) if cond.shape[1] > channels else out

    return model


def _predictions(
    model: Model, x_t: Tensor, cfg: DiffusionConfig, *, t_B: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network says of x_t: its prediction [B, C, ...] and, if learned, the variance's fraction [B, C, ...]."""
    given = network_input(x_t, sigma=sigma, schedule=cfg.noise_schedule, sigma_data=cfg.sigma_data)
    out, channels = model(given, network_time(t_B, cfg.noise_schedule)), x_t.shape[1]
    if out.shape[1] != cfg.channels(channels):
        raise ValueError(
            f"diffusion.variance={cfg.variance!r} takes {cfg.channels(channels)} channels for data of {channels}, but "
            f"this network gives {out.shape[1]}; set the other variance"
        )
    return out[:, :channels], out[:, channels:]


def _x0(pred: Tensor, x_t: Tensor, cfg: DiffusionConfig, *, alpha: Tensor, sigma: Tensor) -> Tensor:
    return to_x0(cfg.predict, pred=pred, x_t=x_t, alpha=alpha, sigma=sigma, sigma_data=cfg.sigma_data)


def _weight(cfg: DiffusionConfig, t_B: Tensor) -> Tensor | None:
    if cfg.min_snr_gamma is None and cfg.weighting == "none":
        return None
    alpha, sigma = alpha_sigma(t_B, cfg.noise_schedule)
    if cfg.min_snr_gamma is None:
        return edm_weight(cfg.predict, alpha=alpha, sigma=sigma, sigma_data=cfg.sigma_data)
    return min_snr_weight(cfg.predict, alpha=alpha, sigma=sigma, gamma=cfg.min_snr_gamma, sigma_data=cfg.sigma_data)


def _scale(t_B: Tensor, x: Tensor, cfg: SamplerConfig) -> float | Tensor:
    """The guidance scale: a number where it is the same at all times, else [B, 1, ...]."""
    if cfg.guidance_schedule == "constant" and cfg.guidance_interval == (0.0, 1.0):
        return cfg.guidance_scale
    scale = scale_at(t_B, scale=cfg.guidance_scale, interval=cfg.guidance_interval, schedule=cfg.guidance_schedule)
    return expand_like(scale, x)


def _sampler(cfg: SamplerConfig, diffusion: DiffusionConfig) -> Callable[..., Tensor]:
    """The function of samplers or solvers that `cfg` names, with its settings."""
    discrete = diffusion.discrete
    if cfg.kind == "ddpm":
        return partial(ddpm, variance=cfg.variance, sigma_data=diffusion.sigma_data)
    if cfg.kind in ("ddim", "euler", "euler_ancestral"):
        return partial(ddim, eta={"ddim": cfg.eta, "euler": 0.0, "euler_ancestral": 1.0}[cfg.kind])
    if cfg.kind == "heun":
        return partial(
            heun,
            s_churn=cfg.s_churn,
            s_tmin=cfg.s_tmin,
            s_tmax=math.inf if cfg.s_tmax is None else cfg.s_tmax,
            s_noise=cfg.s_noise,
            discrete=discrete,
        )
    if cfg.kind == "dpmpp_sde":
        return partial(dpmpp_sde, discrete=discrete)
    solver = {"dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde, "unipc": unipc}[cfg.kind]
    return partial(solver, lower_order_final=cfg.lower_order_final)


def bounded(denoise: Denoise, cfg: SamplerConfig) -> Denoise:
    """The estimate of x0 kept within the sampler's bounds, if it has some."""
    if cfg.threshold == "none":
        return denoise

    def within(x_t: Tensor, t_B: Tensor) -> Tensor:
        out, channels = denoise(x_t, t_B), x_t.shape[1]
        return torch.cat([_thresholded(out[:, :channels], cfg=cfg), out[:, channels:]], dim=1)

    return within


def _thresholded(x0: Tensor, *, cfg: SamplerConfig) -> Tensor:
    return thresholded(
        x0,
        kind=cfg.threshold,
        bound=cfg.threshold_bound,
        percentile=cfg.threshold_percentile,
        largest=math.inf if cfg.threshold_max is None else cfg.threshold_max,
    )
