"""Which times a network is trained at, and which a sampler stops at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genpipe.diffusion.schedules import RHO, Schedule, shifted, sigma_range, steps_of, time_at

TimeSampling = Literal["uniform", "logit_normal", "log_normal", "discrete"]
TimeGrid = Literal["uniform", "trailing", "leading", "linspace", "karras", "logsnr"]

NORMAL: dict[TimeSampling, tuple[float, float]] = {"logit_normal": (0.0, 1.0), "log_normal": (-1.2, 1.2)}
"""Mean and standard deviation in the papers: SD3's rf/lognorm(0, 1); Karras et al. 2022, table 1."""


def sample_t(
    n: int,
    *,
    kind: TimeSampling,
    schedule: Schedule,
    generator: torch.Generator,
    device: torch.device | str,
    mean: float | None = None,
    std: float | None = None,
    shift: float = 1.0,
) -> Tensor:
    """`n` training times in [0, 1], fp32 [n].

    uniform: U(0, 1). logit_normal: sigmoid of N(mean, std^2), Esser et al. 2024 (SD3) eq. 19: more weight on
    the middle times, where the velocity is hardest to tell. log_normal: ln(sigma / alpha) is N(mean, std^2),
    Karras et al. 2022, table 1. discrete: uniform over the steps of the table, `steps_of(schedule)`. `mean` and
    `std` are the papers' (NORMAL) where none is given; `shift` as in `schedules.shifted`.

    Raises ValueError for an unknown kind, and as `shifted` does.
    """
    if kind == "uniform":
        t = torch.rand(n, generator=generator, device=device)
    elif kind == "discrete":
        steps = steps_of(schedule)
        t = torch.randint(1, steps + 1, (n,), generator=generator, device=device) / steps
    elif kind in NORMAL:
        center, spread = NORMAL[kind]
        normal = torch.randn(n, generator=generator, device=device)
        normal = normal * (spread if std is None else std) + (center if mean is None else mean)
        t = normal.sigmoid() if kind == "logit_normal" else time_at(torch.ones_like(normal), normal.exp(), schedule)
    else:
        raise ValueError(f"unknown kind of time sampling {kind!r}: use 'uniform', 'discrete' or {', '.join(NORMAL)}")
    return shifted(t, schedule=schedule, shift=shift)


def timesteps(
    steps: int, *, schedule: Schedule, grid: TimeGrid = "uniform", shift: float = 1.0, discrete: bool = False
) -> Tensor:
    """Sampling times 1 = t_0 > ... > t_steps = 0, fp32 [steps + 1] on the CPU; only `leading` starts and ends inside.

    uniform: evenly in t, then `shifted`: a shift above 1 spends more steps at high noise. Three grids stop at steps
    of the table alone, evenly and rounded (Lin et al. 2023, table 2): trailing from its last step; linspace from its
    last to its first (Nichol & Dhariwal 2021, section 4; GLIDE's and Karlo's); leading at the indices 1, 1 + c, ...
    with c = N // steps, and then at index 0 instead of t = 0 (latent-diffusion's make_ddim_timesteps). karras:
    evenly in sigma^(1/7) (Karras et al. 2022, eq. 5), logsnr: evenly in ln sigma, with sigma standing for sigma /
    alpha; both over `sigma_range`, then to 0. On a schedule that ends in pure noise their first time is moved to 1.

    `discrete` says that the network knows the steps of the table alone: karras and logsnr are rounded to them
    (Karras et al. 2022, table 1, iDDPM), uniform is refused.

    Raises ValueError for fewer than one step, for more steps than the grid has, for a shift of another grid than
    uniform, and for uniform times of a discrete model.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift != 1.0 and grid != "uniform":
        remedy = "use shift=1" if discrete else "use timesteps='uniform', or shift=1"
        raise ValueError(f"shift={shift} has no effect on timesteps={grid!r}: {remedy}")
    if grid == "uniform":
        if discrete:
            raise ValueError(
                "timesteps='uniform' stops between the steps that a model of time_sampling='discrete' was trained at: "
                "use 'trailing' (its default), 'linspace', 'leading', 'karras' or 'logsnr'"
            )
        t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu")
        return shifted(t, schedule=schedule, shift=shift).float()
    table = steps_of(schedule)
    if grid in ("trailing", "leading", "linspace"):
        return _of_table(steps, table, grid).float()
    low, high = sigma_range(schedule)
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64, device="cpu")
    if grid == "karras":
        sigma = (high ** (1 / RHO) * (1 - share) + low ** (1 / RHO) * share) ** RHO
    else:
        sigma = high ** (1 - share) * low**share
    t = time_at(torch.ones_like(sigma), sigma, schedule)
    t = torch.cat([t.new_ones(1), t[1:], t.new_zeros(1)])
    return rounded(t, table, grid=grid).float() if discrete else t.float()


def rounded(t: Tensor, table: int, *, grid: TimeGrid) -> Tensor:
    """Times as the nearest of the 1/table, 2/table, ... 1 and 0; ValueError where two become one."""
    near = (t * table).round()
    near[:-1].clamp_(min=1)
    if len(near.unique()) < len(near):
        raise ValueError(
            f"timesteps={grid!r} rounds {len(t) - 1} steps to {len(near.unique()) - 1} of the model's {table} times: "
            "lower steps, or use 'trailing'"
        )
    return near / table


def _of_table(steps: int, table: int, grid: TimeGrid) -> Tensor:
    """The grids that stop at steps of the table, fp64 [steps + 1]."""
    most = table - 1 if grid == "leading" else table
    if steps > most:
        raise ValueError(f"timesteps={grid!r} has {most} times to stop at, steps={steps} asks for more")
    k = torch.arange(steps, dtype=torch.float64, device="cpu")
    if grid == "trailing":
        index, end = (table - k * (table / steps)).round() - 1, -1.0
    elif grid == "linspace":
        index, end = (k * ((table - 1) / max(steps - 1, 1))).round().flip(0), -1.0
        index[0] = table - 1  # of a single step, too
    else:
        index, end = (k * (table // steps) + 1).flip(0), 0.0
    return (torch.cat([index, index.new_full((1,), end)]) + 1) / table
