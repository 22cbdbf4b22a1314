"""Principal components of image embeddings: what is kept, against numpy's decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genpipe.diffusion.process import SamplerConfig
from genpipe.generation.principal import basis_of, kept_components, reconstruct
from genpipe.generation.representation import as_unclip
from genpipe.generation.systems import load_system
from genpipe.generation.systems.unclip import UnclipSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def embeddings(count: int = 200) -> torch.Tensor:
    scales = torch.linspace(2.0, 0.1, 16)
    return F.normalize(torch.randn(count, 16, generator=seeded(0)) * scales + 0.5, dim=-1)


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> UnclipSystem:
    return as_unclip(load_system(tiny.run("system"), device=CPU), use="test")


def test_the_first_components_are_kept(system: UnclipSystem) -> None:
    embeds = embeddings()
    mean, basis = basis_of(system, [embeds[:120], embeds[120:]])
    found = kept_components(embeds[:3], mean, basis, counts=(0, 1, 4, 16)).view(3, 4, 16)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 4))
    x = embeds.double().numpy()
    _, _, components = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for place, count in enumerate((0, 1, 4, 16)):
        projected = x.mean(0) + (x[:3] - x.mean(0)) @ components[:count].T @ components[:count]
        expected = F.normalize(torch.from_numpy(projected), dim=-1).float()
        torch.testing.assert_close(found[:, place], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, -1], embeds[:3], atol=1e-5, rtol=0)


def test_pictures_change_with_the_components_alone(system: UnclipSystem) -> None:
    embeds, sampler = embeddings(), SamplerConfig(steps=4)
    basis = basis_of(system, [embeds])
    made = reconstruct(system, embeds[:2], basis, counts=(0, 4, 16), sampler=sampler, generator=seeded(1))
    assert made.shape == (6, 3, 16, 16)
    torch.testing.assert_close(made[0], made[3], atol=1e-4, rtol=0)  # the mean and the same noise
    assert not torch.allclose(made[2], made[5], atol=1e-2)


def test_more_than_there_are_cannot_be_kept(system: UnclipSystem) -> None:
    mean, basis = basis_of(system, [embeddings()])
    for count in (17, -1):
        with pytest.raises(ValueError, match=f"components: {count} cannot be kept of the 16"):
            kept_components(embeddings()[:1], mean, basis, counts=(4, count))
    with pytest.raises(ValueError, match="its prior is not autoregressive; give pictures"):
        basis_of(system)
