"""U-Nets written for diffusers: its classes, built with the written config, load the weights and say the same."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import pytest
import torch

from genpipe.models.interop.unet import config_from_diffusers, config_to_diffusers, to_diffusers
from genpipe.models.unet import UNet, UNetConfig

B, M, W = 2, 5, 12

PLAIN = UNetConfig(width=16, multipliers=(1, 2, 2), blocks=1, attention_at=(2, 4), head_width=8, groups=8)
DDPM = PLAIN.model_copy(update={"modulation": "add", "resample": "conv", "attention_at": (2,), "blocks": 2})
BARE = DDPM.model_copy(update={"attention_at": ()})
LATENT = DDPM.model_copy(update={"attention": "transformer", "heads": 2, "transformer_depth": 2})
BY_WIDTH = LATENT.model_copy(update={"heads": None, "attention_at": (1, 2)})


def both(cfg: UNetConfig, *, context: int | None) -> tuple[UNet, torch.nn.Module]:
    """Ours with random numbers everywhere, and what was written of it in diffusers' class."""
    import diffusers

    torch.manual_seed(0)
    ours = UNet(cfg, in_channels=3, out_channels=3, context_dim=context).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = config_to_diffusers(cfg, in_channels=3, out_channels=3, sample_size=16, context_dim=context)
    theirs = getattr(diffusers, config.pop("_class_name"))(**config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), cfg))
    return ours, theirs


@pytest.mark.parametrize(
    ("cfg", "context"), [(PLAIN, None), (DDPM, None), (BARE, None), (LATENT, W), (BY_WIDTH, W), (PLAIN, W)]
)
def test_what_is_written_says_the_same_there(cfg: UNetConfig, context: int | None) -> None:
    ours, theirs = both(cfg, context=context)
    x, timesteps = torch.randn(B, 3, 16, 16), torch.tensor([17, 900])
    told = None if context is None else torch.randn(B, M, context)
    given: dict[str, Any] = {} if told is None else {"encoder_hidden_states": told}
    with torch.no_grad():
        found = ours(x, timesteps / 1000, context=told)
        torch.testing.assert_close(theirs(x, timesteps, **given).sample, found, atol=1e-4, rtol=0)
    assert found.std() > 0.05


def test_dropout_is_of_training_and_not_written() -> None:
    config = config_to_diffusers(DDPM.model_copy(update={"dropout": 0.3}), in_channels=3, out_channels=3, sample_size=8)
    assert config_from_diffusers(config) == DDPM


@pytest.mark.parametrize(
    ("changes", "context", "named"),
    [
        ({"heads": 4}, None, "one width"),
        ({"attention": "transformer", "heads": 2}, W, "residual blocks"),
        ({"resample": "conv", "attention_at": (1, 2, 4)}, W, "never made"),
    ],
)
def test_what_diffusers_has_no_form_for_is_refused(changes: dict[str, Any], context: int | None, named: str) -> None:
    """Heads of several widths; transformers with resizing by residual blocks; plain attention to text without it."""
    cfg = PLAIN.model_copy(update={"multipliers": (1, 2, 4), **changes})
    with pytest.raises(ValueError, match=named):
        config_to_diffusers(cfg, in_channels=3, out_channels=3, sample_size=16, context_dim=context)
