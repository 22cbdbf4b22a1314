"""Schedules and whole trajectories against diffusers' schedulers: the same network, the same times, the same noise.

Shapes: x is [B, C, H, W]. diffusers calls the network with a step's index, ours embeds `network_time` times 1000.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import diffusers

from genpipe.diffusion.guidance import thresholded
from genpipe.diffusion.parameterizations import Predict
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig, denoiser, inverted, sample, with_guidance
from genpipe.diffusion.samplers import Denoise, ddpm, heun
from genpipe.diffusion.schedules import ScheduleName, alpha_sigma, network_time
from genpipe.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, unipc
from genpipe.diffusion.times import timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

TABLES: dict[ScheduleName, dict[str, Any]] = {
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
MODELS: list[tuple[ScheduleName, Predict]] = [
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


def ours(schedule: ScheduleName, predict: Predict, *, net: nn.Module | None = None, **settings: Any) -> Denoise:
    net = net or Network()
    return denoiser(lambda x, t: net(x, 1000.0 * t), process(schedule, predict, **settings))


def process(schedule: ScheduleName, predict: Predict, **settings: Any) -> DiffusionConfig:
    return DiffusionConfig(schedule=schedule, predict=predict, time_sampling="uniform", **settings)


def scheduler(name: str, schedule: ScheduleName, predict: Predict, *, clip: bool = False, **settings: Any) -> Any:
    """A scheduler of diffusers that stops at evenly spaced steps and, where it does at all (`clip`), does not clip x0.

    Its table, a product of a thousand fp32 numbers that is tested by itself, is given in fp64.
    """
    if clip:
        settings["clip_sample"] = False
    common = {"prediction_type": PREDICTION[predict], "timestep_spacing": "trailing"}
    theirs = getattr(diffusers, name)(**TABLES[schedule], **{**common, **settings})
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
def test_tables_are_those_of_diffusers(schedule: ScheduleName) -> None:
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


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine_iddpm", "linear_zsnr"])
def test_tables_of_other_steps_and_betas(name: ScheduleName) -> None:
    """1,100 steps and, where there are any, other betas; the network is told their index."""
    betas = {} if name == "cosine_iddpm" else {"beta_start": 1e-3, "beta_end": 0.01}
    theirs = diffusers.DDIMScheduler(**{**TABLES[name], **betas}, num_train_timesteps=1100)
    cfg = process(name, "v", steps=1100, **betas)
    t = (torch.arange(1100, dtype=torch.float64) + 1) / 1100
    alpha, _ = alpha_sigma(t, cfg.noise_schedule)
    torch.testing.assert_close(alpha.square(), theirs.alphas_cumprod.double(), atol=2e-6, rtol=2e-5)
    told = 1000 * network_time(t.float(), cfg.noise_schedule)
    torch.testing.assert_close(told, torch.arange(1100.0), atol=2e-4, rtol=0)


def test_the_published_tables_have_no_other_name() -> None:
    assert process("linear", "v", steps=1000).noise_schedule == "linear"
    assert DiffusionConfig().noise_schedule == "flow"


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 27, 250, 1000])
def test_linspace_times_are_those_of_karlo(steps: int) -> None:
    theirs = diffusers.UnCLIPScheduler()
    if steps > 1:
        theirs.set_timesteps(steps)
    found = timesteps(steps, schedule="cosine_iddpm", grid="linspace")
    expected = theirs.timesteps.tolist() if steps > 1 else [999]
    assert (found[:-1] * 1000).round().long().sub(1).tolist() == expected
    assert found[-1] == 0


@pytest.mark.parametrize("steps", [10, 30, 250])
def test_leading_is_ddim_of_latent_diffusion(steps: int) -> None:
    """diffusers' settings for its weights: offset by one, and ending at the first step of the table."""
    theirs = scheduler(
        "DDIMScheduler",
        "scaled_linear",
        "eps",
        clip=True,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    cfg = SamplerConfig(kind="ddim", steps=steps, timesteps="leading")
    found = sample(ours("scaled_linear", "eps"), noise(), cfg, diffusion=process("scaled_linear", "eps"))
    assert_same(found, follow(theirs, noise(), steps))


def test_leading_times_of_latent_diffusion() -> None:
    """LDM's configuration of 250 steps: 997, ... 5, 1."""
    ts = timesteps(250, schedule="scaled_linear", grid="leading")
    assert (ts * 1000 - 1).round().tolist() == [*range(997, 0, -4), 0]


@pytest.mark.parametrize(("schedule", "predict"), MODELS)
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(schedule: ScheduleName, predict: Predict, steps: int, eta: float) -> None:
    theirs = scheduler("DDIMScheduler", schedule, predict, clip=True)
    expected = follow(theirs, noise(), steps, eta=eta, generator=gen())
    cfg = SamplerConfig(kind="ddim", steps=steps, timesteps="trailing", eta=eta)
    found = sample(ours(schedule, predict), noise(), cfg, diffusion=process(schedule, predict), generator=gen())
    assert_same(found, expected)


@pytest.mark.parametrize("schedule", ["linear_zsnr", "scaled_linear_zsnr"])
def test_ddim_from_pure_noise_with_guidance_rescaled(schedule: ScheduleName) -> None:
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

    cfg = SamplerConfig(kind="ddim", steps=20, timesteps="trailing", guidance_scale=5.0, guidance_rescale=0.7)
    half = torch.tensor([1.0, 1.0, 0.5, 0.5])[:, None, None, None]
    model = with_guidance(lambda x, t: net(x, 1000.0 * t), lambda x, t: net(half * x, 1000.0 * t), cfg=cfg)
    diffusion = DiffusionConfig(schedule=schedule, predict="v")
    found = sample(denoiser(model, diffusion), noise(), cfg, diffusion=diffusion)
    assert_same(found, x)


@pytest.mark.parametrize(("schedule", "predict"), MODELS)
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(
    ("variance", "theirs_variance"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm(schedule: ScheduleName, predict: Predict, steps: int, variance: str, theirs_variance: str) -> None:
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
def test_solvers(kind: str, schedule: ScheduleName, predict: Predict) -> None:
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
    found = sample(ours(schedule, predict), noise(), cfg, diffusion=process(schedule, predict), generator=gen())
    assert_same(found, expected)


@pytest.mark.parametrize(("schedule", "predict"), [("scaled_linear", "eps"), ("linear", "v")])
@pytest.mark.parametrize("clip", [False, True])
def test_inversion(schedule: ScheduleName, predict: Predict, clip: bool) -> None:
    theirs = scheduler("DDIMInverseScheduler", schedule, predict, clip=not clip)
    expected = follow(theirs, noise(), 20)
    net = Network()
    cfg = SamplerConfig(kind="ddim", steps=20, timesteps="trailing", threshold="static" if clip else "none")
    found = inverted(lambda x, t: net(x, 1000.0 * t), noise(), cfg, diffusion=process(schedule, predict))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "name"), [("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
@pytest.mark.parametrize("lower", [False, True])
def test_last_step_of_lower_order(kind: str, name: str, lower: bool) -> None:
    """In a last step that ends at the first step of the table."""
    theirs = scheduler(name, "scaled_linear", "eps", lower_order_final=lower, final_sigmas_type="sigma_min")
    expected = follow(theirs, noise(), 10)
    ts = timesteps(10, schedule="scaled_linear", grid="trailing")
    ts[-1] = 0.001
    solver = {"dpmpp_2m": dpmpp_2m, "unipc": unipc}[kind]
    assert_same(
        solver(ours("scaled_linear", "eps"), noise(), ts, schedule="scaled_linear", lower_order_final=lower), expected
    )


def test_sde_of_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPMSolverSDEScheduler, whose Brownian tree is of a package that is not here: its noise is ours."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    theirs = DPMSolverSDEScheduler(**TABLES["scaled_linear"], timestep_spacing="trailing")
    theirs.set_timesteps(12)
    drawn, path = gen(), []

    def brownian(start: Tensor, end: Tensor) -> Tensor:
        """Of a path in sigma: first to half-way, then, knowing that, over the whole way."""
        path.append((float(start - end), torch.randn(2, 3, 8, 8, generator=drawn)))
        if len(path) % 2:
            return path[-1][1]
        (half, first), (whole, rest) = path[-2:]
        return (half / whole) ** 0.5 * first + (1 - half / whole) ** 0.5 * rest

    theirs.noise_sampler = brownian
    alpha, _ = alpha_sigma(torch.ones(1), "scaled_linear")
    net, x = Network(), noise() / alpha
    for index in theirs.timesteps:
        out = net(theirs.scale_model_input(x, index), index.expand(2))
        x = theirs.step(out, index, x, return_dict=False)[0]
    cfg = SamplerConfig(kind="dpmpp_sde", steps=12, timesteps="trailing")
    found = sample(
        ours("scaled_linear", "eps"), noise(), cfg, diffusion=process("scaled_linear", "eps"), generator=gen()
    )
    # Half-way they read their table linearly.
    assert (found - x).abs().max() <= 1e-4 * x.abs().max()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift: float) -> None:
    net = Network()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12).tolist())
    x = noise()
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(2)), t, x, return_dict=False)[0]
    cfg = SamplerConfig(kind="euler", steps=12, shift=shift)
    found = sample(ours("flow", "flow"), noise(), cfg, diffusion=process("flow", "flow"))
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
    found = sample(denoise, noise(), cfg_sampler, diffusion=cfg, generator=gen())
    assert_same(found, x)


@pytest.mark.parametrize(("schedule", "steps"), [("scaled_linear", 7), ("scaled_linear", 30), ("edm", 18)])
@pytest.mark.parametrize(("grid", "theirs_grid"), [("karras", "karras"), ("logsnr", "exponential")])
def test_grids_by_noise(schedule: ScheduleName, steps: int, grid: str, theirs_grid: str) -> None:
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
    theirs = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.97, sample_max_value=2.0)
    largest = thresholded(x0, kind="dynamic", bound=1.0, percentile=0.97, largest=2.0)
    torch.testing.assert_close(largest, theirs._threshold_sample(x0))
    scaled = thresholded(ratio * x0, kind="dynamic", bound=ratio, percentile=0.97)
    torch.testing.assert_close(scaled, ratio * expected)
