"""The U-Net against diffusers' with the same weights, at published sizes, and by what it must do."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.blocks import recompute_blocks
from genpipe.models.interop.unet import config_from_diffusers, from_diffusers, to_diffusers
from genpipe.models.layers import dropout
from genpipe.models.unet import UNet, UNetConfig
from genpipe.models.unet_blocks import UNetResBlock

SMALL = UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention_at=(2,), head_width=8, groups=8)
LATENT = SMALL.model_copy(update={"attention": "transformer", "heads": 2, "modulation": "add", "resample": "conv"})
B, M, W, E = 2, 5, 12, 10
MASK = torch.arange(M) < torch.tensor([[2], [5]])

STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
UNCLIP: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "cross_attention_dim": W,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": E,
}
ADM: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(model: nn.Module) -> nn.Module:
    """With values in zero-initialized layers, so that outputs depend on everything that they can depend on."""
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))
    return model.eval()


def unet(cfg: UNetConfig, **sizes: int) -> UNet:
    torch.manual_seed(0)
    return UNet(cfg, in_channels=3, out_channels=3, **sizes)


def parameters(cfg: UNetConfig, **sizes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(cfg, **sizes).parameters())


def small(reference: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**reference, "block_out_channels": (32, 64, 96, 96), "norm_num_groups": 16, **changes}


def assert_same_outputs(theirs: nn.Module, *, channels: int, context: bool, vector: bool, **back: bool) -> None:
    """Ours with their weights says what they say, and gives their weights back."""
    cfg = config_from_diffusers(dict(theirs.config))
    state = theirs.state_dict()
    ours = UNet(
        cfg,
        in_channels=channels,
        out_channels=theirs.config.out_channels,
        context_dim=W if context else None,
        vector_dim=E if vector else None,
    ).eval()
    carried = from_diffusers(state, cfg)
    ours.load_state_dict(carried)
    x, timesteps = randn(B, channels, 16, 16), torch.tensor([17, 900])
    given: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if context:
        given = {"context": randn(B, M, W, seed=1)}
        expected = {"encoder_hidden_states": given["context"]}
    if vector:
        given["vector"] = expected["class_labels"] = randn(B, E, seed=2)
    with torch.no_grad():
        found = ours(x, timesteps / 1000, **given)
        torch.testing.assert_close(found, theirs(x, timesteps, **expected).sample, atol=1e-4, rtol=0)
    assert found.std() > 0.05
    returned = to_diffusers(carried, cfg, **back)
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    "changes", [{}, {"attention_head_dim": (4, 8, 12, 12), "use_linear_projection": True}, {"layers_per_block": 1}]
)
def test_stable_diffusions_unet_is_ours_with_its_weights(changes: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = awake(UNet2DConditionModel(**small(STABLE_DIFFUSION, cross_attention_dim=W, **changes)))
    linear = "use_linear_projection" in changes
    assert_same_outputs(theirs, channels=4, context=True, vector=False, linear_projection=linear)


def test_unclips_unet_is_ours_with_its_weights() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    assert_same_outputs(awake(UNet2DConditionModel(**UNCLIP)), channels=3, context=True, vector=True)


def test_adms_unet_is_ours_with_its_weights() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    assert_same_outputs(awake(UNet2DModel(**ADM)), channels=3, context=False, vector=False)


def test_stable_diffusion_1_has_its_published_size() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel(**STABLE_DIFFUSION)
    cfg = config_from_diffusers(dict(theirs.config))
    ours = parameters(cfg, in_channels=4, out_channels=4, context_dim=768)
    assert ours == sum(p.numel() for p in theirs.parameters()) == 859_520_964


@pytest.mark.parametrize(
    ("settings", "sizes", "published"),
    [
        # Dhariwal & Nichol 2021, table 4 and section 4: ImageNet 64 by class, LSUN 256; learned variance.
        (
            {"width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention_at": (2, 4, 8)},
            {"vector_dim": 1000},
            296,
        ),
        ({"width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "attention_at": (8, 16, 32)}, {}, 553),
    ],
)
def test_adm_has_its_published_sizes(settings: dict[str, Any], sizes: dict[str, int], published: int) -> None:
    assert round(parameters(UNetConfig(**settings), in_channels=3, out_channels=6, **sizes) / 1e6) == published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' has no counterpart"),
        ({"down_block_types": ("KDownBlock2D", *STABLE_DIFFUSION["down_block_types"][1:])}, "KDownBlock2D"),
        ({"block_out_channels": (32, 48, 96, 96)}, "multiples of the first"),
        ({"attention_head_dim": (8, 8, 4, 4)}, "neither one number of heads nor one width"),
        ({"layers_per_block": (1, 2, 2, 2)}, "differ by level"),
    ],
)
def test_what_has_no_equal_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(small(STABLE_DIFFUSION) | changes)


def test_weights_that_are_missing_or_left_over_are_named() -> None:
    cfg = LATENT
    state = to_diffusers(unet(cfg, context_dim=W).state_dict(), cfg)
    extra = {**state, "conv_in.scale": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place here: conv_in\.scale"):
        from_diffusers(extra, cfg)
    del state["mid_block.attentions.0.norm.bias"]
    with pytest.raises(ValueError, match=r"lack mid_block\.attentions\.0\.norm\.bias"):
        from_diffusers(state, cfg)


@pytest.mark.parametrize("cfg", [SMALL, LATENT])
def test_unet_starts_at_zero_then_ignores_masked_context_and_reads_the_rest(cfg: UNetConfig) -> None:
    model = unet(cfg, context_dim=W, vector_dim=E)
    x, t, vector = randn(B, 3, 8, 8), torch.tensor([0.2, 0.8]), randn(B, E, seed=2)
    context, noise = randn(B, M, W, seed=1), randn(B, M, W, seed=3)

    def run(x: Tensor = x, t: Tensor = t, context: Tensor = context, vector: Tensor = vector) -> Tensor:
        return model(x, t, context=context, context_mask=MASK, vector=vector)

    assert not run().any()
    awake(model)
    out = run()
    assert out.shape == (B, 3, 8, 8) and out.dtype == torch.float32
    torch.testing.assert_close(run(context=torch.where(MASK[..., None], context, noise)), out)
    for changed in (run(x=2 * x), run(t=1 - t), run(context=noise), run(vector=-vector)):
        assert not torch.isclose(changed, out).flatten(1).all(1).any()


def test_unet_takes_any_grid_that_halves() -> None:
    model = unet(SMALL)
    for height, width in ((8, 8), (6, 10), (2, 4)):
        assert model(randn(1, 3, height, width), torch.zeros(1)).shape == (1, 3, height, width)
    with pytest.raises(ValueError, match="a grid of 6x5 cannot be halved 1 times"):
        model(randn(1, 3, 6, 5), torch.zeros(1))


def test_what_a_unet_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_at 8 is none of the levels \[1, 2\]"):
        UNetConfig(multipliers=(1, 2), attention_at=(8,))
    with pytest.raises(ValueError, match="48 wide, which groups 32 does not divide"):
        UNetConfig(width=48)
    with pytest.raises(ValueError, match="is 64 wide, which head_width 48 does not divide"):
        UNetConfig(width=32, head_width=48)
    with pytest.raises(ValueError, match="nothing would attend to the context"):
        unet(UNetConfig(attention_at=()), context_dim=W)
    with pytest.raises(ValueError, match="this U-Net has none"):
        unet(UNetConfig(attention="transformer"))


@pytest.mark.parametrize("cfg", [SMALL, LATENT])
def test_recomputing_activations_changes_neither_outputs_nor_gradients(cfg: UNetConfig) -> None:
    """And it keeps fewer bytes for the backward pass."""

    def run(*, again: bool) -> tuple[Tensor, list[Tensor], int]:
        model = awake(unet(cfg, context_dim=W, vector_dim=E))
        if again:
            recompute_blocks(model)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(randn(B, 3, 8, 8), torch.full((B,), 0.3), context=randn(B, M, W), vector=randn(B, E))
        out.square().mean().backward()
        return out, [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())

    (out, grads, bytes_kept), (out_again, grads_again, bytes_again) = run(again=False), run(again=True)
    assert torch.equal(out, out_again)
    assert len(grads) == len(grads_again) == len(list(unet(cfg, context_dim=W, vector_dim=E).parameters()))
    for grad, grad_again in zip(grads, grads_again, strict=True):
        assert torch.equal(grad_again, grad)
    assert bytes_again < 0.6 * bytes_kept


DROPPING = UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention_at=(2,), head_width=16, groups=8, dropout=0.25)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dropout_keeps_the_mean_and_follows_seed_and_layer_alone() -> None:
    x, generator = torch.ones(100_000), seeded(3)
    out = dropout(x, 0.25, generator=generator, number=2)
    assert torch.equal(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)  # seven standard errors
    torch.rand(5, generator=generator)
    assert torch.equal(dropout(x, 0.25, generator=generator, number=2), out)
    for other in (dropout(x, 0.25, generator=generator, number=3), dropout(x, 0.25, generator=seeded(4), number=2)):
        assert ((other == 0) & (out == 0)).float().mean().item() == pytest.approx(0.25**2, abs=0.01), "independent"


def test_dropout_acts_in_training_alone_and_in_every_block_by_itself() -> None:
    torch.manual_seed(0)
    model = awake(UNet(DROPPING, in_channels=3, out_channels=3))
    x, t = randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    plain = UNet(DROPPING.model_copy(update={"dropout": 0.0}), in_channels=3, out_channels=3)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x, t), plain(x, t))
    with pytest.raises(AssertionError, match="generator"):
        model.train()(x, t)
    out = model(x, t, generator=seeded(1))
    assert torch.equal(model(x, t, generator=seeded(1)), out)
    assert not torch.allclose(model(x, t, generator=seeded(2)), out)
    numbers = [block.number for block in model.modules() if isinstance(block, UNetResBlock)]
    assert numbers == list(range(len(numbers))) and len(numbers) > 5


def test_recomputed_blocks_drop_the_same_elements() -> None:
    def gradients(*, again: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = awake(UNet(DROPPING, in_channels=3, out_channels=3)).train()
        if again:
            recompute_blocks(model)
        model(randn(2, 3, 8, 8), torch.full((2,), 0.3), generator=seeded(1)).square().mean().backward()
        return [p.grad for p in model.parameters()]

    for grad, grad_again in zip(gradients(again=False), gradients(again=True), strict=True):
        torch.testing.assert_close(grad_again, grad)
