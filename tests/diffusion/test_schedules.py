"""Schedules and times against their closed forms. What diffusers has as well is compared in test_diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.interpolate import CubicSpline

from genpipe.diffusion.schedules import (
    PURE_NOISE,
    SIGMA_MAX,
    SIGMA_MIN,
    STEPS,
    Schedule,
    add_noise,
    alpha_sigma,
    network_time,
    shifted,
    sigma_range,
    time_at,
)
from genpipe.diffusion.times import TimeSampling, sample_t, timesteps

TABLES = [schedule for schedule in SCHEDULES if schedule not in ("cosine", "flow", "edm")]
GRIDS = ["uniform", "trailing", "karras", "logsnr"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def times(n: int, *, kind: TimeSampling, schedule: Schedule = "flow", **options: float) -> torch.Tensor:
    return sample_t(n, kind=kind, schedule=schedule, generator=gen(), device="cpu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_of_the_schedule(schedule: Schedule, dtype: torch.dtype) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0], dtype=dtype), schedule)
    assert alpha.dtype == sigma.dtype == dtype
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    if schedule in PURE_NOISE:
        assert (alpha[1], sigma[1]) == (0.0, 1.0)
    elif schedule == "edm":
        torch.testing.assert_close(sigma[1], torch.tensor(80.0, dtype=dtype))
    else:
        assert 0 < alpha[1] < 0.07


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_grows_and_variance_is_preserved(schedule: Schedule) -> None:
    alpha, sigma = alpha_sigma(torch.linspace(0, 1, 30_001, dtype=torch.float64), schedule)
    assert ((sigma / alpha).diff() > 0).all()
    assert (alpha.diff() <= 0).all()
    if schedule == "flow":
        torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    elif schedule == "edm":
        assert (alpha == 1).all()
    else:
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))


@pytest.mark.parametrize("schedule", TABLES)
def test_tables_are_smooth_between_their_steps(schedule: Schedule) -> None:
    """Half way between two steps they are where scipy's spline through all steps is."""
    nodes = torch.arange(0, STEPS + 1, dtype=torch.float64) / STEPS
    alpha, _ = alpha_sigma(nodes, schedule)
    between, _ = alpha_sigma(nodes[5:-5] + 0.5 / STEPS, schedule)
    spline = CubicSpline(nodes.numpy(), alpha.numpy())((nodes[5:-5] + 0.5 / STEPS).numpy())
    torch.testing.assert_close(between, torch.from_numpy(spline), atol=1e-7, rtol=0)


@given(t=st.floats(0.0, 1.0), scale=st.floats(0.1, 10.0))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_at_inverts_the_levels(schedule: Schedule, t: float, scale: float) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = alpha_sigma(time, schedule)
    torch.testing.assert_close(time_at(scale * alpha, scale * sigma, schedule), time, atol=1e-9, rtol=1e-9)
    single = time_at(*(level.float() for level in (alpha, sigma)), schedule)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), time, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_beyond_the_ends_are_the_ends(schedule: Schedule) -> None:
    assert time_at(torch.zeros(1), torch.ones(1), schedule) == 1
    assert time_at(torch.ones(1), torch.zeros(1), schedule) == 0


def test_edm_is_karras_spacing() -> None:
    """Karras et al. 2022, eq. 5: step i of N is (max^(1/7) + i / (N - 1) (min^(1/7) - max^(1/7)))^7."""
    i = torch.arange(STEPS, dtype=torch.float64)
    high, low = SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7)
    expected = (high + i / (STEPS - 1) * (low - high)) ** 7
    _, sigma = alpha_sigma((STEPS - i) / STEPS, "edm")
    torch.testing.assert_close(sigma, expected)
    assert sigma_range("edm") == pytest.approx((SIGMA_MIN, SIGMA_MAX))


def test_network_is_told_the_index_of_a_step() -> None:
    t = (torch.arange(STEPS) + 1) / STEPS
    for schedule in TABLES:
        torch.testing.assert_close(1000 * network_time(t, schedule), torch.arange(1000.0), atol=1e-4, rtol=0)
    for schedule in ("cosine", "flow"):
        assert torch.equal(network_time(t, schedule), t)


def test_network_is_told_the_logarithm_of_edms_sigma() -> None:
    t = torch.linspace(0, 1, 1001)
    _, sigma = alpha_sigma(t[1:], "edm")
    told = network_time(t, "edm")
    assert told[0] == 0 and told.min() == 0 and told.max() <= 1
    slope, intercept = (1 / math.log(SIGMA_MAX / SIGMA_MIN), -math.log(SIGMA_MIN) / math.log(SIGMA_MAX / SIGMA_MIN))
    torch.testing.assert_close(told[1:], intercept + slope * sigma.log(), atol=1e-5, rtol=0)


@given(t=st.floats(0.001, 0.999), shift=st.floats(0.2, 8.0))
@pytest.mark.parametrize("schedule", sorted(PURE_NOISE))
def test_shift_lowers_the_log_snr(schedule: Schedule, t: float, shift: float) -> None:
    """By 2 ln(shift): simple diffusion, sec. 3.1."""
    time = torch.tensor([t], dtype=torch.float64)
    (a, s), (a2, s2) = (alpha_sigma(x, schedule) for x in (time, shifted(time, schedule=schedule, shift=shift)))
    torch.testing.assert_close(2 * (a2 / s2).log(), 2 * (a / s).log() - 2 * math.log(shift), atol=1e-6, rtol=1e-6)
    if schedule == "flow":
        expected = shift * time / (1 + (shift - 1) * time)  # SD3 eq. 23
        torch.testing.assert_close(shifted(time, schedule=schedule, shift=shift), expected)


def test_shifts_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"past the end of schedule='linear'.*linear_zsnr"):
        timesteps(4, schedule="linear", shift=2.0)
    with pytest.raises(ValueError, match="positive"):
        timesteps(4, schedule="flow", shift=0.0)
    with pytest.raises(ValueError, match="timesteps='karras'"):
        timesteps(4, schedule="flow", grid="karras", shift=2.0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cosine.*scaled_linear"):
        alpha_sigma(torch.zeros(1), "sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_normal"):
        times(1, kind="beta")  # type: ignore[arg-type]


def test_training_times_have_their_distribution() -> None:
    n = 20_000
    assert stats.kstest(times(n, kind="uniform"), stats.uniform.cdf).pvalue > 0.01
    normal = torch.logit(times(n, kind="logit_normal"))
    assert stats.kstest(normal, stats.norm.cdf).pvalue > 0.01
    normal = torch.logit(times(n, kind="logit_normal", mean=0.5, std=0.8))
    assert stats.kstest(normal, stats.norm(0.5, 0.8).cdf).pvalue > 0.01
    assert torch.equal(times(n, kind="uniform"), times(n, kind="uniform"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_normal_noise_levels(schedule: Schedule) -> None:
    """ln(sigma / alpha) is N(-1.2, 1.2^2): EDM's P_mean and P_std, cut off where the schedule ends."""
    for options, mean, std in (({}, -1.2, 1.2), ({"mean": 0.4, "std": 0.5}, 0.4, 0.5)):
        alpha, sigma = alpha_sigma(times(20_000, kind="log_normal", schedule=schedule, **options), schedule)
        logs = (sigma / alpha).double().log()
        inside = (logs > mean - 1.5 * std) & (logs < mean + 1.5 * std)
        inner = stats.truncnorm(-1.5, 1.5, mean, std)
        assert stats.kstest(logs[inside], inner.cdf).pvalue > 0.01


def test_discrete_times_are_the_steps_all_equally() -> None:
    index = times(100_000, kind="discrete") * STEPS
    torch.testing.assert_close(index, index.round(), atol=1e-3, rtol=0)
    counts = torch.bincount(index.round().long(), minlength=STEPS + 1)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 0.01


def test_training_times_are_shifted() -> None:
    plain, moved = times(1000, kind="uniform"), times(1000, kind="uniform", shift=3.0)
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


@given(steps=st.integers(1, 60), shift=st.floats(0.2, 8.0))
def test_timesteps_fall_from_one_to_zero(steps: int, shift: float) -> None:
    for schedule in SCHEDULES:
        for grid in GRIDS:
            if grid == "uniform" and schedule in PURE_NOISE:
                ts = timesteps(steps, schedule=schedule, grid=grid, shift=shift)
            else:
                ts = timesteps(steps, schedule=schedule, grid=grid)  # type: ignore[arg-type]
            assert ts.shape == (steps + 1,)
            assert ts[0] == 1.0 and ts[-1] == 0.0
            assert (ts.diff() < 0).all()


def test_grids_by_noise() -> None:
    """Evenly in the logarithm, or the seventh root, of sigma / alpha; the first time is pure noise's."""
    for schedule in SCHEDULES:
        for grid, even in (("logsnr", torch.log), ("karras", lambda ratio: ratio ** (1 / 7))):
            alpha, sigma = alpha_sigma(timesteps(20, schedule=schedule, grid=grid).double(), schedule)  # type: ignore[arg-type]
            ratio = (sigma / alpha)[1:-1]
            steps = even(ratio).diff()
            torch.testing.assert_close(steps, steps.mean().expand(18), rtol=1e-4, atol=0)
            assert ratio[-1].item() == pytest.approx(sigma_range(schedule)[0], rel=1e-4)
            if schedule not in PURE_NOISE:
                first = even(torch.tensor(sigma_range(schedule)[1], dtype=torch.float64))
                torch.testing.assert_close(even(ratio)[0] - first, steps.mean(), rtol=1e-4, atol=0)


def test_shift_of_three_sends_one_half_to_three_quarters() -> None:
    assert timesteps(2, schedule="flow", shift=3.0)[1] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="steps"):
        timesteps(0, schedule="flow")
    with pytest.raises(ValueError, match="1000 times"):
        timesteps(1001, schedule="linear", grid="trailing")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_is_added_by_the_levels(schedule: Schedule) -> None:
    x0, noise = torch.randn(2, 3, 4, 5, generator=gen())
    t = torch.tensor([0.0, 0.3, 1.0])
    x_t = add_noise(x0, noise=noise, t=t, schedule=schedule)
    for i in range(3):
        alpha, sigma = alpha_sigma(t[i], schedule)
        torch.testing.assert_close(x_t[i], alpha * x0[i] + sigma * noise[i])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_known_without_data(schedule: Schedule) -> None:
    """On the meta device, as when a run is only planned."""
    t = torch.zeros(4, device="meta")
    for level in (*alpha_sigma(t, schedule), network_time(t, schedule), time_at(t, t, schedule)):
        assert level.shape == (4,) and level.device.type == "meta"
