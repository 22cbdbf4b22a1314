"""Schedules and whole trajectories against diffusers' schedulers: the same network, the same times, the same noise.

Shapes: x is [B, C, H, W]. diffusers calls the network with a step's index, ours embeds `network_time` times 1000.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import diffusers

from genpipe.diffusion.guidance import thresholded
from genpipe.diffusion.parameterizations import Predict
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, denoiser, sample, with_guidance
from genpipe.diffusion.samplers import Denoise, ddpm, heun, invert
from genpipe.diffusion.schedules import Schedule, alpha_sigma
from genpipe.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, unipc
from genpipe.diffusion.times import timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

TABLES: dict[Schedule, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
    "cosine_iddpm": {"beta_schedule": "squaredcos_cap_v2"},
    "linear_zsnr": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "rescale_betas_zero_snr": True},
    "scaled_linear_zsnr": {
        **{"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
        "rescale_betas_zero_snr": True,
    },
}
PREDICTION: dict[Predict, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
MODELS: list[tuple[Schedule, Predict]] = [
    ("linear", "v"),
    ("scaled_linear", "eps"),
    ("scaled_linear", "x0"),
    ("cosine_iddpm", "x0"),
]
"""A table and a prediction each; eps divides by alpha, which ends at 0.006 on linear and at 5e-5 on cosine_iddpm."""


class Network(nn.Module):
    """A fixed random network of an image and a step's index, possibly fractional."""

    def __init__(self, channels_out: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, channels_out, 3, padding=1)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        phase = (index.float() / 300.0).reshape(-1, 1, 1, 1)
        return 2.0 * self.down(torch.tanh(self.up(x) + torch.sin(phase)))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def gen(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=gen(0))


def ours(schedule: Schedule, predict: Predict, *, net: nn.Module | None = None, **settings: Any) -> Denoise:
    cfg = DiffusionConfig(schedule=schedule, predict=predict, time_sampling="uniform", **settings)
    net = net or Network()
    return denoiser(lambda x, t: net(x, 1000.0 * t), cfg)


def scheduler(name: str, schedule: Schedule, predict: Predict, *, clip: bool = False, **settings: Any) -> Any:
    """A scheduler of diffusers that stops at evenly spaced steps and, where it does at all (`clip`), does not clip x0.

    Its table, a product of a thousand fp32 numbers that is tested by itself, is given in fp64.
    """
    if clip:
        settings["clip_sample"] = False
    common = {"prediction_type": PREDICTION[predict], "timestep_spacing": "trailing"}
    theirs = getattr(diffusers, name)(**TABLES[schedule], **common, **settings)
    index = torch.arange(1, 1001, dtype=torch.float64)
    theirs.alphas_cumprod = alpha_sigma(index / 1000, schedule)[0].square()
    return theirs


def follow(
    theirs: Any, x: Tensor, steps: int, *, net: nn.Module | None = None, last: int | None = None, **options: Any
) -> Tensor:
    """Their sample from x in `steps`, or where they are before the step `last` (-1 for the last one)."""
    net = net or Network()
    theirs.set_timesteps(steps)
    for index in theirs.timesteps[:last]:
        out = net(theirs.scale_model_input(x, index), index.expand(len(x)))
        x = theirs.step(out, index, x, return_dict=False, **options)[0]
    return x


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest element: a random network that says eps makes states of size 1 / alpha, about 15."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("schedule", TABLES)
def test_tables_are_those_of_diffusers(schedule: Schedule) -> None:
    theirs = diffusers.DDIMScheduler(**TABLES[schedule]).alphas_cumprod.double()
    index = torch.arange(1000)
    for t in ((index + 1) / 1000, (index.double() + 1) / 1000):
        alpha, sigma = alpha_sigma(t, schedule)
        assert alpha.dtype == sigma.dtype == t.dtype
        # theirs are products of a thousand fp32 numbers
        torch.testing.assert_close(alpha.double().square(), theirs, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(sigma.double().square(), 1 - theirs, atol=2e-6, rtol=1e-3)


def test_trailing_times_are_those_of_diffusers() -> None:
    for steps in (1, 2, 3, 7, 16, 25, 80, 999, 1000):
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
        theirs.set_timesteps(steps)
        found = timesteps(steps, schedule="linear", grid="trailing")
        assert (found[:-1] * 1000).round().long().sub(1).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize(("schedule", "predict"), MODELS)
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(schedule: Schedule, predict: Predict, steps: int, eta: float) -> None:
    theirs = scheduler("DDIMScheduler", schedule, predict, clip=True)
    expected = follow(theirs, noise(), steps, eta=eta, generator=gen())
    cfg = SamplerConfig(kind="ddim", steps=steps, timesteps="trailing", eta=eta)
    found = sample(ours(schedule, predict), noise(), cfg, schedule=schedule, generator=gen())
    assert_same(found, expected)


@pytest.mark.parametrize("schedule", ["linear_zsnr", "scaled_linear_zsnr"])
def test_ddim_from_pure_noise_with_guidance_rescaled(schedule: Schedule) -> None:
    """The sampler of Lin et al. 2023: zero terminal SNR, v, trailing times, rescaled guidance."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    net = Network()
    theirs = scheduler("DDIMScheduler", schedule, "v", clip=True)
    theirs.set_timesteps(20)
    x = noise()
    for index in theirs.timesteps:
        cond, uncond = net(x, index.expand(2)), net(0.5 * x, index.expand(2))
        out = rescale_noise_cfg(uncond + 5.0 * (cond - uncond), cond, guidance_rescale=0.7)
        x = theirs.step(out, index, x, return_dict=False)[0]

    cfg = SamplerConfig(steps=20, timesteps="trailing", guidance_scale=5.0, guidance_rescale=0.7)
    half = torch.tensor([1.0, 1.0, 0.5, 0.5])[:, None, None, None]
    model = with_guidance(lambda x, t: net(x, 1000.0 * t), lambda x, t: net(half * x, 1000.0 * t), cfg=cfg)
    diffusion = DiffusionConfig(schedule=schedule, predict="v")
    found = sample(denoiser(model, diffusion), noise(), cfg, schedule=schedule)
    assert_same(found, x)


@pytest.mark.parametrize(("schedule", "predict"), MODELS)
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(
    ("variance", "theirs_variance"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm(schedule: Schedule, predict: Predict, steps: int, variance: str, theirs_variance: str) -> None:
    """Up to the last step, in which theirs, if there are fewer than 1,000, still adds noise of the larger variance."""
    learned = variance == "learned"
    net = Network(channels_out=6 if learned else 3)
    theirs = scheduler("DDPMScheduler", schedule, predict, clip=True, variance_type=theirs_variance)
    expected = follow(theirs, noise(), steps, net=net, last=-1, generator=gen())
    ts = timesteps(steps, schedule=schedule, grid="trailing")[:-1]
    denoise = ours(schedule, predict, net=net, variance="learned" if learned else "fixed")
    found = ddpm(denoise, noise(), ts, schedule=schedule, generator=gen(), variance=variance)  # type: ignore[arg-type]
    assert_same(found, expected)


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OF_RATIO = ("euler", "euler_ancestral", "heun")
"""Theirs keep x / alpha, which starts at 20,000 on cosine_iddpm and has no fifth digit left in fp32 there."""


@pytest.mark.parametrize(
    ("kind", "schedule", "predict"),
    [
        (kind, schedule, predict)
        for kind in SOLVERS
        for schedule, predict in MODELS
        if not (kind in OF_RATIO and schedule == "cosine_iddpm")
        and not (kind == "euler_ancestral" and predict == "x0")  # which theirs does not take
    ],
)
def test_solvers(kind: str, schedule: Schedule, predict: Predict) -> None:
    name, settings = SOLVERS[kind]
    steps = 20
    alpha, _ = alpha_sigma(timesteps(1, schedule=schedule)[0], schedule)
    expected = follow(
        scheduler(name, schedule, predict, **settings),
        noise() / alpha if kind in OF_RATIO else noise(),
        steps,
        **({"generator": gen()} if kind in ("euler_ancestral", "dpmpp_2m_sde") else {}),
    )
    cfg = SamplerConfig(kind=kind, steps=steps, timesteps="trailing")  # type: ignore[arg-type]
    found = sample(ours(schedule, predict), noise(), cfg, schedule=schedule, generator=gen())
    assert_same(found, expected)


def test_inversion() -> None:
    theirs = scheduler("DDIMInverseScheduler", "scaled_linear", "eps", clip=True)
    expected = follow(theirs, noise(), 20)
    ts = timesteps(20, schedule="scaled_linear", grid="trailing").flip(0)
    found = invert(ours("scaled_linear", "eps"), noise(), ts, schedule="scaled_linear")
    assert_same(found, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift: float) -> None:
    net = Network()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12).tolist())
    x = noise()
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(2)), t, x, return_dict=False)[0]
    cfg = SamplerConfig(kind="euler", steps=12, shift=shift)
    found = sample(ours("flow", "flow"), noise(), cfg, schedule="flow")
    assert_same(found, x)


def test_flow_heun() -> None:
    net = Network()
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(12)
    x = noise()
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(2)), t, x, return_dict=False)[0]
    found = heun(ours("flow", "flow"), noise(), theirs.sigmas.unique().flip(0), schedule="flow")
    assert_same(found, x)


@pytest.mark.parametrize(
    ("name", "sampler", "settings"),
    [
        ("DPMSolverMultistepScheduler", dpmpp_2m, {"algorithm_type": "dpmsolver++"}),
        ("DPMSolverMultistepScheduler", dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", unipc, {}),
    ],
)
def test_solvers_on_flow(name: str, sampler: Callable[..., Tensor], settings: dict[str, Any]) -> None:
    theirs = getattr(diffusers, name)(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", **settings
    )
    theirs.set_timesteps(16)
    net, x, ts = Network(), noise(), theirs.sigmas.clone()
    draw = {"generator": gen()} if "sde" in settings.get("algorithm_type", "") else {}
    for t, exact in zip(theirs.timesteps, ts, strict=False):
        # theirs rounds the network's time to whole steps
        x = theirs.step(net(x, 1000.0 * exact.expand(2)), t, x, return_dict=False, **draw)[0]
    found = sampler(ours("flow", "flow"), noise(), ts, schedule="flow", generator=gen())
    assert_same(found, x)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("EDMEulerScheduler", "euler", {}),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m", {"algorithm_type": "dpmsolver++"}),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm(name: str, kind: str, settings: dict[str, Any], sigma_data: float) -> None:
    """Karras et al.'s preconditioning and sigmas; their network is told ln(sigma) / 4."""
    net = Network()
    low, high = np.log(0.002), np.log(80.0)
    cfg = DiffusionConfig(schedule="edm", predict="edm", sigma_data=sigma_data, time_sampling="log_normal")
    denoise = denoiser(lambda x, t: net(x, 300.0 * 0.25 * (t * (high - low) + low)), cfg)

    theirs = getattr(diffusers, name)(sigma_data=sigma_data, **settings)
    draw = {"generator": gen()} if "sde" in settings.get("algorithm_type", "") else {}
    theirs.set_timesteps(18)
    x = noise() * theirs.init_noise_sigma
    for c_noise in theirs.timesteps:
        out = net(theirs.scale_model_input(x, c_noise), 300.0 * c_noise.expand(2))
        x = theirs.step(out, c_noise, x, return_dict=False, **draw)[0]

    cfg_sampler = SamplerConfig(kind=kind, steps=18, timesteps="karras")  # type: ignore[arg-type]
    found = sample(denoise, noise(), cfg_sampler, schedule="edm", generator=gen())
    assert_same(found, x)


@pytest.mark.parametrize(("schedule", "steps"), [("scaled_linear", 7), ("scaled_linear", 30), ("edm", 18)])
@pytest.mark.parametrize(("grid", "theirs_grid"), [("karras", "karras"), ("logsnr", "exponential")])
def test_grids_by_noise(schedule: Schedule, steps: int, grid: str, theirs_grid: str) -> None:
    if schedule == "edm":
        theirs = diffusers.EDMEulerScheduler(sigma_schedule=theirs_grid)
    else:
        theirs = diffusers.EulerDiscreteScheduler(**TABLES[schedule], **{f"use_{theirs_grid}_sigmas": True})
    theirs.set_timesteps(steps)
    alpha, sigma = alpha_sigma(timesteps(steps, schedule=schedule, grid=grid), schedule)  # type: ignore[arg-type]
    torch.testing.assert_close(sigma / alpha, theirs.sigmas, atol=0, rtol=5e-5)


@pytest.mark.parametrize("ratio", [1.0, 1.7])
def test_dynamic_thresholding(ratio: float) -> None:
    x0 = 1.5 * torch.randn(4, 3, 8, 8, generator=gen())
    theirs = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.97, sample_max_value=100.0)
    expected = theirs._threshold_sample(x0)
    torch.testing.assert_close(thresholded(x0, kind="dynamic", bound=1.0, percentile=0.97), expected)
    scaled = thresholded(ratio * x0, kind="dynamic", bound=ratio, percentile=0.97)
    torch.testing.assert_close(scaled, ratio * expected)
