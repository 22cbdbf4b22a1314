"""The decoder over both denoisers: its conditions and their nulls, its published sizes, and that it learns."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.decoder import Decoder, DecoderConfig, TextTransformerConfig
from genpipe.models.dit import DiTConfig
from genpipe.models.unet import UNetConfig

B, L, N, D, W, K = 4, 5, 2, 8, 12, 3
LENGTHS = torch.tensor([2, 5, 3, 4])
TEXT_MASK = torch.arange(L) < LENGTHS[:, None]
KEEP, DROP = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)

DIT = DiTConfig(patch_size=2, width=32, depth=2, heads=2)
UNET = UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention_at=(2,), head_width=16, groups=8)
LATENT = UNET.model_copy(update={"attention": "transformer", "modulation": "add", "resample": "conv"})
CONFIGS = {
    "dit": DecoderConfig(denoiser=DIT, embed_tokens=2),
    "dit_cross": DecoderConfig(denoiser=DIT.model_copy(update={"context": "cross"}), null_text="encoder"),
    "dit_joint": DecoderConfig(denoiser=DIT.model_copy(update={"context": "joint"})),
    "glide": DecoderConfig(denoiser=UNET, text_transformer=TextTransformerConfig(width=16, depth=1, heads=2)),
    "ldm": DecoderConfig(
        denoiser=LATENT,
        text_transformer=TextTransformerConfig(
            width=16, depth=1, heads=3, head_width=8, qk_norm=False, qkv_bias=False, pooled=False
        ),
        image_embed=False,
    ),
    "latent": DecoderConfig(denoiser=LATENT, image_embed=False, null_text="encoder"),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wake(model: nn.Module) -> None:
    """Give what is zero at the start values, so that outputs depend on everything that they can depend on."""
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.any():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=gen))


def build(cfg: DecoderConfig, *, channels: int = 3) -> Decoder:
    torch.manual_seed(0)
    return Decoder(cfg, latent_channels=channels, embed_dim=D, text_width=W, null_tokens=N)


def awake(name: str) -> Decoder:
    model = build(CONFIGS[name])
    wake(model)
    return model


def run(model: Decoder, **changes: Tensor | None) -> Tensor:
    inputs: dict[str, Tensor | None] = {
        "image_embed": randn(B, D, seed=2),
        "text_encodings": randn(B, L, W, seed=1),
        "text_mask": TEXT_MASK,
        "drop_image": KEEP,
        "drop_text": KEEP,
    }
    return model(randn(B, 3, 4, 4), torch.linspace(0.1, 0.9, B), **inputs | changes)


def unchanged(one: Tensor, other: Tensor) -> Tensor:
    """Which samples are the same: bool [B]."""
    return torch.isclose(one, other, atol=1e-6).flatten(1).all(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_image_and_text_are_dropped_independently(name: str) -> None:
    model = awake(name)
    half = torch.tensor([True, False, True, False])
    for drop_image in (KEEP, DROP, half):
        for drop_text in (KEEP, DROP, half):
            drops = {"drop_image": drop_image, "drop_text": drop_text}
            out = run(model, **drops)
            assert out.shape == (B, 3, 4, 4) and out.dtype == torch.float32
            unseen = drop_image if CONFIGS[name].image_embed else DROP
            assert torch.equal(unchanged(run(model, **drops, image_embed=randn(B, D, seed=3)), out), unseen)
            assert torch.equal(unchanged(run(model, **drops, text_encodings=randn(B, L, W, seed=4)), out), drop_text)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_ignores_padding_and_the_length_of_a_dropped_caption(name: str) -> None:
    model = awake(name)
    only_padding = torch.where(TEXT_MASK[..., None], randn(B, L, W, seed=1), randn(B, L, W, seed=4))
    torch.testing.assert_close(run(model, text_encodings=only_padding), run(model))
    shorter = torch.arange(L) < 1
    torch.testing.assert_close(run(model, drop_text=DROP, text_mask=shorter.expand(B, L)), run(model, drop_text=DROP))


@pytest.mark.parametrize("name", ["dit_cross", "latent"])
def test_a_caption_dropped_for_the_encoders_null_text_is_that_text(name: str) -> None:
    model = awake(name)
    empty = torch.zeros(B, L, W)
    empty[:, :N] = model.null_encoding_W
    spoken = run(model, text_encodings=empty, text_mask=(torch.arange(L) < N).expand(B, L))
    torch.testing.assert_close(run(model, drop_text=DROP), spoken)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_starts_at_zero(name: str) -> None:
    assert not run(build(CONFIGS[name])).any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("drop_image", "drop_text"), [(KEEP, KEEP), (DROP, DROP), (KEEP, DROP)])
def test_every_parameter_has_a_gradient_whatever_is_dropped(name: str, drop_image: Tensor, drop_text: Tensor) -> None:
    model = awake(name)
    run(model, drop_image=drop_image, drop_text=drop_text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if not drop_image.any() and not drop_text.any():
        silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
        assert silent <= {"null_image_D", "null_encoding_W"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_learns_eight_samples_by_their_conditions(name: str) -> None:
    """From noise alone, which is new in every step: only what it is told can say which of the eight it is."""
    model, generator = build(CONFIGS[name]), torch.Generator().manual_seed(0)
    goal = randn(8, 3, 4, 4, seed=9)
    given = {
        "image_embed": randn(8, D, seed=2),
        "text_encodings": randn(8, L, W, seed=1),
        "text_mask": torch.ones(8, L, dtype=torch.bool),
        "drop_image": torch.zeros(8, dtype=torch.bool),
        "drop_text": torch.zeros(8, dtype=torch.bool),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        noise = torch.randn(goal.shape, generator=generator)
        loss = (model(noise, torch.ones(8), **given) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * goal.square().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_runs_in_bf16(name: str) -> None:
    model = awake(name)
    exact = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(model)
    out.square().mean().backward()
    assert out.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())
    assert (out - exact).square().mean() < 1e-3 * exact.square().mean()


def parameters(cfg: DecoderConfig, **sizes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(cfg, **sizes).parameters())


LATENT_DIFFUSION = UNetConfig(
    width=320,
    multipliers=(1, 2, 4, 4),
    attention_at=(1, 2, 4),
    attention="transformer",
    heads=8,
    modulation="add",
    resample="conv",
)
"""The U-Net of Rombach et al. 2022 for text, and of Stable Diffusion 1."""


def test_latent_diffusion_is_stable_diffusions_unet_and_nothing_more() -> None:
    cfg = DecoderConfig(denoiser=LATENT_DIFFUSION, image_embed=False, null_text="encoder")
    assert parameters(cfg, latent_channels=4, embed_dim=768, text_width=768) == 859_520_964


def test_latent_diffusions_text_to_image_model_has_its_published_size() -> None:
    """Rombach et al. 2022, tables 2 and 17: 1.45 B; the U-Net is the 872.30 M that its code prints.

    Its text transformer has, beside what ours has, a table of 30,522 tokens, 77 positions, and an output layer of as
    many tokens that nothing reads; ours has a projection of the encodings that it is given instead.
    """
    text = TextTransformerConfig(
        width=1280, depth=32, heads=8, head_width=64, qk_norm=False, qkv_bias=False, pooled=False
    )
    with torch.device("meta"):
        cfg = DecoderConfig(denoiser=LATENT_DIFFUSION, text_transformer=text, image_embed=False)
        model = Decoder(cfg, latent_channels=4, text_width=512)
    assert model.text_transformer is not None
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["denoiser"] == pytest.approx(872.30e6, abs=5e3)
    layer = 3 * 1280 * 512 + 512 * 1280 + 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 2 * 2 * 1280
    assert count["text_transformer"] == 32 * layer + 2 * 1280 + (512 * 1280 + 1280)
    theirs = 32 * layer + 2 * 1280 + 30_522 * 1280 + 77 * 1280 + (30_522 * 1280 + 30_522)
    assert theirs == pytest.approx(582e6, abs=0.5e6)
    assert theirs + count["denoiser"] == pytest.approx(1.45e9, abs=0.005e9)


def test_unclips_decoder_has_its_published_size() -> None:
    """Ramesh et al. 2022, table 3: 3.5 B with the text encoder of width 2048 and depth 24."""
    unet = UNetConfig(width=512, multipliers=(1, 2, 3, 4), blocks=3, attention_at=(2, 4, 8))
    cfg = DecoderConfig(denoiser=unet, text_transformer=TextTransformerConfig(width=2048, depth=24, heads=32))
    count = parameters(cfg, latent_channels=3, embed_dim=768, text_width=768, out_channels=6)
    assert count == pytest.approx(3.5e9, rel=0.1)


def test_a_learned_variance_takes_as_many_channels_more() -> None:
    with torch.device("meta"):
        model = Decoder(CONFIGS["glide"], latent_channels=3, embed_dim=D, text_width=W, out_channels=6)
        wide = model(
            torch.zeros(B, 3, 4, 4),
            torch.zeros(B),
            image_embed=torch.zeros(B, D),
            text_encodings=torch.zeros(B, L, W),
            text_mask=torch.zeros(B, L, dtype=torch.bool),
            drop_image=torch.zeros(B, dtype=torch.bool),
            drop_text=torch.zeros(B, dtype=torch.bool),
        )
    assert wide.shape == (B, 6, 4, 4)


def test_conditions_that_do_not_fit_the_network_are_refused() -> None:
    blind = DecoderConfig(denoiser=UNetConfig(attention_at=()))
    for sizes in ({"text_width": W}, {"embed_dim": D}):
        with pytest.raises(ValueError, match=r"denoiser\.attention_at is empty"):
            Decoder(blind, latent_channels=3, **sizes)
    with pytest.raises(ValueError, match=r"denoiser\.attention is transformer.*plain"):
        Decoder(CONFIGS["latent"], latent_channels=3, classes=K)
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 3; change one, or set head_width"):
        TextTransformerConfig(width=10, depth=1, heads=3)
    with pytest.raises(ValueError, match="text_transformer"):
        Decoder(CONFIGS["glide"], latent_channels=3, embed_dim=D)


# Class labels, and every subset of the conditions.

DENOISERS = {"dit": DIT, "dit_cross": DIT.model_copy(update={"context": "cross"}), "unet": UNET}
SIZES = {"embed_dim": D, "text_width": W, "classes": K}
SUBSETS = [dict(chosen) for size in range(4) for chosen in itertools.combinations(SIZES.items(), size)]
LABELS = torch.tensor([0, 2, 2, 1])
BELONGS = {
    "embed_dim": {"image_embed", "drop_image"},
    "text_width": {"text_encodings", "text_mask", "drop_text"},
    "classes": {"labels", "drop_label"},
}


def conditional(denoiser: str, sizes: dict[str, int]) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(denoiser=DENOISERS[denoiser]), latent_channels=3, **sizes)
    wake(model)
    return model


def run_labeled(model: Decoder, **changes: Tensor | None) -> Tensor:
    return run(model, **{"labels": LABELS, "drop_label": KEEP} | changes)


@pytest.mark.parametrize("sizes", SUBSETS, ids=lambda sizes: "+".join(sizes) or "unconditional")
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_a_decoder_has_and_reads_only_the_conditions_it_is_built_with(denoiser: str, sizes: dict[str, int]) -> None:
    model = conditional(denoiser, sizes)
    absent: dict[str, Tensor | None] = {name: None for key in SIZES.keys() - sizes.keys() for name in BELONGS[key]}
    out = run_labeled(model, **absent)
    assert out.shape == (B, 3, 4, 4)
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert silent <= {"null_image_D", "null_encoding_W"}
    changed = {
        "embed_dim": run_labeled(model, **absent | {"image_embed": randn(B, D, seed=3)}),
        "text_width": run_labeled(model, **absent | {"text_encodings": randn(B, L, W, seed=4)}),
        "classes": run_labeled(model, **absent | {"labels": (LABELS + 1) % K}),
    }
    for key, other in changed.items():
        assert torch.equal(unchanged(other, out), KEEP if key in sizes else DROP)
    names = {name for name, _ in model.named_parameters()}
    assert ("tokens_in.weight" in names) == ("null_image_D" in names) == ("embed_dim" in sizes)
    assert ("null_encoding_W" in names) == ("text_width" in sizes)
    assert ("denoiser.labels_in.weight" in names) == ("classes" in sizes)
    assert any("context" in name or "cross" in name for name in names) == bool(sizes.keys() - {"classes"})


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_a_dropped_label_is_the_null_class(denoiser: str) -> None:
    """The label K, one past the last, is the null class; samples whose label is dropped are alike in nothing else."""
    model = conditional(denoiser, {"classes": K})
    half = torch.tensor([True, False, True, False])
    out = run_labeled(model, drop_label=half)
    torch.testing.assert_close(out, run_labeled(model, labels=torch.where(half, K, LABELS)))
    assert torch.equal(unchanged(out, run_labeled(model)), ~half)
    assert torch.equal(unchanged(out, run_labeled(model, drop_label=half, labels=(LABELS + 1) % K)), half)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_labels_enter_as_the_time_does(denoiser: str) -> None:
    """Added to the time's embedding (Dhariwal & Nichol 2021): moving a constant from one to the other is no change."""
    model = conditional(denoiser, {"classes": K})
    out = run_labeled(model)
    with torch.no_grad():
        model.denoiser.labels_in.weight += 0.5
        model.denoiser.time_in.down.bias -= 0.5
    torch.testing.assert_close(run_labeled(model), out, atol=1e-5, rtol=1e-5)


def test_a_class_adds_one_row_to_the_label_table() -> None:
    cfg = DecoderConfig(denoiser=DIT)
    ten, eleven = (parameters(cfg, latent_channels=3, classes=classes) for classes in (10, 11))
    assert eleven - ten == DIT.width
    assert ten - parameters(cfg, latent_channels=3) == 11 * DIT.width
