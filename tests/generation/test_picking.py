"""Pictures that are drawn by themselves, against those of the whole batch; and that no others are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from generation.gaussian_system import GaussianSystem
from torch import Tensor, nn

from genpipe.artifacts import Artifact, read_manifest
from genpipe.diffusion.process import SamplerConfig, UpsamplerSamplerConfig
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import draft
from genpipe.generation.picking import pick
from genpipe.generation.systems.unclip import UnclipConfig, UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
ROWS = [5, 2]
TEXTS = ["a small red circle", "a large blue cross", "a large green bar", "a small red bar"] * 2
FEW_CODES = "stages.prior.model={kind: autoregressive, width: 32, depth: 1, heads: 2, buckets: 4, dot_buckets: 2}"
ROUNDING = {"rtol": 0.0, "atol": 1e-5}
"""Sums of fp32 in another order, through all steps of all samplers; a step of 8 bits is 0.008."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def parts(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Those of the tiny pipeline's system, an upsampler among them."""
    manifest = read_manifest(tiny.run("system").uri)
    assert manifest is not None
    return dict(manifest.inputs)


@pytest.fixture(scope="module", params=["diffusion", "autoregressive"])
def of_prior(request: pytest.FixtureRequest, tiny: TinyPipeline, parts: dict[str, Artifact]) -> dict[str, Artifact]:
    """The parts, with one prior and the other."""
    return parts if request.param == "diffusion" else {**parts, "prior": tiny.run("prior", FEW_CODES)}


def noisy() -> UnclipConfig:
    """Of each sampler one that draws noise on its way, and two candidates of the prior."""
    return UnclipConfig(
        prior=SamplerConfig(kind="ddim", eta=1.0, steps=3),
        candidates=2,
        decoder=SamplerConfig(kind="dpmpp_2m_sde", steps=4, guidance_scale=2.0),
        upsamplers=(UpsamplerSamplerConfig(kind="ddpm", steps=3),),
    )


@pytest.mark.parametrize("negative", [None, ["a large red cross"] * len(TEXTS)])
def test_picked_pictures_are_those_of_the_batch(of_prior: dict[str, Artifact], negative: list[str] | None) -> None:
    system = UnclipSystem(noisy(), of_prior, device=CPU)
    conditions = Conditions(len(TEXTS), texts=TEXTS, negative=negative)
    everything = system.sample(conditions, generator=seeded())
    picked = pick(system.sample, conditions, ROWS, generator=seeded())
    assert picked.shape == (2, 3, 32, 32)
    torch.testing.assert_close(picked, everything[ROWS], **ROUNDING)
    others = [row for row in range(len(TEXTS)) if row not in ROWS]
    assert (everything[others][:, None] - picked).abs().amax(dim=(2, 3, 4)).min() > 0.1, "no other is like them"


def test_only_what_is_picked_is_drawn_and_upscaled(parts: dict[str, Artifact]) -> None:
    system = UnclipSystem(noisy(), parts, device=CPU)
    seen: dict[str, set[int]] = {"decoder": set(), "upsampler": set()}

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, arguments: seen[name].add(len(arguments[0])))

    watch(system.decoder, "decoder")
    watch(system.cascade.steps[0].model, "upsampler")
    conditions = Conditions(len(TEXTS), texts=TEXTS)

    def drafts(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        return draft(system, conditions, generator=generator)

    small = pick(drafts, conditions, [5], generator=seeded())
    assert small.shape == (1, 3, 16, 16) and seen == {"decoder": {2}, "upsampler": set()}, "guidance doubles a batch"
    pick(system.sample, conditions, [5], generator=seeded())
    assert seen == {"decoder": {2}, "upsampler": {1}}
    torch.testing.assert_close(small, drafts(conditions, generator=seeded())[5:6], **ROUNDING)


@pytest.mark.parametrize("sampler", [{"kind": "heun", "s_churn": 2.0}, {"kind": "dpmpp_sde"}, {"kind": "euler"}])
def test_the_noise_of_every_sampler_is_that_of_the_row(sampler: dict[str, Any]) -> None:
    system = GaussianSystem(SamplerConfig(steps=4, **sampler))

    def exact(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
        return draft(system, conditions, generator=generator)

    everything = exact(Conditions(6), generator=seeded())
    picked = pick(exact, Conditions(6), [4, 1], generator=seeded())
    torch.testing.assert_close(picked, everything[[4, 1]], rtol=0.0, atol=1e-6)
