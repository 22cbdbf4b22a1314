"""Sharpness-aware minimization, where its gradient is known: of a quadratic form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from folder_runtime import FolderRuntime, train_stage, weights
from torch import Tensor, nn

from genpipe.training.sharpness import sharpened

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyPipeline

RHO = 0.3
CURVATURE = torch.tensor([1.0, 2.0, 5.0, 0.1])


class Bowl(nn.Module):
    """x^T diag(c) x / 2, whose gradient is c x: x is two parameters together, and a third is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor([0.7, -0.2, 0.4]))
        self.other = nn.Parameter(torch.tensor([3.0]))
        self.unused = nn.Parameter(torch.tensor([1.0]))

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        return 0.5 * (CURVATURE * torch.cat([self.one, self.other]).square()).sum(), {}


def test_gradients_are_taken_rho_up_the_gradient() -> None:
    """Foret et al. 2021, eq. 2: all parameters are one vector, of one norm."""
    bowl = Bowl()
    x = torch.cat([bowl.one, bowl.other]).detach()
    before = [p.detach().clone() for p in bowl.parameters()]
    climb = RHO * CURVATURE * x / (CURVATURE * x).norm()
    with sharpened(bowl, bowl.loss, rho=RHO):
        bowl.loss()[0].backward()
    assert bowl.one.grad is not None and bowl.other.grad is not None
    torch.testing.assert_close(torch.cat([bowl.one.grad, bowl.other.grad]), CURVATURE * (x + climb))
    assert all(torch.equal(p, old) for p, old in zip(bowl.parameters(), before, strict=True))


def test_nothing_moves_where_the_loss_is_flat() -> None:
    bowl = Bowl()
    with torch.no_grad():
        for p in bowl.parameters():
            p.zero_()
    with sharpened(bowl, bowl.loss, rho=RHO):
        bowl.loss()[0].backward()
    assert bowl.one.grad is not None and not bowl.one.grad.any()


def test_a_stage_trains_with_it(tiny: TinyPipeline, tmp_path: Path) -> None:
    """CLIP, as in unCLIP, whose towers are computed in chunks."""
    short = ("samples=64", "global_batch_size=16", "grad_clip=null", "precision=fp32")
    settings = [f"stages.clip.train.{setting}" for setting in short] + ["stages.clip.tower_batch_size=4"]
    plain, _ = train_stage(tiny.spec("clip", *settings), FolderRuntime(tmp_path / "plain"))
    rt = FolderRuntime(tmp_path / "sharp")
    sharp, _ = train_stage(tiny.spec("clip", *settings, "stages.clip.train.sam_rho=0.1"), rt)
    one, other = weights(plain), weights(sharp)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.isfinite().all() for tensor in other.values())
