"""Bad steps leave no trace: a run that met them ends as one whose stream had them not."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from folder_runtime import STEP, FolderRuntime
from rank_processes import train_small_ranks
from ranks import run_ranks
from safetensors.torch import load_file
from small_objective import G, Small, stream, train_small
from torch import Tensor

from genpipe.data.loader import Data
from genpipe.training.guard import RECENT, Guard
from genpipe.training.loop import Interrupted
from genpipe.training.settings import GuardConfig

NAN, INF = math.nan, math.inf
THREE = {"guard": {"steps": 3}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_steps_that_are_not_finite_leave_no_trace(tmp_path: Path, optim: str, micro_batch_size: int | None) -> None:
    """In the input, in the loss alone, at the first step and the last: weights, statistics and optimizer state."""
    bad = {0: ("x", NAN), 5: ("x", INF), 6: ("offset", NAN), 11: ("offset", INF)}
    settings: dict[str, Any] = {"optim": {"kind": optim, "lr": 0.01}, "micro_batch_size": micro_batch_size}
    rt = FolderRuntime(tmp_path / "bad")
    found = train_small(stream(bad), rt, steps=12, build=Deaf, **settings)
    expected = train_small(
        stream(left_out=list(bad)), FolderRuntime(tmp_path / "without"), steps=8, build=Deaf, **settings
    )
    assert same(found, expected)
    assert rt.environment["skipped_steps"] == "4"
    assert [values["skipped_steps"] for at, values in sorted(rt.logged.items()) if at % (4 * G) == 0] == [1, 3, 4]
    assert all(math.isfinite(value) for values in rt.logged.values() for value in values.values())


class Deaf(Small):
    """It hears nothing of the noise, which follows from the place in the stream."""

    noise = 0.0


def test_metrics_are_means_over_the_steps_that_count(tmp_path: Path) -> None:
    """Two of the first four steps are bad: the mean is that of the others."""
    fine, coarse = FolderRuntime(tmp_path / "fine"), FolderRuntime(tmp_path / "coarse")
    bad = {1: ("x", NAN), 2: ("offset", INF)}
    train_small(stream(bad), fine, steps=4, log_every=1)
    train_small(stream(bad), coarse, steps=4, log_every=4)
    assert "small/loss" not in fine.logged[2 * G] and "small/grad_norm" not in fine.logged[3 * G]
    for name in ("small/loss", "small/grad_norm", "small/x"):
        kept = [fine.logged[at * G][name] for at in (1, 4)]
        assert coarse.logged[4 * G][name] == pytest.approx(sum(kept) / 2, rel=1e-6)


@pytest.mark.parametrize("checkpoint_seconds", [1e9, 1e-9])
@pytest.mark.parametrize("trouble", [("x", NAN), ("offset", 1e6)])
def test_a_run_of_bad_steps_takes_training_back(
    tmp_path: Path, trouble: tuple[str, float], checkpoint_seconds: float
) -> None:
    """Steps 141 to 143 are bad: 138 to 143 are skipped, wherever the checkpoints lie."""
    bad = dict.fromkeys((141, 142, 143), trouble)
    rt = FolderRuntime(tmp_path / "bad")
    found = train_small(stream(bad), rt, steps=160, build=Deaf, checkpoint_seconds=checkpoint_seconds, **THREE)
    expected = train_small(
        stream(left_out=range(138, 144)), FolderRuntime(tmp_path / "without"), steps=154, build=Deaf, **THREE
    )
    assert same(found, expected)
    told = "small: the loss or a gradient" if trouble[0] == "x" else "small/loss 2.5e+05 is far above its recent range"
    assert rt.environment["skipped_samples"].startswith(f"{138 * G}-{144 * G} ({told}")
    assert rt.logged[160 * G]["rollbacks"] == 1
    assert rt.reported == sorted(set(rt.reported)), "nothing stands twice"


def test_one_loss_far_off_is_no_reason_to_go_back(tmp_path: Path) -> None:
    bad = dict.fromkeys((141, 142, 144, 145), ("offset", 1e6))
    one, other = FolderRuntime(tmp_path / "one"), FolderRuntime(tmp_path / "other")
    found = train_small(stream(bad), one, steps=150, **THREE)
    assert same(found, train_small(stream(), other, steps=150, **THREE)), "an offset changes no gradient"
    assert one.logged[150 * G]["rollbacks"] == 0


Straight = tuple[Data, FolderRuntime, dict[str, Tensor]]


@pytest.fixture(scope="module", params=[("x", NAN), ("offset", 1e6)])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """A stream with a run of bad steps, and a single one before; and a training on it that nothing stopped."""
    torch.set_float32_matmul_precision("highest")
    data = stream({3: ("x", NAN), **dict.fromkeys((141, 142, 143), request.param)})
    rt = FolderRuntime(tmp_path_factory.mktemp("straight"))
    return data, rt, train_small(data, rt, steps=160, **THREE)


@pytest.mark.parametrize("stop_after", [100, 139, 141, 142, 143, 144, 150])
def test_a_resumed_run_comes_to_the_same_verdict(tmp_path: Path, straight: Straight, stop_after: int) -> None:
    """Stopped before, in, and after the run of bad steps, and looked at more often."""
    data, alone, expected = straight
    first = FolderRuntime(tmp_path / "cut", stop_at=(stop_after - 1) * G + STEP)
    second = FolderRuntime(tmp_path / "cut")
    with pytest.raises(Interrupted):
        train_small(data, first, steps=160, log_every=1, **THREE)
    assert max(first.saved()) == (stop_after * G if stop_after != 144 else G), "at once where training went back to"
    found = train_small(data, second, steps=160, **THREE)
    assert same(found, expected)
    assert second.environment == alone.environment
    assert second.logged[160 * G]["rollbacks"] == 1
    assert second.logged[160 * G]["skipped_steps"] == alone.logged[160 * G]["skipped_steps"] == 1


def test_training_goes_back_a_bounded_number_of_times(tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    bad = dict.fromkeys(range(20, 200), ("x", NAN))
    with pytest.raises(FloatingPointError) as error:
        train_small(stream(bad), rt, steps=200, guard={"steps": 3, "rollbacks": 2})
    told = str(error.value)
    assert told.startswith(f"small: the loss or a gradient is not finite after {29 * G} samples, in 3 steps on end")
    assert "2 other parts of the data are skipped" in told and "lower train.optim.lr" in told
    reason = "small: the loss or a gradient is not finite"
    expected = f"{17 * G}-{23 * G} ({reason}), {20 * G}-{26 * G} ({reason})"
    assert rt.environment["skipped_samples"] == expected
    assert rt.saved(), "finite ones"
    for file in tmp_path.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_the_range_is_by_median_and_deviation() -> None:
    """On quantiles of a normal distribution with mean 5: the limit is 20 deviations above, of one alone."""
    normal = NormalDist(mu=5.0, sigma=0.5)
    losses = [normal.inv_cdf((i + 0.5) / RECENT) for i in range(RECENT)]
    guard = Guard(GuardConfig(steps=1), global_batch_size=G)
    for i, loss in enumerate([*losses[:-1], 1e9]):
        feed(guard, i, loss)
        assert guard.look() is None, "no range yet"
    for i, loss in enumerate([losses[-1], *losses[:16], 14.9]):
        feed(guard, RECENT + i, loss)
        assert guard.look() is None
    feed(guard, 200, 15.1)
    verdict = guard.look()
    assert verdict is not None and verdict.window == (199 * G, 201 * G)


def test_the_range_begins_anew_where_other_modules_are_trained() -> None:
    guard = Guard(GuardConfig(steps=1), global_batch_size=G)
    for i in range(2 * RECENT):
        feed(guard, i, 1.0)
    feed(guard, 2 * RECENT, 100.0, active=("one", "two"))
    assert guard.look() is None


def feed(guard: Guard, step: int, loss: float, active: tuple[str, ...] = ("one",)) -> None:
    guard.note("one", active=active, samples_seen=step * G, loss=torch.tensor(loss), skip=torch.tensor(0.0))


@pytest.mark.services
def test_all_ranks_skip_alike(tmp_path: Path) -> None:
    """What only one rank meets, none applies; and a run of it takes both back."""
    run_ranks(train_small_ranks, str(tmp_path), ranks=2)
    first, second, alone = (torch.load(tmp_path / f"{who}.pt", weights_only=True) for who in ("0", "1", "alone"))
    assert same(first, second)
    for name, tensor in alone.items():
        if "running" not in name:  # a batch norm's are those of its rank
            torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4)
