"""Autoencoders against diffusers', with the weights carried over, both ways; published sizes on the meta device."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from torch import Tensor, nn

from genpipe.models.autoencoder import Autoencoder, FoldedConfig, build_autoencoder
from genpipe.models.dc_autoencoder import DeepCompressionConfig
from genpipe.models.interop.autoencoder import (
    config_from_diffusers,
    config_to_diffusers,
    from_diffusers,
    standardizing,
    to_diffusers,
)
from genpipe.models.ldm_autoencoder import LdmConfig
from genpipe.models.quantizer import Vq

CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel, "AutoencoderDC": AutoencoderDC}
KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 2,
    "latent_channels": 4,
}
STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""As published with Stable Diffusion 1."""


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew, so that none stands at a value that hides it."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise + (parameter.ndim == 1) * parameter.data)
    return model.eval()


def pair(name: str, settings: dict[str, Any]) -> tuple[Any, Autoencoder, Any]:
    """Theirs with random weights, ours with the same, and our config."""
    theirs = randomized(CLASSES[name](**settings))
    cfg = config_from_diffusers({"_class_name": name, **json.loads(json.dumps(dict(theirs.config)))})
    ours = build_autoencoder(cfg)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), cfg))
    return theirs, ours.eval(), cfg


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side + 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


ATTENDING = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}


@pytest.mark.parametrize(
    "change",
    [{}, {"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False}, ATTENDING],
)
@torch.no_grad()
def test_kl_autoencoder_is_diffusers(change: dict[str, Any]) -> None:
    theirs, ours, _ = pair("AutoencoderKL", {**KL, **change})
    posterior = theirs.encode(images()).latent_dist
    mean, logvar = ours.encode(images())
    torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("convolutions", [True, False])
@torch.no_grad()
def test_an_autoencoder_of_standardized_latents(convolutions: bool) -> None:
    """The posterior as N((mean - m) / s, variance / s^2), and the same pictures of it."""
    around = {"use_quant_conv": convolutions, "use_post_quant_conv": convolutions}
    _, ours, cfg = pair("AutoencoderKL", {**KL, **around})
    assert isinstance(cfg, LdmConfig)
    mean, std = torch.tensor([0.3, -2.0, 0.0, 1.0]), torch.tensor([0.5, 3.0, 1.0, 0.01])
    theirs = AutoencoderKL(**KL).eval()
    theirs.load_state_dict(standardizing(to_diffusers(ours.state_dict(), cfg), mean=mean, std=std))
    posterior = theirs.encode(images()).latent_dist
    (m, logvar), shift, scale = ours.encode(images()), mean[:, None, None], std[:, None, None]
    torch.testing.assert_close(posterior.mean, (m - shift) / scale, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, logvar - 2 * scale.log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.decode((m - shift) / scale).sample, ours.decode(m), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_vq_autoencoder_is_diffusers() -> None:
    """The latents before the codebook, and the reconstruction that goes through it."""
    theirs, ours, cfg = pair("VQModel", {**KL, "latent_channels": 3, "num_vq_embeddings": 48})
    assert isinstance(cfg.bottleneck, Vq) and cfg.bottleneck.codes == 48
    latents = theirs.encode(images()).latents
    torch.testing.assert_close(ours.encode(images())[0], latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-4, rtol=1e-4)
    assert ours.quantizer(latents).counts[""].count_nonzero() > 5, "the codebook is used"


DC: dict[str, Any] = {
    "latent_channels": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 32, 64),
    "decoder_block_out_channels": (16, 32, 64),
    "encoder_layers_per_block": (1, 1, 2),
    "decoder_layers_per_block": (2, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}


@pytest.mark.parametrize(
    "change",
    [
        {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"},
        {"encoder_layers_per_block": (0, 2, 1), "decoder_layers_per_block": (0, 1, 1)},
        {"encoder_qkv_multiscales": ((), (), (3, 5)), "decoder_qkv_multiscales": ((), (), (3, 5))},
        {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"},
    ],
)
@torch.no_grad()
def test_deep_compression_is_diffusers(change: dict[str, Any]) -> None:
    theirs, ours, _ = pair("AutoencoderDC", {**DC, **change})
    latents = theirs.encode(images()).latent
    mean, logvar = ours.encode(images())
    torch.testing.assert_close(mean, latents, atol=1e-4, rtol=1e-4)
    assert (logvar == -30).all()
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("AutoencoderKL", KL), ("AutoencoderKL", KL | ATTENDING), ("VQModel", KL), ("AutoencoderDC", DC)],
    ids=lambda v: str(v)[:13],
)
def test_what_is_written_is_what_was_read(name: str, settings: dict[str, Any]) -> None:
    theirs, ours, cfg = pair(name, settings)
    written = config_to_diffusers(cfg)
    assert written.pop("_class_name") == name
    again = CLASSES[name](**written)
    again.load_state_dict(to_diffusers(ours.state_dict(), cfg))
    assert theirs.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in theirs.state_dict().items())


def test_older_names_of_attention_are_read() -> None:
    theirs, ours, cfg = pair("AutoencoderKL", KL)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    for new, old in older.items():
        state = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in state.items()}
    assert any("proj_attn" in key for key in state)
    found = from_diffusers(state, cfg)
    assert all(torch.equal(found[key], tensor) for key, tensor in ours.state_dict().items())


def test_weights_that_do_not_fit_are_refused() -> None:
    theirs, _, cfg = pair("AutoencoderKL", KL)
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"no place here: encoder\.extra\.weight"):
        from_diffusers({**state, "encoder.extra.weight": torch.zeros(1)}, cfg)
    del state["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match=r"lack decoder\.conv_out\.bias"):
        from_diffusers(state, cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups 16 has no counterpart here; it must be 32"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny has no counterpart"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "do not attend where down_block_types do"),
        ({"down_block_types": ["KDownBlock2D"] * 3}, "blocks of the types KDownBlock2D have no counterpart"),
        ({"block_out_channels": [32, 48, 64]}, "not multiples of the first"),
        ({"use_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ"),
        ({"_class_name": "VQModel", "vq_embed_dim": 8}, "vq_embed_dim and latent_channels differ"),
        ({"_class_name": "VQModel", "norm_type": "spatial"}, "norm_type 'spatial' has no counterpart"),
    ],
)
def test_networks_without_a_counterpart_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_diffusers({"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, **KL, **change})


def test_what_diffusers_has_no_class_for_is_refused() -> None:
    for bottleneck in ({"kind": "plain"}, {"kind": "vq", "normalize": True}):
        with pytest.raises(ValueError, match="diffusers"):
            config_to_diffusers(LdmConfig.model_validate({"kind": "ldm", "bottleneck": bottleneck}))
    with pytest.raises(ValueError, match="plain"):
        config_to_diffusers(
            DeepCompressionConfig.model_validate({"kind": "deep_compression", "bottleneck": {"kind": "kl"}})
        )


def test_weights_for_a_kind_that_diffusers_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="of the kinds ldm and deep_compression only"):
        from_diffusers({}, FoldedConfig())


def test_attention_at_no_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_at \[16\] .*downsampling factors \[1, 2, 4, 8\]"):
        LdmConfig(kind="ldm", attention_at=(8, 16))


def test_stable_diffusions_size() -> None:
    """83.7 M, exactly theirs, from the published config; it is also the default of the kind."""
    cfg = config_from_diffusers(STABLE_DIFFUSION)
    assert cfg == LdmConfig(kind="ldm")
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(STABLE_DIFFUSION)
        ours = build_autoencoder(cfg)
    assert count(ours) == count(theirs) == 83_653_863
    assert ours.encode(torch.zeros(1, 3, 256, 256, device="meta"))[0].shape == (1, 4, 32, 32)


@pytest.mark.parametrize(
    ("multipliers", "channels", "attention_at", "factor"),
    [((1, 2, 4), 3, (), 4), ((1, 2, 4, 4), 4, (), 8), ((1, 1, 2, 2, 4), 16, (16,), 16)],
)
def test_latent_diffusions_sizes(
    multipliers: tuple[int, ...], channels: int, attention_at: tuple[int, ...], factor: int
) -> None:
    cfg = LdmConfig(kind="ldm", multipliers=multipliers, latent_channels=channels, attention_at=attention_at)
    assert cfg.factor == factor
    with torch.device("meta"):
        settings = config_to_diffusers(cfg)
        del settings["_class_name"]
        assert count(build_autoencoder(cfg)) == count(AutoencoderKL(**settings))


@pytest.mark.parametrize(
    ("widths", "blocks", "attention_from", "latents", "factor"),
    [((128, 256, 512, 512, 1024, 1024), 6, 3, 32, 32), ((128, 256, 512, 512, 1024, 1024, 2048), 7, 3, 128, 64)],
)
def test_deep_compressions_sizes(
    widths: tuple[int, ...], blocks: int, attention_from: int, latents: int, factor: int
) -> None:
    """f32c32 is SANA's, of 312 M parameters, and the default of the kind; f64c128 has one level more."""
    cfg = DeepCompressionConfig(
        kind="deep_compression",
        widths=widths,
        latent_channels=latents,
        encoder_blocks=(2, 2, 2, 3, 3, 3, 3)[:blocks],
        decoder_blocks=(3,) * blocks,
    )
    assert cfg.factor == factor
    with torch.device("meta"):
        settings = config_to_diffusers(cfg)
        del settings["_class_name"]
        parameters = count(build_autoencoder(cfg))
        assert parameters == count(AutoencoderDC(**settings))
    if factor == 32:
        assert cfg == DeepCompressionConfig(kind="deep_compression")
        assert round(parameters / 1e6) == 312
