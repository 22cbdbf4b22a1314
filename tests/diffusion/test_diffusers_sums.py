"""The sums that diffusers' own scheduler tests expect, of samples that ours draw through their dummy network.

The numbers stand in huggingface/diffusers, tests/schedulers/test_scheduler_*.py, and are compared within the tolerances
that stand there: 1e-2 of a sum of magnitudes over 768 elements, 1e-3 of their mean. Theirs are of fp32 tables, products
of a thousand numbers; where that shows, the case says by how much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import diffusers

from genpipe.diffusion.guidance import thresholded
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, estimator, sample
from genpipe.diffusion.samplers import Denoise, ddim, ddpm, heun, invert
from genpipe.diffusion.schedules import ScheduleName, add_noise, alpha_sigma, network_time, time_at
from genpipe.diffusion.solvers import dpmpp_2m, unipc
from genpipe.diffusion.times import timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

EPS = DiffusionConfig(schedule="linear", predict="eps", time_sampling="discrete")
V = EPS.model_copy(update={"predict": "v"})
COSINE = EPS.model_copy(update={"schedule": "cosine_iddpm"})
CLIPPED: dict[str, Any] = {"threshold": "static"}
EDM = DiffusionConfig(schedule="edm", predict="edm", sigma_data=0.5, time_sampling="log_normal")


def longer(cfg: DiffusionConfig) -> DiffusionConfig:
    """With 1,100 steps, as their tests of Euler's and Heun's methods."""
    return cfg.model_copy(update={"steps": 1100})


def dummy(x: Tensor, index: Tensor) -> Tensor:
    """SchedulerCommonTest.dummy_model."""
    index = index.reshape(-1, *(1,) * (x.ndim - 1))
    return x * index / (index + 1)


def ramp(shape: tuple[int, ...] = (3, 8, 8, 4), *, down: bool = False) -> Tensor:
    """SchedulerCommonTest.dummy_sample_deter, and dummy_noise_deter, which counts down."""
    values = torch.arange(math.prod(shape)) / math.prod(shape)
    return (values.flip(0) if down else values).reshape(shape).permute(len(shape) - 1, *range(len(shape) - 1))


def model(x: Tensor, t: Tensor) -> Tensor:
    return dummy(x, 1000.0 * t)


def of_rounded_index(x: Tensor, t: Tensor) -> Tensor:
    """As their multistep schedulers with Karras' times tell the index."""
    return dummy(x, (1000.0 * t).round())


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_sum(x: Tensor, expected: float, *, atol: float = 1e-2) -> None:
    assert x.abs().sum().item() == pytest.approx(expected, abs=atol)


def assert_mean(x: Tensor, expected: float, *, atol: float = 1e-3) -> None:
    assert x.abs().mean().item() == pytest.approx(expected, abs=atol)


def at(indices: list[float] | np.ndarray, *, steps: int = 1000) -> Tensor:
    """Times of a table's indices; of -1 that of the data."""
    return (torch.tensor(np.array(indices), dtype=torch.float64) + 1) / steps


LEADING = at([*range(900, -1, -100), -1])
"""Their DDIM's ten steps."""
LINSPACE = at([*np.linspace(0, 999, 11).round()[::-1][:-1], 0])
"""Their multistep schedulers' ten steps, with final_sigmas_type="sigma_min"."""


@pytest.mark.parametrize(
    ("cfg", "ts", "expected"),
    [
        (EPS, LEADING, 172.0067),
        (V, LEADING, 52.5302),
        (EPS.model_copy(update={"beta_start": 0.01}), LEADING, 149.8295),
        (EPS.model_copy(update={"beta_start": 0.01}), torch.cat([LEADING[:-1], at([0])]), 149.0784),
    ],
)
def test_ddim(cfg: DiffusionConfig, ts: Tensor, expected: float) -> None:
    assert_sum(ddim(denoiser(model, cfg), ramp(), ts, schedule=cfg.noise_schedule), expected)


def test_ddim_from_a_noised_image() -> None:
    ts = LEADING[8:]
    x = add_noise(ramp(), noise=ramp(down=True), t=ts[:1].float().expand(4), schedule="linear")
    assert_sum(ddim(denoiser(model, EPS), x, ts, schedule="linear"), 354.5418)


@pytest.mark.parametrize(
    ("cfg", "first", "expected"),
    [
        (EPS, -1, 671.6816),
        (V, -1, 1394.2185),
        (EPS.model_copy(update={"beta_start": 0.01}), -1, 539.9622),
        (EPS.model_copy(update={"beta_start": 0.01}), 0, 542.6722),
    ],
)
def test_ddim_inverse(cfg: DiffusionConfig, first: int, expected: float) -> None:
    ts = at([first, *range(0, 901, 100)])
    clipped = partial(torch.clamp, min=-1.0, max=1.0)
    assert_sum(invert(estimator(model, cfg), ramp(), ts, schedule=cfg.noise_schedule, bounded=clipped), expected)


@pytest.mark.parametrize(
    ("cfg", "sampler", "expected", "exact"),
    [
        (EPS, SamplerConfig(kind="ddpm", steps=1000, **CLIPPED), 258.9606, None),
        (V, SamplerConfig(kind="ddpm", steps=1000, **CLIPPED), 202.0296, None),
        (COSINE, SamplerConfig(kind="ddpm", steps=1000, **CLIPPED), 252.2682495, 252.4390),
        (COSINE, SamplerConfig(kind="ddpm", steps=25, timesteps="linspace", **CLIPPED), 258.2044983, 258.3410),
    ],
)
def test_ddpm_and_unclip(cfg: DiffusionConfig, sampler: SamplerConfig, expected: float, exact: float | None) -> None:
    """`exact` is what UnCLIPScheduler gives once its tables are of fp64, see below."""
    x = sample(denoiser(model, cfg), ramp(), sampler, diffusion=cfg, generator=gen())
    assert_sum(x, expected, atol=1e-2 if exact is None else 0.2)
    if exact is not None:
        assert_sum(x, exact)


def test_ddpm_from_a_noised_image() -> None:
    ts = at([1, 0, -1])
    x = add_noise(ramp(), noise=ramp(down=True), t=ts[:1].float().expand(4), schedule="linear")
    x = ddpm(denoiser(model, EPS), x, ts, schedule="linear", generator=gen())
    assert_sum(x, 387.9466, atol=0.03)
    assert_sum(x, 387.9669)


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "first", "expected"),
    [
        ("UnCLIPScheduler", "cosine_iddpm", 1000, 0, 252.4390),
        ("UnCLIPScheduler", "cosine_iddpm", 25, 0, 258.3410),
        ("DDPMScheduler", "linear", 1000, 998, 387.9669),
    ],
)
def test_sums_of_diffusers_with_exact_tables(
    name: str, schedule: ScheduleName, steps: int, first: int, expected: float
) -> None:
    """What their algorithms give without the rounding errors of a thousand fp32 factors."""
    theirs, x, generator = getattr(diffusers, name)(), ramp(), gen()
    cumprod = alpha_sigma(torch.arange(1001, dtype=torch.float64) / 1000, schedule)[0].square()
    theirs.alphas_cumprod, theirs.alphas = cumprod[1:], cumprod[1:] / cumprod[:-1]
    theirs.betas, theirs.one = 1 - theirs.alphas, torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(steps)
    indices = theirs.timesteps[first:]
    if first:
        x = theirs.add_noise(x, ramp(down=True), indices[:1])
    for index, following in zip(indices, [*indices[1:], None], strict=True):
        options = {"prev_timestep": following} if name == "UnCLIPScheduler" else {}
        x = theirs.step(dummy(x, index), index, x, generator=generator, return_dict=False, **options)[0]
    assert_sum(x, expected)


def dynamic(denoise: Denoise) -> Denoise:
    """dynamic_thresholding_ratio=0.87, sample_max_value=0.5."""

    def bounded(x: Tensor, t: Tensor) -> Tensor:
        return thresholded(denoise(x, t), kind="dynamic", bound=1.0, percentile=0.87, largest=0.5)

    return bounded


def karras(steps: int, cfg: DiffusionConfig = EPS) -> Tensor:
    """Their multistep schedulers' with use_karras_sigmas=True: ten sigmas, and the last of them again."""
    ts = timesteps(steps, schedule=cfg.noise_schedule, grid="karras")
    return torch.cat([ts[:-1], ts[-2:-1]])


def lu(steps: int) -> Tensor:
    """use_lu_lambdas=True: evenly in the seventh root of ln sigma, which is negative at its end and so cut off."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, use_lu_lambdas=True, final_sigmas_type="sigma_min"
    )
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double()
    return time_at(torch.ones_like(sigmas), sigmas, "linear")


@pytest.mark.parametrize(
    ("cfg", "net", "ts", "expected"),
    [
        (EPS, model, LINSPACE, 0.3301),
        (V, model, LINSPACE, 0.2251),
        (V, of_rounded_index, karras(10), 0.2096),
        (V, of_rounded_index, lu(10), 0.1554),
    ],
)
def test_dpm_solver_multistep(cfg: DiffusionConfig, net: Model, ts: Tensor, expected: float) -> None:
    assert_mean(dpmpp_2m(denoiser(net, cfg), ramp(), ts, schedule="linear"), expected)


def test_dpm_solver_multistep_with_dynamic_threshold() -> None:
    assert_mean(dpmpp_2m(dynamic(denoiser(model, EPS)), ramp(), LINSPACE, schedule="linear"), 1.1364)


def test_dpm_solver_multistep_from_a_noised_image() -> None:
    ts = LINSPACE[5:]
    x = add_noise(ramp(), noise=ramp(down=True), t=ts[:1].float().expand(4), schedule="linear")
    assert_sum(dpmpp_2m(denoiser(model, EPS), x, ts, schedule="linear"), 318.4111)


@pytest.mark.parametrize(
    ("cfg", "net", "ts", "expected"),
    [
        (EPS, model, LINSPACE, 0.2464),
        (V, model, LINSPACE, 0.1014),
        (EPS, of_rounded_index, karras(10), 0.2925),
        (V, of_rounded_index, karras(10), 0.1966),
    ],
)
def test_unipc(cfg: DiffusionConfig, net: Model, ts: Tensor, expected: float) -> None:
    x = unipc(denoiser(net, cfg), ramp(), ts, schedule="linear", lower_order_final=True)
    assert_mean(x, expected)


@pytest.mark.parametrize(
    ("cfg", "net", "ts", "expected"),
    [
        (EPS, model, LINSPACE, 0.2441),
        (V, model, LINSPACE, 0.1014),
        (EPS, of_rounded_index, karras(10), 0.2898),
        (V, of_rounded_index, karras(10), 0.1944),
    ],
)
def test_unipc_of_signals(cfg: DiffusionConfig, net: Model, ts: Tensor, expected: float) -> None:
    x = unipc(denoiser(net, cfg), ramp((3, 8, 4)), ts, schedule="linear", lower_order_final=True)
    assert_mean(x, expected)


@pytest.mark.parametrize(("shape", "expected"), [((3, 8, 8, 4), 315.5757), ((3, 8, 4), 39.0870)])
def test_unipc_from_a_noised_image(shape: tuple[int, ...], expected: float) -> None:
    ts = LINSPACE[8:]
    x = add_noise(ramp(shape), noise=ramp(shape, down=True), t=ts[:1].float().expand(4), schedule="linear")
    assert_sum(unipc(denoiser(model, EPS), x, ts, schedule="linear", lower_order_final=True), expected)


UPWARDS = at([*np.linspace(0, 999, 11).round()])
KARRAS_UPWARDS = torch.cat([karras(10)[:-1].flip(0), karras(10)[:1]])


@pytest.mark.parametrize(
    ("cfg", "bounded", "net", "ts", "expected", "atol"),
    [
        (EPS, False, model, UPWARDS, 0.7047, 1e-3),
        (EPS, True, model, UPWARDS, 19.8933, 3e-3),  # their fp32 tables, times sigma / alpha = 157 at the end
        (V, False, model, UPWARDS, 1.5194, 1e-3),
        (V, False, of_rounded_index, KARRAS_UPWARDS, 1.7833, 2e-3),
    ],
)
def test_dpm_solver_multistep_inverse(
    cfg: DiffusionConfig, bounded: bool, net: Model, ts: Tensor, expected: float, atol: float
) -> None:
    denoise = denoiser(net, cfg)
    assert_mean(dpmpp_2m(dynamic(denoise) if bounded else denoise, ramp(), ts, schedule="linear"), expected, atol=atol)


def in_their_steps(step: Callable[..., Tensor], y: Tensor, ts: Tensor, cfg: DiffusionConfig) -> Tensor:
    """A sample as their tests of schedulers that keep y = x / alpha draw it: each step starts from alpha y, not from y.

    They keep as the state what scale_model_input returns for the network, y / sqrt(1 + sigma^2). The network sees it
    too, as it is; at the second evaluation of Heun's method it sees y scaled as it should be.
    """
    for pair in ts.unfold(0, 2, 1):
        alpha, _ = alpha_sigma(pair, cfg.noise_schedule)
        start = network_time(pair[0], cfg.noise_schedule)

        def net(x: Tensor, t: Tensor, *, alpha: Tensor = alpha[0], start: Tensor = start) -> Tensor:
            return model(x / alpha if torch.isclose(t[0], start.float()) else x, t)

        y = step(denoiser(net, cfg), (alpha[0] ** 2 * y).float(), pair, schedule=cfg.noise_schedule) / alpha[1]
    return y


EVEN = at([*np.linspace(0, 1099, 10)[::-1], -1], steps=1100)
KARRAS = timesteps(10, schedule=longer(EPS).noise_schedule, grid="karras").double()
RATIO = [
    (ddim, EPS, EVEN, 10.0807),
    (ddim, V, EVEN, 0.0002),
    (ddim, EPS, KARRAS, 124.52299499511719),
    (partial(ddim, eta=1.0), EPS, EVEN, 152.3192),
    (partial(ddim, eta=1.0), V, EVEN, 108.4439),
    (heun, EPS, EVEN, 0.1233),
    (heun, V, EVEN, 4.6934e-07),
    (heun, EPS, KARRAS, 0.00015),
]


@pytest.mark.parametrize(("sampler", "cfg", "ts", "expected"), RATIO)
def test_euler_ancestral_and_heun(
    sampler: Callable[..., Tensor], cfg: DiffusionConfig, ts: Tensor, expected: float
) -> None:
    cfg = longer(cfg)
    alpha, _ = alpha_sigma(ts[:1], cfg.noise_schedule)
    assert_sum(in_their_steps(partial(sampler, generator=gen()), ramp() / alpha, ts, cfg), expected)


@pytest.mark.parametrize(
    ("sampler", "expected"), [(ddim, 57062.9297), (partial(ddim, eta=1.0), 56163.0508), (heun, 75074.8906)]
)
def test_euler_ancestral_and_heun_from_a_noised_image(sampler: Callable[..., Tensor], expected: float) -> None:
    cfg, ts = longer(EPS), EVEN[8:]
    end, _ = alpha_sigma(EVEN[:1], cfg.noise_schedule)
    alpha, sigma = alpha_sigma(ts[:1], cfg.noise_schedule)
    y = ramp() / end + sigma / alpha * ramp(down=True)
    found = in_their_steps(partial(sampler, generator=gen()), y, ts, cfg)
    assert_sum(found, expected, atol=1e-5 * expected)  # 1 / alpha = 256 at the end has no sixth digit in their tables


def told_sigma(x: Tensor, t: Tensor, *, sign: float = 1.0, scaled: bool = True) -> Tensor:
    """The dummy told ln(sigma) / 4; in their multistep test it sees the state itself instead of the network's input."""
    low, high = math.log(0.002), math.log(80.0)
    log_sigma = low + (high - low) * t
    size = 1.0 if scaled else torch.hypot(torch.tensor(0.5), log_sigma.exp()).reshape(-1, 1, 1, 1)
    return sign * dummy(size * x, 0.25 * log_sigma)


def test_edm_euler() -> None:
    sampler = SamplerConfig(kind="euler", steps=10, timesteps="karras")
    assert_sum(sample(denoiser(told_sigma, EDM), ramp(), sampler, diffusion=EDM), 34.1855, atol=1e-3)


@pytest.mark.parametrize(
    ("sign", "bounded", "expected"), [(1.0, False, 0.0001), (1.0, True, 0.0080), (-1.0, False, 0.0092)]
)
def test_edm_dpm_solver_multistep(sign: float, bounded: bool, expected: float) -> None:
    """Their v_prediction of EDM is the same with the other sign."""
    denoise = denoiser(partial(told_sigma, sign=sign, scaled=False), EDM)
    ts = karras(10, EDM)
    assert_mean(dpmpp_2m(dynamic(denoise) if bounded else denoise, ramp(), ts, schedule="edm"), expected)


def test_edm_dpm_solver_multistep_from_a_noised_image() -> None:
    ts = karras(10, EDM)[5:]
    x = add_noise(ramp(), noise=ramp(down=True), t=ts[:1].expand(4), schedule="edm")
    denoise = denoiser(partial(told_sigma, scaled=False), EDM)
    assert_sum(dpmpp_2m(denoise, x, ts, schedule="edm"), 8.1661)
