"""The diffusion prior: masks, dropped captions, sizes, and diffusers' PriorTransformer as the reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from genpipe.config import load
from genpipe.models.autoregressive_prior import AutoregressivePriorConfig
from genpipe.models.interop.prior import (
    config_from_diffusers,
    config_to_diffusers,
    embed_statistics,
    from_diffusers,
    to_diffusers,
)
from genpipe.models.prior import DiffusionPrior, DiffusionPriorConfig, PriorConfig, build_prior
from genpipe.models.prior_conditioning import Caption, causal_mask, drop_captions

os.environ |= {"HF_HUB_OFFLINE": "1"}

B, L, D, W = 4, 5, 8, 12
SMALL = DiffusionPriorConfig(width=32, depth=2, heads=2)
LENGTHS = torch.tensor([2, 5, 3, 4])
TEXT_MASK = torch.arange(L) < LENGTHS[:, None]
KEEP, DROP = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)


def published(name: str) -> Any:
    """The config of configs/model/prior."""
    values = load(Path(__file__).parents[2] / f"configs/model/prior/{name}.yaml").values
    return TypeAdapter(PriorConfig).validate_python(values)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prior(**settings: Any) -> DiffusionPrior:
    torch.manual_seed(0)
    cfg = DiffusionPriorConfig.model_validate(SMALL.model_dump() | settings)
    model = DiffusionPrior(cfg, embed_dim=D, text_width=W, null_tokens=2)
    if cfg.null_text == "encoder":
        model.null_encoding_W.copy_(randn(2, W, seed=20))
        model.null_text_D.copy_(randn(D, seed=21))
    return model


DETAILS = [
    {},
    {"text_positions": 7, "time_frequencies": 32, "qk_norm": False, "null_text": "encoder"},
    {"text_tokens": False},
]


def run(model: DiffusionPrior, **changes: Tensor) -> Tensor:
    inputs = {
        "t": torch.linspace(0, 1, B),
        "text_embed": randn(B, D, seed=2),
        "text_encodings": randn(B, L, W, seed=1),
        "text_mask": TEXT_MASK,
        "drop_text": KEEP,
    } | changes
    return model(inputs.pop("noised_embed", randn(B, D)), **inputs)


def test_who_may_look_at_whom() -> None:
    """Every pair, by the sentence: a token sees itself, and what precedes it unless that is padding."""
    mask = causal_mask(TEXT_MASK, extra=3)
    assert mask.shape == (B, 1, L + 3, L + 3)
    for b, length in enumerate(LENGTHS.tolist()):
        for query in range(L + 3):
            for key in range(L + 3):
                padding = length <= key < L
                assert mask[b, 0, query, key] == (key == query or (key < query and not padding))


@pytest.mark.parametrize("details", DETAILS)
def test_prior_ignores_padding_and_reads_the_rest(details: dict[str, Any]) -> None:
    model = prior(**details)
    out = run(model)
    assert out.shape == (B, D) and out.dtype == torch.float32
    other_tokens = run(model, text_encodings=randn(B, L, W, seed=3), text_mask=~TEXT_MASK)
    assert torch.equal(other_tokens, out) != model.cfg.text_tokens
    noise = randn(B, L, W, seed=3)
    only_padding = torch.where(TEXT_MASK[..., None], randn(B, L, W, seed=1), noise)
    torch.testing.assert_close(run(model, text_encodings=only_padding), out)
    for changed in (
        *([{"text_encodings": noise}] if model.cfg.text_tokens else []),
        {"text_embed": randn(B, D, seed=4)},
        {"noised_embed": randn(B, D, seed=5)},
        {"t": torch.full((B,), 0.4)},
    ):
        assert not torch.isclose(run(model, **changed), out).all(1).any()


@pytest.mark.parametrize("details", DETAILS)
def test_more_padding_changes_nothing(details: dict[str, Any]) -> None:
    """Batches are cut to their longest caption; what follows the text must not notice."""
    model, encodings = prior(**details), randn(B, L, W, seed=1)
    longer = {
        "text_encodings": torch.cat([encodings, randn(B, 2, W, seed=8)], dim=1),
        "text_mask": torch.cat([TEXT_MASK, torch.zeros(B, 2, dtype=torch.bool)], dim=1),
    }
    for drop in (KEEP, DROP):
        torch.testing.assert_close(run(model, drop_text=drop, **longer), run(model, drop_text=drop))


@pytest.mark.parametrize("details", DETAILS)
def test_prior_without_its_text_does_not_depend_on_it(details: dict[str, Any]) -> None:
    """The text alone is dropped: the noised embedding and the time are read as before."""
    model = prior(**details)
    out = run(model, drop_text=DROP)
    other = {"text_encodings": randn(B, L, W, seed=3), "text_embed": randn(B, D, seed=4)}
    torch.testing.assert_close(run(model, drop_text=DROP, **other), out)
    torch.testing.assert_close(run(model, drop_text=DROP, text_mask=~TEXT_MASK), out)
    for changed in ({"noised_embed": randn(B, D, seed=5)}, {"t": torch.full((B,), 0.4)}):
        assert not torch.isclose(run(model, drop_text=DROP, **changed), out).all(1).any()


def test_captions_are_dropped_one_by_one() -> None:
    model, some = prior(), torch.tensor([True, False, True, False])
    mixed = run(model, drop_text=some)
    torch.testing.assert_close(mixed, torch.where(some[:, None], run(model, drop_text=DROP), run(model)))


def test_the_encoders_null_caption_is_the_empty_caption() -> None:
    """Dropping is the same as having been given the empty caption's encodings, padded, and its embed."""
    model = prior(null_text="encoder")
    empty = torch.cat([model.null_encoding_W, randn(L - 2, W, seed=9)])[None].expand(B, -1, -1)
    given = run(
        model,
        text_encodings=empty,
        text_embed=model.null_text_D.expand(B, -1),
        text_mask=(torch.arange(L) < 2).expand(B, -1),
    )
    torch.testing.assert_close(run(model, drop_text=DROP), given)
    assert {"null_encoding_W", "null_text_D"} <= model.state_dict().keys()
    assert not {"null_encoding_W", "null_text_D"} & {name for name, _ in model.named_parameters()}


def test_a_prior_that_reads_no_tokens_has_nothing_for_them() -> None:
    model, whole = prior(text_tokens=False), prior()
    missing = whole.state_dict().keys() - model.state_dict().keys()
    assert missing == {"encodings_in.weight", "encodings_in.bias", "null_encoding_W"}
    with pytest.raises(ValidationError, match="text_positions has no effect"):
        DiffusionPriorConfig(text_tokens=False, text_positions=7)


def test_a_learned_null_caption_is_one_token() -> None:
    caption = Caption(randn(B, D), randn(B, L, W), TEXT_MASK)
    null = drop_captions(caption, DROP, null_encodings=randn(W, seed=1), null_embed=randn(D, seed=2))
    assert null.text_mask.sum(1).tolist() == [1] * B
    assert torch.equal(null.encodings[:, 0], randn(W, seed=1).expand(B, W))
    assert torch.equal(null.embed, randn(D, seed=2).expand(B, D))


@pytest.mark.parametrize("details", DETAILS)
@pytest.mark.parametrize("drop_text", [KEEP, DROP])
def test_every_parameter_has_a_gradient_whatever_is_dropped(details: dict[str, Any], drop_text: Tensor) -> None:
    model = prior(**details)
    run(model, drop_text=drop_text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("details", DETAILS)
def test_prior_overfits_one_batch(details: dict[str, Any]) -> None:
    model, goal = prior(**details), randn(B, D, seed=9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (run(model) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_block_without_a_kind_is_the_diffusion_prior() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(PriorConfig)
    assert adapter.validate_python({"width": 64}) == DiffusionPriorConfig(width=64)
    assert adapter.validate_python({"kind": "autoregressive", "depth": 2}) == AutoregressivePriorConfig(depth=2)
    with pytest.raises(ValidationError, match="multiple of 2"):
        adapter.validate_python({"time_frequencies": 31})


def transformer(**settings: Any) -> Any:
    """diffusers' prior with random weights, those included that it starts at zero."""
    from diffusers import PriorTransformer

    torch.manual_seed(1)
    model = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=D, num_embeddings=L, **settings
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    return model.eval()


def test_the_same_function_as_prior_transformer() -> None:
    reference = transformer()
    cfg = config_from_diffusers(dict(reference.config))
    model = DiffusionPrior(cfg, embed_dim=D, text_width=D, null_tokens=2)
    model.load_state_dict({**model.state_dict(), **from_diffusers(reference.state_dict(), cfg)})
    x, text_embed, encodings = randn(B, D), randn(B, D, seed=2), randn(B, L, D, seed=1)
    timestep = torch.tensor([0, 17, 500, 999])
    with torch.no_grad():
        expected = reference(x, timestep, text_embed, encodings, TEXT_MASK).predicted_image_embedding
        changes = {"text_embed": text_embed, "text_encodings": encodings, "noised_embed": x}
        found = run(model, t=timestep / 1000, **changes)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        cut = {**changes, "text_encodings": encodings[:, : LENGTHS.max() - 1], "text_mask": TEXT_MASK[:, :-1]}
        rows = LENGTHS < L
        torch.testing.assert_close(run(model, t=timestep / 1000, **cut)[rows], expected[rows], atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > 0.01, "inputs matter"


def test_prior_transformers_weights_go_and_come_back() -> None:
    theirs = transformer().state_dict()
    cfg = config_from_diffusers(dict(transformer().config))
    mean, std = embed_statistics(theirs)
    assert torch.equal(mean, theirs["clip_mean"][0]) and torch.equal(std, theirs["clip_std"][0])
    back = to_diffusers(from_diffusers(theirs, cfg), cfg, mean=mean, std=std)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_the_written_config_makes_the_transformer_that_was_read() -> None:
    theirs = transformer()
    written = config_to_diffusers(config_from_diffusers(dict(theirs.config)), embed_dim=D, text_width=D)
    assert written.pop("_class_name") == "PriorTransformer"
    assert written.items() <= dict(theirs.config).items()
    type(theirs)(**written).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"8 and 12 wide"):
        config_to_diffusers(config_from_diffusers(dict(theirs.config)), embed_dim=D, text_width=W)
    with pytest.raises(ValueError, match="cannot be written as one"):
        config_to_diffusers(SMALL, embed_dim=D, text_width=D)


def test_weights_that_do_not_fit_are_refused() -> None:
    theirs, cfg = transformer().state_dict(), config_from_diffusers(dict(transformer().config))
    with pytest.raises(ValueError, match=r"no place here: norm_in\.weight"):
        from_diffusers({**theirs, "norm_in.weight": randn(32)}, cfg)
    lacking = {name: tensor for name, tensor in theirs.items() if name != "prd_embedding"}
    with pytest.raises(ValueError, match="lack prd_embedding"):
        from_diffusers(lacking, cfg)
    with pytest.raises(ValueError, match=r"set model\.qk_norm to false"):
        from_diffusers(theirs, cfg.model_copy(update={"qk_norm": True}))
    with pytest.raises(ValueError, match="cannot be written as one"):
        to_diffusers(prior().state_dict(), SMALL, mean=randn(D), std=randn(D))
    for settings in ({"norm_in_type": "layer"}, {"added_emb_type": None}, {"time_embed_dim": 64}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            config_from_diffusers(dict(transformer().config) | settings)


def test_karlos_prior_counts_as_diffusers_counts_it() -> None:
    """To the last one; the mean and deviation of the embeddings are parameters there, and in the manifest here."""
    from diffusers import PriorTransformer

    with torch.device("meta"):
        reference = PriorTransformer(embedding_dim=768, num_embeddings=77, additional_embeddings=4)
        model = build_prior(published("karlo"), embed_dim=768, text_width=768, null_tokens=2)
    assert config_from_diffusers(dict(reference.config)) == published("karlo")
    expected = sum(p.numel() for p in reference.parameters())
    assert expected == 1_022_030_080
    assert sum(p.numel() for p in model.parameters()) + 2 * 768 == expected


def test_the_autoregressive_prior_is_the_decoder_of_table_3() -> None:
    """Ramesh et al. 2022: 24 layers of 1,664 with 26 heads on 319 components; their 1 B count a text encoder, too."""
    cfg = published("autoregressive-1b")
    assert (cfg.width, cfg.depth, cfg.heads) == (1664, 24, 26)
    with torch.device("meta"):
        model = build_prior(cfg, embed_dim=1024, text_width=2048, components=319)
    blocks = 24 * 12 * 1664**2
    assert blocks < sum(p.numel() for p in model.parameters()) < 1.02 * blocks
