"""Learning rates by hand, and which parameter gets which optimizer and which decay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from genpipe.models.autoencoder import build_autoencoder
from genpipe.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from genpipe.models.clip import CLIP, CLIPConfig, TowerConfig
from genpipe.models.dc_autoencoder import ChannelNorm, DeepCompressionConfig
from genpipe.models.decoder import Decoder, DecoderConfig, TextTransformerConfig
from genpipe.models.discriminator import Discriminator, DiscriminatorConfig
from genpipe.models.dit import DiTConfig
from genpipe.models.layers import ResidualBlock
from genpipe.models.ldm_autoencoder import LdmConfig
from genpipe.models.prior import DiffusionPrior, DiffusionPriorConfig
from genpipe.models.space_to_depth_autoencoder import FoldedConfig
from genpipe.models.unet import UNetConfig
from genpipe.models.upsampler import ConvolutionalConfig, UNetUpsamplerConfig, build_upsampler
from genpipe.models.vqvae2 import HierarchicalConfig
from genpipe.training.muon import orthogonalize
from genpipe.training.optim import AdamW, Muon, build_optimizers
from genpipe.training.settings import TrainConfig, lr_scale

NORMS = (nn.LayerNorm, nn.GroupNorm, ChannelNorm)


class Stack(ResidualBlock):
    """Linear layers of one shape, as a block has them."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"samples": 120, "global_batch_size": 10, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decay": "constant"}, {0: 1.0, 60: 1.0, 120: 1.0}),
        ({"decay": "linear"}, {0: 1.0, 30: 0.75, 60: 0.5, 120: 0.0}),
        ({"decay": "linear", "final_lr": 0.2}, {0: 1.0, 60: 0.6, 120: 0.2}),
        ({"decay": "cosine"}, {0: 1.0, 40: 0.75, 60: 0.5, 80: 0.25, 120: 0.0}),
        # The first step of a warm-up over 40 samples is a quarter of the way up; decay starts when it ends.
        ({"decay": "constant", "warmup_samples": 40}, {0: 0.25, 10: 0.5, 30: 1.0, 70: 1.0}),
        ({"decay": "linear", "warmup_samples": 40}, {0: 0.25, 40: 1.0, 80: 0.5, 120: 0.0}),
        ({"decay": "cosine", "warmup_samples": 20, "final_lr": 0.5}, {0: 0.5, 20: 1.0, 70: 0.75, 120: 0.5}),
    ],
)
def test_lr_scale_by_hand(fields: dict[str, Any], expected: dict[int, float]) -> None:
    found = {at: lr_scale(config(**fields), samples_seen=at) for at in expected}
    assert found == pytest.approx(expected, abs=1e-12)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 200),
    st.floats(0, 1),
    st.lists(st.integers(0, 300), min_size=2, max_size=2).map(sorted),
)
def test_lr_scale_rises_then_falls_within_its_bounds(decay: str, warmup: int, final: float, two: list[int]) -> None:
    cfg = config(decay=decay, warmup_samples=warmup, final_lr=final)
    early, late = (lr_scale(cfg, samples_seen=at) for at in two)
    assert 0 <= early <= 1 and 0 <= late <= 1
    if two[1] + cfg.global_batch_size <= warmup:
        assert early <= late
    if two[0] >= warmup:
        assert early >= late >= (1.0 if decay == "constant" else final) - 1e-9


def test_steps_and_micro_batches() -> None:
    assert config(samples=121).steps == 13
    assert config().micro_batch(2) == 5
    assert config(micro_batch_size=2).micro_batch(2) == 2
    with pytest.raises(ValueError, match="micro_batch_size 3 does not divide global_batch_size 10"):
        config(micro_batch_size=3)


TOWER = TowerConfig(width=16, depth=2, heads=2)
DIT = DiTConfig(width=16, depth=2, heads=2)
UNET = UNetConfig(width=32, multipliers=(1, 2), blocks=1, attention_at=(2,), head_width=32)
LATENT = UNET.model_copy(update={"attention": "transformer", "modulation": "add", "resample": "conv"})
TEXT = TextTransformerConfig(width=16, depth=2, heads=2)
CONDITIONS = {"latent_channels": 4, "embed_dim": 8, "text_width": 8, "classes": 3}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIP(
        CLIPConfig(embed_dim=8, image_size=16, image=TOWER, text=TOWER, image_pooling="class_token"),
        vocab_size=300,
        context_length=8,
        eot_id=2,
    ),
    "diffusion prior": lambda: DiffusionPrior(
        DiffusionPriorConfig(width=16, depth=2, heads=2), embed_dim=8, text_width=8
    ),
    "autoregressive prior": lambda: AutoregressivePrior(
        AutoregressivePriorConfig(kind="autoregressive", width=16, depth=2), embed_dim=8, text_width=8, components=4
    ),
    "decoder dit": lambda: Decoder(DecoderConfig(denoiser=DIT), **CONDITIONS),
    "decoder dit cross": lambda: Decoder(
        DecoderConfig(denoiser=DIT.model_copy(update={"context": "cross"})), **CONDITIONS
    ),
    "decoder dit joint": lambda: Decoder(
        DecoderConfig(denoiser=DIT.model_copy(update={"context": "joint"})), **CONDITIONS
    ),
    "decoder unet": lambda: Decoder(DecoderConfig(denoiser=UNET, text_transformer=TEXT), **CONDITIONS),
    "decoder unet of latent diffusion": lambda: Decoder(DecoderConfig(denoiser=LATENT), **CONDITIONS),
    "upsampler convolutional": lambda: build_upsampler(ConvolutionalConfig(width=16, depth=2)),
    "upsampler unet": lambda: build_upsampler(UNetUpsamplerConfig(width=32, multipliers=(1, 2), blocks=1)),
    "autoencoder folded": lambda: build_autoencoder(FoldedConfig(width=16, mid_attention=True)),
    "autoencoder ldm": lambda: build_autoencoder(LdmConfig(kind="ldm", width=32, multipliers=(1, 2), blocks=1)),
    "autoencoder deep compression": lambda: build_autoencoder(
        DeepCompressionConfig(
            kind="deep_compression",
            latent_channels=4,
            widths=(32, 64),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1),
            attention_from=1,
        )
    ),
    "autoencoder hierarchical": lambda: build_autoencoder(HierarchicalConfig(kind="hierarchical", width=16)),
    "discriminator": lambda: Discriminator(DiscriminatorConfig(width=8)),
}

TRANSFORMER = "attention.qkv attention.out mlp.up mlp.down"
RESIDUAL = "conv1 conv2 skip"


def within(places: str, layers: str) -> set[str]:
    return {f"{place}.{layer}.weight" for place in places.split() for layer in layers.split()}


MATRICES: dict[str, tuple[set[str], set[str], set[str]]] = {
    "clip": (
        within("image_tower.blocks.# text_tower.blocks.#", TRANSFORMER),
        within("image_tower", "patches projection") | {"text_tower.projection.weight"},
        {
            "image_tower.positions_1NW",
            "image_tower.class_token_W",
            "text_tower.positions_LW",
            "text_tower.tokens.weight",
            "logit_scale",
        },
    ),
    "diffusion prior": (
        within("blocks.#", TRANSFORMER),
        {
            f"{name}.weight"
            for name in ("encodings_in", "text_in", "image_in", "time_in.up", "time_in.down", "image_out")
        },
        {"query_M", "positions_SM", "null_encoding_W", "null_text_D"},
    ),
    "autoregressive prior": (
        within("blocks.#", TRANSFORMER),
        {"encodings_in.weight", "text_in.weight", "code_out.weight"},
        {"positions_SM", "null_encoding_W", "null_text_D", "dot_in.weight", "code_in.weight"},
    ),
    "decoder dit": (
        within("denoiser.blocks.#", TRANSFORMER + " attention.context_kv"),
        {"tokens_in.weight", "denoiser.blocks.#.modulation.weight"}
        | within("denoiser", "patches_in time_in.up time_in.down vector_in modulation_out patches_out"),
        {"null_image_D", "null_encoding_W", "denoiser.labels_in.weight"},
    ),
    "decoder dit cross": (
        within("denoiser.blocks.#", TRANSFORMER + " cross_attention.q cross_attention.kv cross_attention.out"),
        {"tokens_in.weight", "denoiser.blocks.#.modulation.weight"}
        | within("denoiser", "patches_in time_in.up time_in.down vector_in modulation_out patches_out"),
        {"null_image_D", "null_encoding_W", "denoiser.labels_in.weight"},
    ),
    "decoder dit joint": (
        within("denoiser.blocks.#", TRANSFORMER),
        {"tokens_in.weight", "denoiser.blocks.#.modulation.weight"}
        | within("denoiser", "patches_in context_in time_in.up time_in.down vector_in modulation_out patches_out"),
        {"null_image_D", "null_encoding_W", "denoiser.labels_in.weight"},
    ),
    "decoder unet": (
        within("text_transformer.blocks.#", TRANSFORMER)
        | within("denoiser.down.#.block denoiser.up.#.block", RESIDUAL)
        | within("denoiser.middle.#.block denoiser.up.#.resize", "conv1 conv2")
        | within(
            "denoiser.down.#.attention denoiser.middle.#.attention denoiser.up.#.attention",
            "attention.qkv attention.context_kv attention.out",
        ),
        {"tokens_in.weight", "text_transformer.encodings_in.weight"}
        | within("denoiser.down.#.block denoiser.middle.#.block denoiser.up.#.block denoiser.up.#.resize", "modulation")
        | within("denoiser", "grid_in time_in.up time_in.down vector_in grid_out"),
        {"null_image_D", "null_encoding_W", "denoiser.labels_in.weight"},
    ),
    "decoder unet of latent diffusion": (
        within("denoiser.down.#.block denoiser.up.#.block", RESIDUAL)
        | within("denoiser.middle.#.block", "conv1 conv2")
        | within(
            "denoiser.down.#.attention denoiser.middle.#.attention denoiser.up.#.attention",
            "tokens_in tokens_out blocks.#.self_attention.qkv blocks.#.self_attention.out blocks.#.cross_attention.q "
            "blocks.#.cross_attention.kv blocks.#.cross_attention.out blocks.#.mlp.up blocks.#.mlp.down",
        ),
        {"tokens_in.weight"}
        | within("denoiser.down.#.block denoiser.middle.#.block denoiser.up.#.block", "modulation")
        | within("denoiser", "grid_in time_in.up time_in.down vector_in down.#.block.conv up.#.resize.conv grid_out"),
        {"null_image_D", "null_encoding_W", "denoiser.labels_in.weight"},
    ),
    "upsampler convolutional": (
        within("blocks.#", "conv1 conv2"),
        {"blocks.#.modulation.weight", "image_in.weight", "image_out.weight"}
        | within("time_in noise_aug_in", "up down"),
        set(),
    ),
    "upsampler unet": (
        within("unet.down.#.block unet.up.#.block", RESIDUAL)
        | within("unet.middle.#.block unet.up.#.resize", "conv1 conv2"),
        within("unet.down.#.block unet.middle.#.block unet.up.#.block unet.up.#.resize", "modulation")
        | within("unet", "grid_in time_in.up time_in.down vector_in grid_out")
        | within("noise_aug_in", "up down"),
        set(),
    ),
    "autoencoder folded": (
        within("encoder.# decoder.#", "conv1 conv2 attention.qkv attention.out"),
        {"encoder.#.weight", "decoder.#.weight"},
        set(),
    ),
    "autoencoder ldm": (
        within("encoder.# decoder.#", RESIDUAL + " q k v out"),
        {"encoder.#.weight", "decoder.#.weight"},
        set(),
    ),
    "autoencoder deep compression": (
        within("encoder.# decoder.#", "conv1 conv2") | within("encoder.#.# decoder.#.#", "q k v out widen narrow"),
        {"encoder.#.weight", "decoder.#.weight"}
        | within("encoder.# decoder.#", "conv")
        | within("encoder.#.# decoder.#.#", "scales.#.# depth"),
        set(),
    ),
    "autoencoder hierarchical": (
        within("encoder.down.# encoder.down_again.# encoder.from_top.# decoder.up.#", "conv1 conv2"),
        within("encoder", "down.# down_again.# to_top from_top.# to_bottom") | within("decoder", "raise_top up.#"),
        set(),
    ),
    "discriminator": (set(), {"net.#.weight"}, set()),
}
"""By model: the hidden matrices, the other matrices, and what is neither and no gain or bias of a layer."""


def placed(module: nn.Module, cfg: AdamW | Muon) -> tuple[set[str], set[str], set[str]]:
    """Names of Muon's parameters, and AdamW's decayed and undecayed ones, without the gains and biases of layers.

    A number in a name is written #.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    plain = {id(p) for layer in module.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    plain |= {id(p) for name, p in module.named_parameters() if name.rsplit(".")[-1] == "bias"}
    found: tuple[set[str], set[str], set[str]] = set(), set(), set()
    ids = []
    for optimizer in build_optimizers(module, cfg):
        by_muon = not isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            assert group["peak_lr"] == group["lr"] == (cfg.lr if by_muon or cfg.kind == "adamw" else cfg.adamw_lr)
            ids += [id(p) for p in group["params"]]
            place = 0 if by_muon else 1 if group["weight_decay"] else 2
            assert place == 2 or not plain & {id(p) for p in group["params"]}, "gains and biases are not decayed"
            assert group["weight_decay"] in (0.0, cfg.weight_decay) and (place == 2 or group["weight_decay"])
            found[place].update(re.sub(r"\b\d+\b", "#", names[id(p)]) for p in group["params"] if id(p) not in plain)
    assert sorted(ids) == sorted(names), "every parameter has one place"
    return found


@pytest.mark.parametrize("name", MODELS)
def test_which_optimizer_and_decay_each_parameter_has(name: str) -> None:
    """Muon: the hidden matrices alone (Jordan et al. 2024). Decay: what multiplies activations, in either case."""
    with torch.device("meta"):
        module = MODELS[name]()
    hidden, matrices, others = MATRICES[name]
    assert placed(module, Muon(kind="muon", lr=0.5, adamw_lr=0.25)) == (hidden, matrices, others)
    assert placed(module, AdamW()) == (set(), hidden | matrices, others)


def test_decay_shrinks_matrices_only() -> None:
    """With zero gradients AdamW does nothing but decay: one step scales a matrix by 1 - lr * weight_decay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in build_optimizers(module, AdamW(lr=0.1, weight_decay=0.5)):
        optimizer.step()
    after = dict(module.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("shape", [(64, 32), (16, 48), (24, 24)])
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    """Three steps on a matrix beside others of its shape, against torch.optim.Muon on that matrix alone."""
    torch.manual_seed(0)
    start, *gradients = torch.randn(4, *shape)
    reference = nn.Parameter(start.clone())
    theirs = torch.optim.Muon([reference], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    layers = Stack(*(nn.Linear(*reversed(shape), bias=False) for _ in range(3)))
    weights = [layer.weight for layer in layers.layers]
    with torch.no_grad():
        weights[1].copy_(start)
    (ours,) = build_optimizers(layers, Muon(kind="muon", lr=0.1, weight_decay=0.1))
    for gradient in gradients:
        reference.grad = gradient.clone()
        for i, weight in enumerate(weights):
            weight.grad = gradient if i == 1 else torch.randn(shape)
        theirs.step()
        ours.step()
    assert (reference - start).abs().max() > 0.05
    torch.testing.assert_close(weights[1], reference, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24)])
def test_orthogonalization_is_a_polynomial_of_the_singular_values(shape: tuple[int, int, int]) -> None:
    """Jordan et al. 2024: five times s -> a s + b s^3 + c s^5, of singular values whose squares add up to 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.square().sum(dim=1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = (left * values[:, None] @ right).float()
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), expected, atol=1e-5, rtol=0)
    assert (orthogonalize(matrices, torch.bfloat16) - expected).abs().max() > 1e-4


def test_epsilon_holds_small_gradients_back() -> None:
    """The first step of Adam by hand: lr g / (|g| + eps), at g = eps half of lr."""
    module = nn.Linear(1, 1, bias=False)
    before = module.weight.detach().clone()
    (adamw,) = build_optimizers(module, AdamW(lr=0.1, eps=1e-3, weight_decay=0.0))
    module.weight.grad = torch.full_like(module.weight, 1e-3)
    adamw.step()
    torch.testing.assert_close(before - module.weight.detach(), torch.full_like(before, 0.05))


def test_muon_steps_have_the_rms_of_adamw() -> None:
    """The update of a matrix is orthogonal, scaled to an RMS of 0.2 lr (Liu et al. 2025, eq. 4)."""
    torch.manual_seed(0)
    module = Stack(nn.Linear(64, 32, bias=False))
    weight = module.layers[0].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    (muon,) = build_optimizers(module, Muon(kind="muon", lr=0.1, weight_decay=0.0))
    muon.step()
    rms = (weight - before).square().mean().sqrt().item()
    assert math.isclose(rms, 0.2 * 0.1, rel_tol=0.2), "five Newton-Schulz iterations are only nearly orthogonal"
