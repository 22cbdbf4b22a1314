"""Learning rates by hand, and which parameter gets which optimizer and which decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from genpipe.models.clip import CLIP, CLIPConfig, TowerConfig
from genpipe.models.decoder import Decoder, DecoderConfig
from genpipe.models.dit import DiTConfig
from genpipe.models.prior import DiffusionPrior, DiffusionPriorConfig
from genpipe.training.optim import AdamW, Muon, build_optimizers
from genpipe.training.settings import TrainConfig, lr_scale


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


def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        tower = TowerConfig(width=16, depth=2, heads=2)
        return {
            "clip": CLIP(
                CLIPConfig(embed_dim=8, image_size=16, image=tower, text=tower),
                vocab_size=300,
                context_length=8,
                eot_id=2,
            ),
            "prior": DiffusionPrior(DiffusionPriorConfig(width=16, depth=2, heads=2), embed_dim=8, text_width=8),
            "decoder": Decoder(
                DecoderConfig(denoiser=DiTConfig(width=16, depth=2, heads=2)),
                latent_channels=4,
                embed_dim=8,
                text_width=8,
            ),
        }


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
@pytest.mark.parametrize("cfg", [AdamW(), Muon(kind="muon")], ids=["adamw", "muon"])
def test_every_parameter_has_one_place_and_vectors_no_decay(name: str, cfg: AdamW | Muon) -> None:
    module = models()[name]
    names = {id(p): n for n, p in module.named_parameters()}
    optimizers = build_optimizers(module, cfg)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    for group in groups:
        assert group["peak_lr"] == group["lr"]
        if group["weight_decay"]:
            assert all(p.ndim >= 2 for p in group["params"])
        else:
            assert all(p.ndim < 2 for p in group["params"])
    undecayed = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert name != "clip" or "logit_scale" in undecayed
    assert all(n in undecayed for n in names.values() if n.endswith("bias") or "norm" in n)


def test_muon_takes_the_layers_matrices_and_nothing_else() -> None:
    """The weights of linear layers and convolutions; embeddings and bare parameters (positions, nulls) are AdamW's."""
    for name, module in models().items():
        names = {id(p): n for n, p in module.named_parameters()}
        adamw, muon = build_optimizers(module, Muon(kind="muon", lr=0.5, adamw_lr=0.25))
        taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
        assert all(n.endswith(".weight") and "norm" not in n for n in taken)
        assert {
            n for n in names.values() if ".blocks." in f".{n}" and n.endswith("weight") and "norm" not in n
        } <= taken
        assert not taken & {
            "text_tower.tokens.weight",
            "text_tower.positions_LW",
            "positions_SM",
            "query_M",
            "logit_scale",
        }
        assert name != "clip" or "text_tower.tokens.weight" in names.values()
        assert {group["lr"] for group in muon.param_groups} == {0.5}
        assert {group["lr"] for group in adamw.param_groups} == {0.25}


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
    layers = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(*reversed(shape), bias=False) for _ in range(3))})
    weights = [layer.weight for layer in layers["blocks"]]
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
    module = nn.ModuleDict({"blocks": nn.Linear(64, 32, bias=False)})
    weight = module["blocks"].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    (muon,) = build_optimizers(module, Muon(kind="muon", lr=0.1, weight_decay=0.0))
    muon.step()
    rms = (weight - before).square().mean().sqrt().item()
    assert math.isclose(rms, 0.2 * 0.1, rel_tol=0.2), "five Newton-Schulz iterations are only nearly orthogonal"
