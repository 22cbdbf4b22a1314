"""U-Nets of diffusers, read and written: UNet2DConditionModel (Stable Diffusion, unCLIP) and UNet2DModel (ADM).

A time of ours is theirs by 1,000: where their timestep is 500 our t is 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from genpipe.models.interop.tensors import joined, split
from genpipe.models.unet import UNet, UNetConfig

_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "simple_projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Settings of diffusers whose other values make another network than ours."""

_ATTENDING = {"CrossAttn": "transformer", "SimpleCrossAttn": "plain", "Attn": "plain"}
_OUTER = {
    "grid_in": "conv_in",
    "norm_out": "conv_norm_out",
    "grid_out": "conv_out",
    "time_in.up": "time_embedding.linear_1",
    "time_in.down": "time_embedding.linear_2",
    "vector_in": "class_embedding",
}
_BLOCK = {"modulation": "time_emb_proj", "skip": "conv_shortcut"}
_PLAIN: dict[str, tuple[str, ...]] = {
    "norm": ("group_norm",),
    "attention.qkv": ("to_q", "to_k", "to_v"),
    "attention.context_kv": ("add_k_proj", "add_v_proj"),
    "attention.out": ("to_out.0",),
}
_TRANSFORMER: dict[str, tuple[str, ...]] = {
    "norm": ("norm",),
    "tokens_in": ("proj_in",),
    "tokens_out": ("proj_out",),
    "self_norm": ("norm1",),
    "self_attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "self_attention.out": ("attn1.to_out.0",),
    "cross_norm": ("norm2",),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attention.out": ("attn2.to_out.0",),
    "mlp_norm": ("norm3",),
    "mlp.up": ("ff.net.0.proj",),
    "mlp.down": ("ff.net.2",),
}


def config_from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    """The same network's config, from the `config.json` of a UNet2DConditionModel or a UNet2DModel.

    Raises ValueError naming the first setting without a counterpart in our U-Net.
    """
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"a U-Net of diffusers with {name} {config[name]!r} has no counterpart here")
    channels = list(config["block_out_channels"])
    if any(width % channels[0] for width in channels):
        raise ValueError(f"block_out_channels {channels} are not multiples of the first")
    attends = [_attends(name) for name in config["down_block_types"]]
    if [_attends(name) for name in reversed(config["up_block_types"])] != attends:
        raise ValueError("up_block_types do not mirror down_block_types")
    kinds = {kind for kind in attends if kind}
    if config.get("add_attention", True) != bool(kinds):
        raise ValueError("attention in the middle alone, or everywhere else, has no counterpart here")
    if len(kinds) > 1:
        raise ValueError(f"down_block_types mixes kinds of attention: {list(config['down_block_types'])}")
    depth = config.get("transformer_layers_per_block", 1)
    if not isinstance(depth, int) or not isinstance(config["layers_per_block"], int):
        raise ValueError(
            "layers_per_block and transformer_layers_per_block that differ by level have no counterpart here"
        )
    return UNetConfig(
        width=channels[0],
        multipliers=tuple(width // channels[0] for width in channels),
        blocks=config["layers_per_block"],
        attention_at=tuple(2**level for level, kind in enumerate(attends) if kind),
        attention="transformer" if kinds == {"transformer"} else "plain",
        transformer_depth=depth,
        modulation="scale_shift" if config.get("resnet_time_scale_shift") == "scale_shift" else "add",
        resample=_resample(config),
        groups=config["norm_num_groups"],
        **_heads(config, channels, attends),
    )


def config_to_diffusers(
    cfg: UNetConfig, *, in_channels: int, out_channels: int, sample_size: int, context_dim: int | None = None
) -> dict[str, Any]:
    """What diffusers' class is built with for `cfg`, its name under `_class_name`: with a context
    UNet2DConditionModel, without one UNet2DModel.

    Raises ValueError for a network that neither of them is.
    """
    levels = [2**level in cfg.attention_at for level in range(len(cfg.widths))]
    theirs: dict[str, Any] = {
        "_class_name": "UNet2DModel" if context_dim is None else "UNet2DConditionModel",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "sample_size": sample_size,
        "block_out_channels": cfg.widths,
        "layers_per_block": cfg.blocks,
        "norm_num_groups": cfg.groups,
        "resnet_time_scale_shift": "scale_shift" if cfg.modulation == "scale_shift" else "default",
        "attention_head_dim": _head_dim(cfg, levels),
        **_block_types(cfg, levels, context=context_dim is not None),
    }
    if context_dim is None:
        resize = "resnet" if cfg.resample == "block" else "conv"
        theirs |= {"downsample_type": resize, "upsample_type": resize, "attn_norm_num_groups": cfg.groups}
        theirs["add_attention"] = any(levels)
    else:
        theirs |= {"cross_attention_dim": context_dim, "transformer_layers_per_block": cfg.transformer_depth}
    if _shape(config_from_diffusers(theirs)) != _shape(cfg):
        raise ValueError(f"diffusers' {theirs['_class_name']} is never made as this U-Net is; it cannot be written")
    return theirs


def _block_types(cfg: UNetConfig, levels: Sequence[bool], *, context: bool) -> dict[str, Any]:
    """The names of the blocks of each level, on the way down, in the middle and on the way up."""
    resnet = "Resnet{0}sample" if cfg.resample == "block" else "{0}"
    kind = {"plain": "SimpleCrossAttn{0}", "transformer": "CrossAttn{0}"}[cfg.attention] if context else "Attn{0}"
    names = [f"{kind if attends else resnet}Block2D" for attends in levels]
    middle = {"plain": "UNetMidBlock2DSimpleCrossAttn", "transformer": "UNetMidBlock2DCrossAttn"}
    return {
        "down_block_types": [name.format("Down") for name in names],
        "up_block_types": [name.format("Up") for name in reversed(names)],
        "mid_block_type": middle[cfg.attention] if context else "UNetMidBlock2D",
    }


def _head_dim(cfg: UNetConfig, levels: Sequence[bool]) -> int | list[int]:
    """Their attention_head_dim: of transformers the heads of each level, else the one width of all heads."""
    if cfg.attention == "transformer":
        return cfg.heads or [cfg.heads_of(width) for width in cfg.widths]
    attending = [width for width, attends in zip(cfg.widths, levels, strict=True) if attends]
    found = {width // cfg.heads_of(width) for width in [*attending, *([cfg.widths[-1]] if attending else [])]}
    if len(found) > 1:
        raise ValueError(f"heads of the widths {sorted(found)} have no counterpart in diffusers, which has one width")
    return found.pop() if found else cfg.head_width


def _shape(cfg: UNetConfig) -> tuple[object, ...]:
    """All that makes two U-Nets the same function of the same weights."""
    depth = cfg.transformer_depth if cfg.attention == "transformer" else 1
    heads = [cfg.heads_of(width) for level, width in enumerate(cfg.widths) if 2**level in cfg.attention_at]
    kind = cfg.attention if cfg.attention_at else "plain"
    return (
        cfg.widths,
        cfg.blocks,
        sorted(cfg.attention_at),
        kind,
        depth,
        cfg.modulation,
        cfg.resample,
        cfg.groups,
        heads,
    )


def from_diffusers(state: Mapping[str, Tensor], cfg: UNetConfig) -> dict[str, Tensor]:
    """State of our UNet of `cfg` from that of diffusers' (a `simple_projection` class embedding is our vector).

    Raises ValueError naming keys that are missing or left over.
    """
    context = any("attn2" in key or "add_k_proj" in key for key in state)
    with torch.device("meta"):
        model = UNet(
            cfg,
            in_channels=1,
            out_channels=1,
            context_dim=1 if context else None,
            vector_dim=1 if "class_embedding.weight" in state else None,
        )
    names = {key: _theirs(key, cfg) for key in model.state_dict()}
    # In Stable Diffusion 1 these are 1x1 convolutions.
    flat = {key: tensor.flatten(1) if _projects(key) else tensor for key, tensor in state.items()}
    return joined(flat, names)


def to_diffusers(state: Mapping[str, Tensor], cfg: UNetConfig, *, linear_projection: bool = False) -> dict[str, Tensor]:
    """Inverse of `from_diffusers`; `linear_projection` as `use_linear_projection` in diffusers' config."""
    found = split(state, {key: _theirs(key, cfg) for key in state})
    if linear_projection:
        return found
    return {key: tensor[:, :, None, None] if _projects(key) else tensor for key, tensor in found.items()}


def _projects(their_key: str) -> bool:
    return their_key.endswith(("proj_in.weight", "proj_out.weight"))


def _attends(block_type: str) -> Literal["plain", "transformer"] | None:
    """The attention of a block of diffusers. Raises ValueError for a type without a counterpart."""
    found = re.fullmatch(r"(CrossAttn|SimpleCrossAttn|Attn|Resnet)?(Down|Up|Downsample|Upsample)Block2D", block_type)
    if found is None:
        raise ValueError(f"a block of type {block_type} has no counterpart here")
    kind = _ATTENDING.get(found[1])
    return "transformer" if kind == "transformer" else "plain" if kind else None


def _resample(config: Mapping[str, Any]) -> Literal["block", "conv"]:
    """Whether grids are resized by residual blocks: a setting of UNet2DModel, a type of block in the other."""
    by_setting = {config.get("downsample_type", "conv"), config.get("upsample_type", "conv")}
    types = [*config["down_block_types"][:-1], *config["up_block_types"][:-1]]  # the last ones do not resize
    by_type = {"resnet" if re.match("SimpleCrossAttn|Resnet", name) else "conv" for name in types}
    kinds = by_type if by_setting == {"conv"} else by_setting
    if len(kinds) > 1:
        raise ValueError("grids resized now by convolutions, now by residual blocks have no counterpart here")
    return "block" if kinds == {"resnet"} else "conv"


def _heads(config: Mapping[str, Any], channels: Sequence[int], attends: Sequence[str | None]) -> dict[str, int]:
    """`heads` or `head_width`. With transformers, attention_head_dim is the number of heads, against its name."""
    given = config.get("attention_head_dim")
    values = list(given) if isinstance(given, (list, tuple)) else [given] * len(channels)
    used = [(width, value or width) for width, value, kind in zip(channels, values, attends, strict=True) if kind]
    if "transformer" not in attends:
        widths = {value for _, value in used}
    elif len({value for _, value in used}) == 1:
        return {"heads": used[0][1]}
    else:
        widths = {width // value for width, value in used}
    if len(widths) > 1:
        raise ValueError(f"attention_head_dim {given} is neither one number of heads nor one width of head")
    return {"head_width": widths.pop()} if widths else {}


def _theirs(key: str, cfg: UNetConfig) -> tuple[str, ...]:
    """Their names of the tensors that make up ours, concatenated along the first axis."""
    module, _, tensor = key.rpartition(".")
    if module in _OUTER:
        return (f"{_OUTER[module]}.{tensor}",)
    path, number, part, inner = re.fullmatch(r"(down|up|middle)\.(\d+)\.(\w+)\.(.+)", module).groups()  # type: ignore[union-attr]
    level, place = divmod(int(number), cfg.blocks + 1)
    group = "mid_block" if path == "middle" else f"{path}_blocks.{level}"
    place = int(number) if path == "middle" else place
    if part == "resize":
        return (f"{group}.upsamplers.0.{_BLOCK.get(inner, inner)}.{tensor}",)
    if part == "block":
        owner = "downsamplers.0" if path == "down" and place == cfg.blocks else f"resnets.{place}"
        return (f"{group}.{owner}.{_BLOCK.get(inner, inner)}.{tensor}",)
    owner = f"{group}.attentions.{place}"
    if cfg.attention == "plain":
        return tuple(f"{owner}.{name}.{tensor}" for name in _PLAIN[inner])
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", inner):
        owner, inner = f"{owner}.transformer_blocks.{block[1]}", block[2]
    return tuple(f"{owner}.{name}.{tensor}" for name in _TRANSFORMER[inner])
