"""Two ranks train as one: real gloo processes against gradient accumulation in this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from folder_runtime import FolderRuntime
from rank_processes import RANKS, train_recorded, train_stages
from ranks import run_ranks
from torch import Tensor

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.pipeline.spec import StageSpec

if TYPE_CHECKING:
    from conftest import TinyPipeline

STAGES = ("autoencoder", "clip", "prior", "decoder", "upsampler")
SETTINGS = (
    *("train.samples=64", "train.global_batch_size=16", "train.precision=fp32"),
    *("observe.log_every=1", "observe.validate_every=0"),
)


def spec_of(tiny: TinyPipeline, stage: str) -> StageSpec:
    """Four steps in fp32; micro-batches of 4, but for CLIP, whose loss compares the whole batch: chunks of 3."""
    settings = SETTINGS if stage == "clip" else (*SETTINGS, "train.micro_batch_size=4")
    adversarial = ["stages.autoencoder.adversarial={start: 16, model: {width: 8, layers: 2}}"]
    extra = {
        "autoencoder": adversarial,
        "clip": ["stages.clip.tower_batch_size=3"],
        "prior": ["stages.prior.train.sam_rho=0.05"],
    }.get(stage, [])
    return tiny.spec(stage, *(f"stages.{stage}.{setting}" for setting in settings), *extra)


@pytest.fixture(scope="module")
def specs(tiny: TinyPipeline) -> dict[str, StageSpec]:
    return {stage: spec_of(tiny, stage) for stage in STAGES}


@pytest.fixture(scope="module")
def folder(specs: dict[str, StageSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left that trained every stage together."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(train_stages, {s: spec.model_dump_json() for s, spec in specs.items()}, str(folder), ranks=RANKS)
    return folder


@pytest.fixture(scope="module")
def both(specs: dict[str, StageSpec], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By stage: the record of one process alone, then of ranks 0 and 1."""
    torch.set_float32_matmul_precision("highest")
    return {
        stage: [
            train_recorded(specs[stage], FolderRuntime(folder / f"{stage}-alone")),
            *(torch.load(folder / f"{stage}-{rank}.pt", weights_only=True) for rank in range(RANKS)),
        ]
        for stage in STAGES
    }


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.services
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one(both: dict[str, list[dict[str, Any]]], stage: str) -> None:
    alone, first, second = both[stage]
    assert largest_difference(first["weights"], second["weights"]) == 0.0, "the ranks agree to the last bit"
    assert largest_difference(alone["weights"], first["weights"]) < 1e-6
    assert largest_difference(alone["weights"], alone["initial"]) > 1e-3, "training moved the weights"
    assert alone["metrics"] == pytest.approx(first["metrics"], rel=1e-4, abs=1e-5)
    assert second["metrics"] == {}, "rank 0 validates"
    for at, values in alone["logged"].items():
        for name in values:
            if name.startswith(stage):
                assert first["logged"][at][name] == pytest.approx(values[name], rel=1e-4, abs=1e-6)


@pytest.mark.services
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "clip"])
def test_noise_belongs_to_the_micro_batch_and_not_to_the_rank(
    both: dict[str, list[dict[str, Any]]], stage: str
) -> None:
    """(seed, name, position) of every micro-batch: the two ranks together draw what one process draws."""
    alone, *ranks = ([tuple(seed) for seed in record["seeds"] if seed[-1] != "validate"] for record in both[stage])
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert not set(ranks[0]) & set(ranks[1])
    positions = {seed[-1] for seed in alone}
    assert positions == set(range(0, 64, 4))


@pytest.mark.services
def test_a_stage_run_by_two_ranks_is_committed_once(specs: dict[str, StageSpec], folder: Path) -> None:
    """As torchrun starts them: rank 0 exports and commits, both get the artifact."""
    first, second = (
        Artifact.model_validate_json((folder / f"artifact-{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert first == second
    manifest = artifacts.verify(first.uri)
    assert manifest.artifact.fingerprint == specs["upsampler"].target.fingerprint
    assert manifest.metrics.keys() >= {"loss", "psnr"}
