"""Predictions: each turned into x0 and noise, into one another, and refused where it is not defined."""

from __future__ import annotations

import itertools

import pytest
import torch
from analytic import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genpipe.diffusion.parameterizations import (
    Predict,
    check_predict,
    network_input,
    target,
    to_noise,
    to_x0,
    x0_gain,
)
from genpipe.diffusion.schedules import Schedule, add_noise, alpha_sigma

PREDICTS: list[Predict] = ["eps", "x0", "v", "flow", "edm"]
ALLOWED: dict[Schedule, set[Predict]] = {
    "flow": {"x0", "v", "flow"},
    "edm": {"eps", "x0", "edm"},
    "cosine": {"x0", "v"},
    "linear_zsnr": {"x0", "v"},
    "scaled_linear_zsnr": {"x0", "v"},
    "linear": {"eps", "x0", "v"},
    "scaled_linear": {"eps", "x0", "v"},
    "cosine_iddpm": {"eps", "x0", "v"},
}


def state(schedule: Schedule, *, t: float, seed: int) -> dict[str, Tensor]:
    x0, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = torch.full((3,), t, dtype=torch.float64)
    alpha, sigma = alpha_sigma(times, schedule)
    x_t = add_noise(x0, noise=noise, t=times, schedule=schedule)
    return {"x0": x0, "noise": noise, "x_t": x_t, "alpha": alpha, "sigma": sigma}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
@given(t=st.floats(0.0, 1.0), seed=st.integers(0, 1000), sigma_data=st.sampled_from([0.5, 1.0, 2.0]))
def test_conversions_invert_the_target(
    predict: Predict, schedule: Schedule, t: float, seed: int, sigma_data: float
) -> None:
    made = state(schedule, t=t, seed=seed)
    x0, noise, x_t = made["x0"], made["noise"], made["x_t"]
    levels = {"alpha": made["alpha"], "sigma": made["sigma"], "sigma_data": sigma_data}
    tgt = target(predict, x0=x0, noise=noise, **levels)
    if predict != "eps" or levels["alpha"].min() > 1e-4:
        torch.testing.assert_close(to_x0(predict, pred=tgt, x_t=x_t, **levels), x0)
    if predict != "x0" or levels["sigma"].min() > 1e-4:
        torch.testing.assert_close(to_noise(predict, pred=tgt, x_t=x_t, **levels), noise)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(PREDICTS, 2)))
@given(t=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_round_trips_between_predictions(one: Predict, other: Predict, t: float, seed: int) -> None:
    """Any prediction, right or wrong, comes back from being turned into another kind and again."""
    made = state("cosine", t=t, seed=seed)
    x_t, pred = made["x_t"], made["noise"] + made["x0"].flip(0)
    levels = {"alpha": made["alpha"], "sigma": made["sigma"]}

    def convert(predict: Predict, pred: Tensor, *, into: Predict) -> Tensor:
        given = {"pred": pred, "x_t": x_t, **levels}
        return target(into, x0=to_x0(predict, **given), noise=to_noise(predict, **given), **levels)

    torch.testing.assert_close(convert(other, convert(one, pred, into=other), into=one), pred)


def test_edm_is_table_1_of_the_paper() -> None:
    """D(x) = c_skip x + c_out F(c_in x), Karras et al. 2022, and what F has to learn has unit variance."""
    data = 0.5
    sigma = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0], dtype=torch.float64)
    x, pred = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2) ** 0.5
    c_in = 1 / (sigma**2 + data**2) ** 0.5
    levels = {"alpha": torch.ones_like(sigma), "sigma": sigma, "sigma_data": data}
    expected = c_skip[:, None] * x + c_out[:, None] * pred
    torch.testing.assert_close(to_x0("edm", pred=pred, x_t=x, **levels), expected)
    found = network_input(x, sigma=sigma, schedule="edm", sigma_data=data)
    torch.testing.assert_close(found, c_in[:, None] * x)
    assert network_input(x, sigma=sigma, schedule="flow") is x
    gen = torch.Generator().manual_seed(0)
    x0, noise = data * torch.randn(5, 100_000, generator=gen).double(), torch.randn(5, 100_000, generator=gen).double()
    spread = target("edm", x0=x0, noise=noise, **levels).std(1)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.01, rtol=0)


@given(t=st.floats(0.0, 1.0), seed=st.integers(0, 100))
def test_edm_of_unit_data_is_minus_v_where_variance_is_preserved(t: float, seed: int) -> None:
    made = state("cosine", t=t, seed=seed)
    del made["x_t"]
    torch.testing.assert_close(target("edm", **made), -target("v", **made))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
def test_gain_is_how_far_x0_moves(predict: Predict, schedule: Schedule) -> None:
    made = state(schedule, t=0.6, seed=0)
    levels = {"alpha": made["alpha"], "sigma": made["sigma"], "sigma_data": 0.7}
    pred = made["noise"].requires_grad_()
    (slope,) = torch.autograd.grad(to_x0(predict, pred=pred, x_t=made["x_t"], **levels).sum(), pred)
    expected = x0_gain(predict, **levels)[:, None, None].expand_as(slope)
    torch.testing.assert_close(slope.abs(), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
def test_what_is_not_defined_is_refused(predict: Predict, schedule: Schedule) -> None:
    if predict in ALLOWED[schedule]:
        check_predict(predict, schedule=schedule)
    else:
        with pytest.raises(ValueError, match=rf"predict='{predict}'.*use "):
            check_predict(predict, schedule=schedule)


def test_unknown_predictions_are_refused() -> None:
    one = torch.ones(1)
    levels = {"alpha": one, "sigma": one}
    for refuse in (
        lambda: target("score", x0=one, noise=one, **levels),  # type: ignore[arg-type]
        lambda: to_x0("score", pred=one, x_t=one, **levels),  # type: ignore[arg-type]
        lambda: to_noise("score", pred=one, x_t=one, **levels),  # type: ignore[arg-type]
        lambda: x0_gain("score", **levels),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="'flow'"):
            refuse()
