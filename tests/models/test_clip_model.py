"""CLIP: shapes, masks, one-batch overfit; the contrastive loss on two ranks against one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from genpipe.models.clip import CLIP, CLIPConfig, TowerConfig, contrastive_loss

TOWER = TowerConfig(width=32, depth=2, heads=2)
TINY = CLIPConfig(embed_dim=16, image_size=16, patch_size=8, image=TOWER, text=TOWER)
TOKENS = torch.tensor([[5, 6, 7, 2, 0, 0], [8, 9, 2, 0, 0, 0], [3, 4, 5, 6, 7, 2], [9, 2, 0, 0, 0, 0]])


def tiny(*, causal_text: bool = True) -> CLIP:
    torch.manual_seed(0)
    cfg = TINY.model_copy(update={"causal_text": causal_text})
    return CLIP(cfg, vocab_size=10, context_length=8)


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


def test_overfits_one_batch() -> None:
    model = tiny()
    images = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        loss = contrastive_loss(*model(images, TOKENS), logit_scale=model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_loss_of_orthogonal_pairs_has_a_closed_form() -> None:
    eye = torch.eye(4)
    scale = torch.tensor(math.log(3.0))
    expected = math.log(math.exp(3.0) + 3.0) - 3.0
    assert contrastive_loss(eye, eye, logit_scale=scale).item() == pytest.approx(expected, rel=1e-5)


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 5, generator=gen)
    image_weight, text_weight = torch.randn(2, 5, 4, generator=gen)
    return images, texts, image_weight, text_weight


def _gradients(images: Tensor, texts: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    scale = torch.tensor(1.5)
    leaves = [w.clone().requires_grad_() for w in (*weights, scale)]
    image_embed = F.normalize(images @ leaves[0], dim=1)
    text_embed = F.normalize(texts @ leaves[1], dim=1)
    loss = contrastive_loss(image_embed, text_embed, logit_scale=leaves[2])
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, texts, *weights = _problem()
    mine = slice(3 * rank, 3 * rank + 3)
    loss, grads = _gradients(images[mine], texts[mine], weights)
    for value in (loss, *grads):
        dist.all_reduce(value)
        value /= 2
    if rank == 0:
        torch.save([loss, *grads], f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_in_loss_and_gradients(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    images, texts, *weights = _problem()
    loss, grads = _gradients(images, texts, weights)
    ranks = torch.load(tmp_path / "result.pt", weights_only=True)
    assert len(ranks) == 4
    for value, expected in zip(ranks, [loss, *grads], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
