"""One, two and four ranks learn the same, replicated, sharded, and sharded in groups: real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from folder_runtime import FolderRuntime
from parallel_ranks import BATCH, LEG, Toy, muon_steps, train_in_turns, train_together, train_toy
from ranks import run_ranks
from safetensors.torch import load_file
from test_ranks import STAGES, largest_difference, spec_of
from torch import Tensor, nn

from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources
from genpipe.training import parallel
from genpipe.training.parallel import spread

if TYPE_CHECKING:
    from conftest import TinyPipeline

CASES: dict[str, dict[str, Any]] = {
    "whole": {"noise": False},
    "micro": {"noise": True, "micro_batch_size": 4},
    "muon": {"noise": True, "micro_batch_size": 4, "optim": {"kind": "muon", "lr": 2e-3, "adamw_lr": 2e-3}},
}
CLOSE = {"whole": 1e-5, "micro": 1e-5, "muon": 1e-3}
"""Muon orthogonalizes in bf16, which makes more of the last bits of a gradient."""

SPREADS: dict[int, dict[str, int | str]] = {2: {"ddp": 1, "fsdp": "all"}, 4: {"fsdp": "all", "hybrid": 2}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process learns by itself."""
    folder = tmp_path_factory.mktemp("alone")
    return {case: train_toy(FolderRuntime(folder / case), **settings) for case, settings in CASES.items()}


class Together(NamedTuple):
    """What processes left that trained together."""

    ranks: int
    folder: Path

    def results(self, name: str) -> list[dict[str, Any]]:
        """By rank."""
        return [torch.load(self.folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(self.ranks)]

    def toys(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(case, results) of each way to spread it."""
        return [(case, self.results(f"{spread}-{case}")) for spread in SPREADS[self.ranks] for case in CASES]


@pytest.fixture(scope="module", params=SPREADS)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    spreads = SPREADS[request.param].items()
    toys = {f"{name}-{case}": {**CASES[case], "shard_over": over} for name, over in spreads for case in CASES}
    run_ranks(train_together, request.param, str(folder), toys, {}, ranks=request.param)
    return Together(request.param, folder)


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_learn_what_one_learns(alone: dict[str, dict[str, Any]], together: Together) -> None:
    for case, several in together.toys():
        one, first, close = alone[case], several[0], 10 * CLOSE[case]
        assert largest_difference(one["weights"], first["weights"]) < CLOSE[case]
        assert first["metrics"] == pytest.approx(one["metrics"], rel=close)
        assert all(result["metrics"] == {} for result in several[1:]), "metrics are rank 0's"
        for at, values in one["logged"].items():
            for name in values:
                if name.endswith(("loss", "grad_norm", "error")):
                    assert first["logged"][at][name] == pytest.approx(values[name], rel=close, abs=1e-6)


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_see_what_one_sees(alone: dict[str, dict[str, Any]], together: Together) -> None:
    """Which sample stands at which position, for each module, exactly; no rank sees another's."""
    for case, results in together.toys():
        several = [result["seen"] for result in results]
        assert sorted(row for seen in several for row in seen) == sorted(alone[case]["seen"])
        assert all(len(seen) == len(several[0]) for seen in several)


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_muon_sharded_is_muon(together: Together) -> None:
    """The same gradients on all ranks: sharded over them in a row, and in pairs."""
    expected = muon_steps(None)
    for both in together.results("muon"):
        for found in both:
            assert [(one - other).abs().max() < 1e-5 for one, other in zip(found, expected, strict=True)] == [True] * 6


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_learns_the_same_sharded(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Each with what is special to it: a discriminator, towers in chunks, blocks computed again."""
    specs: dict[str, StageSpec] = {stage: spec_of(tiny, stage) for stage in STAGES}
    for stage, spec in specs.items():
        train, resources = spec.config["train"], {**spec.config["resources"], "shard_over": "all"}
        resources["recompute_blocks"] = stage in ("autoencoder", "decoder")
        optim = {"kind": "adamw", "lr": 1e-3, "eps": 1e-2}
        config = {**spec.config, "train": {**train, "optim": optim, "sam_rho": None}, "resources": resources}
        specs[stage] = spec.model_copy(update={"config": config})
    texts = {stage: spec.model_dump_json() for stage, spec in specs.items()}
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    run_ranks(train_together, 2, str(tmp_path / "two"), {}, texts, ranks=2)
    run_ranks(train_together, 1, str(tmp_path / "one"), {}, texts, ranks=1)
    for stage in STAGES:
        [one], [two, _] = Together(1, tmp_path / "one").results(stage), Together(2, tmp_path / "two").results(stage)
        assert largest_difference(one["weights"], two["weights"]) < 1e-5, stage
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-4)


TURNS: dict[int, list[tuple[str, int | str, bool]]] = {
    2: [
        ("fsdp", "all", False),
        *[("fsdp-offloaded", "all", True), ("fsdp-offloaded", "all", False)],
        *[("fsdp-cut", "all", True), ("fsdp-cut", "all", False)],
        *[("fsdp-to-ddp", "all", True), ("fsdp-to-ddp", 1, False)],
        *[("ddp-to-fsdp", 1, True), ("ddp-to-fsdp", "all", False)],
        *[("fsdp-to-4", "all", True), ("ddp-to-4", 1, True)],
    ],
    4: [("fsdp-to-4", "all", False), ("ddp-to-4", 2, False)],
}
"""By the number of ranks: the run, over how many it is sharded, and whether it stops on the way."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_go_on_sharded_or_not_and_on_more_ranks(tmp_path: Path) -> None:
    """FSDP stopped and resumed is FSDP to the last bit, wherever its averages are; in another layout it learns what
    one process learns.
    """
    for ranks, turns in TURNS.items():
        run_ranks(train_in_turns, ranks, str(tmp_path), turns, ranks=ranks)
    alone_rt = FolderRuntime(tmp_path / "alone")
    alone = train_toy(alone_rt, **LEG)["weights"]
    straight = torch.load(tmp_path / "fsdp-0.pt", weights_only=True)["weights"]
    for name in {name for turns in TURNS.values() for name, _, _ in turns}:
        found = torch.load(tmp_path / f"{name}-0.pt", weights_only=True)["weights"]
        assert largest_difference(found, alone) < 1e-5, name
        if name in ("fsdp-cut", "fsdp-offloaded"):
            assert largest_difference(found, straight) == 0.0
        kept, expected = (_averages(FolderRuntime(tmp_path / run)) for run in (name, "fsdp"))
        assert kept.keys() == expected.keys() == _averages(alone_rt).keys() and len(kept) == 8
        assert all(largest_difference(kept[file], expected[file]) < 1e-5 for file in kept), name
        if name in ("fsdp-cut", "fsdp-offloaded"):
            assert all(largest_difference(kept[file], expected[file]) == 0.0 for file in kept), name


def _averages(rt: FolderRuntime) -> dict[str, dict[str, Tensor]]:
    """The averages that a run kept, by their files."""
    return {path.name: load_file(path) for path in Path(rt.averages.uri).rglob("*.safetensors")}


def test_training_moves_the_weights(alone: dict[str, dict[str, Any]]) -> None:
    initial = {f"{n}.{k}": v for n, module in Toy(False).trainable.items() for k, v in module.state_dict().items()}
    for case, result in alone.items():
        assert largest_difference(initial, result["weights"]) > 1e-3, case
        assert result["weights"]["network.log_scale"] <= 0.51


def test_four_micro_batches_are_one_batch(tmp_path: Path) -> None:
    one = train_toy(FolderRuntime(tmp_path / "1"), noise=False)
    four = train_toy(FolderRuntime(tmp_path / "4"), noise=False, micro_batch_size=BATCH // 4)
    assert largest_difference(one["weights"], four["weights"]) < 1e-5


def test_groups_of_ranks_must_come_out_even() -> None:
    with pytest.raises(ValueError, match=r"resources\.shard_over 3 does not divide the 4 training ranks; .* or to all"):
        Resources(shard_over=3).shards(4)
    assert [Resources(shard_over=over).shards(4) for over in (1, 2, 4, "all")] == [1, 2, 4, 4]
    assert Resources(shard_over=8).shards(1) == 1


def test_sharpness_needs_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.Sharded, "__init__", lambda self, objective, rt, shards: None)
    rt = FolderRuntime(tmp_path, world_size=2)
    with pytest.raises(ValueError, match=r"train\.sam_rho .*; set resources\.shard_over to 1"):
        train_toy(rt, noise=False, shard_over="all", sam_rho=0.1)


def test_networks_without_blocks_are_not_sharded(tmp_path: Path) -> None:
    toy = Toy(False)
    toy.trainable = {"network": nn.Linear(3, 3)}
    with pytest.raises(ValueError, match=r"resources\.shard_over: .* no blocks to shard; set it to 1, or put"):
        spread(toy, FolderRuntime(tmp_path, world_size=2), Resources(shard_over="all"))
