"""What drawing costs: evaluations that samplers, guidance and candidates ask for, and the sums over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from genpipe.generation.conditions import Conditions
from genpipe.generation.speed import Meter, parameters_of, speed_metrics
from genpipe.generation.systems import load_system

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")


def test_evaluations_are_steps_times_guidance_times_candidates(tiny: TinyPipeline) -> None:
    """Of tiny.yaml: 4 steps of the prior for two candidates, 4 guided ones of the decoder, 2 of the upsampler."""
    system = load_system(tiny.run("system"), device=CPU)
    meter = Meter(system)
    with meter.running():
        system.sample(Conditions(3, texts=["a red bar"] * 3), generator=torch.Generator().manual_seed(0))
    counted = dict(meter.evaluated)
    assert counted == {"prior": 3 * 4 * 2, "decoder": 3 * 4 * 2, "upsampler_0": 3 * 2} and meter.seconds > 0
    system.sample(Conditions(3, texts=["a red bar"] * 3), generator=torch.Generator().manual_seed(0))
    assert dict(meter.evaluated) == counted, "nothing is counted outside"


def test_parameters_are_those_of_all_parts(tiny: TinyPipeline) -> None:
    artifact = tiny.run("system")
    system: Any = load_system(artifact, device=CPU)
    modules = [system.autoencoder, system.clip, system.prior, system.decoder, system.cascade.steps[0].model]
    assert parameters_of(artifact) == sum(len(p.flatten()) for of in modules for p in of.state_dict().values())


def batch(pictures: int, seconds: float, *, peak: int = 0) -> dict[str, Any]:
    return {
        "pictures": pictures,
        "seconds": seconds,
        "evaluated": {"decoder": 10 * pictures},
        "peak_bytes": peak,
        "parameters": 7,
    }


def test_a_slow_first_batch_counts_for_little() -> None:
    found = speed_metrics([batch(8, 100.0, peak=2**30), batch(8, 2.0, peak=2**31), batch(4, 1.0)])
    assert found == {
        "speed/pictures_per_second": pytest.approx(4.0),
        "speed/evaluations_decoder": pytest.approx(10.0),
        "speed/parameters": 7.0,
        "speed/peak_gib": pytest.approx(2.0),
    }
    assert "speed/peak_gib" not in speed_metrics([batch(1, 1.0)])
