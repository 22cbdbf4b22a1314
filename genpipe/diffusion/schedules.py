"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise for times t from 0 (data) to 1 (noise).

Two functions say all about a schedule: `alpha_sigma` gives the levels at a time, `time_at` the time of a
ratio of levels. Everything here is elementwise on tensors of any shape. A schedule is a name, or a `Table`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

ScheduleName = Literal[
    "cosine", "flow", "edm", "linear", "scaled_linear", "cosine_iddpm", "linear_zsnr", "scaled_linear_zsnr"
]
TableName = Literal["linear", "scaled_linear", "cosine_iddpm", "linear_zsnr", "scaled_linear_zsnr"]

TABLES: tuple[TableName, ...] = get_args(TableName)

PURE_NOISE: frozenset[ScheduleName] = frozenset({"cosine", "flow", "linear_zsnr", "scaled_linear_zsnr"})
"""Schedules that end in alpha = 0 (zero terminal SNR): there x_1 says nothing about x0."""

STEPS = 1000
"""Steps of the tables as they are published, and times of a schedule that is none where times are discrete."""

BETAS: dict[TableName, tuple[float, float]] = {
    "linear": (1e-4, 0.02),
    "linear_zsnr": (1e-4, 0.02),
    "scaled_linear": (8.5e-4, 0.012),
    "scaled_linear_zsnr": (8.5e-4, 0.012),
}
"""The first and the last beta: Ho et al. 2020, section 4; latent-diffusion's txt2img-1p4B-eval.yaml."""


class Table(NamedTuple):
    """A schedule of betas with a number of steps, or a first and last beta, other than the published ones.

    `start` and `end` of None are those of BETAS; cosine_iddpm has none.
    """

    name: TableName
    steps: int = STEPS
    start: float | None = None
    end: float | None = None


Schedule = ScheduleName | Table

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
"""Karras et al. 2022, table 1: the range of sigma and the exponent of its spacing."""


def alpha_sigma(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Signal and noise levels at times `t` (any shape, values in [0, 1]); both of the shape and dtype of `t`.

    cosine: alpha = cos(pi t / 2), sigma = sin(pi t / 2). flow: alpha = 1 - t, sigma = t (rectified flow; Liu
    et al. 2022). edm: alpha = 1, sigma^(1/7) linear in t from 0.002 at t = 1/1000 to 80 (Karras et al. 2022,
    eq. 5), and from 0 before that.

    The others are tables, of N = 1,000 steps where `Table` says nothing else: step i of 0 ... N - 1 is t = (i + 1) / N.
    Between the steps they are read by a smooth cubic, sigma^2 = 1 - alpha^2.
    linear: betas from 1e-4 to 0.02 (DDPM; Ho et al. 2020). scaled_linear: sqrt(beta) linear, betas from
    8.5e-4 to 0.012 (latent diffusion). cosine_iddpm: alpha^2 = cos^2 with offset 0.008, betas up to 0.999
    (Nichol & Dhariwal 2021, eq. 17). linear_zsnr, scaled_linear_zsnr: these with alpha shifted and scaled to
    end at 0 (Lin et al. 2023, alg. 1). All have alpha = 1 at t = 0.
    """
    if schedule == "cosine":
        # cos(pi/2) is -4e-8 in fp32 and 6e-17 in fp64, where alpha has to be 0.
        return torch.cos(t * (math.pi / 2)).clamp(min=0.0).masked_fill(t >= 1, 0.0), torch.sin(t * (math.pi / 2))
    if schedule == "flow":
        return 1.0 - t, t
    if schedule == "edm":
        return torch.ones_like(t), _edm_sigma(t)
    alpha = _alpha_of_table(t, schedule)
    return alpha.to(t.dtype), (1.0 - alpha.square()).clamp(min=0.0).sqrt().to(t.dtype)


def time_at(alpha: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
    """The time at which the schedule's levels are in the ratio sigma / alpha: the inverse of `alpha_sigma`.

    alpha >= 0 and sigma >= 0 of one shape, not both 0, of any common scale. A ratio beyond the schedule's end
    gives 1.
    """
    if schedule == "cosine":
        return torch.atan2(sigma, alpha) / (math.pi / 2)
    if schedule == "flow":
        return sigma / (alpha + sigma)
    if schedule == "edm":
        return _edm_time(sigma / alpha)
    cosine = alpha.double() / torch.hypot(alpha.double(), sigma.double())
    return _time_in_table(cosine, schedule).to(sigma.dtype)


def network_time(t: Tensor, schedule: Schedule) -> Tensor:
    """What a network is told of time `t`: a number in [0, 1] of the shape of `t`, which it embeds times 1000.

    cosine, flow: t. Tables: times 1000 it is the step's index 0, 1, ... (t - 1/1000 for the usual 1,000 steps), as
    networks of other libraries are told. edm: ln sigma, moved from [ln 0.002, ln 80] to [0, 1]; this is the
    paper's c_noise = ln(sigma) / 4 in other units.
    """
    if schedule in ("cosine", "flow"):
        return t
    if schedule == "edm":
        low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
        return ((_edm_sigma(t).clamp(min=SIGMA_MIN).log() - low) / (high - low)).clamp(0.0, 1.0)
    steps = steps_of(schedule)
    return (t - 1.0 / steps).clamp(min=0.0) * (steps / STEPS)


def steps_of(schedule: Schedule) -> int:
    """How many steps the schedule's table has, which are the times i / steps; 1,000 where it is no table."""
    return schedule.steps if isinstance(schedule, Table) else STEPS


def ends_in_noise(schedule: Schedule) -> bool:
    """Whether alpha is 0 at t = 1 (zero terminal SNR)."""
    return (schedule.name if isinstance(schedule, Table) else schedule) in PURE_NOISE


def sigma_range(schedule: Schedule) -> tuple[float, float]:
    """sigma / alpha at the first step, t = 1/1000, and at t = 1: between these, samplers space their steps by noise.

    Karras et al. 2022's largest sigma, 80, stands for an end in pure noise or near it, where alpha is below 1e-3.
    """
    ends = torch.tensor([1.0 / steps_of(schedule), 1.0], dtype=torch.float64, device="cpu")
    alpha, sigma = alpha_sigma(ends, schedule)
    low, high = (sigma / alpha).tolist()
    return low, SIGMA_MAX if alpha[1] < 1e-3 else high


def shifted(t: Tensor, *, schedule: Schedule, shift: float) -> Tensor:
    """The times at which the noise-to-signal ratio is `shift` times that at `t`: for images of higher resolution.

    The log-SNR is lowered by 2 ln(shift) (Hoogeboom et al. 2023, simple diffusion, sec. 3.1, with shift =
    resolution / 64). On the flow schedule this is t -> s t / (1 + (s - 1) t), Esser et al. 2024 (SD3) eq. 23.

    Raises ValueError as `check_shift` does.
    """
    check_shift(shift, schedule=schedule)
    if shift == 1.0:
        return t
    alpha, sigma = alpha_sigma(t, schedule)
    return time_at(alpha, shift * sigma, schedule)


def check_shift(shift: float, *, schedule: Schedule) -> None:
    """Raise ValueError for a shift that is not positive, or leads past the end of the schedule."""
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    if shift != 1.0 and not ends_in_noise(schedule):
        raise ValueError(
            f"shift={shift} leads past the end of schedule={schedule!r}, which is not pure noise: use one of "
            f"{', '.join(sorted(PURE_NOISE))}, or to train more at high noise time_sampling='log_normal' with a "
            "higher time_mean"
        )


def expand_like(level_B: Tensor, x: Tensor) -> Tensor:
    """Append singleton axes to `level_B` so that it broadcasts against `x` (first axes equal); a number stays one.

    Numbers, tensors of shape [], leave the dtype of what they meet as it is.
    """
    return level_B if level_B.ndim == 0 else level_B.reshape(level_B.shape + (1,) * (x.ndim - level_B.ndim))


def add_noise(x0: Tensor, *, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha x0 + sigma noise for x0, noise [B, ...] and t [B] in [0, 1]."""
    alpha, sigma = alpha_sigma(t, schedule)
    return expand_like(alpha, x0) * x0 + expand_like(sigma, x0) * noise


_EDM_LOW, _EDM_HIGH = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)


def _edm_sigma(t: Tensor) -> Tensor:
    first = 1.0 / STEPS
    above = _EDM_LOW + (t - first) / (1.0 - first) * (_EDM_HIGH - _EDM_LOW)
    return torch.where(t < first, t / first * _EDM_LOW, above) ** RHO


def _edm_time(sigma: Tensor) -> Tensor:
    first = 1.0 / STEPS
    root = sigma ** (1 / RHO)
    above = first + (root - _EDM_LOW) / (_EDM_HIGH - _EDM_LOW) * (1.0 - first)
    return torch.where(root < _EDM_LOW, root / _EDM_LOW * first, above).clamp(max=1.0)


@lru_cache
def _table(table: Table) -> np.ndarray:
    """alpha at t = 0, 1/N, ... 1 and its slope per step there, fp64 [2, N + 1]."""
    steps = table.steps
    if table.name == "cosine_iddpm":
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        start, end = BETAS[table.name]
        start, end = start if table.start is None else table.start, end if table.end is None else table.end
        power = 2 if table.name.startswith("scaled_") else 1
        betas = np.linspace(start ** (1 / power), end ** (1 / power), steps) ** power
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    if ends_in_noise(table):
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha = np.concatenate([[1.0], alpha])
    return np.stack([alpha, np.gradient(alpha, edge_order=2)])


def _table_on(device: torch.device, schedule: TableName | Table) -> Tensor:
    """A fresh copy: a tensor that is kept would be a fake one if it was first asked for when planning."""
    table = schedule if isinstance(schedule, Table) else Table(schedule)
    if table.name not in TABLES:
        raise ValueError(f"unknown schedule {table.name!r}: use one of {', '.join(get_args(ScheduleName))}")
    return torch.tensor(_table(table), device="cpu").to(device, non_blocking=True)


def _alpha_of_table(t: Tensor, schedule: TableName | Table) -> Tensor:
    """alpha at `t` in fp64, exact at the steps."""
    nodes, slopes = _table_on(t.device, schedule)
    last = nodes.shape[0] - 1
    position = (t.double() * last).clamp(0.0, float(last))
    index = position.long().clamp(max=last - 1)
    return _cubic(position - index, nodes=nodes, slopes=slopes, index=index)[0]


def _time_in_table(alpha: Tensor, schedule: TableName | Table) -> Tensor:
    """The time at which the table has `alpha`, both fp64: its interval, then Newton's iteration in there."""
    nodes, slopes = _table_on(alpha.device, schedule)
    last = nodes.shape[0] - 1
    index = (torch.searchsorted(-nodes, -alpha, right=True) - 1).clamp(0, last - 1)
    within = (nodes[index] - alpha) / (nodes[index] - nodes[index + 1])
    for _ in range(4):  # nearly linear between two steps: four leave rounding errors
        value, slope = _cubic(within, nodes=nodes, slopes=slopes, index=index)
        within = within - (value - alpha) / slope
    return (index + within.clamp(0.0, 1.0)) / last


def _cubic(f: Tensor, *, nodes: Tensor, slopes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The Hermite cubic at the share `f` of interval `index`, and its derivative by `f`."""
    rise = nodes[index + 1] - nodes[index]
    low, high = slopes[index] - rise, slopes[index + 1] - rise
    # The straight line, which is exactly 0 at the end of a schedule that ends in 0, and what bends it.
    value = nodes[index] + f * rise + f * (1.0 - f) * ((1.0 - f) * low - f * high)
    slope = rise + low * (1.0 - 4.0 * f + 3.0 * f.square()) - high * (2.0 * f - 3.0 * f.square())
    return value, slope
