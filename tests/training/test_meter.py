"""What a step costs: operations by hand, shares of the time, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from folder_runtime import CPU, FolderRuntime, build, weights
from ranks import run_ranks
from small_objective import G, Small, stream, train_small

from genpipe.stages import load_stage
from genpipe.training.meter import Meter, peak_memory
from genpipe.training.objective import Step
from genpipe.training.parallel import Replicated
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState
from genpipe.training.trial import step_flops, unobserved

if TYPE_CHECKING:
    from conftest import TinyPipeline

SIZES = ((2, 6), (6, 6), (6, 1))
"""Of the small network's matrices."""


def test_flops_by_hand(tmp_path: Path) -> None:
    """A product and its sum are two: forward, by the weights, and by the inputs of all layers but the first."""
    objective, rt = Small(), FolderRuntime(tmp_path)
    parallel = Replicated(objective, rt)
    batch = stream().train.collate(np.arange(G), np.arange(G))
    found = step_flops(
        objective,
        parallel,
        "small",
        batch,
        Step(0, torch.Generator()),
        products="fp32",
    )
    assert found == sum(2 * G * a * b for a, b in SIZES * 2 + SIZES[1:])
    assert all(p.grad is None for p in objective.model.parameters())

    state = TrainState.fresh(objective.trainable, TrainConfig(samples=8, global_batch_size=G))
    meter = Meter(rt, global_batch_size=G, peak_flops=1e9)
    for _ in range(5):
        meter.count(flops=found)
    meter.report(state, waited=0.0, log=True)
    values = rt.logged[0]
    assert values["mfu"] * 1e9 * values["step_seconds"] == pytest.approx(found)
    assert values["samples_per_second"] * values["step_seconds"] == pytest.approx(G)


def test_the_shares_of_the_time_are_its_parts(tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    train_small(stream(), rt, steps=8, log_every=2, checkpoint_seconds=1e-9)
    for at in rt.reported:
        shares = [rt.logged[at][f"{part}_share"] for part in ("data_wait", "compute", "other")]
        assert sum(shares) == pytest.approx(1) and all(0 <= share <= 1 for share in shares)
        assert 0 < rt.logged[at]["mfu"] < 1


def test_the_peak_of_memory_is_that_of_the_process() -> None:
    """Of a new one, which has not much yet."""
    run_ranks(double_the_peak, ranks=1)


def double_the_peak(rank: int) -> None:
    before = peak_memory(CPU)
    assert 2**26 < before < 2**40, "in bytes"
    filled = np.ones(before // 4, dtype=np.float64)  # twice as many bytes
    after = peak_memory(CPU)
    assert after - before > 0.5 * filled.nbytes


def test_a_trial_leaves_no_trace(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Neither in a codebook nor in what is noted for it, nor in the wait for a plateau."""
    settings = ("adversarial={start: settled, model: {width: 8, layers: 2, norm: batch}}", "model.bottleneck.kind=vq")
    spec = tiny.spec("autoencoder", *(f"stages.autoencoder.{setting}" for setting in settings))
    module = load_stage("autoencoder")
    batch = module.data(module.Config.model_validate(spec.config), spec.inputs).train.collate(
        np.arange(4), np.arange(4)
    )
    objective = build(spec)
    parallel = Replicated(objective, FolderRuntime(tmp_path))
    before = weights(objective)
    for name in objective.trainable:
        assert (
            step_flops(
                objective,
                parallel,
                name,
                batch,
                Step(0, torch.Generator()),
                products="fp32",
            )
            > 0
        )
    with unobserved(objective):
        objective.loss("autoencoder", batch, Step(0, torch.Generator()))
        objective.after_step()
        assert any(not torch.equal(before[name], tensor) for name, tensor in weights(objective).items())
    objective.after_step()  # nothing was noted that it could take in
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(objective).items())
