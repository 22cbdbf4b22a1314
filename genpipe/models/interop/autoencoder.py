"""Autoencoders of diffusers, read and written: AutoencoderKL (Stable Diffusion's), VQModel, AutoencoderDC.

Their `scaling_factor`, `shift_factor` and `latents_mean` are left out: latents here are standardized with statistics
that are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genpipe.models.autoencoder import AnyConfig, Autoencoder, build_autoencoder
from genpipe.models.convolutions import ResBlock
from genpipe.models.dc_autoencoder import (
    DeepCompressionConfig,
    FromLatents,
    GatedConv,
    LinearAttention,
    ToLatents,
)
from genpipe.models.interop.tensors import Names, joined, split
from genpipe.models.ldm_autoencoder import GROUPS, LdmAttention, LdmConfig
from genpipe.models.quantizer import Kl, Vq

_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "AutoencoderKL": {"act_fn": ("silu", "swish"), "norm_num_groups": (GROUPS,)},
    "VQModel": {"act_fn": ("silu", "swish"), "norm_num_groups": (GROUPS,), "norm_type": ("group",)},
    "AutoencoderDC": {
        "encoder_out_shortcut": (True,),
        "decoder_in_shortcut": (True,),
        "decoder_norm_types": ("rms_norm",),
        "decoder_act_fns": ("silu",),
        "decoder_conv_act_fn": ("relu",),
    },
}
"""Settings of diffusers whose other values make another network than ours; of lists, each entry."""

_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""Levels of AutoencoderKL and VQModel without attention, and with it."""

_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in older files of AutoencoderKL."""

_INNER: dict[type[nn.Module], dict[str, str]] = {
    ResBlock: {"skip": "conv_shortcut"},
    LdmAttention: {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    LinearAttention: {
        **{"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "out": "attn.to_out", "norm": "attn.norm_out"},
        **{f"scales.{i}.0": f"attn.to_qkv_multiscale.{i}.proj_in" for i in range(4)},
        **{f"scales.{i}.1": f"attn.to_qkv_multiscale.{i}.proj_out" for i in range(4)},
    },
    ToLatents: {"conv": ""},
    FromLatents: {"conv": ""},
    GatedConv: {
        "widen": "conv_out.conv_inverted",
        "depth": "conv_out.conv_depth",
        "narrow": "conv_out.conv_point",
        "norm": "conv_out.norm",
    },
}
"""By block, our name of a layer in it: theirs, where they differ."""


def config_from_diffusers(theirs: Mapping[str, Any]) -> LdmConfig | DeepCompressionConfig:
    """Our config for the `config.json` of an AutoencoderKL, VQModel or AutoencoderDC.

    Raises ValueError naming the settings that make it a network without a counterpart here.
    """
    name = theirs.get("_class_name", "AutoencoderKL")
    if name not in _ONLY:
        raise ValueError(f"diffusers' {name} has no counterpart here; supported are {', '.join(_ONLY)}")
    for setting, allowed in _ONLY[name].items():
        found = theirs.get(setting, allowed[0])
        if any(value not in allowed for value in ([found] if isinstance(found, str | bool | int) else found)):
            raise ValueError(f"{name}: {setting} {found!r} has no counterpart here; it must be {allowed[0]!r}")
    return _deep_compression(theirs) if name == "AutoencoderDC" else _ldm(theirs, vq=name == "VQModel")


def _ldm(theirs: Mapping[str, Any], *, vq: bool) -> LdmConfig:
    widths = theirs["block_out_channels"]
    down, up = list(theirs["down_block_types"]), list(reversed(theirs["up_block_types"]))
    if unknown := ({*down} - {*_DOWN}) | ({*up} - {*_UP}):
        raise ValueError(f"blocks of the types {', '.join(sorted(unknown))} have no counterpart here")
    attends = [_DOWN.index(kind) for kind in down]
    if attends != [_UP.index(kind) for kind in up]:
        raise ValueError("up_block_types do not attend where down_block_types do, which has no counterpart here")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths} are not multiples of the first")
    if theirs["in_channels"] != theirs["out_channels"]:
        raise ValueError("in_channels and out_channels differ, which has no counterpart here")
    around = {theirs.get("use_quant_conv", True), theirs.get("use_post_quant_conv", True)}
    if len(around) > 1:
        raise ValueError("use_quant_conv and use_post_quant_conv differ, which has no counterpart here")
    if theirs.get("vq_embed_dim") not in (None, theirs["latent_channels"]):
        raise ValueError("vq_embed_dim and latent_channels differ, which has no counterpart here")
    codebook = {"kind": "vq", "update": "gradient", "codes": theirs.get("num_vq_embeddings"), "revive_after": 0}
    return LdmConfig(
        kind="ldm",
        image_channels=theirs["in_channels"],
        latent_channels=theirs["latent_channels"],
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=theirs["layers_per_block"],
        mid_attention=theirs.get("mid_block_add_attention", True),
        attention_at=tuple(2**level for level, attention in enumerate(attends) if attention),
        quant_conv=around.pop(),
        bottleneck=Vq.model_validate(codebook) if vq else Kl(),
    )


def _deep_compression(theirs: Mapping[str, Any]) -> DeepCompressionConfig:
    widths = theirs["encoder_block_out_channels"]
    types = [theirs[f"{half}_block_types"] for half in ("encoder", "decoder")]
    per_level = [[kind] * len(widths) if isinstance(kind, str) else list(kind) for kind in types]
    plain = per_level[0].count("ResBlock")
    expected = ["ResBlock"] * plain + ["EfficientViTBlock"] * (len(widths) - plain)
    kernels = {
        tuple(kernels) for half in ("encoder", "decoder") for kernels in theirs[f"{half}_qkv_multiscales"][plain:]
    }
    resampling = {("pixel_unshuffle", "pixel_shuffle"): "fold", ("conv", "interpolate"): "stride"}
    changes = theirs["downsample_block_type"].lower(), theirs["upsample_block_type"].lower()
    if (
        any(found != expected for found in per_level)
        or list(theirs["decoder_block_out_channels"]) != list(widths)
        or len(kernels) > 1
        or changes not in resampling
    ):
        raise ValueError("encoder and decoder must have the same widths, block types (residual above EfficientViT), "
                         "attention scales and kind of resampling to have a counterpart here")  # fmt: skip
    return DeepCompressionConfig.model_validate(
        {
            "kind": "deep_compression",
            "image_channels": theirs["in_channels"],
            "latent_channels": theirs["latent_channels"],
            "widths": widths,
            "encoder_blocks": theirs["encoder_layers_per_block"],
            "decoder_blocks": theirs["decoder_layers_per_block"],
            "attention_from": plain,
            "attention_kernels": kernels.pop() if kernels else (),
            "resampling": resampling[changes],
        }
    )


def config_to_diffusers(cfg: LdmConfig | DeepCompressionConfig) -> dict[str, Any]:
    """What diffusers' class is built with for `cfg`, its name under `_class_name`."""
    if isinstance(cfg, DeepCompressionConfig):
        return _config_to_dc(cfg)
    attends = [cfg.attends(level) for level in range(len(cfg.multipliers))]
    theirs: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": cfg.image_channels,
        "out_channels": cfg.image_channels,
        "down_block_types": [_DOWN[attention] for attention in attends],
        "up_block_types": [_UP[attention] for attention in reversed(attends)],
        "block_out_channels": cfg.widths,
        "layers_per_block": cfg.blocks,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": cfg.mid_attention,
    }
    if isinstance(cfg.bottleneck, Vq):
        if cfg.bottleneck.normalize or not cfg.quant_conv:
            raise ValueError("diffusers' VQModel has no normalized codes, and always 1x1 convolutions (quant_conv)")
        return {**theirs, "_class_name": "VQModel", "num_vq_embeddings": cfg.bottleneck.codes}
    if not isinstance(cfg.bottleneck, Kl):
        raise ValueError("diffusers has this autoencoder with a kl or a vq bottleneck only")
    return {**theirs, "use_quant_conv": cfg.quant_conv, "use_post_quant_conv": cfg.quant_conv}


def _config_to_dc(cfg: DeepCompressionConfig) -> dict[str, Any]:
    if cfg.bottleneck.kind != "plain":
        raise ValueError("diffusers has DC-AE without a bottleneck only (bottleneck: {kind: plain})")
    levels = range(len(cfg.widths))
    types = ["ResBlock" if level < cfg.attention_from else "EfficientViTBlock" for level in levels]
    kernels = [() if level < cfg.attention_from else cfg.attention_kernels for level in levels]
    fold = cfg.resampling == "fold"
    theirs: dict[str, Any] = {
        "_class_name": "AutoencoderDC",
        "in_channels": cfg.image_channels,
        "latent_channels": cfg.latent_channels,
        "encoder_layers_per_block": cfg.encoder_blocks,
        "decoder_layers_per_block": cfg.decoder_blocks,
        "downsample_block_type": "pixel_unshuffle" if fold else "conv",
        "upsample_block_type": "pixel_shuffle" if fold else "interpolate",
    }
    for half in ("encoder", "decoder"):
        theirs |= {f"{half}_block_types": types, f"{half}_qkv_multiscales": kernels}
        theirs |= {f"{half}_block_out_channels": cfg.widths}
    return theirs


def from_diffusers(state: Mapping[str, Tensor], cfg: AnyConfig) -> dict[str, Tensor]:
    """Our state dict for theirs. Raises ValueError naming keys that are missing or have no place here, and for a
    kind of autoencoder that diffusers has no class for."""
    if not isinstance(cfg, LdmConfig | DeepCompressionConfig):
        raise ValueError("diffusers has autoencoders of the kinds ldm and deep_compression only")
    model = _skeleton(cfg)
    ours = joined(_renewed(state), _names(model))
    shapes = model.state_dict()
    ours = {name: _fitted(tensor, shapes[name].ndim) for name, tensor in ours.items()}
    if isinstance(cfg.bottleneck, Vq):
        ours["quantizer.unused_steps"] = torch.zeros(cfg.bottleneck.codes)
        if cfg.bottleneck.update == "ema":
            ours["quantizer.ema_counts"] = torch.ones(cfg.bottleneck.codes)
            ours["quantizer.ema_sums"] = ours["quantizer.codebook"].clone()
    return ours


def to_diffusers(state: Mapping[str, Tensor], cfg: LdmConfig | DeepCompressionConfig) -> dict[str, Tensor]:
    """Inverse of `from_diffusers`; what only training needs of a codebook is left out."""
    theirs = split(state, _names(_skeleton(cfg)))
    linear = (".attn.to_q.weight", ".attn.to_k.weight", ".attn.to_v.weight", ".attn.to_out.weight")
    return {name: _fitted(tensor, 2) if name.endswith(linear) else tensor for name, tensor in theirs.items()}


def standardizing(state: Mapping[str, Tensor], *, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """An AutoencoderKL's state, by diffusers' names, that encodes to latents of mean 0 and deviation 1, and decodes
    them: what decoders here draw, with a `scaling_factor` of 1.

    `mean` and `std` [C] are those of the latents now. They go into the 1x1 convolutions around the latents, which are
    added where there are none (`use_quant_conv` and `use_post_quant_conv`).
    """
    channels = len(mean)
    moments = torch.cat([std, torch.ones_like(std)])  # the posterior's mean, then its log variance
    shift = torch.cat([-mean / std, -2 * std.log()])
    into, out = (torch.eye(size)[:, :, None, None] for size in (2 * channels, channels))
    weight = state.get("quant_conv.weight", into)
    bias = state.get("quant_conv.bias", torch.zeros(2 * channels))
    post = state.get("post_quant_conv.weight", out)
    return {
        **state,
        "quant_conv.weight": weight / moments[:, None, None, None],
        "quant_conv.bias": bias / moments + shift,
        "post_quant_conv.weight": post * std[None, :, None, None],
        "post_quant_conv.bias": state.get("post_quant_conv.bias", torch.zeros(channels)) + post[:, :, 0, 0] @ mean,
    }


def _skeleton(cfg: LdmConfig | DeepCompressionConfig) -> Autoencoder:
    with torch.device("meta"):
        return build_autoencoder(cfg)


def _names(model: Autoencoder) -> Names:
    cfg = model.cfg
    assert isinstance(cfg, LdmConfig | DeepCompressionConfig)
    halves = _ldm_places(cfg) if isinstance(cfg, LdmConfig) else _deep_compression_places(cfg)
    names: dict[str, tuple[str, ...]] = {}
    for half, places in zip(("encoder", "decoder"), halves, strict=True):
        for (index, layer), place in zip(model.get_submodule(half).named_children(), places, strict=True):
            for name, block in layer.named_modules():
                for tensor in dict(block.named_parameters(recurse=False)):
                    names[_dotted(half, index, name, tensor)] = (_theirs(layer, place, name, tensor),)
    if isinstance(cfg.bottleneck, Vq):
        names["quantizer.codebook"] = ("quantize.embedding.weight",)
    return names


def _theirs(layer: nn.Module, place: str, name: str, tensor: str) -> str:
    """Their name of a tensor of the block `name` in our `layer`, which is at `place` in theirs."""
    if isinstance(layer, nn.Sequential):  # EfficientViT's two halves are one block with them
        index, _, name = name.partition(".")
        layer = layer[int(index)]
    return _dotted(place, _INNER.get(type(layer), {}).get(name, name), tensor)


def _ldm_places(cfg: LdmConfig) -> tuple[list[str], list[str]]:
    """The place in theirs of each layer of our encoder and of our decoder."""
    last = len(cfg.multipliers) - 1
    encoder, decoder = ["encoder.conv_in"], ["decoder.conv_in", *_middle("decoder", cfg)]
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        encoder += _level(down, cfg.blocks, attention=cfg.attends(level))
        decoder += _level(up, cfg.blocks + 1, attention=cfg.attends(last - level))
        if level < last:
            encoder.append(f"{down}.downsamplers.0.conv")
            decoder.append(f"{up}.upsamplers.0.conv")
    encoder += [*_middle("encoder", cfg), "encoder.conv_norm_out", "", "encoder.conv_out"]
    decoder += ["decoder.conv_norm_out", "", "decoder.conv_out"]
    if cfg.quant_conv:
        encoder, decoder = [*encoder, "quant_conv"], ["post_quant_conv", *decoder]
    return encoder, decoder


def _level(place: str, count: int, *, attention: bool) -> list[str]:
    kinds = ("resnets", "attentions") if attention else ("resnets",)
    return [f"{place}.{kind}.{i}" for i in range(count) for kind in kinds]


def _middle(half: str, cfg: LdmConfig) -> list[str]:
    attention = [f"{half}.mid_block.attentions.0"] if cfg.mid_attention else []
    return [f"{half}.mid_block.resnets.0", *attention, f"{half}.mid_block.resnets.1"]


def _deep_compression_places(cfg: DeepCompressionConfig) -> tuple[list[str], list[str]]:
    last = len(cfg.widths) - 1
    encoder, decoder = ["encoder.conv_in"], ["decoder.conv_in"]
    for level, count in enumerate(cfg.encoder_blocks):
        resizes = level < last and count > 0
        encoder += [f"encoder.down_blocks.{level}.{i}" for i in range(count + resizes)]
    for level, count in reversed(list(enumerate(cfg.decoder_blocks))):
        resizes = level < last and count > 0
        decoder += [f"decoder.up_blocks.{level}.{i}" for i in range(count + resizes)]
    return [*encoder, "encoder.conv_out"], [*decoder, "decoder.norm_out", "", "decoder.conv_out"]


def _renewed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with older names of attention's layers replaced."""
    return {".".join(_LEGACY.get(part, part) for part in name.split(".")): value for name, value in state.items()}


def _fitted(tensor: Tensor, ndim: int) -> Tensor:
    """A linear layer's weight as that of a 1x1 convolution, or the other way round, where `ndim` asks for it."""
    if (tensor.ndim, ndim) == (2, 4):
        return tensor[:, :, None, None]
    return tensor.flatten(1) if (tensor.ndim, ndim) == (4, 2) else tensor


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)
