"""Weights of transformers, OpenAI and open_clip in our CLIP: the same embeddings and text states, and back again."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from genpipe.models.clip import CLIP, OPENAI_MEAN, OPENAI_STD, CLIPConfig
from genpipe.models.contrastive import SigmoidLoss
from genpipe.models.interop import clip as foreign

EOT, VOCABULARY = 98, 99
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 120,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 12,
    "eos_token_id": EOT,
    "bos_token_id": 97,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "image_size": 32,
    "patch_size": 8,
}
LARGE = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


def tokens(*, pad: int) -> Tensor:
    rows = [[97, 5, 6, 7, EOT], [97, EOT], [97, 0, 0, 3, 1, 2, 9, 9, 9, 9, 4, EOT], [97, 8, EOT]]
    return torch.tensor([row + [pad] * (12 - len(row)) for row in rows])


def images(size: int = 32) -> tuple[Tensor, Tensor]:
    """In [-1, 1], and as the other libraries' preprocessing gives them."""
    zero_to_one = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    return 2 * zero_to_one - 1, (zero_to_one - mean) / std


def shaken(module: nn.Module) -> nn.Module:
    """With random numbers everywhere, biases and gains too, which libraries start at 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def clip_model(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPModel

    return CLIPModel(TheirConfig(**config))


def loaded(cfg: CLIPConfig, sizes: dict[str, int], state: dict[str, Tensor]) -> CLIP:
    model = CLIP(cfg, **sizes).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("pad", [0, EOT])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_weights_give_the_same_embeddings_and_states(activation: str, pad: int) -> None:
    torch.manual_seed(0)
    text, vision = TEXT | {"hidden_act": activation}, VISION | {"hidden_act": activation, "layer_norm_eps": 0.1}
    theirs = shaken(clip_model({"projection_dim": 24, "text_config": text, "vision_config": vision}))
    cfg, sizes = foreign.config_from_transformers(theirs.config.to_dict())
    assert sizes == {"vocab_size": VOCABULARY, "context_length": 12, "eot_id": EOT}
    ours = loaded(cfg, sizes, foreign.from_transformers(theirs.state_dict(), cfg))
    signed, standardized = images()
    with torch.no_grad():
        expected = theirs(input_ids=tokens(pad=pad), pixel_values=standardized)
        image_embed, (text_embed, states) = ours.encode_image(signed), ours.encode_text(tokens(pad=pad))
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(image_embed, expected.image_embeds, **close)
    torch.testing.assert_close(text_embed, expected.text_embeds, **close)
    torch.testing.assert_close(states, expected.text_model_output.last_hidden_state, **close)
    logits = ours.logit_scale.exp() * image_embed @ text_embed.T
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-3, rtol=1e-4)
    loss = clip_loss(expected.logits_per_image)
    torch.testing.assert_close(ours.loss(image_embed, text_embed), loss, **close)


def clip_loss(logits: Tensor) -> Tensor:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    return image_text_contrastive_loss(logits)


def test_what_goes_to_transformers_comes_back_and_runs_there() -> None:
    torch.manual_seed(0)
    config = {"projection_dim": 24, "text_config": TEXT, "vision_config": VISION}
    theirs = shaken(clip_model(config))
    cfg, sizes = foreign.config_from_transformers(theirs.config.to_dict())
    ours = foreign.from_transformers(theirs.state_dict(), cfg)
    again = foreign.to_transformers(ours, cfg)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) and again[name].is_contiguous() for name, tensor in
               theirs.state_dict().items())  # fmt: skip
    other = clip_model(foreign.config_to_transformers(cfg, sizes)).eval()
    other.load_state_dict(again)
    inputs = {"input_ids": tokens(pad=0), "pixel_values": images()[1]}
    with torch.no_grad():
        for name in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(other(**inputs)[name], theirs(**inputs)[name])
    assert foreign.config_from_transformers(other.config.to_dict()) == (cfg, sizes)


@pytest.mark.parametrize(("config", "parameters"), [({}, 151_277_313), (LARGE, 427_616_513)])
def test_published_sizes_on_the_meta_device(config: dict[str, Any], parameters: int) -> None:
    """ViT-B/32 is transformers' default; tensors of either fit the other, name by name."""
    with torch.device("meta"):
        theirs = clip_model(config)
        cfg, sizes = foreign.config_from_transformers(config)
        assert foreign.config_from_transformers(theirs.config.to_dict()) == (cfg, sizes)
        ours = CLIP(cfg, **sizes)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) == parameters
    converted = foreign.from_transformers(theirs.state_dict(), cfg)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_the_first_configurations_of_transformers_say_2_for_the_largest_id() -> None:
    """openai/clip-vit-base-patch32's config.json: eos_token_id 2, where the end of text is 49407."""
    assert foreign.config_from_transformers({"text_config": {"eos_token_id": 2}})[1]["eot_id"] == 49407
    nested = {"text_config": None, "text_config_dict": {"eos_token_id": 7}}
    assert foreign.config_from_transformers(nested)[1]["eot_id"] == 7


@given(st.integers(1, 3000), st.integers(1, 9000))
def test_any_hidden_width_survives_being_a_ratio(quarter: int, hidden: int) -> None:
    config = {"text_config": {"hidden_size": 4 * quarter, "num_attention_heads": 4, "intermediate_size": hidden}}
    assert foreign.config_to_transformers(*foreign.config_from_transformers(config))["text_config"][
        "intermediate_size"
    ] == hidden  # fmt: skip


# --- OpenAI ---


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """ResidualAttentionBlock of openai/CLIP's model.py, names and all."""

    def __init__(self, width: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", activation()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, embed_dim: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 2, width // 64, activation)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAI(nn.Module):
    """openai/CLIP's model.py with a vision transformer, in fp32; open_clip's CLIP has the same names."""

    def __init__(self, activation: type[nn.Module] = QuickGelu) -> None:
        super().__init__()
        self.visual = Visual(32, 8, 128, 24, activation)
        self.transformer = Transformer(64, 3, 1, activation)
        self.token_embedding = nn.Embedding(VOCABULARY, 64)
        self.positional_embedding = nn.Parameter(torch.randn(12, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 24))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def initialize_parameters(self) -> None:
        """Of the text tower; what it does not name is as torch makes it."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, blocks = 64, self.transformer.resblocks
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.full((12, 12), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(text) + self.positional_embedding, mask)
        x = self.ln_final(x)
        return x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection, x


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 3},
}


@pytest.mark.parametrize("library", ["openai", "open_clip"])
def test_openai_weights_give_the_same_embeddings_and_states(library: str) -> None:
    """OpenAI says what its models are by their shapes, open_clip in a config."""
    torch.manual_seed(0)
    theirs = shaken(OpenAI(QuickGelu if library == "openai" else nn.GELU))
    state = theirs.state_dict()
    read = foreign.config_from_openai(state) if library == "openai" else foreign.config_from_open_clip(OPEN_CLIP)
    ours = loaded(*read, foreign.from_openai(state, read[0]))
    signed, standardized = images()
    with torch.no_grad():
        feature, states = theirs.encode_text(tokens(pad=0))
        text_embed, encodings = ours.encode_text(tokens(pad=0))
        expected = F.normalize(theirs.visual(standardized), dim=-1)
        torch.testing.assert_close(ours.encode_image(signed), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text_embed, F.normalize(feature, dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encodings, states, atol=1e-4, rtol=1e-4)
    again = foreign.to_openai(ours.state_dict(), read[0])
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) and again[name].is_contiguous() for name, tensor in state.items())
    assert foreign.config_from_open_clip(foreign.config_to_open_clip(*read)) == read


def test_fresh_weights_are_drawn_as_openais() -> None:
    """Tensor by tensor: deviations within five standard errors, zeros where theirs are zeros, the same scale."""
    torch.manual_seed(0)
    theirs = OpenAI()
    theirs.initialize_parameters()
    cfg, sizes = foreign.config_from_openai(theirs.state_dict())
    expected = foreign.from_openai(theirs.state_dict(), cfg)
    for name, found in CLIP(cfg, **sizes).state_dict().items():
        their_std, std = expected[name].std(correction=0), found.std(correction=0)
        assert abs(std - their_std) <= 5 * their_std / found.numel() ** 0.5, name
        assert found.mean().item() == pytest.approx(expected[name].mean().item(), abs=0.1), name


def test_half_precision_and_untrained_entries_of_openais_archives() -> None:
    state = {name: tensor.half() for name, tensor in OpenAI().state_dict().items()}
    cfg, _ = foreign.config_from_openai(state)
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(99)}
    ours = foreign.from_openai(state | sizes, cfg)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in ours.values())
    assert ours.keys() == foreign.from_openai(state, cfg).keys()


def test_keys_that_are_missing_or_left_over_are_named() -> None:
    state = dict(OpenAI().state_dict())
    cfg, _ = foreign.config_from_openai(state)
    with pytest.raises(ValueError, match=r"visual\.adapter\.weight"):
        foreign.from_openai(state | {"visual.adapter.weight": torch.zeros(1)}, cfg)
    del state["ln_final.bias"], state["visual.ln_pre.weight"]
    with pytest.raises(ValueError, match=r"ln_final\.bias, visual\.ln_pre\.weight"):
        foreign.from_openai(state, cfg)
    with pytest.raises(ValueError, match=r"visual\.proj is missing"):
        foreign.config_from_openai({"visual.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"custom_text": True}, "custom_text"),
        ({"vision_cfg": {**OPEN_CLIP["vision_cfg"], "timm_model_name": "vit"}}, "timm_model_name"),
        ({"text_cfg": {**OPEN_CLIP["text_cfg"], "hf_model_name": "roberta", "no_causal_mask": True}},
         "hf_model_name, no_causal_mask"),
    ],
)  # fmt: skip
def test_other_models_of_open_clip_are_refused(config: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"open_clip's {names}: no setting"):
        foreign.config_from_open_clip(OPEN_CLIP | config)


def test_models_that_the_others_cannot_hold_are_not_exported() -> None:
    cfg, sizes = foreign.config_from_open_clip(OPEN_CLIP)
    with pytest.raises(ValueError, match=r"patch_bias, image_pre_norm, image_pooling, image\.qk_norm"):
        foreign.to_openai({}, CLIPConfig())
    with pytest.raises(ValueError, match=r"loss\.kind"):
        foreign.to_transformers({}, cfg.model_copy(update={"loss": SigmoidLoss(kind="sigmoid")}))
    for export in (foreign.config_to_transformers, foreign.config_to_open_clip):
        with pytest.raises(ValueError, match="the largest id for the end of text"):
            export(cfg, sizes | {"eot_id": 2})
    mixed = cfg.model_copy(update={"text": cfg.text.model_copy(update={"activation": "quick_gelu"})})
    with pytest.raises(ValueError, match="one activation for both towers"):
        foreign.config_to_open_clip(mixed, sizes)
