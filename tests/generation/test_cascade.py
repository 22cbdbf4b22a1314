"""Upsamplers one after the other: their sizes, their samplers, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genpipe.artifacts import Artifact
from genpipe.diffusion.process import DiffusionConfig
from genpipe.generation.cascade import Cascade, CascadeConfig, check_cascade
from genpipe.models.upsampler import ConvolutionalConfig, build_upsampler
from genpipe.weights import save_weights

CPU = torch.device("cpu")
DIFFUSION = DiffusionConfig(schedule="cosine", predict="x0", time_sampling="uniform").model_dump(mode="json")


def upsampler(low_size: int, image_size: int, folder: Path | None = None, **extra: Any) -> Artifact:
    """One of these sizes; with weights if there is a folder for them."""
    if folder is not None:
        folder.mkdir(parents=True)
        cfg = ConvolutionalConfig(patch_size=2, width=16, depth=1)
        told = {"diffusion": DIFFUSION, "target": "image", "residual_std": None, **extra}
        save_weights(build_upsampler(cfg), folder, kind="upsampler", config=cfg, sizes={}, extra=told)
    meta = {"low_size": low_size, "image_size": image_size, "diffusion": DIFFUSION}
    return Artifact(kind="upsampler", uri=str(folder or ""), fingerprint="f" * 64, meta=meta)


def parts(*upsamplers: Artifact) -> dict[str, Artifact]:
    return {f"upsamplers.{i}": artifact for i, artifact in enumerate(upsamplers)}


def test_a_cascade_of_three_ends_at_the_last_size() -> None:
    three = parts(upsampler(8, 16), upsampler(16, 64), upsampler(64, 256))
    assert check_cascade(CascadeConfig(), three, size=8) == 256
    assert check_cascade(CascadeConfig(), {}, size=8) == 8


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ([(16, 32)], ["inputs.upsamplers[0]", "low_size is 16", "8 px"]),
        ([(8, 16), (32, 64)], ["inputs.upsamplers[1]", "low_size is 32", "inputs.upsamplers[0]'s", "16 px"]),
    ],
)
def test_a_step_takes_what_the_one_below_it_makes(sizes: list[tuple[int, int]], names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        check_cascade(CascadeConfig(), parts(*(upsampler(*pair) for pair in sizes)), size=8)
    assert all(name in str(error.value) for name in names), error.value


def test_samplers_belong_to_upsamplers_and_fit_them() -> None:
    two = CascadeConfig.model_validate({"upsamplers": [{"steps": 2}, {"steps": 3}]})
    with pytest.raises(ValueError, match=r"model\.upsamplers has 2 samplers for 1 upsamplers"):
        check_cascade(two, parts(upsampler(8, 16)), size=8)
    learned = CascadeConfig.model_validate({"upsamplers": [{"kind": "ddpm", "variance": "learned"}]})
    with pytest.raises(ValueError, match=r"model\.upsamplers\[0\].*variance"):
        check_cascade(learned, parts(upsampler(8, 16)), size=8)


def test_every_step_is_drawn(tmp_path: Path) -> None:
    two = parts(upsampler(8, 16, tmp_path / "one"), upsampler(16, 32, tmp_path / "other"))
    cfg = CascadeConfig.model_validate({"upsamplers": [{"steps": 2}], "noise_aug": 0.0})
    cascade = Cascade(cfg, two, device=CPU)
    assert [step.sampler.steps for step in cascade.steps] == [2, 8]
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, again = (cascade.enlarge(images, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert [picture.shape for picture in one] == [(3, 3, 16, 16), (3, 3, 32, 32)]
    assert all(picture.abs().max() <= 1 for picture in one)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_an_upsampler_of_latents_needs_an_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inputs\.upsamplers: .*autoencoder"):
        Cascade(CascadeConfig(), parts(upsampler(8, 16, tmp_path / "one", target="latents")), device=CPU)
