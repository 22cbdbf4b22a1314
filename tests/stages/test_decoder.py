"""The decoder's stage: what is dropped how often, null texts, pixels and latents, and the meta device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genpipe.artifacts import Artifact
from genpipe.models.autoencoder import IdentityConfig, build_autoencoder
from genpipe.models.decoder import Decoder
from genpipe.stages import decoder
from genpipe.training.objective import Batch, Step

D, W, L = 8, 12, 6
SIZES = {"latent_channels": 3, "embed_dim": D, "text_width": W}
META: dict[str, Any] = {
    **SIZES,
    "latent_size": 8,
    "context_length": L,
    "latent_mean": [0.1] * 3,
    "latent_std": [0.5] * 3,
    "image_embed_mean": [0.0] * D,
    "image_embed_std": [0.3] * D,
    "clip": "c" * 64,
    "autoencoder": "a" * 64,
    "classes": ["cat", "dog", "owl"],
}
DIT = {"denoiser": {"patch_size": 2, "width": 32, "depth": 1, "heads": 2}}
UNET = {
    "kind": "unet",
    "width": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_at": [2],
    "head_width": 8,
    "groups": 8,
}
LEARNED = {"schedule": "linear", "predict": "eps", "time_sampling": "discrete", "variance": "learned"}
FORMS: list[dict[str, Any]] = [
    {"model": DIT},
    {"model": {"denoiser": UNET, "text_transformer": {"width": 16, "depth": 1, "heads": 2}}, "diffusion": LEARNED},
    {"model": {"denoiser": {**UNET, "attention": "transformer"}, "image_embed": False, "null_text": "encoder"}},
    {"model": {**DIT, "image_embed": False}, "text": False, "label": True},
    {"model": DIT, "label": True},
    {"model": {**DIT, "image_embed": False}, "text": False},
]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def config(**settings: Any) -> decoder.Config:
    train = {"samples": 8, "global_batch_size": 4}
    return decoder.Config.model_validate({"observe": {"sampler": {"steps": 2}}, "train": train, **settings})


def batch(count: int, *, size: int = 8) -> Batch:
    gen = seeded(0)
    return {
        "latents": torch.randn(count, 3, size, size, generator=gen).half(),
        "image_embeds": torch.randn(count, D, generator=gen).half(),
        "text_embeds": torch.randn(count, D, generator=gen).half(),
        "text_encodings": torch.randn(count * L, W, generator=gen).half(),
        "text_places": torch.arange(count * L).view(count, L),
        "labels": torch.arange(count) % 3,
    }


def objective(cfg: decoder.Config) -> decoder.Objective:
    """In pixels: its autoencoder does nothing."""
    torch.manual_seed(0)
    sizes = {**decoder.sizes(cfg, META), "out_channels": cfg.diffusion.channels(3), "null_tokens": 2}
    autoencoder = build_autoencoder(IdentityConfig(kind="identity"))
    return decoder.Objective(cfg, META, Decoder(cfg.model, **sizes), sizes, autoencoder)


@pytest.mark.parametrize("settings", FORMS)
def test_every_form_trains_and_is_validated(settings: dict[str, Any]) -> None:
    made = objective(config(**settings))
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.02)
    losses = [made.loss("decoder", batch(4), Step(0, seeded(n)))[0] for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and losses[0].isfinite()
    losses[0].backward()
    assert [name for name, p in made.model.named_parameters() if p.grad is None] == []
    found = made.validate([batch(4)], seeded(2))
    assert all(np.isfinite(value) for value in found.metrics.values()) and "loss" in found.metrics
    assert found.images["samples"].std() > 0


@pytest.mark.parametrize("settings", FORMS)
def test_every_form_is_stepped_on_the_meta_device(settings: dict[str, Any]) -> None:
    cfg, meta = config(**settings), torch.device("meta")
    planned = {
        "features": Artifact(kind="features", uri="", fingerprint="f" * 64, meta=META),
        "autoencoder": Artifact(kind="autoencoder", uri="", fingerprint="a" * 64, meta={}),
    }
    with meta:
        made = decoder.objective(cfg, planned, meta)
        example = decoder.example_batch(cfg, planned, batch_size=4)
        made.loss("decoder", example, Step(0, None))[0].backward()  # type: ignore[arg-type]
    assert all(p.grad is not None and p.device.type == "meta" for p in made.model.parameters())
    whole = {name: (t.shape, t.dtype) for name, t in batch(4).items()}
    if not cfg.model.image_embed:
        del whole["image_embeds"]
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == whole


class Recording(Decoder):
    """A decoder that remembers what was dropped."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, **given: Tensor) -> Tensor:
        self.dropped = given["drop_image"], given["drop_text"], given["drop_label"]
        return super().forward(x_BCHW, t_B, **given)


def test_conditions_are_dropped_as_often_as_asked_and_independently() -> None:
    cfg = config(model=DIT, label=True, drop_image=0.2, drop_text=0.5, drop_label=0.4)
    model = Recording(cfg.model, **decoder.sizes(cfg, META))
    made = decoder.Objective(cfg, META, model, SIZES, None)
    with torch.no_grad():
        made.loss("decoder", batch(4000, size=2), Step(0, seeded(0)))
    image, text, label = model.dropped
    assert image.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert text.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert label.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert (image & text).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (text & label).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_a_grid_that_does_not_divide_is_refused() -> None:
    features = Artifact(kind="features", uri="", fingerprint="f" * 64, meta={**META, "latent_size": 6})
    cfg = config(model={"denoiser": {**UNET, "multipliers": [1, 1, 2], "attention_at": [4]}})
    with pytest.raises(ValueError, match=r"denoiser\.multipliers makes cells of 4, which do not divide the latents' 6"):
        decoder.check_inputs(cfg, {"features": features})


def features(**meta: Any) -> dict[str, Artifact]:
    """Features with this in their meta; None takes something out."""
    held = {name: value for name, value in {**META, **meta}.items() if value is not None}
    return {"features": Artifact(kind="features", uri="", fingerprint="f" * 64, meta=held)}


@pytest.mark.parametrize(
    ("settings", "meta", "named"),
    [
        ({}, {"embed_dim": None, "clip": None}, ("model.image_embed", "a clip")),
        ({}, {"text_width": None}, ("text:", "text_encoder")),
        ({"label": True}, {"classes": []}, ("label:", "shards with class labels")),
        ({}, {"latent_size": None, "autoencoder": None}, ("latents", "autoencoder")),
        ({"observe": {"sampler": {"kind": "ddpm", "variance": "learned"}}}, {}, ("variance",)),
    ],
)
def test_a_condition_that_the_features_lack_is_refused(
    settings: dict[str, Any], meta: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        decoder.check_inputs(config(model=DIT, **settings), features(**meta))
    assert all(part in str(error.value) for part in named), error.value


def test_what_it_promises_is_what_it_takes() -> None:
    whole = decoder.check_inputs(config(model=DIT, label=True), features())
    assert whole["conditions"] == ["image_embed", "text", "label"] and whole["classes"] == META["classes"]
    assert (whole["clip"], whole["autoencoder"]) == ("c" * 64, "a" * 64)
    label = decoder.check_inputs(config(model={**DIT, "image_embed": False}, text=False, label=True), features())
    assert label["conditions"] == ["label"] and "clip" not in label
    t5 = decoder.check_inputs(config(model={**DIT, "image_embed": False}), features(text_encoder="e" * 64))
    assert t5["conditions"] == ["text"] and t5["text_encoder"] == "e" * 64 and "clip" not in t5
    unknown = decoder.check_inputs(config(model=DIT, label=True), features(classes=None))
    assert "classes" not in unknown, "before the shards are made"
