"""Systems that draw pixels: a cascade of three upsamplers, whole, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from genpipe.artifacts import Artifact, read_manifest
from genpipe.diffusion.process import DiffusionConfig
from genpipe.generation.conditions import Conditions
from genpipe.generation.systems import load_system
from genpipe.generation.systems.pixel import PixelConfig, PixelSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
CFG = PixelConfig(kind="pixel")
EDM = DiffusionConfig(schedule="edm", predict="edm", time_sampling="log_normal").model_dump(mode="json")


def decoder(**meta: Any) -> dict[str, Artifact]:
    promised = {"conditions": ["label"], "diffusion": EDM, "image_size": 32, **meta}
    return {"decoder": Artifact(kind="decoder", uri="", fingerprint="d" * 64, meta=promised)}


def test_what_is_promised() -> None:
    assert CFG.check(decoder(classes=["cat"])) == {"size": 32, "conditioned_on": ["label"], "classes": ["cat"]}
    assert "classes" not in CFG.check(decoder()), "not known before the shards are made"
    assert CFG.check(decoder(conditions=[])) == {"size": 32, "conditioned_on": [], "classes": []}


def test_a_decoder_of_latents_is_refused() -> None:
    parts = decoder()
    meta = {name: value for name, value in parts["decoder"].meta.items() if name != "image_size"}
    latent = {"decoder": parts["decoder"].model_copy(update={"meta": {**meta, "autoencoder": "a" * 64}})}
    with pytest.raises(ValueError, match=r"inputs\.decoder draws an autoencoder's latents.*model\.kind to latent"):
        CFG.check(latent)


def test_three_upsamplers_follow_a_class_conditional_decoder(pixel_tiny: TinyPipeline) -> None:
    """`configs/pipeline/cascade-tiny.yaml`, whole."""
    path = Path("configs/pipeline/cascade-tiny.yaml")
    cascade = type(pixel_tiny)(pixel_tiny.store, pixel_tiny.shapes, path)
    samples = cascade.run("sample")
    assert samples.meta["image_size"] == 32 and samples.meta["samples"]["train"] == 20
    scores = read_manifest(cascade.run("evaluate").uri)
    assert scores is not None and {"decoder/loss", *(f"upsampler.{i}/psnr" for i in range(3))} <= scores.metrics.keys()
    system = load_system(cascade.run("system"), device=CPU)
    assert isinstance(system, PixelSystem) and system.conditioned_on == {"label"} and len(system.classes) == 5
    conditions = Conditions(2, labels=[0, 4])
    made = system.stages(conditions, generator=torch.Generator().manual_seed(0))
    assert [images.shape[-1] for images in made] == [8, 16, 24, 32]
    assert all(images.isfinite().all() and images.abs().max() <= 1 for images in made)
    again = system.sample(conditions, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, made[-1])
    other = system.sample(Conditions(2, labels=[1, 4]), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(again[0], other[0])
    torch.testing.assert_close(again[1], other[1], atol=1e-4, rtol=0)
