"""The codebook: lookup against brute force, losses and moving averages by hand, dead codes, and many ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from genpipe.models import quantizer
from genpipe.models.quantizer import REVIVED_PER_STEP, Quantizer, Vq, codebook_use

RANKS = 2


def make(*, channels: int = 4, **settings: Any) -> Quantizer:
    torch.manual_seed(0)
    made = Quantizer(Vq.model_validate({"kind": "vq", "codes": 16, **settings}), channels)
    made.codebook.data.normal_()
    return made


def grid(seed: int = 0, *, batch: int = 3, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 5, 2, generator=torch.Generator().manual_seed(seed))


def rows_of(latents: Tensor) -> np.ndarray:
    """[B, C, H, W] as vectors in the order of batch, row, column."""
    return np.moveaxis(latents.numpy(), 1, -1).reshape(-1, latents.shape[1])


@given(st.integers(0, 2**31), st.booleans())
def test_codes_are_the_nearest_by_brute_force(seed: int, normalize: bool) -> None:
    model, latents = make(normalize=normalize), grid(seed)
    rows, codebook = rows_of(latents).astype(np.float64), model.codebook.detach().numpy().astype(np.float64)
    if normalize:
        rows, codebook = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, codebook))
    distances = ((rows[:, None] - codebook[None]) ** 2).sum(-1)
    codes = model.codes(latents).numpy().reshape(-1)
    np.testing.assert_allclose(distances[np.arange(len(rows)), codes], distances.min(1), atol=1e-5)
    vectors = model(latents).vectors.detach()
    np.testing.assert_allclose(rows_of(vectors), codebook[codes], atol=1e-6)
    assert torch.equal(model.embed(model.codes(latents)), vectors)


def test_lookup_in_chunks_is_lookup_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latents = make(), grid()
    whole = model.codes(latents)
    monkeypatch.setattr(quantizer, "_DISTANCES", 3 * 16)
    assert torch.equal(model.codes(latents), whole)


def test_lookup_ignores_autocast() -> None:
    """Codes closer together than bf16 can tell."""
    model = make(channels=1)
    model.codebook.copy_(1 + torch.arange(16.0)[:, None] / 1024)
    latents = model.codebook.view(1, 1, 4, 4).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.codes(latents).flatten().tolist() == list(range(16))
        assert torch.equal(model(latents).vectors, latents)


def test_the_gradient_passes_straight_through_and_is_committed() -> None:
    """d(sum(w z_q) + beta |z - e|^2) / dz = w + 2 beta (z - e) / elements."""
    model, latents = make(commitment=0.3), grid().requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    quantized = model(latents)
    ((weights * quantized.vectors).sum() + quantized.loss).backward()
    expected = weights + 0.6 * (latents - quantized.vectors).detach() / latents.numel()
    torch.testing.assert_close(latents.grad, expected)


def test_codes_that_learn_by_gradient_move_towards_their_vectors() -> None:
    """d|sg(z) - e|^2 / de by code: 2 (count e - sum of its vectors) / elements, 0 for unused ones."""
    model, latents = make(update="gradient"), grid()
    loss = model(latents).loss
    assert isinstance(model.codebook, torch.nn.Parameter)
    torch.testing.assert_close(loss, 1.25 * (latents - model(latents).vectors).square().mean())
    loss.backward()
    codes, rows = model.codes(latents).flatten(), torch.from_numpy(rows_of(latents))
    for code in range(16):
        own = rows[codes == code]
        expected = 2 * (len(own) * model.codebook[code] - own.sum(0)) / latents.numel()
        torch.testing.assert_close(model.codebook.grad[code], expected.detach())


def test_moving_averages_by_hand() -> None:
    """N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N (van den Oord et al. 2017, eqs. 6 to 8)."""
    model = make(decay=0.9, revive_after=0)
    model.ema_sums.copy_(model.codebook)
    counts, sums = np.ones(16), model.codebook.numpy().astype(np.float64)
    for step in range(3):
        latents = grid(step)
        codes, rows = model.codes(latents).flatten().numpy(), rows_of(latents).astype(np.float64)
        before = model.codebook.clone()
        model(latents, generator=torch.Generator().manual_seed(step))
        assert torch.equal(before, model.codebook), "codes move in `update` alone"
        model.update()
        for code in range(16):
            counts[code] = 0.9 * counts[code] + 0.1 * (codes == code).sum()
            sums[code] = 0.9 * sums[code] + 0.1 * rows[codes == code].sum(0)
        smoothed = (counts + 1e-5) / (counts.sum() + 16e-5) * counts.sum()
        np.testing.assert_allclose(model.codebook.numpy(), sums / smoothed[:, None], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.codebook.numpy(), sums / counts[:, None], rtol=1e-2, atol=1e-3)


def test_a_step_is_one_step_however_it_is_cut() -> None:
    whole, parts, never = make(revive_after=1), make(revive_after=1), make(revive_after=1)
    latents = grid(batch=4)
    whole(latents, generator=torch.Generator().manual_seed(0))
    for half in latents.chunk(2):
        parts(half, generator=torch.Generator().manual_seed(0))
    whole.update()
    parts.update()
    torch.testing.assert_close(whole.ema_counts, parts.ema_counts)
    before = never.codebook.clone()
    never(latents)
    never.update()
    assert torch.equal(never.codebook, before), "without a generator nothing is noted"
    moved = whole.codebook.clone()
    whole.update()
    assert torch.equal(whole.codebook, moved), "what was noted is used once"


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codes_start_from_the_data(update: str) -> None:
    """At the first step all unused codes become outputs of the encoder, each another one, used ones stay."""
    model, latents = make(update=update), grid(batch=8)
    used = torch.zeros(16, dtype=torch.bool).index_fill(0, model.codes(latents).unique(), True)
    assert 0 < used.sum() < 16
    before = model.codebook.detach().clone()
    model(latents, generator=torch.Generator().manual_seed(0))
    model.update()
    fresh = model.codebook.detach()[~used]
    nearest = torch.cdist(fresh, torch.from_numpy(rows_of(latents))).min(1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) == len(fresh)
    if update == "gradient":
        assert torch.equal(model.codebook.detach()[used], before[used])


def test_a_code_is_revived_when_its_time_is_up_and_not_before() -> None:
    model = make(update="gradient", revive_after=3)
    model.unused_steps.zero_()
    away = torch.full((4,), 100.0)
    model.codebook.data[7] = away
    for step in range(3):
        assert torch.equal(model.codebook.detach()[7], away), f"unused for {step} steps"
        model(grid(step, batch=30), generator=torch.Generator().manual_seed(step))
        model.update()
    assert model.codebook.detach()[7].abs().max() < 10
    assert model.unused_steps[7] == 0
    model.codebook.data[7] = away
    keeps = make(update="gradient", revive_after=0)
    keeps.codebook.data[7] = away
    for step in range(5):
        keeps(grid(step), generator=torch.Generator().manual_seed(step))
        keeps.update()
    assert torch.equal(keeps.codebook.detach()[7], away), "revive_after 0 is never"


def test_revival_takes_what_the_generator_draws() -> None:
    def revived(seed: int) -> Tensor:
        model = make()
        model(grid(batch=8), generator=torch.Generator().manual_seed(seed))
        model.update()
        return model.codebook

    assert torch.equal(revived(0), revived(0))
    assert not torch.equal(revived(0), revived(1))


def test_more_dead_codes_than_a_step_revives() -> None:
    model = make(codes=2 * REVIVED_PER_STEP)
    model.codebook.fill_(50.0)
    latents = torch.randn(40, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(latents, generator=torch.Generator().manual_seed(0))
        model.update()
    assert (model.codebook.abs().max(1).values < 40).all()


def test_no_code_is_revived_from_numbers_that_are_not_finite() -> None:
    """Nor where codes are parameters, which no skipped step puts back."""
    model = make(update="gradient", revive_after=1)
    latents = grid()
    latents[:, :, ::2] = torch.nan
    model(latents, generator=torch.Generator().manual_seed(0))
    model.update()
    assert model.codebook.isfinite().all()


def test_use_by_hand() -> None:
    use = codebook_use({"": torch.tensor([2.0, 2.0, 0.0, 0.0]), "top_": torch.tensor([3.0, 1.0])})
    assert use["codes_used"] == 0.5 and use["perplexity"] == pytest.approx(2.0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert use["top_codes_used"] == 1.0 and use["top_perplexity"] == pytest.approx(math.exp(entropy))


def step_of(latents: Tensor, *, seeds: list[int], update: str) -> Quantizer:
    """Two steps; each chunk of the batch is a micro-batch with its own seed."""
    model = make(update=update, revive_after=1)
    for _ in range(2):
        for seed, part in zip(seeds, latents.chunk(len(seeds)), strict=True):
            model(part, generator=torch.Generator().manual_seed(seed))
        model.update()
    return model


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for update in ("ema", "gradient"):
        mine = grid(batch=8).chunk(RANKS)[rank]
        model = step_of(mine, seeds=[2 * rank, 2 * rank + 1], update=update)
        torch.save(model.state_dict(), Path(folder, f"{update}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.services
def test_ranks_move_the_codes_as_one_process(tmp_path: Path) -> None:
    """Bitwise alike on the ranks, and as one process that sees all micro-batches, revived codes too."""
    run_ranks(run_rank, str(tmp_path), ranks=RANKS)
    for update in ("ema", "gradient"):
        first, second = (torch.load(tmp_path / f"{update}-{rank}.pt", weights_only=True) for rank in range(RANKS))
        alone = step_of(grid(batch=8), seeds=[0, 1, 2, 3], update=update).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name in first:
            torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=1e-5)
        start = make(update=update, revive_after=1).codebook
        assert (first["codebook"] - start).abs().max() > 0.1, "codes moved"
