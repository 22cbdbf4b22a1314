"""What stages meet: settings, the training loss, held-out losses, sampling and guidance through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import get_args

import pytest
import torch
from analytic import GAUSSIAN, SCHEDULES, Mixture
from pydantic import ValidationError
from torch import Tensor, nn

from genpipe.diffusion.parameterizations import Predict, check_predict, network_input, target
from genpipe.diffusion.process import (
    FIXED_TIMES,
    DiffusionConfig,
    Model,
    SamplerConfig,
    check_sampler,
    denoiser,
    fixed_time_losses,
    inverted,
    loss_at,
    sample,
    sampling_times,
    training_loss,
    with_guidance,
)
from genpipe.diffusion.samplers import ddim, ddpm, heun
from genpipe.diffusion.schedules import ScheduleName, add_noise, alpha_sigma, network_time
from genpipe.diffusion.solvers import dpmpp_sde, unipc
from genpipe.diffusion.times import TimeGrid, TimeSampling, sample_t, timesteps

KINDS = get_args(SamplerConfig.model_fields["kind"].annotation)
UNIT = Mixture(torch.zeros(1, 2), torch.ones(1), 1.0)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def continuous(schedule: ScheduleName) -> DiffusionConfig:
    return DiffusionConfig(schedule=schedule, predict="x0", time_sampling="uniform")


def allowed(predict: Predict, schedule: ScheduleName) -> bool:
    try:
        check_predict(predict, schedule=schedule)
    except ValueError:
        return False
    return True


PAIRS = [pair for pair in product(get_args(Predict), SCHEDULES) if allowed(*pair)]


def perfect(data: Mixture, cfg: DiffusionConfig, *, times: Tensor) -> Model:
    """The best network of `cfg` for the data: what its prediction of E[x0 | x_t] is, from its own input and time.

    It is told the time as networks are, and finds the one of `times` that this means.
    """

    def model(given: Tensor, told: Tensor) -> Tensor:
        index = (network_time(times, cfg.schedule)[None] - told[:, None]).abs().argmin(1)
        t = times[index]
        alpha, sigma = alpha_sigma(t, cfg.schedule)
        scale = network_input(torch.ones_like(given), sigma=sigma, schedule=cfg.schedule, sigma_data=cfg.sigma_data)
        x_t = given / scale
        x0 = data.denoiser(cfg.schedule)(x_t, t)
        noise = (x_t - alpha[:, None] * x0) / sigma[:, None]
        return target(cfg.predict, x0=x0, noise=noise, alpha=alpha, sigma=sigma, sigma_data=cfg.sigma_data)

    return model


@pytest.mark.parametrize(("predict", "schedule"), PAIRS)
def test_denoiser_undoes_what_the_network_is_given_and_asked(predict: Predict, schedule: ScheduleName) -> None:
    cfg = DiffusionConfig(schedule=schedule, predict=predict, sigma_data=0.6)
    times = torch.tensor([0.05, 0.3, 0.6, 0.9])
    x_t = torch.randn(4, 1, generator=gen())
    found = denoiser(perfect(GAUSSIAN, cfg, times=times), cfg)(x_t, times)
    torch.testing.assert_close(found, GAUSSIAN.denoiser(schedule)(x_t, times), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("predict", "schedule"), PAIRS)
def test_perfect_network_has_the_least_loss_there_can_be(predict: Predict, schedule: ScheduleName) -> None:
    """On x0 that is the posterior's variance, s^2 sigma^2 / (alpha^2 s^2 + sigma^2); on others times a known factor."""
    cfg = DiffusionConfig(schedule=schedule, predict=predict, sigma_data=0.6)
    x0 = 0.7 + 0.6 * torch.randn(50_000, 1, generator=gen())
    model = perfect(GAUSSIAN, cfg, times=torch.tensor(FIXED_TIMES))
    losses = fixed_time_losses(model, x0, cfg, generator=gen(1))
    assert set(losses) == {"loss", *(f"loss_t{t}" for t in FIXED_TIMES)}
    for t in FIXED_TIMES:
        alpha, sigma = (level.item() for level in alpha_sigma(torch.tensor(t), schedule))
        posterior = 0.36 * sigma**2 / (alpha**2 * 0.36 + sigma**2)
        per_x0 = {
            "x0": 1.0,
            "eps": alpha / sigma,
            "v": (alpha**2 + sigma**2) / sigma,
            "flow": 1 / sigma,
            "edm": math.hypot(0.6, sigma) / (0.6 * sigma),
        }[predict]
        assert losses[f"loss_t{t}"].mean().item() == pytest.approx(posterior * per_x0**2, rel=0.03)
    torch.testing.assert_close(losses["loss"], torch.stack([losses[f"loss_t{t}"] for t in FIXED_TIMES]).mean(0))


@pytest.mark.parametrize("time_sampling", get_args(TimeSampling))
@pytest.mark.parametrize(("predict", "schedule"), PAIRS)
def test_training_loss_is_finite_and_repeats(predict: Predict, schedule: ScheduleName, time_sampling: str) -> None:
    net = nn.Linear(3, 2)
    model: Model = lambda x, t: net(torch.cat([x, t[:, None]], dim=1))  # noqa: E731
    x0 = torch.randn(512, 2, generator=gen())
    for options in ({}, {"min_snr_gamma": 5.0}, {"weighting": "edm"}):
        cfg = DiffusionConfig(schedule=schedule, predict=predict, time_sampling=time_sampling, **options)  # type: ignore[arg-type]
        loss = training_loss(model, x0, cfg, generator=gen())
        assert loss.shape == (512,) and loss.dtype == torch.float32 and loss.isfinite().all()
        assert torch.equal(loss, training_loss(model, x0, cfg, generator=gen()))
        net.zero_grad()
        loss.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_without_data(schedule: ScheduleName) -> None:
    """On the meta device, as when a run is only planned."""
    predict: Predict = "edm" if schedule == "edm" else "v"
    learned = schedule not in ("flow", "edm")
    for sampling in get_args(TimeSampling):
        cfg = DiffusionConfig(
            schedule=schedule, predict=predict, variance="learned" if learned else "fixed", time_sampling=sampling
        )
        net = nn.Conv2d(3, cfg.channels(3), 1, device="meta")
        x0 = torch.zeros(2, 3, 4, 4, device="meta")
        t_B, noise = torch.zeros(2, device="meta"), torch.zeros_like(x0)
        loss = loss_at(lambda x, t, net=net: net(x), x0, cfg, t_B=t_B, noise=noise, vlb_weight=1.0)
        assert loss.shape == (2,) and loss.device.type == "meta"


def test_demo_settings_train_as_they_did() -> None:
    """The squared error by hand, of the draws in their order: the times, then the noise."""
    x0 = torch.randn(16, 2, generator=gen())
    model: Model = lambda x, t: 0.5 * x + t[:, None]  # noqa: E731
    for cfg, alpha_of, sigma_of in (
        (DiffusionConfig(), lambda t: 1 - t, lambda t: t),
        (
            DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform"),
            lambda t: torch.cos(t * math.pi / 2),
            lambda t: torch.sin(t * math.pi / 2),
        ),
    ):
        draws = gen(5)
        flow = cfg.schedule == "flow"
        t = (torch.randn(16, generator=draws).sigmoid() if flow else torch.rand(16, generator=draws))[:, None]
        noise = torch.randn(16, 2, generator=draws)
        x_t = alpha_of(t) * x0 + sigma_of(t) * noise
        tgt = noise - x0 if flow else x0
        expected = (0.5 * x_t + t - tgt).square().mean(1)
        assert torch.equal(training_loss(model, x0, cfg, generator=gen(5)), expected)


def test_settings_of_times_and_weights_reach_the_loss() -> None:
    """By hand, on the flow schedule: shifted logit-normal times, and an error on x0 of x_t - t v, weighed on x0."""
    x0 = torch.randn(16, 2, generator=gen())
    model: Model = lambda x, t: 0.5 * x + t[:, None]  # noqa: E731
    for options, weight_of in (
        ({"min_snr_gamma": 2.0}, lambda snr: snr.clamp(max=2.0)),
        ({"weighting": "edm", "sigma_data": 0.5}, lambda snr: snr * (1 / snr + 0.25) / 0.25),
    ):
        cfg = DiffusionConfig(time_mean=0.7, time_std=0.4, shift=2.0, **options)  # type: ignore[arg-type]
        draws = gen(5)
        t = (0.7 + 0.4 * torch.randn(16, generator=draws)).sigmoid()[:, None]
        t = 2 * t / (1 + t)
        noise = torch.randn(16, 2, generator=draws)
        x_t = (1 - t) * x0 + t * noise
        error = t * (0.5 * x_t + t - (noise - x0))
        expected = (weight_of(((1 - t) / t) ** 2) * error.square()).mean(1)
        torch.testing.assert_close(training_loss(model, x0, cfg, generator=gen(5)), expected)


class TestLearnedVariance:
    CFG = DiffusionConfig(schedule="linear", predict="eps", variance="learned", time_sampling="discrete")

    def test_takes_twice_the_channels(self) -> None:
        assert self.CFG.channels(4) == 8
        assert DiffusionConfig().channels(4) == 4
        x0 = torch.zeros(2, 4)
        with pytest.raises(ValueError, match=r"8 channels for data of 4, but this network gives 4"):
            training_loss(lambda x, t: x, x0, self.CFG, generator=gen())
        with pytest.raises(ValueError, match=r"4 channels for data of 4, but this network gives 8"):
            training_loss(lambda x, t: torch.cat([x, x], 1), x0, DiffusionConfig(), generator=gen())

    def test_is_hybrid(self) -> None:
        """The bound's term trains the fraction alone, the squared error the prediction alone; held out, only that."""
        x0 = torch.randn(64, 2, generator=gen())
        pred, fraction = (torch.randn(64, 2, generator=gen(i)).requires_grad_() for i in (1, 2))
        both: Model = lambda x, t: torch.cat([pred, fraction], dim=1)  # noqa: E731
        plain = DiffusionConfig(schedule="linear", predict="eps", time_sampling="discrete")

        def gradients(model: Model, cfg: DiffusionConfig, *of: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(training_loss(model, x0, cfg, generator=gen(3)).sum(), of)

        (alone,) = gradients(lambda x, t: pred, plain, pred)
        together, by_fraction = gradients(both, self.CFG, pred, fraction)
        torch.testing.assert_close(together, alone)
        assert by_fraction.abs().min() > 0
        held_out = fixed_time_losses(both, x0, self.CFG, generator=gen(4))
        simple = fixed_time_losses(lambda x, t: pred, x0, plain, generator=gen(4))
        assert torch.equal(held_out["loss"], simple["loss"])

    def test_learns_the_variance_of_the_data(self) -> None:
        """The bound leads to the best variance, for Gaussian data known to be small + of_x0^2 var(x0 | x_t)."""
        data, t = GAUSSIAN, 0.003
        x0 = 0.7 + 0.6 * torch.randn(200_000, 1, generator=gen())
        t_B = torch.full((len(x0),), t)
        fraction = torch.zeros((), requires_grad=True)
        mean = perfect(data, self.CFG, times=torch.tensor([t]))
        model: Model = lambda x, told: torch.cat([mean(x, told), fraction.expand(len(x), 1)], dim=1)  # noqa: E731
        noise = torch.randn(x0.shape, generator=gen(1))
        optimizer = torch.optim.LBFGS([fraction], max_iter=30)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, x0, self.CFG, t_B=t_B, noise=noise, vlb_weight=1.0).mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        ends = torch.tensor([t, t - 0.001], dtype=torch.float64)
        (a, a_s), (s, s_s) = (level.tolist() for level in alpha_sigma(ends, "linear"))
        beta = 1 - (a / a_s) ** 2
        tilde = beta * s_s**2 / s**2
        expected = tilde + (a_s * beta / s**2) ** 2 * 0.36 * s**2 / (a**2 * 0.36 + s**2)
        share = (fraction.item() + 1) / 2
        assert math.log(beta / tilde) > 0.3
        assert share * math.log(beta) + (1 - share) * math.log(tilde) == pytest.approx(math.log(expected), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid", ["uniform", "trailing", "karras", "logsnr"])
def test_every_sampler_draws_the_data_on_every_schedule(schedule: ScheduleName, kind: str, grid: str) -> None:
    """From standard normal noise, through a network that predicts what suits the schedule."""
    cfg = SamplerConfig(kind=kind, steps=100, timesteps=grid)  # type: ignore[arg-type]
    z = torch.randn(2000, 2, generator=gen())
    x = sample(UNIT.denoiser(schedule), z, cfg, diffusion=continuous(schedule), generator=gen(1))
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.09, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), torch.eye(2), atol=0.18, rtol=0)


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        ({"kind": "ddim", "eta": 0.4}, partial(ddim, eta=0.4)),
        ({"kind": "euler_ancestral"}, partial(ddim, eta=1.0)),
        ({"kind": "ddpm", "variance": "analytic"}, partial(ddpm, variance="analytic")),
        (
            {"kind": "heun", "s_churn": 9.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.1},
            partial(heun, s_churn=9.0, s_tmin=0.1, s_tmax=5.0, s_noise=1.1, discrete=True),
        ),
        ({"kind": "dpmpp_sde"}, partial(dpmpp_sde, discrete=True)),
        ({"kind": "unipc", "lower_order_final": True}, partial(unipc, lower_order_final=True)),
    ],
)
def test_settings_of_a_sampler_reach_it(settings: dict[str, object], direct: Callable[..., Tensor]) -> None:
    cfg = DiffusionConfig(schedule="linear", predict="x0", time_sampling="discrete")
    sampler = SamplerConfig(steps=9, timesteps="leading", **settings)  # type: ignore[arg-type]
    z, denoise = torch.randn(64, 2, generator=gen()), UNIT.denoiser("linear")
    ts = timesteps(9, schedule="linear", grid="leading")
    expected = direct(
        denoise, z * torch.hypot(*alpha_sigma(ts[0], "linear")).item(), ts, schedule="linear", generator=gen(1)
    )
    assert torch.equal(sample(denoise, z, sampler, diffusion=cfg, generator=gen(1)), expected)


def test_thresholds_keep_samples_in_bounds() -> None:
    denoise = lambda x, t: 3.0 * torch.ones_like(x)  # noqa: E731
    z = torch.randn(4, 2, generator=gen())
    for cfg, expected in (
        (SamplerConfig(steps=3), 3.0),
        (SamplerConfig(steps=3, threshold="static"), 1.0),
        (SamplerConfig(steps=3, threshold="dynamic", threshold_bound=2.0), 2.0),
        (SamplerConfig(steps=3, threshold="dynamic", threshold_max=1.5), 1.0),
    ):
        torch.testing.assert_close(sample(denoise, z, cfg, diffusion=DiffusionConfig()), torch.full((4, 2), expected))


def test_thresholds_leave_a_learned_variance_alone() -> None:
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return torch.cat([3.0 * torch.ones_like(x), torch.full_like(x, 7.0)], dim=1)

    cfg = SamplerConfig(kind="ddpm", variance="learned", steps=2, threshold="static")
    large = sample(denoise, torch.zeros(4, 2), cfg, diffusion=continuous("linear"), generator=gen())
    assert large.isfinite().all() and seen == [1.0, 0.5]
    torch.testing.assert_close(large, torch.ones(4, 2))


class TestGuidance:
    @staticmethod
    def both(x: Tensor, t: Tensor) -> Tensor:
        """2 and a fraction of 5 with the condition, 1 and a fraction of 9 without."""
        half = len(x) // 2
        parts = [torch.full_like(x[:half], 2.0), torch.full_like(x[half:], 1.0)]
        return torch.cat([torch.cat(parts), torch.cat([3 * parts[0] - 1, 9 * parts[1]])], dim=1)

    def test_follows_schedule_and_interval(self) -> None:
        x, t = torch.zeros(3, 5), torch.tensor([0.25, 0.5, 0.75])
        conditional: Model = lambda x, t: x  # noqa: E731

        def scales(**options: object) -> list[float]:
            cfg = SamplerConfig(guidance_scale=3.0, **options)  # type: ignore[arg-type]
            return (with_guidance(conditional, self.both, cfg=cfg)(x, t)[:, 0] - 1.0).tolist()

        assert scales() == [3.0, 3.0, 3.0]
        assert scales(guidance_schedule="linear") == [4.0, 3.0, 2.0]
        assert scales(guidance_interval=(0.4, 0.6)) == [1.0, 3.0, 1.0]
        assert with_guidance(conditional, self.both, cfg=SamplerConfig()) is conditional

    def test_interval_is_of_the_whole_table(self) -> None:
        """The last of 1,100 steps is told as 1.099, and is as much guided as the last of 1,000."""
        x, told = torch.zeros(2, 5), torch.tensor([1.099, 0.3])
        cfg = SamplerConfig(guidance_scale=3.0, guidance_interval=(0.5, 1.0))
        out = with_guidance(lambda x, t: x, self.both, cfg=cfg, steps=1100)(x, told)
        assert out[:, 0].tolist() == [4.0, 2.0]

    def test_keeps_the_conditional_variance(self) -> None:
        cfg = SamplerConfig(guidance_scale=3.0)
        out = with_guidance(lambda x, t: x, self.both, cfg=cfg)(torch.zeros(3, 5), torch.zeros(3))
        assert out.shape == (3, 10)
        assert (out[:, :5] == 4.0).all() and (out[:, 5:] == 5.0).all()


REFUSED_DIFFUSION = [
    ({"schedule": "cosine", "predict": "eps"}, "zero terminal SNR"),
    ({"schedule": "linear", "predict": "flow"}, "schedule='flow'"),
    ({"schedule": "linear", "predict": "v", "shift": 2.0}, "past the end"),
    ({"min_snr_gamma": 5.0, "weighting": "edm"}, "set one of them"),
    ({"time_sampling": "uniform", "time_mean": 0.5}, "no effect on time_sampling='uniform'"),
    ({"variance": "learned"}, "variance='fixed'"),
    ({"schedule": "edm", "predict": "edm", "variance": "learned"}, "variance='fixed'"),
    ({"steps": 1100}, "no table"),
    ({"schedule": "cosine_iddpm", "predict": "v", "beta_end": 0.01}, "beta_end have no effect"),
]
REFUSED_SAMPLERS = [
    ({"kind": "heun", "eta": 0.5}, "eta has no effect"),
    ({"variance": "large"}, "variance has no effect"),
    ({"timesteps": "karras", "shift": 3.0}, "shift has no effect"),
    ({"guidance_interval": (0.8, 0.2)}, "lower first"),
    ({"kind": "ddim", "lower_order_final": True}, "dpmpp_2m or dpmpp_2m_sde or unipc"),
    ({"s_churn": 40.0}, "kind=heun"),
    ({"kind": "heun", "s_noise": 1.003}, "without s_churn"),
    ({"threshold": "static", "threshold_max": 2.0}, "use 'dynamic'"),
    ({"threshold": "dynamic", "threshold_max": 0.5}, "raise it"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_DIFFUSION)
def test_processes_that_are_not_defined(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DiffusionConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SAMPLERS)
def test_settings_of_a_sampler_that_have_no_effect(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplerConfig(**settings)  # type: ignore[arg-type]


def test_samplers_that_do_not_fit_the_model() -> None:
    check_sampler(SamplerConfig(shift=3.0), DiffusionConfig())
    with pytest.raises(ValueError, match="past the end"):
        check_sampler(SamplerConfig(shift=3.0), DiffusionConfig(schedule="linear", predict="v"))
    with pytest.raises(ValueError, match=r"diffusion\.variance='learned'"):
        check_sampler(SamplerConfig(kind="ddpm", variance="learned"), DiffusionConfig())


class TestDiscreteTimes:
    """A model that was trained at the steps of its table is asked there alone."""

    CFG = DiffusionConfig(schedule="cosine_iddpm", predict="x0", time_sampling="discrete")

    @pytest.mark.parametrize("steps", [1, 3, 7, 27, 64, 250, 333, 1000])
    @pytest.mark.parametrize("table", [1000, 1100])
    def test_are_the_default(self, steps: int, table: int) -> None:
        cfg = self.CFG.model_copy(update={"steps": table})
        told = []

        def model(x: Tensor, t: Tensor) -> Tensor:
            told.append(1000 * t[0].item())
            return x

        sampler = SamplerConfig(steps=steps)
        sample(denoiser(model, cfg), torch.zeros(1, 2), sampler, diffusion=cfg)
        assert len(told) == steps
        assert told[0] == pytest.approx(table - 1, abs=1e-3)
        assert max(abs(index - round(index)) for index in told) < 1e-3

    def test_trained_and_sampled_times_are_the_same(self) -> None:
        trained = sample_t(20_000, kind="discrete", schedule="cosine_iddpm", generator=gen(), device="cpu").unique()
        assert torch.equal(trained, sampling_times(SamplerConfig(steps=1000), self.CFG)[:-1].flip(0))

    @pytest.mark.parametrize("grid", ["karras", "logsnr"])
    def test_of_grids_by_noise_are_the_nearest(self, grid: TimeGrid) -> None:
        exact = sampling_times(SamplerConfig(steps=12, timesteps=grid), continuous("linear"))
        cfg = DiffusionConfig(schedule="linear", predict="x0", time_sampling="discrete")
        found = sampling_times(SamplerConfig(steps=12, timesteps=grid), cfg)
        torch.testing.assert_close(found * 1000, (exact * 1000).round(), atol=1e-3, rtol=0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"timesteps": "uniform"}, "'trailing'"),
            ({"shift": 2.0}, "past the end"),
            ({"timesteps": "logsnr", "steps": 400}, "lower steps"),
            ({"steps": 1001}, "1000 times"),
            ({"timesteps": "leading", "steps": 1000}, "999 times"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_what_does(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_sampler(SamplerConfig(**settings), self.CFG)  # type: ignore[arg-type]


def test_an_image_comes_back_from_its_inverse() -> None:
    x0 = 0.7 + 0.6 * torch.randn(32, 1, generator=gen())
    sampler = SamplerConfig(kind="ddim", steps=20)
    for cfg in (continuous("flow"), DiffusionConfig(schedule="linear", predict="v", time_sampling="discrete")):
        times = sampling_times(sampler, cfg)
        model = perfect(GAUSSIAN, cfg, times=times[:-1])
        z = inverted(model, x0, sampler, diffusion=cfg, refinements=60)
        again = sample(denoiser(model, cfg), z, sampler, diffusion=cfg)
        torch.testing.assert_close(again, x0, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="kind='ddim'"):
        inverted(model, x0, SamplerConfig(kind="ddpm"), diffusion=cfg)


def test_noise_of_the_data_is_as_large_as_the_schedule_says() -> None:
    """A sampler's start: what add_noise makes of unit data at t = 1 has its size."""
    starts = []
    for schedule in SCHEDULES:
        z = torch.randn(100_000, 1, generator=gen())

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            starts.append(x.std())
            return x

        sample(denoise, z, SamplerConfig(steps=1), diffusion=continuous(schedule))
        noised = add_noise(torch.randn(100_000, 1, generator=gen(1)), noise=z, t=torch.ones(100_000), schedule=schedule)
        torch.testing.assert_close(starts[-1], noised.std(), rtol=0.02, atol=0)
