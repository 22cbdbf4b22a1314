"""Sampling priors on the tiny pipeline: candidates, and the autoregressive one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from genpipe.artifacts import Artifact, read_manifest
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.systems.unclip import UnclipConfig, UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue cross", "a large green bar"]
CFG = UnclipConfig(prior=SamplerConfig(steps=4), decoder=SamplerConfig(steps=2))


@pytest.fixture(scope="module")
def parts(tiny: TinyPipeline) -> dict[str, Artifact]:
    """Those of the tiny pipeline's system."""
    manifest = read_manifest(tiny.run("system").uri)
    assert manifest is not None
    return dict(manifest.inputs)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_of_several_candidates_the_best_match_is_kept(parts: dict[str, Artifact]) -> None:
    text = UnclipSystem(CFG, parts, device=CPU).encode_text(PROMPTS * 8)
    size = len(text.embed)

    def candidates(count: int) -> Tensor:
        system = UnclipSystem(CFG.model_copy(update={"candidates": count}), parts, device=CPU)
        embeds = system.prior_embeds(text, generator=seeded(3))
        assert embeds is not None
        return embeds

    # The generator's first rows are the first candidates, whatever their number.
    noise = {n: torch.randn(n * size, text.embed.shape[1], generator=seeded(3)) for n in (1, 3)}
    assert torch.equal(noise[1], noise[3][:size])
    single, best = candidates(1), candidates(3)
    match_single, match_best = ((embeds * text.embed).sum(-1) for embeds in (single, best))
    assert (match_best >= match_single - 1e-5).all()
    assert (match_best > match_single + 1e-5).any()


def test_an_autoregressive_prior_serves_as_well(parts: dict[str, Artifact], tiny: TinyPipeline) -> None:
    few = "stages.prior.model={kind: autoregressive, width: 32, depth: 1, heads: 2, buckets: 4, dot_buckets: 2}"
    system = UnclipSystem(CFG, {**parts, "prior": tiny.run("prior", few)}, device=CPU)
    text = system.encode_text(PROMPTS)
    one, again, other = (system.prior_embeds(text, generator=seeded(n)) for n in (1, 1, 2))
    assert one is not None and again is not None and other is not None
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(3))
    assert torch.equal(one, again) and not torch.equal(one, other)
