"""The upsampler's stage and its sampling: crops, spaces, degradations, pieces; and that the input is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.artifacts import Artifact
from genpipe.data.image_batches import to_uint8
from genpipe.data.loader import SampleSet
from genpipe.diffusion.process import SamplerConfig
from genpipe.generation import upsampling
from genpipe.generation.conditions import Statistics
from genpipe.generation.upsampling import LatentSpace, PixelSpace, Space, enlarge, in_pieces, upsample
from genpipe.models.autoencoder import FoldedConfig, IdentityConfig, build_autoencoder
from genpipe.stages import upsampler
from genpipe.training.objective import Batch, Step

CPU = torch.device("cpu")
UNET = {"kind": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "groups": 8}
SMALL = {"patch_size": 2, "width": 16, "depth": 1}
LEARNED = {"schedule": "linear", "predict": "eps", "time_sampling": "discrete", "variance": "learned"}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def config(**settings: Any) -> upsampler.Config:
    base = {"low_size": 8, "image_size": 32, "crop": 16, "model": SMALL, "observe": {"sampler": {"steps": 2}}}
    train = {"samples": 8, "global_batch_size": 4}
    return upsampler.Config.model_validate({**base, "train": train, **settings})


def space(cfg: upsampler.Config) -> Space:
    if cfg.target != "latents":
        return PixelSpace(0.1 if cfg.target == "residual" else None)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(FoldedConfig(patch_size=4, width=16, multipliers=(1,), latent_channels=4))
    statistics = Statistics.of([0.1] * 4, [2.0] * 4, axes=2, device=CPU)
    return LatentSpace(autoencoder.requires_grad_(False).eval(), statistics, 4)


def pictures(count: int = 8, *, side: int = 32) -> Tensor:
    """Smooth random images with fine stripes, uint8."""
    smooth = F.interpolate(torch.randn(count, 3, 4, 4, generator=seeded(0)), (side, side), mode="bicubic")
    stripes = torch.sin(torch.arange(side) * torch.randint(1, 4, (count, 3, side, 1), generator=seeded(1)))
    return to_uint8((0.6 * smooth + 0.2 * stripes).clamp(-1, 1))


FORMS: list[dict[str, Any]] = [
    {},
    {"low_size": 12, "target": "image"},
    {"model": UNET, "target": "image", "degradation": {"kind": "blur"}},
    {"model": UNET, "target": "image", "degradation": {"kind": "bsr"}, "diffusion": LEARNED},
    {"target": "latents", "crop": 16, "model": {**SMALL, "patch_size": 1}},
    {"target": "latents", "model": UNET, "diffusion": LEARNED},
]


@pytest.mark.parametrize("settings", FORMS)
def test_every_form_trains_and_is_validated(settings: dict[str, Any]) -> None:
    cfg = config(**settings)
    objective = upsampler.Objective(cfg, space(cfg), CPU)
    with torch.no_grad():
        for p in objective.model.parameters():
            p.add_(0.02)
    batch = {"images": pictures(4)}
    loss, _ = objective.loss("upsampler", batch, Step(0, seeded(0)))
    again, _ = objective.loss("upsampler", batch, Step(0, seeded(0)))
    other, _ = objective.loss("upsampler", batch, Step(0, seeded(1)))
    assert loss == again != other and loss.isfinite()
    loss.backward()
    assert [name for name, p in objective.model.named_parameters() if p.grad is None] == []
    found = objective.validate([batch], seeded(2))
    assert {"loss", "psnr", "psnr_bicubic"} <= found.metrics.keys()
    assert found.images["enlarged_upsampled_true"].std() > 0


def test_a_batch_is_as_the_example_says() -> None:
    cfg, shard = config(), Artifact(kind="shard", uri="", fingerprint="s" * 64, meta={"image_size": 32})
    example: Batch = upsampler.example_batch(cfg, {"shard": shard}, batch_size=3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {"images": ((3, 3, 32, 32), torch.uint8)}


def trained(*, blind: bool) -> tuple[upsampler.Objective, Tensor, Tensor]:
    """An upsampler fitted to eight images, whole, and their small ones; a blind one is shown only gray."""
    cfg = config(target="image", crop=32, noise_aug=0.0, model={**SMALL, "width": 32, "depth": 2})
    torch.manual_seed(0)
    objective = upsampler.Objective(cfg, PixelSpace(None), CPU)
    if blind:
        see = objective.model.forward
        objective.model.forward = lambda x, t, *, low_res, **rest: see(  # type: ignore[method-assign]
            x, t, low_res=torch.zeros_like(low_res), **rest
        )
    images = pictures()
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=4e-3)
    for step in range(150):
        loss, _ = objective.loss("upsampler", {"images": images}, Step(step, seeded(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = images.float() / 127.5 - 1
    return objective, images, upsampler.shrink(images, size=8)


def own_image_is_nearest(objective: upsampler.Objective, images: Tensor, low: Tensor) -> Tensor:
    """Whose image each output is nearest to: int [8]."""
    with torch.no_grad():
        outputs = objective._upsample(low, seeded(5))
    return torch.cdist(outputs.flatten(1), images.flatten(1)).argmin(1)


def test_the_upsampler_uses_its_input() -> None:
    """With the small images swapped the large ones are swapped with them; a model that does not look cannot do it."""
    objective, images, low = trained(blind=False)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 4, 5])
    assert own_image_is_nearest(objective, images, low).tolist() == list(range(8))
    assert own_image_is_nearest(objective, images, low[order]).tolist() == order.tolist()
    blind, *_ = trained(blind=True)
    assert (own_image_is_nearest(blind, images, low) == torch.arange(8)).sum() <= 4
    assert torch.equal(own_image_is_nearest(blind, images, low), own_image_is_nearest(blind, images, low[order]))


class Local(nn.Module):
    """An upsampler that looks one cell far, and whose every channel counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, *, low_res: Tensor, noise_aug: Tensor) -> Tensor:
        return self.look(torch.cat([x_BCHW, low_res], dim=1)) + (t_B + noise_aug)[:, None, None, None]


@torch.no_grad()
def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images at a time: exactly. In tiles: exactly where tiles do not overlap, and else near their borders."""
    model = Local()
    x, low = torch.randn(2, 5, 3, 40, 40, generator=seeded(0))
    t, level = torch.rand(2, 5, generator=seeded(1))
    whole = model(x, t, low_res=low, noise_aug=level)
    monkeypatch.setattr(upsampling, "CELLS_AT_ONCE", 2 * 40 * 40)
    torch.testing.assert_close(in_pieces(model, low, level=level)(x, t), whole)  # type: ignore[arg-type]
    tiles = in_pieces(model, low, level=level, tile=24, overlap=8)(x, t)  # type: ignore[arg-type]
    torch.testing.assert_close(tiles[..., :16, :16], whole[..., :16, :16])
    torch.testing.assert_close(tiles[..., 24:, 24:], whole[..., 24:, 24:])
    assert 0 < (tiles - whole).abs().max() < 0.1 * whole.abs().max()


class Oracle(nn.Module):
    """Says that x0 is what it was made with."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, x_BCHW: Tensor, t_B: Tensor, *, low_res: Tensor, noise_aug: Tensor) -> Tensor:
        return self.x0.expand_as(x_BCHW)


@pytest.mark.parametrize("target", ["residual", "image", "latents"])
@pytest.mark.parametrize("low_size", [8, 12])
def test_what_is_drawn_becomes_the_image(target: str, low_size: int) -> None:
    """A network that knows the right answer gives back the image (latents: as the autoencoder has it)."""
    cfg = config(target=target, low_size=low_size)
    here, images = space(cfg), pictures(2).float() / 127.5 - 1
    low = upsampler.shrink(images, size=low_size)
    beside = enlarge(low, size=here.grid(32))
    oracle = Oracle(here.encode(images, low_res=beside))
    found = upsample(
        oracle,  # type: ignore[arg-type]
        low,
        size=32,
        space=here,
        noise_aug=0.1,
        diffusion=cfg.diffusion,
        sampler=SamplerConfig(steps=3),
        generator=seeded(0),
    )
    expected = images
    if isinstance(here, LatentSpace) and here.autoencoder:
        with torch.no_grad():
            expected = here.autoencoder.decode(here.autoencoder.encode(images)[0]).clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_small_image_lies_beside_latents_as_it_is() -> None:
    low = torch.rand(1, 3, 8, 8, generator=seeded(0)) * 2 - 1
    torch.testing.assert_close(enlarge(low, size=8), low)
    shrunk = enlarge(low.repeat_interleave(4, 2).repeat_interleave(4, 3), size=8)
    assert F.cosine_similarity(shrunk.flatten(), low.flatten(), dim=0) > 0.95


def test_latents_of_an_identity_are_pixels() -> None:
    statistics = Statistics.of([0.0] * 3, [1.0] * 3, axes=2, device=CPU)
    here = LatentSpace(build_autoencoder(IdentityConfig(kind="identity")), statistics, 1)
    images = pictures(2).float() / 127.5 - 1
    assert here.grid(32) == 32 and here.channels(3) == 3
    torch.testing.assert_close(here.encode(images, low_res=images), images)


def test_crops_of_grids_of_different_fineness_show_the_same_place() -> None:
    coarse = torch.arange(6 * 10 * 10).view(6, 1, 10, 10).float()
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    few, many = upsampler.random_crops([coarse, fine], side=3, generator=seeded(0))
    assert few.shape == (6, 1, 3, 3) and many.shape == (6, 1, 12, 12)
    torch.testing.assert_close(many[..., ::4, ::4], few)


def inputs(cfg: upsampler.Config) -> dict[str, Artifact]:
    """Planned, and not made."""
    shard = Artifact(kind="shard", uri="", fingerprint="s" * 64, meta={"image_size": 64})
    meta = {"image_size": 16, "latent_size": 4, "latent_channels": 4, "latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}
    autoencoder = Artifact(kind="autoencoder", uri="", fingerprint="a" * 64, meta=meta)
    known = {"shard": shard, "autoencoder": autoencoder}
    return {name: known[name] for name in upsampler.roles(cfg)}


@pytest.mark.parametrize("settings", FORMS)
def test_every_form_is_stepped_on_the_meta_device(settings: dict[str, Any]) -> None:
    cfg, meta = config(**settings), torch.device("meta")
    with meta:
        objective = upsampler.objective(cfg, inputs(cfg), meta)
        loss, _ = objective.loss("upsampler", upsampler.example_batch(cfg, inputs(cfg), batch_size=3), Step(0, None))  # type: ignore[arg-type]
    loss.backward()
    assert {p.grad.device.type for p in objective.model.parameters() if p.grad is not None} == {"meta"}
    real = upsampler.Objective(cfg, space(cfg), CPU)
    assert [p.shape for p in real.model.parameters()] == [p.shape for p in objective.model.parameters()]


def agreed(cfg: upsampler.Config) -> dict[str, Any]:
    return upsampler.check_inputs(cfg, inputs(cfg))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_size": 32}, "image_size 32 is not larger than low_size 32"),
        ({"crop": 15}, "crop 15 must be a multiple of the 2 px of the model's coarsest cells"),
        ({"crop": 34}, "at most image_size 32"),
        ({"image_size": 33}, "image_size 33 is not a multiple of the 2 px"),
        (
            {"model": {**UNET, "multipliers": [1, 1, 2]}, "image_size": 34},
            "image_size 34 is not a multiple of the 4 px",
        ),
        ({"target": "latents", "crop": 12}, "crop 12 must be a multiple of the 8 px"),
        ({"observe": {"sampler": {"kind": "ddpm", "variance": "learned"}}}, "needs a model that learned it"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreed(config(**settings))


def test_what_is_promised() -> None:
    assert upsampler.roles(config()).keys() == {"shard"}
    cfg = config(low_size=12)
    diffusion = cfg.diffusion.model_dump(mode="json")
    assert agreed(cfg) == {"low_size": 12, "image_size": 32, "diffusion": diffusion}
    latents = config(target="latents")
    assert upsampler.roles(latents).keys() == {"shard", "autoencoder"}
    assert agreed(latents) == {
        "low_size": 8,
        "image_size": 32,
        "diffusion": diffusion,
        "autoencoder": "a" * 64,
    }


def test_the_residuals_scale_sees_both_sources_of_a_mix() -> None:
    """Of flat pictures enlarging loses nothing, of noise nearly all: the mean square is that of the mix as weighted."""
    noise = torch.randint(0, 256, (600, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = torch.cat([torch.full_like(noise, 128), noise])
    sources = {"flat": range(600), "noise": range(600, 1200)}
    split = SampleSet(1200, lambda indices, _: {"images": images[indices]}, sources)

    def measured(**weights: float) -> float:
        cfg = {"low_size": 8, "image_size": 16, "crop": 16, "train": {"samples": 64, "global_batch_size": 4}}
        cfg["train"] |= {"source_weights": weights}
        return upsampler.residual_std(split, upsampler.Config.model_validate(cfg))

    alone = measured(flat=0, noise=1)
    assert measured() == pytest.approx(alone * 0.5**0.5, rel=0.02)
    assert measured(flat=3, noise=1) == pytest.approx(alone * 0.25**0.5, rel=0.02)
