"""Noise augmentation of what upsamplers are given."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from genpipe.generation.upsampling import augment


def test_noise_augmentation_preserves_variance() -> None:
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.3, 0.7, 1.0])
    noisy = augment(images, level=level, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noisy[0], images[0])
    torch.testing.assert_close(noisy.std((1, 2, 3)), torch.ones(4), atol=0.03, rtol=0)
    kept = F.cosine_similarity(noisy.flatten(1), images.flatten(1))
    torch.testing.assert_close(kept, torch.cos(level * torch.pi / 2), atol=0.03, rtol=0)
