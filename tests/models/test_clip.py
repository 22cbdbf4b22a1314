"""CLIP: shapes, masks, details of published models, one-batch overfit, and parameters counted on the meta device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from genpipe.config import load, parse
from genpipe.models.clip import CLIP, CLIPConfig, TowerConfig, keep_patches, text_mask
from genpipe.models.contrastive import SigmoidLoss
from genpipe.training.optim import AdamW, build_optimizers

CONFIGS = Path(__file__).parents[2] / "configs/model/clip"
TOWER = TowerConfig(width=32, depth=2, heads=2)
TINY = CLIPConfig(embed_dim=16, image_size=16, patch_size=8, image=TOWER, text=TOWER)
PLAIN = TowerConfig(width=32, depth=2, heads=2, qk_norm=False, activation="quick_gelu")
PUBLISHED = CLIPConfig(
    embed_dim=16,
    image_size=16,
    patch_size=8,
    image=PLAIN,
    text=PLAIN,
    pixels="openai",
    patch_bias=False,
    image_pre_norm=True,
    image_pooling="class_token",
    mask_padding=False,
)
TOKENS = torch.tensor([[5, 6, 7, 2, 0, 0], [8, 9, 2, 0, 0, 0], [3, 4, 5, 6, 7, 2], [9, 2, 0, 0, 0, 0]])


def tiny(cfg: CLIPConfig = TINY, **changes: object) -> CLIP:
    torch.manual_seed(0)
    return CLIP(cfg.model_copy(update=changes), vocab_size=10, context_length=8, eot_id=2)


def test_shapes_and_unit_norms_under_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_embed = model.encode_image(torch.randn(4, 3, 16, 16))
        text_embed, text_encodings = model.encode_text(TOKENS)
    for embed in (image_embed, text_embed):
        assert embed.shape == (4, 16) and embed.dtype == torch.float32
        torch.testing.assert_close(embed.norm(dim=1), torch.ones(4))
    assert text_encodings.shape == (4, 6, 32)


@pytest.mark.parametrize("causal_text", [True, False])
def test_padding_changes_nothing(causal_text: bool) -> None:
    model = tiny(causal_text=causal_text)
    longer = F.pad(TOKENS, (0, 2))
    text_embed, text_encodings = model.encode_text(TOKENS)
    padded_embed, padded_encodings = model.encode_text(longer)
    torch.testing.assert_close(padded_embed, text_embed)
    real = TOKENS != 0
    torch.testing.assert_close(padded_encodings[:, :6][real], text_encodings[real])


def test_causal_states_do_not_see_later_tokens() -> None:
    model = tiny()
    changed = TOKENS.clone()
    changed[2, 3] = 1
    before, after = model.encode_text(TOKENS)[1], model.encode_text(changed)[1]
    torch.testing.assert_close(after[2, :3], before[2, :3])
    assert not torch.allclose(after[2, 3:], before[2, 3:])


def test_wrong_sizes_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="16x16"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="context_length 8"):
        model.encode_text(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="patch_size 7"):
        CLIPConfig(image_size=16, patch_size=7)


def test_logit_scale_starts_at_the_papers_value_and_is_clamped() -> None:
    model = tiny()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_scale.dtype == torch.float32
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale_()
    assert model.logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.parametrize("cfg", [TINY, PUBLISHED, TINY.model_copy(update={"loss": SigmoidLoss(kind="sigmoid")})])
def test_every_parameter_gets_a_gradient(cfg: CLIPConfig) -> None:
    model = tiny(cfg)
    model.loss(*model(torch.randn(4, 3, 16, 16), TOKENS)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert ("logit_bias" in dict(model.named_parameters())) == (cfg.loss.kind == "sigmoid")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("cfg", [TINY, PUBLISHED])
def test_overfits_eight_pairs_and_a_shuffled_pairing_is_worse(cfg: CLIPConfig, kind: str) -> None:
    loss_config = cfg.loss if kind == "softmax" else SigmoidLoss(kind="sigmoid")
    model = tiny(cfg, loss=loss_config)
    images = torch.randn(8, 3, 16, 16).clamp(-1, 1)
    tokens = torch.tensor([[1, 3 + i % 4, 7 + i // 4, 2, 0, 0] for i in range(8)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = model.loss(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale_()
        losses.append(loss.item())
    image_embed, text_embed = model(images, tokens)
    assert losses[-1] < 0.1 < losses[0]
    assert (image_embed @ text_embed.T).argmax(1).tolist() == list(range(8))
    assert model.loss(image_embed, text_embed.roll(1, 0)).item() > losses[-1] + 1


def test_starting_scale_and_bias_of_siglip() -> None:
    """Zhai et al. 2023, sec. 3.2: t' = log 10, b = -10."""
    model = tiny(loss=SigmoidLoss(kind="sigmoid"))
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias is not None and model.logit_bias.item() == -10


def test_scale_bias_and_class_token_are_not_decayed() -> None:
    model = tiny(PUBLISHED, loss=SigmoidLoss(kind="sigmoid"))
    groups = [g for optimizer in build_optimizers(model, AdamW(weight_decay=0.2)) for g in optimizer.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert model.logit_bias is not None and model.image_tower.class_token_W is not None
    for parameter in (model.logit_scale, model.logit_bias, model.image_tower.class_token_W):
        assert decay[id(parameter)] == 0.0 and parameter.dtype == torch.float32
    assert decay[id(model.image_tower.patches.weight)] == 0.2


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=5), st.sampled_from([0, 2, 49407])
)
def test_text_mask_ends_with_the_first_end_of_text(captions: list[tuple[int, int]], pad: int) -> None:
    """Whatever is used for padding: a token of its own, "!" (id 0) or the end of text again."""
    eot = 2 if pad != 49407 else 49407
    length = 2 + max(words + padding for words, padding in captions)
    rows = [[1, *[5] * words, eot] + [pad] * (length - words - 2) for words, _ in captions]
    expected = [[i < words + 2 for i in range(length)] for words, _ in captions]
    assert text_mask(torch.tensor(rows), eot_id=eot).tolist() == expected


@pytest.mark.parametrize("pad", [0, 2, 7])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_of_any_kind_changes_no_embedding(pad: int, mask_padding: bool) -> None:
    model = tiny(mask_padding=mask_padding)
    padded = torch.where(text_mask(TOKENS, eot_id=2), TOKENS, pad)
    torch.testing.assert_close(model.encode_text(padded)[0], model.encode_text(TOKENS)[0])
    assert model.text_mask(padded).tolist() == (TOKENS != 0).tolist()


def test_padding_that_would_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_padding is off and causal_text too"):
        CLIPConfig(causal_text=False, mask_padding=False)


def test_openais_pixels_are_standardized_by_channel() -> None:
    """(x - mean) / std of x in [0, 1], as their preprocessing says, of what we are given in [-1, 1]."""
    model, plain = tiny(PUBLISHED), tiny(PUBLISHED, pixels="signed")
    zero_to_one = torch.rand(2, 3, 16, 16)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(
        model.encode_image(2 * zero_to_one - 1), plain.encode_image((zero_to_one - mean) / std), atol=1e-5, rtol=1e-4
    )
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("cfg", [TINY, PUBLISHED])
def test_dropped_patches_are_not_looked_at(cfg: CLIPConfig) -> None:
    model = tiny(cfg)
    images = torch.randn(2, 3, 16, 16)
    kept = torch.tensor([[3, 0], [1, 2]])
    embed = model.encode_image(images, patches_BK=kept)
    torch.testing.assert_close(model.encode_image(images, patches_BK=kept.flip(1)), embed)
    changed = images.clone()
    changed[0, :, :8, 8:] += 1  # patch 1 of the first image, which was dropped
    changed[1, :, 8:, 8:] += 1  # patch 3 of the second
    torch.testing.assert_close(model.encode_image(changed, patches_BK=kept), embed)
    assert not torch.allclose(model.encode_image(changed), model.encode_image(images))
    everything = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    torch.testing.assert_close(model.encode_image(images, patches_BK=everything), model.encode_image(images))


def test_patches_are_dropped_at_random_by_the_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        return keep_patches(torch.empty(2000, 1), patches=10, drop=0.7, generator=torch.Generator().manual_seed(seed))

    kept = draw(0)
    assert kept.shape == (2000, 3) and torch.equal(kept, draw(0)) and not torch.equal(kept, draw(1))
    assert all(len(set(row)) == 3 for row in kept.tolist())
    shares = torch.bincount(kept.flatten(), minlength=10) / 2000
    assert shares.tolist() == pytest.approx([0.3] * 10, abs=5 * (0.3 * 0.7 / 2000) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    assert keep_patches(torch.empty(3, 1), patches=4, drop=0.99, generator=generator).shape == (3, 1), (
        "one is always kept"
    )


def count(name: str) -> int:
    cfg = parse(CLIPConfig, load(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = CLIP(cfg, vocab_size=49408, context_length=77, eot_id=49407)
        embeds = model(torch.empty(2, 3, cfg.image_size, cfg.image_size), torch.zeros(2, 77, dtype=torch.long))
        assert [embed.shape for embed in embeds] == [(2, cfg.embed_dim)] * 2
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit-s-32", 63_085_825), ("vit-b-32", 151_277_313), ("vit-b-16", 149_620_737), ("vit-l-14", 427_616_513)],
)
def test_published_sizes_have_the_published_parameters(name: str, parameters: int) -> None:
    """As open_clip counts its models of these names, and their comments say."""
    assert count(name) == parameters
    assert f"{parameters:,} parameters" in (CONFIGS / f"{name}.yaml").read_text()
