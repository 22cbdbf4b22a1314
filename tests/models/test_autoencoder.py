"""Autoencoders of every kind behind the same calls; bottleneck and adversarial losses against closed forms."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional as F

from genpipe.models.autoencoder import (
    AnyConfig,
    Autoencoder,
    AutoencoderConfig,
    IdentityConfig,
    build_autoencoder,
    decode_tiled,
    encode_tiled,
    kl_divergence,
)
from genpipe.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    logits_right,
)
from genpipe.models.space_to_depth_autoencoder import FoldedConfig
from genpipe.models.tiling import tiled
from genpipe.models.vqvae2 import HierarchicalConfig, pack, unpack

TINY = FoldedConfig(width=16, multipliers=(1, 2), blocks=1, latent_channels=4, patch_size=2, mid_attention=True)
KINDS: dict[str, dict[str, Any]] = {
    "folded": {"width": 16, "multipliers": [1, 2], "latent_channels": 4, "patch_size": 2, "mid_attention": True},
    "ldm": {"width": 32, "multipliers": [1, 1, 2], "blocks": 1},
    "deep_compression": {
        "widths": [16, 32, 64],
        "latent_channels": 8,
        "encoder_blocks": [1, 1, 1],
        "decoder_blocks": [1, 1, 1],
        "attention_from": 2,
    },
    "hierarchical": {"width": 32, "residual_width": 16, "blocks": 1, "top_channels": 6, "bottom_channels": 5},
}
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "kl": {"kind": "kl"},
    "vq": {"kind": "vq", "codes": 64},
    "vq-gradient": {"kind": "vq", "codes": 64, "update": "gradient", "normalize": True},
    "plain": {"kind": "plain"},
}
EVERY = [(kind, bottleneck) for kind in KINDS for bottleneck in BOTTLENECKS]


def config(kind: str, bottleneck: str = "", **settings: Any) -> AnyConfig:
    values = {"kind": kind, **KINDS.get(kind, {}), **settings}
    return TypeAdapter(AutoencoderConfig).validate_python(
        values | ({"bottleneck": BOTTLENECKS[bottleneck]} if bottleneck else {})
    )


def build(kind: str, bottleneck: str = "") -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(config(kind, bottleneck))


def blocks_of_color(batch: int, cell: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, 2, 2, generator=generator).repeat_interleave(cell, 2).repeat_interleave(cell, 3) * 2 - 1


def trained_on(model: Autoencoder, images: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of a training step: reconstruction through the bottleneck, and its penalty."""
    mean, logvar = model.encode(images)
    if model.quantizer is not None:
        quantized = model.quantizer(mean, generator=generator)
        return F.l1_loss(model.render(quantized.vectors), images) + quantized.loss
    sample = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    return F.l1_loss(model.decode(sample), images) + 1e-6 * kl_divergence(mean, logvar).mean()


def test_a_block_without_a_kind_is_folded() -> None:
    adapter: TypeAdapter[AnyConfig] = TypeAdapter(AutoencoderConfig)
    assert adapter.validate_python({}) == FoldedConfig()
    assert adapter.validate_python(KINDS["folded"]) == config("folded")
    for kind in (*KINDS, "identity"):
        parsed = adapter.validate_python({"kind": kind})
        assert parsed.kind == kind
        assert adapter.validate_json(parsed.model_dump_json()) == parsed
    with pytest.raises(ValidationError, match="patch_size"):
        adapter.validate_python({"kind": "ldm", "patch_size": 2})


@pytest.mark.parametrize(("kind", "bottleneck"), EVERY)
def test_every_kind_has_the_same_calls(kind: str, bottleneck: str) -> None:
    model = build(kind, bottleneck)
    channels, factor = model.cfg.latent_channels, model.cfg.factor
    images = torch.rand(2, 3, 4 * factor, 6 * factor, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = model.encode(images)
    assert mean.shape == logvar.shape == (2, channels, 4, 6)
    assert mean.dtype == logvar.dtype == torch.float32
    assert (bottleneck == "kl") == (logvar > -29).any().item(), "without a KL bottleneck there is no noise"
    assert model.decode(mean).shape == images.shape
    with pytest.raises(ValueError, match=f"factor {factor}"):
        model.encode(torch.zeros(1, 3, factor + 1, factor))


@pytest.mark.parametrize(("kind", "bottleneck"), EVERY)
def test_every_parameter_has_a_gradient_in_every_step(kind: str, bottleneck: str) -> None:
    model = build(kind, bottleneck)
    trained_on(model, blocks_of_color(2), torch.Generator().manual_seed(0)).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert model.last_layer.grad is not None


@pytest.mark.parametrize(("kind", "bottleneck"), [(kind, name) for kind, name in EVERY if name in ("kl", "vq")])
def test_every_kind_overfits_eight_images(kind: str, bottleneck: str) -> None:
    model, images = build(kind, bottleneck), blocks_of_color(8)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = trained_on(model, images, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.quantizer is not None:
            model.quantizer.update()
    recon = model.eval().decode(model.encode(images)[0])
    constant = (images - images.mean()).abs().mean()
    assert (recon - images).abs().mean() < 0.35 * constant


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_on_the_meta_device_and_under_autocast(kind: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = build(kind, "vq")
        trained_on(model, blocks_of_color(2), torch.Generator().manual_seed(0)).backward()
    with torch.device("meta"):
        model = build(kind, "vq")
        images = torch.zeros(2, 3, 16, 16)
    latents, _ = model.encode(images)
    assert model.decode(latents, fp32=True).shape == images.shape
    assert model.quantizer is not None and model.quantizer(latents).vectors.shape == latents.shape


@pytest.mark.parametrize(("patch_size", "multipliers", "factor"), [(1, (1, 1, 1), 4), (2, (1, 2), 4), (4, (1,), 4)])
def test_any_divisible_size(patch_size: int, multipliers: tuple[int, ...], factor: int) -> None:
    cfg = FoldedConfig(width=16, multipliers=multipliers, blocks=1, latent_channels=3, patch_size=patch_size)
    assert cfg.factor == factor
    model = build_autoencoder(cfg)
    images = torch.zeros(2, 3, 8, 20)
    mean, logvar = model.encode(images)
    assert mean.shape == logvar.shape == (2, 3, 2, 5)
    assert model.decode(mean).shape == images.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 7}, "64, is not a multiple of latent_channels 7"),
        ({"widths": [16, 48, 64]}, "48 does not divide 4 times 16"),
        ({"encoder_blocks": [1, 1]}, "one entry for each of the 3 widths"),
        ({"decoder_blocks": [1, 0, 1]}, "0 at the first level only"),
        ({"attention_from": 0}, "multiples of 32"),
        ({"attention_kernels": [4]}, "odd"),
    ],
)
def test_sizes_of_deep_compression_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config("deep_compression", **change)


@pytest.mark.parametrize("resampling", ["fold", "stride"])
def test_residual_autoencoding_keeps_the_average_color(resampling: str) -> None:
    """With its convolutions at zero the shortcuts alone average space on the way down and spread it on the way up."""
    cfg = config("deep_compression", widths=[32, 32, 32], attention_from=3, resampling=resampling)
    model = build_autoencoder(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("encoder.0.weight", "encoder.0.bias"):
                parameter.zero_()
        features = model.encoder[0](blocks_of_color(1))
        latents = model.encode(blocks_of_color(1))[0]
    # Each level folds 2x2 pixels of every channel and averages the four, the end averages neighboring channels.
    pooled = F.avg_pool2d(features, 4).unflatten(1, (8, 4)).mean(2)
    torch.testing.assert_close(latents, pooled)


def test_the_two_levels_are_one_grid_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    top, bottom = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 2, 8, 10, generator=generator)
    grid = pack(top, bottom)
    assert grid.shape == (2, 3 + 4 * 2, 4, 5)
    assert all(torch.equal(a, b) for a, b in zip(unpack(grid, top_channels=3), (top, bottom), strict=True))
    assert torch.equal(grid[1, 3:7, 2, 3], bottom[1, 0, 4:6, 6:8].flatten()), "a square of cells becomes channels"


def test_the_bottom_level_is_told_the_tops_codes() -> None:
    """Moved top codes change what the bottom says; a top nudged within one code's reach does not."""
    model = build("hierarchical", "vq").eval()
    images = blocks_of_color(2)
    with torch.no_grad():
        before = unpack(model.encode(images)[0], top_channels=6)
        model.encoder.to_top.bias += 1e-6
        nudged = unpack(model.encode(images)[0], top_channels=6)
        assert torch.equal(nudged[1], before[1]) and not torch.equal(nudged[0], before[0])
        model.quantizer.top.codebook += 1.0
        moved = unpack(model.encode(images)[0], top_channels=6)
    assert torch.equal(moved[0], nudged[0]) and not torch.allclose(moved[1], nudged[1])


def test_published_size_of_vq_vae_2() -> None:
    """By hand from fig. 2a and table 4: convolutions k x k of i to o channels have k k i o + o parameters."""

    def conv(i: int, o: int, k: int) -> int:
        return k * k * i * o + o

    def stack(i: int) -> int:
        return conv(i, 128, 3) + 2 * (conv(128, 64, 3) + conv(64, 128, 1))

    encoder = conv(3, 64, 4) + conv(64, 128, 4) + stack(128) + conv(128, 64, 4) + stack(64) + conv(128, 64, 1)
    encoder += stack(64) + conv(128, 64, 4) + conv(128 + 64, 64, 1)
    decoder = conv(64, 64, 4) + stack(64 + 64) + conv(128, 64, 4) + conv(64, 3, 4)
    with torch.device("meta"):
        model = build_autoencoder(HierarchicalConfig(kind="hierarchical"))
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder
    assert (model.cfg.factor, model.cfg.latent_channels) == (8, 64 + 4 * 64)


def test_the_identity_is_the_image() -> None:
    model = build_autoencoder(IdentityConfig(kind="identity"))
    images = blocks_of_color(2)
    mean, logvar = model.encode(images)
    assert torch.equal(mean, images) and (logvar == -30).all()
    assert torch.equal(model.decode(mean), images)
    assert not list(model.parameters()) and not model.state_dict()
    assert (model.cfg.factor, model.cfg.latent_channels) == (1, 3)


def test_codes_are_looked_up_before_decoding() -> None:
    """Latents within one code's reach decode alike, to the very last bit."""
    model = build("folded", "vq").eval()
    latents, _ = model.encode(blocks_of_color(2))
    codes = model.quantizer.codes(latents)
    vectors = model.quantizer.embed(codes)
    with torch.no_grad():
        assert torch.equal(model.decode(latents), model.render(vectors))
        assert torch.equal(model.decode(vectors), model.render(vectors))


@pytest.mark.parametrize(("kind", "bottleneck"), [("folded", "kl"), ("hierarchical", "vq"), ("deep_compression", "kl")])
def test_fp32_decoding_ignores_autocast(kind: str, bottleneck: str) -> None:
    model = build(kind, bottleneck)
    latents = torch.randn(2, model.cfg.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = model.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.decode(latents, fp32=True), plain)
        rough = model.decode(latents)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, plain)


def local_model() -> Autoencoder:
    """Without norms over the grid and attention: no latent looks further than 6 cells around it, no pixel than 2."""
    return build("hierarchical", "plain").eval()


@pytest.mark.parametrize(("tile", "overlap"), [(14, 6), (12, 6)])
@torch.no_grad()
def test_tiles_of_a_local_model_are_the_whole_away_from_seams(tile: int, overlap: int) -> None:
    model = local_model()
    images = torch.rand(1, 3, 8 * 22, 8 * 22, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = model.encode(images)
    whole = model.decode(mean)
    tiles, spread = encode_tiled(model, images, tile=tile, overlap=overlap)
    parts = decode_tiled(model, mean, tile=tile, overlap=overlap)
    torch.testing.assert_close(spread, logvar)
    clear = tile - overlap  # cells that the first tile alone covers
    for found, expected, corner in ((tiles, mean, clear), (parts, whole, 8 * clear)):
        assert found.shape == expected.shape
        torch.testing.assert_close(found[..., :corner, :corner], expected[..., :corner, :corner], atol=1e-5, rtol=1e-4)
        assert (found - expected).abs().mean() < 0.02 * (expected - expected.mean()).abs().mean()
        assert not torch.allclose(found, expected, atol=1e-5), "seams are not exact, or there were none"


@torch.no_grad()
def test_tiles_of_a_pointwise_function_are_the_whole_everywhere() -> None:
    x = torch.rand(2, 3, 37, 23, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(lambda t: t**2, x, tile=8, overlap=3, scale=Fraction(1)), x**2)
    doubled = tiled(lambda t: F.interpolate(t, scale_factor=2.0), x, tile=10, overlap=5, scale=Fraction(2))
    torch.testing.assert_close(doubled, F.interpolate(x, scale_factor=2.0))
    with pytest.raises(ValueError, match="tile 6 must be at least twice the overlap 4"):
        tiled(lambda t: t, x, tile=6, overlap=4, scale=Fraction(1))


def test_neighboring_tiles_fade_into_one_another() -> None:
    """Two tiles that are constants, 0 and 4, the place they start at: over the overlap a straight line from one to the
    other, along either axis."""
    line = torch.cat([torch.zeros(4), torch.tensor([0.5, 1.5, 2.5, 3.5]), torch.full((4,), 4.0)])
    for axis in (0, 1):
        places = torch.arange(12.0).expand(5, -1) if axis else torch.arange(12.0)[:, None].expand(-1, 5)
        faded = tiled(lambda t: t[..., :1, :1].expand_as(t), places[None, None], tile=8, overlap=4, scale=Fraction(1))
        torch.testing.assert_close(faded[0, 0], line.expand(5, -1) if axis else line[:, None].expand(-1, 5))


def test_large_images_go_in_tiles_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what the networks are given: no more than a tile, unless the model trains or the image is small."""
    model = local_model()
    sides: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, args: sides.append(max(args[0].shape[-2:])))
    model.encoder.down.register_forward_pre_hook(lambda _, args: sides.append(max(args[0].shape[-2:])))
    for name, pixels in (("TILED_ABOVE", 64), ("TILE", 32), ("OVERLAP", 16)):
        monkeypatch.setattr(f"genpipe.models.autoencoder.{name}", pixels)
    for side, training, encoded, decoded in ((64, False, 64, 8), (96, False, 32, 4), (96, True, 96, 12)):
        sides.clear()
        model.train(training)
        with torch.no_grad():
            latents, _ = model.encode(torch.zeros(1, 3, 32, side))
            assert latents.shape == (1, model.cfg.latent_channels, 4, side // 8)
            assert max(sides) == encoded
            sides.clear()
            assert model.decode(latents).shape == (1, 3, 32, side)
            assert max(sides) == decoded


def test_kl_equals_torch_distributions() -> None:
    gen = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=gen)
    unit = Normal(torch.zeros(()), torch.ones(()))
    expected = torch_kl(Normal(mean, (0.5 * logvar).exp()), unit).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_forward_goes_through_a_posterior_sample() -> None:
    model, images = build("folded", "kl"), blocks_of_color(2)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    recon, mean, logvar = model(images, noise=noise)
    torch.testing.assert_close(recon, model.decode(Normal(mean, (0.5 * logvar).exp()).icdf(Normal(0, 1).cdf(noise))))


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * (0.25 + 1.0))
    assert generator_loss(fake) == pytest.approx(1.0)
    assert logits_right(torch.tensor([2.0, 0.5, -1.0, 3.0]), torch.tensor([-3.0, 1.0, 2.0])) == (
        0.75,
        pytest.approx(1 / 3),
    )


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_discriminator_scores_patches_and_learns(norm: Any) -> None:
    torch.manual_seed(0)
    model = Discriminator(DiscriminatorConfig(width=8, layers=2, norm=norm))
    real, fake = torch.ones(8, 3, 32, 32), -torch.ones(8, 3, 32, 32)
    assert model(real).shape == (8, 1, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    real, fake = real + 0.1 * torch.randn_like(real), fake + 0.1 * torch.randn_like(fake)
    for _ in range(40):
        loss = discriminator_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_published_discriminator() -> None:
    """pix2pix's 70 x 70 PatchGAN, by hand: 4x4 convolutions 3-64-128-256-512-1, no bias before a BatchNorm; its
    weights are drawn with deviation 0.02, and group norm alone makes scores independent of the rest of the batch."""
    torch.manual_seed(0)
    published = Discriminator(DiscriminatorConfig(width=64, norm="batch"))
    widths = ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1))
    convolutions = sum(16 * i * o for i, o in widths) + 64 + 1
    assert sum(p.numel() for p in published.parameters()) == convolutions + 2 * (128 + 256 + 512)
    assert published.net[8].weight.detach().std() == pytest.approx(0.02, rel=0.02)
    images = torch.randn(4, 3, 64, 64)
    for norm, alone in (("group", True), ("batch", False)):
        model = Discriminator(DiscriminatorConfig(width=8, norm=norm))
        assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-5) == alone
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    published.eval()(pixels)[0, 0, 15, 15].backward()
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_adaptive_weight_is_a_ratio_of_gradient_norms() -> None:
    layer = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0]])  # d(layer(x)) / d(weight) = x, of norm 5
    out = layer(x).sum()
    weight = adaptive_weight(6.0 * out, 2.0 * out, last_layer=layer.weight)
    assert weight == pytest.approx(3.0, rel=1e-4)
    assert not weight.requires_grad
    assert adaptive_weight(out, 0.0 * out, last_layer=layer.weight, limit=100.0) == 100.0


@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_is_the_one_that_draws_the_image(kind: str) -> None:
    """Without it, and what stands beside it, the image is constant."""
    model = build(kind)
    with torch.no_grad():
        assert model.decode(torch.randn(1, model.cfg.latent_channels, 2, 2)).std() > 0
        model.last_layer.zero_()
        image = model.decode(torch.randn(1, model.cfg.latent_channels, 2, 2))
    tile = image[..., : 8 // 4, : 8 // 4] if kind == "folded" else image[..., :1, :1]
    assert torch.equal(
        image, tile.repeat(1, 1, *(a // b for a, b in zip(image.shape[-2:], tile.shape[-2:], strict=True)))
    )
