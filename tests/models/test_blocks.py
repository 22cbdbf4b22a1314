"""What counts as a block, and that blocks computed again are the same blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.blocks import blocks_of, recompute_blocks
from genpipe.models.layers import ResidualBlock, TransformerBlock
from genpipe.models.ldm_autoencoder import LdmConfig, ldm_decoder
from genpipe.models.unet import UNet, UNetConfig


class Dropping(ResidualBlock):
    """A block of one's own, that draws from torch's default generator."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 4 * width), nn.Dropout(0.3), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        up, drop, down = self.layers
        return x + gain * down(drop(up(x).relu()))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), Dropping(8), nn.ReLU(), Dropping(8))
        self.more = nn.ModuleList([TransformerBlock(8, heads=2), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))])
        self.empty = nn.ModuleList([nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[3](self.body[:3](x), gain=0.5)
        for block in self.more:
            x = block(x)
        return x


def test_blocks_are_the_outermost_residual_blocks_and_elements_of_lists() -> None:
    network = Network()
    assert blocks_of(network) == [network.body[1], network.body[3], *network.more]
    assert blocks_of(network.more[0]) == [network.more[0]]
    assert blocks_of(nn.Linear(3, 3)) == []
    unet = UNet(
        UNetConfig(width=32, multipliers=(1, 2), blocks=1, head_width=32, attention_at=(2,)),
        in_channels=3,
        out_channels=3,
    )
    assert blocks_of(unet) == [*unet.down, *unet.up, *unet.middle]
    decoder = ldm_decoder(LdmConfig(kind="ldm", width=32, multipliers=(1, 2), blocks=1))
    assert len(blocks_of(decoder)) == sum(isinstance(layer, ResidualBlock) for layer in decoder) > 3


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(bf16: bool) -> None:
    """With dropout drawn from the default generator, and under autocast."""
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(2))

    def run(*, again: bool) -> tuple[list[Tensor | None], Tensor, int]:
        torch.manual_seed(0)
        network, kept = Network(), 0
        if again:
            recompute_blocks(network)

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            loss = network(x).float().square().mean()
        drawn = torch.rand(())
        loss.backward()
        return [p.grad for p in network.parameters()], torch.stack([loss.detach(), drawn]), kept

    (grads, out, kept), (grads_again, out_again, kept_again) = run(again=False), run(again=True)
    assert torch.equal(out, out_again), "and what is drawn after the blocks is the same"
    assert all(torch.equal(one, other) for one, other in zip(grads, grads_again, strict=True) if one is not None)
    assert [g is None for g in grads] == [g is None for g in grads_again] == [False] * len(grads)
    assert kept_again < 0.5 * kept
