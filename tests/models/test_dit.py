"""The diffusion transformer against diffusers' with the same weights, at its published size, and by what it must do."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from genpipe.models.blocks import recompute_blocks
from genpipe.models.dit import DiT, DiTConfig
from genpipe.models.interop.dit import config_from_diffusers, from_diffusers, to_diffusers

B, M, W, E = 2, 5, 12, 10
SMALL = DiTConfig(patch_size=2, width=32, depth=2, heads=2)
MASK = torch.arange(M) < torch.tensor([[2], [5]])
CONTEXTS: tuple[Literal["keys", "cross", "joint"], ...] = ("keys", "cross", "joint")


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


def dit(cfg: DiTConfig = SMALL, **sizes: int) -> DiT:
    torch.manual_seed(0)
    return DiT(cfg, in_channels=3, out_channels=3, **sizes)


def as_published(theirs: nn.Module) -> Iterator[nn.Module]:
    """One time and class embedding for all blocks, with the paper's frequencies."""
    embeddings = [block.norm1.emb for block in theirs.transformer_blocks]
    for embedding in embeddings:
        embedding.load_state_dict(embeddings[0].state_dict())
        embedding.time_proj.downscale_freq_shift = 0
        yield embedding


def diffusers_dit(**sizes: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = awake(DiTTransformer2DModel(sample_size=8, in_channels=3, out_channels=6, **sizes))
    assert len(list(as_published(theirs))) == sizes["num_layers"]
    return theirs


TINY = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "num_embeds_ada_norm": E}


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_diffusers_dit_is_ours_with_its_weights(patch_size: int) -> None:
    theirs = diffusers_dit(**TINY, patch_size=patch_size)
    cfg, state = config_from_diffusers(dict(theirs.config)), theirs.state_dict()
    ours = DiT(cfg, in_channels=3, out_channels=6, classes=E).eval()
    carried = from_diffusers(state, cfg)
    ours.load_state_dict(carried)
    x, timesteps, labels = randn(3, 3, 8, 8), torch.tensor([17, 500, 900]), torch.tensor([0, 4, E])
    with torch.no_grad():
        expected = theirs(x, timesteps, class_labels=labels).sample
        found = ours(x, timesteps / 1000, labels=labels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found.std() > 0.05
    returned = to_diffusers(carried, cfg)
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[key], tensor) for key, tensor in state.items())


def test_weights_that_do_not_fit_are_refused() -> None:
    theirs = diffusers_dit(**TINY, patch_size=2)
    cfg, state = config_from_diffusers(dict(theirs.config)), theirs.state_dict()
    with pytest.raises(ValueError, match=r"no place here: more\.weight"):
        from_diffusers({**state, "more.weight": torch.zeros(1)}, cfg)
    with pytest.raises(ValueError, match=r"lack transformer_blocks\.1\.ff\.net\.2\.bias"):
        from_diffusers({key: t for key, t in state.items() if key != "transformer_blocks.1.ff.net.2.bias"}, cfg)
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"
    with pytest.raises(ValueError, match="not that of the first block"):
        from_diffusers({**state, key: state[key] + 1}, cfg)
    with pytest.raises(ValueError, match="activation_fn 'geglu' has no counterpart"):
        config_from_diffusers({**theirs.config, "activation_fn": "geglu"})


def test_dit_xl_2_has_its_published_size() -> None:
    """675,129,632 in the paper's code, of which 256 fixed positions are no parameters here."""
    cfg = DiTConfig(patch_size=2, width=1152, depth=28, heads=16, qk_norm=False, activation="gelu_tanh")
    with torch.device("meta"):
        model = DiT(cfg, in_channels=4, out_channels=8, classes=1000)
    assert sum(p.numel() for p in model.parameters()) + 256 * 1152 == 675_129_632


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_dit_starts_at_zero_then_ignores_masked_context_and_reads_the_rest(
    context: Literal["keys", "cross", "joint"], positions: Literal["absolute", "relative"]
) -> None:
    cfg = SMALL.model_copy(update={"context": context, "positions": positions})
    model = dit(cfg, context_dim=W, vector_dim=E)
    x, t, vector = randn(B, 3, 4, 4), torch.tensor([0.2, 0.8]), randn(B, E, seed=2)
    encodings, noise = randn(B, M, W, seed=1), randn(B, M, W, seed=3)

    def run(x: Tensor = x, t: Tensor = t, context: Tensor = encodings, vector: Tensor = vector) -> Tensor:
        return model(x, t, context=context, context_mask=MASK, vector=vector)

    assert not run().any()
    awake(model)
    out = run()
    assert out.shape == (B, 3, 4, 4) and out.dtype == torch.float32
    torch.testing.assert_close(run(context=torch.where(MASK[..., None], encodings, noise)), out)
    for changed in (run(x=2 * x), run(t=1 - t), run(context=noise), run(vector=-vector)):
        assert not torch.isclose(changed, out).flatten(1).all(1).any()
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_dit_takes_any_grid(positions: Literal["absolute", "relative"]) -> None:
    model = dit(SMALL.model_copy(update={"positions": positions}))
    for height, width in ((4, 4), (6, 8), (2, 10)):
        out = model(randn(2, 3, height, width), torch.tensor([0.2, 0.9]))
        assert out.shape == (2, 3, height, width)
    with pytest.raises(ValueError, match="patches of 2"):
        model(randn(2, 3, 5, 4), torch.zeros(2))


def test_dit_knows_where_its_tokens_are() -> None:
    model = awake(dit())
    out = model(torch.ones(1, 3, 4, 4), torch.tensor([0.5]))
    assert not torch.allclose(out[..., :2, :2], out[..., 2:, 2:])


@pytest.mark.parametrize("context", CONTEXTS)
def test_recomputing_activations_changes_neither_outputs_nor_gradients(
    context: Literal["keys", "cross", "joint"],
) -> None:
    def run(*, again: bool) -> tuple[Tensor, list[Tensor | None]]:
        model = awake(dit(SMALL.model_copy(update={"context": context}), context_dim=W))
        if again:
            recompute_blocks(model)
        out = model(randn(B, 3, 8, 8), torch.full((B,), 0.3), context=randn(B, M, W), context_mask=MASK)
        out.square().mean().backward()
        return out, [p.grad for p in model.parameters()]

    (out, grads), (out_again, grads_again) = run(again=False), run(again=True)
    assert torch.equal(out, out_again)
    for grad, grad_again in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(grad_again, grad)
