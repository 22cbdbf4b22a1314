"""Which times a network is trained at, and which a sampler stops at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genpipe.diffusion.schedules import NODES, RHO, Schedule, shifted, sigma_range, time_at

TimeSampling = Literal["uniform", "logit_normal", "log_normal", "discrete"]
TimeGrid = Literal["uniform", "trailing", "karras", "logsnr"]

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
    Karras et al. 2022, table 1. discrete: uniform over the 1,000 steps of the tables. `mean` and `std` are
    the papers' (NORMAL) where none is given; `shift` as in `schedules.shifted`.
    """
    if kind == "uniform":
        t = torch.rand(n, generator=generator, device=device)
    elif kind == "discrete":
        t = torch.randint(1, NODES + 1, (n,), generator=generator, device=device) / NODES
    elif kind in NORMAL:
        center, spread = NORMAL[kind]
        normal = torch.randn(n, generator=generator, device=device)
        normal = normal * (spread if std is None else std) + (center if mean is None else mean)
        t = normal.sigmoid() if kind == "logit_normal" else time_at(torch.ones_like(normal), normal.exp(), schedule)
    else:
        raise ValueError(f"unknown kind of time sampling {kind!r}: use 'uniform', 'discrete' or {', '.join(NORMAL)}")
    return shifted(t, schedule=schedule, shift=shift)


def timesteps(steps: int, *, schedule: Schedule, grid: TimeGrid = "uniform", shift: float = 1.0) -> Tensor:
    """Sampling times 1 = t_0 > ... > t_steps = 0, fp32 [steps + 1] on the CPU.

    uniform: evenly in t, then `shifted`: a shift above 1 spends more steps at high noise. trailing: evenly,
    rounded to the steps of the tables (Lin et al. 2023, sec. 3.3). karras: evenly in sigma^(1/7) (Karras et al.
    2022, eq. 5), logsnr: evenly in ln sigma, with sigma standing for sigma / alpha; both over `sigma_range`,
    then to 0. On a schedule that ends in pure noise their first time is moved to 1.

    Raises ValueError for fewer than one step, for more `trailing` steps than there are, and for a shift of
    another grid than uniform.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift != 1.0 and grid != "uniform":
        raise ValueError(f"shift={shift} has no effect on timesteps={grid!r}: use timesteps='uniform', or shift=1")
    if grid == "uniform":
        t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu")
        return shifted(t, schedule=schedule, shift=shift).float()
    if grid == "trailing":
        if steps > NODES:
            raise ValueError(f"timesteps='trailing' has {NODES} times to stop at, steps={steps} asks for more")
        t = NODES - torch.arange(steps + 1, dtype=torch.float64, device="cpu") * (NODES / steps)
        return (t.round() / NODES).float()
    low, high = sigma_range(schedule)
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64, device="cpu")
    if grid == "karras":
        sigma = (high ** (1 / RHO) * (1 - share) + low ** (1 / RHO) * share) ** RHO
    else:
        sigma = high ** (1 - share) * low**share
    t = time_at(torch.ones_like(sigma), sigma, schedule)
    return torch.cat([t.new_ones(1), t[1:], t.new_zeros(1)]).float()
