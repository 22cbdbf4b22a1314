"""DiT of diffusers (DiTTransformer2DModel), read and written.

Theirs embeds 1,000 t with half of 256 frequencies stepped by 1 / 127 of the range, the paper's code (and ours) by
1 / 128: `downscale_freq_shift` 1 against 0. Weights that were trained as the paper's, as the published ones were, are
right with 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genpipe.models.dit import DiT, DiTConfig
from genpipe.models.interop.tensors import joined, split

_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_zero",),
}
_OUTER = {"patches_in": "pos_embed.proj", "modulation_out": "proj_out_1", "patches_out": "proj_out_2"}
_BLOCK: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "modulation": ("norm1.linear",),
    "mlp.up": ("ff.net.0.proj",),
    "mlp.down": ("ff.net.2",),
}
_EMBEDDING = {
    "time_in.up": "timestep_embedder.linear_1",
    "time_in.down": "timestep_embedder.linear_2",
    "labels_in": "class_embedder.embedding_table",
}
_SHARED = re.compile(r"transformer_blocks\.\d+\.norm1\.emb\.")
_INPUTS = ("attention.qkv", "mlp.up", "patches_out")
"""Modules that read the residual stream: its channels are the columns of their weights."""
_OUTPUTS = {"patches_in": 1, "attention.out": 1, "mlp.down": 1, "modulation": 6, "modulation_out": 2}
"""Modules that write to the residual stream: its channels are the rows of their weights, so many times over."""


def config_from_diffusers(config: Mapping[str, Any]) -> DiTConfig:
    """The same network's config. Raises ValueError naming the first setting without a counterpart in our DiT."""
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"a DiT of diffusers with {name} {config[name]!r} has no counterpart here")
    return DiTConfig(
        patch_size=config["patch_size"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        qk_norm=False,
        activation="gelu_tanh",
        # Theirs takes it from the block's setting before the MLP, and has 1e-6, the paper's, everywhere else.
        norm_eps=1e-6,
    )


def from_diffusers(state: Mapping[str, Tensor], cfg: DiTConfig) -> dict[str, Tensor]:
    """State of our class-conditional DiT of `cfg`, from that of diffusers'.

    Raises ValueError naming keys that are missing or left over; and where their time and class embeddings, of which
    they keep one per block, are not all the same.
    """
    state = dict(state)
    for key in filter(_SHARED.match, list(state)):
        first = _SHARED.sub("transformer_blocks.0.norm1.emb.", key)
        if key != first and first in state and not torch.equal(state.pop(key), state[first]):
            raise ValueError(f"{key} is not that of the first block; here all blocks share one embedding")
    sizes = _sizes(state, cfg)
    with torch.device("meta"):
        ours = DiT(cfg, **sizes).state_dict()
    found = joined(state, {key: _theirs(key) for key in ours})
    found["patches_in.weight"] = found["patches_in.weight"].flatten(1)
    patch = (cfg.patch_size**2, sizes["out_channels"])
    for part in ("weight", "bias"):  # rows by cell then channel, ours by channel then cell
        rows = found[f"patches_out.{part}"].unflatten(0, patch)
        found[f"patches_out.{part}"] = rows.transpose(0, 1).flatten(0, 1)
    return {key: _reordered(key, tensor) for key, tensor in found.items()}


def to_diffusers(state: Mapping[str, Tensor], cfg: DiTConfig) -> dict[str, Tensor]:
    """Inverse of `from_diffusers`."""
    ours = {key: _reordered(key, tensor) for key, tensor in state.items()}
    ours["patches_in.weight"] = ours["patches_in.weight"].unflatten(1, (-1, cfg.patch_size, cfg.patch_size))
    for part in ("weight", "bias"):
        rows = ours[f"patches_out.{part}"].unflatten(0, (-1, cfg.patch_size**2))
        ours[f"patches_out.{part}"] = rows.transpose(0, 1).flatten(0, 1)
    found = split(ours, {key: _theirs(key) for key in ours})
    for key in [key for key in found if ".norm1.emb." in key]:
        for block in range(1, cfg.depth):
            found[key.replace(".0.", f".{block}.", 1)] = found[key]
    return found


def _sizes(state: Mapping[str, Tensor], cfg: DiTConfig) -> dict[str, int]:
    """Channels in and out, and the number of classes. Raises ValueError if the tensors that give them are missing."""
    names = (
        "pos_embed.proj.weight",
        "proj_out_2.weight",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    )
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"the weights lack {', '.join(missing)}")
    patches_in, patches_out, table = (state[name] for name in names)
    return {
        "in_channels": patches_in.shape[1],
        "out_channels": len(patches_out) // cfg.patch_size**2,
        "classes": len(table) - 1,
    }


def _theirs(key: str) -> tuple[str, ...]:
    """Their names of the tensors that make up ours, concatenated along the first axis."""
    module, _, tensor = key.rpartition(".")
    if module in _OUTER:
        return (f"{_OUTER[module]}.{tensor}",)
    if module in _EMBEDDING:
        return (f"transformer_blocks.0.norm1.emb.{_EMBEDDING[module]}.{tensor}",)
    _, number, inner = module.split(".", 2)
    return tuple(f"transformer_blocks.{number}.{name}.{tensor}" for name in _BLOCK[inner])


def _reordered(key: str, tensor: Tensor) -> Tensor:
    """Our tensor with the residual stream's channels in their order, or theirs in ours.

    Positions are added as [cos row, sin row, cos column, sin column], theirs as [sin column, cos column, sin row, cos
    row]: the quarters of the channels are reversed.
    """
    module, _, kind = key.rpartition(".")
    module = re.sub(r"^blocks\.\d+\.", "", module)
    if module in _INPUTS and kind == "weight":
        return tensor.unflatten(1, (4, -1)).flip(1).flatten(1, 2)
    if module in _OUTPUTS:
        return tensor.unflatten(0, (_OUTPUTS[module], 4, -1)).flip(1).flatten(0, 2)
    return tensor
