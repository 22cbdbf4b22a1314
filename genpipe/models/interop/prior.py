"""Karlo's diffusion prior, diffusers' `PriorTransformer`, read and written.

A time of ours is theirs by 1,000: where their timestep is 500 our t is 0.5. They take the text embedding as the
encoder's projection gives it, and diffuse image embeddings standardized with their own mean and deviation, which
are among their weights; ours are in the manifest of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genpipe.models.interop.tensors import joined, split
from genpipe.models.prior import DiffusionPrior, DiffusionPriorConfig

_ONLY: dict[str, tuple[Any, ...]] = {
    "added_emb_type": ("prd",),
    "additional_embeddings": (DiffusionPrior.SPECIAL,),
    "embedding_proj_norm_type": (None,),
    "encoder_hid_proj_type": ("linear",),
    "norm_in_type": (None,),
    "time_embed_act_fn": ("silu",),
}
"""Settings of diffusers whose other values make another network than ours."""

_OUTER = {
    "encodings_in": "encoder_hidden_states_proj",
    "text_in": "embedding_proj",
    "time_in.up": "time_embedding.linear_1",
    "time_in.down": "time_embedding.linear_2",
    "image_in": "proj_in",
    "norm": "norm_out",
    "image_out": "proj_to_clip_embeddings",
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "attention_norm": ("norm1",),
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "mlp_norm": ("norm3",),
    "mlp.up": ("ff.net.0.proj",),
    "mlp.down": ("ff.net.2",),
}
_STATISTICS = ("clip_mean", "clip_std")


def config_from_diffusers(config: Mapping[str, Any]) -> DiffusionPriorConfig:
    """Our config of a `PriorTransformer`'s; its embed_dim and text_width are both `embedding_dim`.

    Raises ValueError naming a setting whose value makes another network than ours.
    """
    width, embed_dim = config["num_attention_heads"] * config["attention_head_dim"], config["embedding_dim"]
    only = _ONLY | {
        "time_embed_dim": (None, width),
        "embedding_proj_dim": (None, embed_dim),
        "clip_embed_dim": (None, embed_dim),
    }
    if wrong := [f"{name}={config[name]!r}" for name in only if name in config and config[name] not in only[name]]:
        raise ValueError(f"this PriorTransformer is another network than our diffusion prior: {', '.join(wrong)}")
    return DiffusionPriorConfig(
        width=width,
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        null_text="encoder",
        text_positions=config["num_embeddings"],
        time_frequencies=width,
        qk_norm=False,
    )


def config_to_diffusers(cfg: DiffusionPriorConfig, *, embed_dim: int, text_width: int) -> dict[str, Any]:
    """What a PriorTransformer is built with for `cfg`. Raises ValueError for a prior that it cannot represent."""
    _check_representable(cfg)
    if embed_dim != text_width:
        raise ValueError(
            f"a PriorTransformer's embeddings and encodings are of one width, and these are {embed_dim} and "
            f"{text_width} wide; it cannot be written as one"
        )
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.width // cfg.heads,
        "num_layers": cfg.depth,
        "embedding_dim": embed_dim,
        "num_embeddings": cfg.text_positions,
        "additional_embeddings": DiffusionPrior.SPECIAL,
    }


def from_diffusers(state: Mapping[str, Tensor], cfg: DiffusionPriorConfig) -> dict[str, Tensor]:
    """A PriorTransformer's state by our names, but for the null caption, which is the encoder's.

    Load it as `{**prior.state_dict(), **from_diffusers(...)}`; `embed_statistics` has the rest. Raises ValueError
    naming keys that are missing or have no place here, or a setting that they do not have.
    """
    if cfg.qk_norm:
        raise ValueError("a PriorTransformer's queries and keys are not normalized; set model.qk_norm to false")
    theirs = {name: tensor for name, tensor in state.items() if name not in _STATISTICS}
    for name in ("positional_embedding", "prd_embedding"):
        if name in theirs:
            theirs[name] = theirs[name].squeeze(0)
    ours = joined(theirs, _names(cfg))
    return {**ours, "query_M": ours["query_M"].squeeze(0)}


def embed_statistics(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] with which a PriorTransformer's image embeddings are standardized."""
    mean, std = (state[name].squeeze(0) for name in _STATISTICS)
    return mean, std


def to_diffusers(
    state: Mapping[str, Tensor], cfg: DiffusionPriorConfig, *, mean: Tensor, std: Tensor
) -> dict[str, Tensor]:
    """Inverse of `from_diffusers` and `embed_statistics`.

    Raises ValueError for a prior that a PriorTransformer cannot represent.
    """
    _check_representable(cfg)
    theirs = split({**state, "query_M": state["query_M"][None]}, _names(cfg))
    for name in ("positional_embedding", "prd_embedding"):
        theirs[name] = theirs[name][None]
    return {**theirs, "clip_mean": mean[None], "clip_std": std[None]}


def _check_representable(cfg: DiffusionPriorConfig) -> None:
    representable = cfg.text_tokens and not cfg.qk_norm and cfg.null_text == "encoder" and cfg.text_positions
    if not (representable and cfg.time_frequencies == cfg.width and cfg.mlp_ratio == 4):
        raise ValueError(
            "a PriorTransformer has text_tokens true, qk_norm false, null_text encoder, learned text_positions, "
            "time_frequencies as many as its width and mlp_ratio 4; a prior trained otherwise cannot be written as one"
        )


def _names(cfg: DiffusionPriorConfig) -> dict[str, tuple[str, ...]]:
    """Ours: theirs, of which several make one of ours."""
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _OUTER.items()}
    for i in range(cfg.depth):
        for ours, parts in _BLOCK.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"transformer_blocks.{i}.{part}" for part in parts)
    names = {
        f"{ours}.{kind}": tuple(f"{part}.{kind}" for part in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    return {**names, "positions_SM": ("positional_embedding",), "query_M": ("prd_embedding",)}
