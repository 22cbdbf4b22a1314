"""CLIP's configurations and weights as OpenAI, open_clip and transformers write them, as ours and back.

Theirs see images standardized with OpenAI's mean and standard deviation; ours are given them in [-1, 1] and
standardize for themselves (`pixels: openai`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genpipe.data.tokenizer import SPECIAL
from genpipe.models.clip import OPENAI_MEAN, OPENAI_STD, CLIPConfig, TowerConfig
from genpipe.models.interop.tensors import Names, joined, split

State = dict[str, Tensor]
Sizes = dict[str, int]

PUBLISHED: dict[str, Any] = {
    "patch_bias": False,
    "image_pre_norm": True,
    "image_pooling": "class_token",
    "causal_text": True,
}
"""What all three have in common, and ours can do otherwise."""

TRANSFORMERS_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
TRANSFORMERS_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What transformers leaves out of a config.json because it is the default."""

OPEN_CLIP_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
OPEN_CLIP_TEXT = {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio"}
NO_WEIGHTS = {
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    *("input_resolution", "context_length", "vocab_size", "attn_mask"),
}
"""Entries of their state dicts that are not trained."""


def config_from_transformers(config: Mapping[str, Any]) -> tuple[CLIPConfig, Sizes]:
    """The `config.json` of a CLIPModel -> our config, and the sizes that `CLIP` takes beside it."""
    text = {**TRANSFORMERS_TEXT, **(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    vision = {**TRANSFORMERS_VISION, **(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    cfg = CLIPConfig(
        embed_dim=config.get("projection_dim", 512),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        image=_tower_from_transformers(vision),
        text=_tower_from_transformers(text),
        pixels="openai",
        mask_padding=False,
        **PUBLISHED,
    )
    # The first configurations have 2 in place of 49407; the model then takes the largest id.
    eot_id = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    return cfg, {
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "eot_id": eot_id,
    }


def _tower_from_transformers(tower: Mapping[str, Any]) -> TowerConfig:
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    ratio = hidden / width
    return TowerConfig(
        width=width,
        depth=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        qk_norm=False,
        activation=tower["hidden_act"],
        norm_eps=tower["layer_norm_eps"],
    )


def config_to_transformers(cfg: CLIPConfig, sizes: Sizes) -> dict[str, Any]:
    """Our config and sizes -> the `config.json` of a CLIPModel. Raises ValueError for what CLIPModel cannot do."""
    _check_published(cfg, library="transformers")
    if sizes["eot_id"] == 2:
        raise ValueError("transformers takes the largest id for the end of text where eos_token_id is 2, as it is "
                         "with tokenizers trained here; use special_tokens_last first")  # fmt: skip
    text = {
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["context_length"],
        "eos_token_id": sizes["eot_id"],
        "bos_token_id": sizes["eot_id"] - 1,
    }
    vision = {"image_size": cfg.image_size, "patch_size": cfg.patch_size}
    return {
        "model_type": "clip",
        "projection_dim": cfg.embed_dim,
        "text_config": text | _tower_to_transformers(cfg.text, embed_dim=cfg.embed_dim),
        "vision_config": vision | _tower_to_transformers(cfg.image, embed_dim=cfg.embed_dim),
    }


def preprocessor_to_transformers(cfg: CLIPConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` that gives a CLIPModel images as ours standardizes them."""
    standard = cfg.pixels == "openai"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.image_size},
        "do_center_crop": True,
        "crop_size": {"height": cfg.image_size, "width": cfg.image_size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(OPENAI_MEAN) if standard else [0.5] * 3,
        "image_std": list(OPENAI_STD) if standard else [0.5] * 3,
    }


def special_tokens_last(state: Mapping[str, Tensor], sizes: Sizes) -> tuple[State, Sizes]:
    """The same model for a vocabulary whose `SPECIAL` first tokens come last, in their order.

    The tokenizers trained here begin with padding, start and end of text; transformers and open_clip find a caption's
    last token as that of the largest id. `CaptionTokenizer.to_transformers` numbers the tokens so.
    """
    assert sizes["eot_id"] == SPECIAL - 1, "a tokenizer that was trained here"
    table = torch.roll(state["text_tower.tokens.weight"], -SPECIAL, dims=0)
    return {**state, "text_tower.tokens.weight": table}, {**sizes, "eot_id": sizes["vocab_size"] - 1}


def _tower_to_transformers(tower: TowerConfig, *, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_eps,
        "projection_dim": embed_dim,
    }


def config_from_open_clip(config: Mapping[str, Any]) -> tuple[CLIPConfig, Sizes]:
    """The `model_cfg` of open_clip -> our config, and the sizes that `CLIP` takes beside it.

    Raises ValueError naming the settings of models other than a ViT with CLIP's own text transformer.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    unknown = {*(config.keys() - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"})}
    unknown |= (vision.keys() - OPEN_CLIP_VISION) | (text.keys() - OPEN_CLIP_TEXT)
    if unknown:
        raise ValueError(f"open_clip's {', '.join(sorted(unknown))}: no setting of ours does the same")
    details: dict[str, Any] = {"qk_norm": False, "activation": "quick_gelu" if config.get("quick_gelu") else "gelu"}
    cfg = CLIPConfig(
        embed_dim=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        image=TowerConfig(
            width=vision["width"],
            depth=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            **details,
        ),
        text=TowerConfig(
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
            mlp_ratio=text.get("mlp_ratio", 4.0),
            **details,
        ),
        pixels="openai",
        mask_padding=False,
        **PUBLISHED,
    )
    sizes = {"vocab_size": text["vocab_size"], "context_length": text["context_length"]}
    return cfg, sizes | {"eot_id": text["vocab_size"] - 1}


def config_to_open_clip(cfg: CLIPConfig, sizes: Sizes) -> dict[str, Any]:
    """Our config and sizes -> open_clip's `model_cfg`. Raises ValueError for what open_clip's CLIP cannot do."""
    _check_published(cfg, library="open_clip")
    if cfg.image.activation != cfg.text.activation:
        raise ValueError("open_clip has one activation for both towers; image.activation and text.activation differ")
    if sizes["eot_id"] != sizes["vocab_size"] - 1:
        raise ValueError("open_clip takes the largest id for the end of text, which it is not with tokenizers "
                         "trained here; export models of CLIP's own tokenizer")  # fmt: skip
    image, text = cfg.image, cfg.text
    return {
        "embed_dim": cfg.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": cfg.image_size,
            "patch_size": cfg.patch_size,
            "layers": image.depth,
            "width": image.width,
            "head_width": image.width // image.heads,
            "mlp_ratio": image.mlp_ratio,
        },
        "text_cfg": {
            "context_length": sizes["context_length"],
            "vocab_size": sizes["vocab_size"],
            "layers": text.depth,
            "width": text.width,
            "heads": text.heads,
            "mlp_ratio": text.mlp_ratio,
        },
    }


def config_from_openai(state: Mapping[str, Tensor]) -> tuple[CLIPConfig, Sizes]:
    """The config is read from the shapes of OpenAI's checkpoints (`build_model` in openai/CLIP). ViTs only."""
    if "visual.conv1.weight" not in state or state["visual.conv1.weight"].ndim != 4 or "visual.proj" not in state:
        raise ValueError(
            "these are not the weights of an OpenAI CLIP with a vision transformer: visual.proj is missing"
        )
    width, _, _, patch = state["visual.conv1.weight"].shape
    text_width, embed_dim = state["text_projection"].shape
    config = {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
            "patch_size": patch,
            "layers": _depth(state, "visual.transformer.resblocks."),
            "width": width,
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "layers": _depth(state, "transformer.resblocks."),
            "width": text_width,
            "heads": text_width // 64,
        },
    }
    return config_from_open_clip(config)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def from_transformers(state: Mapping[str, Tensor], cfg: CLIPConfig) -> State:
    """A CLIPModel's state dict -> ours, in fp32. Raises ValueError naming keys that are missing or left over."""
    return _from(state, _names(cfg, _TRANSFORMERS))


def to_transformers(state: Mapping[str, Tensor], cfg: CLIPConfig) -> State:
    """The inverse of `from_transformers`."""
    _check_published(cfg, library="transformers")
    return _to(state, _names(cfg, _TRANSFORMERS), cfg)


def from_openai(state: Mapping[str, Tensor], cfg: CLIPConfig) -> State:
    """A state dict of OpenAI's CLIP or open_clip's, which share their names -> ours, in fp32.

    Raises ValueError naming keys that are missing or left over.
    """
    return _projections_transposed(_from(state, _names(cfg, _OPENAI)))


def to_openai(state: Mapping[str, Tensor], cfg: CLIPConfig) -> State:
    """The inverse of `from_openai`."""
    _check_published(cfg, library="OpenAI")
    return _to(_projections_transposed(state), _names(cfg, _OPENAI), cfg)


def _check_published(cfg: CLIPConfig, *, library: str) -> None:
    """Raise ValueError naming the settings that no published model has."""
    ours = [name for name, value in PUBLISHED.items() if getattr(cfg, name) != value]
    ours += [f"{name}.qk_norm" for name, tower in (("image", cfg.image), ("text", cfg.text)) if tower.qk_norm]
    ours += ["loss.kind"] if cfg.loss.kind != "softmax" else []
    if ours:
        raise ValueError(f"{library}'s CLIP is not made as {', '.join(ours)} would have it; only models like those in "
                         "configs/model/clip can be exported")  # fmt: skip


def _from(state: Mapping[str, Tensor], names: Names) -> State:
    ours = joined({name: tensor.float() for name, tensor in state.items() if name not in NO_WEIGHTS}, names)
    ours["image_tower.patches.weight"] = ours["image_tower.patches.weight"].flatten(1)
    ours["image_tower.positions_1NW"] = ours["image_tower.positions_1NW"][None]
    return ours


def _to(state: Mapping[str, Tensor], names: Names, cfg: CLIPConfig) -> State:
    convolution = state["image_tower.patches.weight"].unflatten(1, (3, cfg.patch_size, cfg.patch_size))
    positions = state["image_tower.positions_1NW"][0]
    ours = {**state, "image_tower.patches.weight": convolution, "image_tower.positions_1NW": positions}
    return {name: tensor.contiguous() for name, tensor in split(ours, names).items()}


def _projections_transposed(state: Mapping[str, Tensor]) -> State:
    """OpenAI multiplies by its projections from the right."""
    names = ("image_tower.projection.weight", "text_tower.projection.weight")
    return {**state, **{name: state[name].T.contiguous() for name in names}}


def _names(cfg: CLIPConfig, library: _Library) -> Names:
    """Ours: theirs, of every tensor of a model of this depth."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in library.outer.items()}
    for (tower, layers), depth in zip(library.layers.items(), (cfg.image.depth, cfg.text.depth), strict=True):
        for i, kind, (ours, theirs) in product(range(depth), ("weight", "bias"), library.block.items()):
            names[f"{tower}.blocks.{i}.{ours}.{kind}"] = tuple(f"{layers}.{i}.{name.format(kind)}" for name in theirs)
    return names


class _Library(NamedTuple):
    """What a library calls the tensors outside of the blocks, the lists of blocks, and the layers of a block."""

    outer: Mapping[str, str]
    layers: Mapping[str, str]
    block: Mapping[str, tuple[str, ...]]


_TRANSFORMERS = _Library(
    outer={
        "image_tower.patches.weight": "vision_model.embeddings.patch_embedding.weight",
        "image_tower.positions_1NW": "vision_model.embeddings.position_embedding.weight",
        "image_tower.class_token_W": "vision_model.embeddings.class_embedding",
        "image_tower.pre_norm.weight": "vision_model.pre_layrnorm.weight",
        "image_tower.pre_norm.bias": "vision_model.pre_layrnorm.bias",
        "image_tower.norm.weight": "vision_model.post_layernorm.weight",
        "image_tower.norm.bias": "vision_model.post_layernorm.bias",
        "image_tower.projection.weight": "visual_projection.weight",
        "text_tower.tokens.weight": "text_model.embeddings.token_embedding.weight",
        "text_tower.positions_LW": "text_model.embeddings.position_embedding.weight",
        "text_tower.norm.weight": "text_model.final_layer_norm.weight",
        "text_tower.norm.bias": "text_model.final_layer_norm.bias",
        "text_tower.projection.weight": "text_projection.weight",
        "logit_scale": "logit_scale",
    },
    layers={"image_tower": "vision_model.encoder.layers", "text_tower": "text_model.encoder.layers"},
    block={
        "attention_norm": ("layer_norm1.{}",),
        "attention.qkv": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
        "attention.out": ("self_attn.out_proj.{}",),
        "mlp_norm": ("layer_norm2.{}",),
        "mlp.up": ("mlp.fc1.{}",),
        "mlp.down": ("mlp.fc2.{}",),
    },
)

_OPENAI = _Library(
    outer={
        "image_tower.patches.weight": "visual.conv1.weight",
        "image_tower.positions_1NW": "visual.positional_embedding",
        "image_tower.class_token_W": "visual.class_embedding",
        "image_tower.pre_norm.weight": "visual.ln_pre.weight",
        "image_tower.pre_norm.bias": "visual.ln_pre.bias",
        "image_tower.norm.weight": "visual.ln_post.weight",
        "image_tower.norm.bias": "visual.ln_post.bias",
        "image_tower.projection.weight": "visual.proj",
        "text_tower.tokens.weight": "token_embedding.weight",
        "text_tower.positions_LW": "positional_embedding",
        "text_tower.norm.weight": "ln_final.weight",
        "text_tower.norm.bias": "ln_final.bias",
        "text_tower.projection.weight": "text_projection",
        "logit_scale": "logit_scale",
    },
    layers={"image_tower": "visual.transformer.resblocks", "text_tower": "transformer.resblocks"},
    block={
        "attention_norm": ("ln_1.{}",),
        "attention.qkv": ("attn.in_proj_{}",),
        "attention.out": ("attn.out_proj.{}",),
        "mlp_norm": ("ln_2.{}",),
        "mlp.up": ("mlp.c_fc.{}",),
        "mlp.down": ("mlp.c_proj.{}",),
    },
)
