"""Samplers against distributions whose denoiser and probability flow are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from analytic import GAUSSIAN, SCHEDULES, TWO, Mixture, even_in_log_snr, gaussian_flow
from torch import Tensor

from genpipe.diffusion.samplers import Variance, ddim, ddpm, heun, invert
from genpipe.diffusion.schedules import Schedule, alpha_sigma, time_at
from genpipe.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc
from genpipe.diffusion.times import timesteps

Sampler = Callable[..., Tensor]

DETERMINISTIC = [(ddim, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 3)]
"""And their orders: UniPC-2 is a predictor of order 2 with a corrector that adds one."""

STOCHASTIC: list[tuple[Sampler, dict[str, object]]] = [
    (ddpm, {"variance": "small"}),
    (ddpm, {"variance": "large"}),
    (ddim, {"eta": 0.5}),
    (ddim, {"eta": 1.0}),
    (dpmpp_2m_sde, {}),
    (dpmpp_sde, {}),
    (heun, {"s_churn": 40.0}),
]
HIGH, LOW = 10.0, 0.1


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error_on_the_way(sampler: Sampler, *, steps: int, schedule: Schedule) -> float:
    """Largest error against the exact flow of a Gaussian from sigma / alpha = HIGH to LOW."""
    z = torch.linspace(-2, 2, 9)[:, None]
    ts = even_in_log_snr(steps, schedule=schedule, high=HIGH, low=LOW)
    (start, end), _ = alpha_sigma(ts[[0, -1]], schedule)
    x = sampler(GAUSSIAN.denoiser(schedule), start.float() * gaussian_flow(z, ratio=HIGH), ts, schedule=schedule)
    return (x / end.float() - gaussian_flow(z, ratio=LOW)).abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), DETERMINISTIC)
def test_samplers_converge_at_their_order(sampler: Sampler, order: int, schedule: Schedule) -> None:
    coarse, fine = (error_on_the_way(sampler, steps=steps, schedule=schedule) for steps in (12, 24))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)
    assert fine < 0.4 / 6**order


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 2)])
def test_whole_way_from_pure_noise_to_data(sampler: Sampler, order: int, schedule: Schedule) -> None:
    """Where sigma / alpha is infinite at the start and 0 at the end; lambda has both signs of infinity."""
    z = torch.linspace(-2, 2, 9)[:, None]

    def error(steps: int) -> float:
        x = sampler(GAUSSIAN.denoiser(schedule), z, timesteps(steps, schedule=schedule), schedule=schedule)
        return (x - gaussian_flow(z)).abs().max().item()

    coarse, fine = error(128), error(256)
    assert math.log2(coarse / fine) > order - 0.4
    assert fine < 0.01 / order**4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [sampler for sampler, _ in DETERMINISTIC])
@pytest.mark.parametrize("grid", ["uniform", "trailing", "karras", "logsnr"])
def test_every_grid_leads_to_the_data(grid: str, sampler: Sampler, schedule: Schedule) -> None:
    z = torch.linspace(-2, 2, 9)[:, None]
    ts = timesteps(100, schedule=schedule, grid=grid)  # type: ignore[arg-type]
    alpha, sigma = alpha_sigma(ts[0], schedule)
    start = sigma * z if alpha == 0 else alpha * gaussian_flow(z, ratio=(sigma / alpha).item())
    x = sampler(GAUSSIAN.denoiser(schedule), start, ts, schedule=schedule)
    torch.testing.assert_close(x, gaussian_flow(z), atol=0.06, rtol=0)


def test_ddim_on_the_flow_schedule_is_euler_on_the_velocity() -> None:
    z = torch.randn(16, 1, generator=gen())
    ts = timesteps(7, schedule="flow", shift=2.0)
    denoise = GAUSSIAN.denoiser("flow")
    x = z
    for t, t_next in pairwise(ts):
        x0 = denoise(x, t.expand(16))
        x = x + (t_next - t) * (x - x0) / t  # noise - x0 = (x_t - x0) / t
    torch.testing.assert_close(ddim(denoise, z, ts, schedule="flow"), x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), STOCHASTIC)
def test_stochastic_samplers_have_the_mean_and_deviation_of_the_data(
    sampler: Sampler, options: dict[str, object], schedule: Schedule
) -> None:
    ts = timesteps(200, schedule=schedule, grid="logsnr")
    z = torch.randn(8000, 1, generator=gen()) * torch.hypot(*alpha_sigma(ts[0], schedule))
    x = sampler(GAUSSIAN.denoiser(schedule), z, ts, schedule=schedule, generator=gen(1), **options)
    assert x.mean() == pytest.approx(0.7, abs=0.025)
    assert x.std() == pytest.approx(0.6, abs=0.025)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "scaled_linear_zsnr"])
@pytest.mark.parametrize(("sampler", "options"), [*STOCHASTIC, (ddim, {}), (heun, {}), (dpmpp_2m, {}), (unipc, {})])
def test_samplers_reach_a_mixture(sampler: Sampler, options: dict[str, object], schedule: Schedule) -> None:
    z = torch.randn(4000, 1, generator=gen())
    ts = timesteps(100, schedule=schedule, grid="karras" if schedule == "scaled_linear_zsnr" else "uniform")
    x = sampler(TWO.denoiser(schedule), z, ts, schedule=schedule, generator=gen(1), **options)
    right = x > 0
    assert right.float().mean() == pytest.approx(0.7, abs=0.03)
    assert x[right].mean() == pytest.approx(1.0, abs=0.02)
    assert x[right].std() == pytest.approx(0.1, abs=0.025)


def test_a_learned_variance_between_the_two() -> None:
    """A fraction of -1 or 1 behind x0 is the small or the large variance, and half way their geometric mean."""
    z = torch.randn(64, 1, generator=gen())
    ts = timesteps(3, schedule="linear")[:2]
    plain = GAUSSIAN.denoiser("linear")

    def step(fraction: float) -> Tensor:
        both = lambda x, t: torch.cat([plain(x, t), torch.full_like(x, fraction)], dim=1)  # noqa: E731
        return ddpm(both, z, ts, schedule="linear", generator=gen(1), variance="learned")

    def fixed(variance: str) -> Tensor:
        return ddpm(plain, z, ts, schedule="linear", generator=gen(1), variance=variance)  # type: ignore[arg-type]

    torch.testing.assert_close(step(-1.0), fixed("small"))
    torch.testing.assert_close(step(1.0), fixed("large"))
    x0 = plain(z, ts[0].expand(64))
    (a, a_next), (s, s_next) = (level.double().tolist() for level in alpha_sigma(ts, "linear"))
    beta = 1 - (a / a_next) ** 2
    tilde = beta * s_next**2 / s**2
    mean = a_next * beta / s**2 * x0 + a / a_next * s_next**2 / s**2 * z
    torch.testing.assert_close(
        (step(0.0) - mean) / torch.randn(64, 1, generator=gen(1)),
        torch.full((64, 1), (beta * tilde) ** 0.25),
        atol=1e-4,
        rtol=1e-3,
    )
    with pytest.raises(ValueError, match=r"diffusion\.variance='learned'"):
        fixed("learned")


@pytest.mark.parametrize(("sampler", "options"), STOCHASTIC)
def test_stochastic_samplers_need_a_generator_and_repeat_with_it(sampler: Sampler, options: dict[str, object]) -> None:
    z, ts, denoise = torch.zeros(4, 1), timesteps(3, schedule="cosine"), GAUSSIAN.denoiser("cosine")
    with pytest.raises(ValueError, match="generator"):
        sampler(denoise, z, ts, schedule="cosine", **options)

    def draw(seed: int) -> Tensor:
        return sampler(denoise, z, ts, schedule="cosine", generator=gen(seed), **options)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert draw(3).std() > 0


@pytest.mark.parametrize("settings", [{}, {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}])
def test_churn_is_algorithm_2_of_karras(settings: dict[str, float]) -> None:
    """Written out in sigma, with the settings of their table 5 for ImageNet; sigma does not rise above its end."""
    z, denoise = torch.randn(64, 1, generator=gen()), GAUSSIAN.denoiser("edm")
    ts = timesteps(18, schedule="edm")
    sigmas = alpha_sigma(ts.double(), "edm")[1].tolist()

    def at(x: Tensor, sigma: float) -> Tensor:
        one = torch.ones(64, dtype=torch.float64)
        return denoise(x, time_at(one, sigma * one, "edm"))

    low, high, scale = (
        settings.get(name, default) for name, default in (("s_tmin", 0), ("s_tmax", 1e9), ("s_noise", 1))
    )
    x, draws = 80.0 * z.double(), gen(1)
    for sigma, sigma_next in pairwise(sigmas):
        gamma = min(40.0 / 18, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        raised = min(sigma * (1 + gamma), 80.0)
        if raised > sigma * (1 + 1e-9):
            noise = torch.randn(64, 1, generator=draws)
            x = x + math.sqrt(raised**2 - sigma**2) * scale * noise
        slope = (x - at(x, raised)) / raised
        start, x = x, x + (sigma_next - raised) * slope
        if sigma_next > 0:
            x = start + (sigma_next - raised) * 0.5 * (slope + (x - at(x, sigma_next)) / sigma_next)
    found = heun(denoise, 80.0 * z, ts, schedule="edm", generator=gen(1), s_churn=40.0, **settings)
    torch.testing.assert_close(found, x.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sampler", "options"), [(heun, {"s_churn": 40.0}), (dpmpp_sde, {})])
def test_steps_of_the_table_alone(sampler: Sampler, options: dict[str, object]) -> None:
    """A model of discrete times is asked at steps of its table, half-way and with churn, too; and draws the data."""
    ideal, seen = GAUSSIAN.denoiser("linear"), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item() * 1000)
        return ideal(x, t)

    ts = timesteps(40, schedule="linear", grid="karras", discrete=True)
    z = torch.randn(8000, 1, generator=gen())
    x = sampler(denoise, z, ts, schedule="linear", generator=gen(1), discrete=True, **options)
    assert max(abs(t - round(t)) for t in seen) < 1e-3
    assert len({round(t) for t in seen}) > 40
    assert x.mean() == pytest.approx(0.7, abs=0.03)
    assert x.std() == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("std", [1.0, 17.2 / 32])
def test_analytic_variance_is_exact_in_few_steps(std: float) -> None:
    """Of Gaussian data each step's distribution is Gaussian, of whatever size: no other variance draws it in five."""
    data = Mixture(torch.zeros(1, 256), torch.ones(1), std)
    ts = timesteps(5, schedule="cosine_iddpm", grid="trailing")
    z = torch.randn(400, 256, generator=gen())

    def deviation(variance: Variance) -> float:
        options: dict[str, Any] = {"schedule": "cosine_iddpm", "generator": gen(1), "sigma_data": std}
        return ddpm(data.denoiser("cosine_iddpm"), z, ts, variance=variance, **options).std().item()

    # The last step adds no noise: what comes out is the estimate at the time before, and as large as that.
    alpha, sigma = (level.item() for level in alpha_sigma(ts[-2], "cosine_iddpm"))
    expected = alpha * std**2 / math.hypot(alpha * std, sigma)
    assert deviation("analytic") == pytest.approx(expected, rel=0.005)
    assert deviation("small") < 0.8 * expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 10])
def test_sampling_from_an_inverted_image_returns_it(steps: int, schedule: Schedule) -> None:
    x = 0.7 + 0.6 * torch.randn(32, 1, generator=gen())
    denoise, ts = GAUSSIAN.denoiser(schedule), timesteps(steps, schedule=schedule)
    state = invert(GAUSSIAN.estimator(schedule), x, ts.flip(0), schedule=schedule, refinements=100)
    torch.testing.assert_close(ddim(denoise, state, ts, schedule=schedule), x, atol=2e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "linear"])
def test_usual_inversion_comes_near(schedule: Schedule) -> None:
    """One evaluation a step returns the image up to the order of the method, and the noise that led to it."""
    z = torch.linspace(-2, 2, 9)[:, None]
    denoise, x = GAUSSIAN.denoiser(schedule), gaussian_flow(z)

    def gaps(steps: int) -> tuple[float, float]:
        ts = timesteps(steps, schedule=schedule)
        state = invert(GAUSSIAN.estimator(schedule), x, ts.flip(0), schedule=schedule)
        again = ddim(denoise, state, ts, schedule=schedule)
        return (again - x).abs().max().item(), (state - z).abs().max().item()

    (coarse, _), (fine, noise) = gaps(100), gaps(400)
    assert fine < 0.5 * coarse < 0.1
    assert noise < 0.1
