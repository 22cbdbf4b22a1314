"""The best weights: those of the validation that was best, bitwise, however often training was cut."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runtime import FolderRuntime
from small_objective import G, Small, stream, train_small
from torch import Tensor

from genpipe.data.loader import Batch
from genpipe.training.loop import Interrupted
from genpipe.training.objective import Validation

STEPS, EVERY = 60, 7
LOOKS = [*range(EVERY, STEPS, EVERY), STEPS]
"""The steps after which weights are compared: some two multiples of the samples lie within the steps."""

AVERAGE = {"ema_decay": 0.5, "optim": {"kind": "adamw", "lr": 0.05}}


class Measured(Small):
    """Its held-out loss goes up and down at this rate."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        errors = []
        for batch in batches:
            x = torch.stack([batch["x"], torch.zeros_like(batch["x"])], dim=1)
            errors.append((self.model(x)[:, 0] - (3 * batch["x"]).sin()).square().mean())
        return Validation({"loss": float(torch.stack(errors).mean())})


def trained(folder: Path, *, steps: int = STEPS, rt: FolderRuntime | None = None, **settings: Any) -> dict[str, Tensor]:
    return train_small(stream(), rt or FolderRuntime(folder), steps=steps, build=Measured, **AVERAGE, **settings)


def best(**settings: Any) -> dict[str, Any]:
    return {"every": EVERY * G, "heldout_samples": 8, **settings}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, dict[str, Tensor]]]:
    """Trainings that end where a long one looks: their last held-out losses, and their weights."""
    found = {}
    for steps in LOOKS:
        rt = FolderRuntime(tmp_path_factory.mktemp("prefix"))
        weights = trained(rt.work, steps=steps, rt=rt)
        found[steps] = (rt.logged[steps * G]["heldout/loss"], weights)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("goal", ["min", "max"])
def test_the_weights_are_those_of_the_best_validation(
    goal: str, prefixes: dict[int, tuple[float, dict[str, Tensor]]], tmp_path: Path
) -> None:
    choose = min if goal == "min" else max
    steps = choose(prefixes, key=lambda steps: prefixes[steps][0])
    rt = FolderRuntime(tmp_path)
    weights = trained(tmp_path, rt=rt, best=best(goal=goal))
    assert same(weights, prefixes[steps][1]) and not same(weights, prefixes[STEPS if steps != STEPS else EVERY][1])
    assert rt.environment["weights_of_samples"] == str(steps * G)
    looked = {at // G: values["heldout/loss"] for at, values in rt.logged.items() if "heldout/loss" in values}
    assert looked == {steps: loss for steps, (loss, _) in prefixes.items()}


def test_both_goals_end_at_other_weights(prefixes: dict[int, tuple[float, dict[str, Tensor]]]) -> None:
    """So that the test above tells the best from the last."""
    losses = [loss for loss, _ in prefixes.values()]
    assert len(set(losses)) == len(losses) and losses.index(max(losses)) != len(losses) - 1


@pytest.mark.parametrize("goal", ["min", "max"])
@pytest.mark.parametrize("cut", [EVERY - 1, EVERY, 3 * EVERY + 1, STEPS - 1])
def test_a_resumed_run_ends_at_the_same_weights(goal: str, cut: int, tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight", best=best(goal=goal), log_every=1)
    with pytest.raises(Interrupted):
        rt = FolderRuntime(tmp_path / "cut", stop_at=cut * G, step=G)
        trained(tmp_path / "cut", rt=rt, best=best(goal=goal), log_every=1)
    rt = FolderRuntime(tmp_path / "cut")
    assert same(trained(tmp_path / "cut", rt=rt, best=best(goal=goal), log_every=1), straight)
    assert min(at for at, values in rt.logged.items() if "small/loss" in values) == (cut + 1) * G, "it went on"


@pytest.mark.parametrize("patience", [EVERY * G, 3 * EVERY * G])
def test_training_ends_when_nothing_is_better_for_so_long(
    patience: int, prefixes: dict[int, tuple[float, dict[str, Tensor]]], tmp_path: Path
) -> None:
    expected = last = 0
    for steps in LOOKS:  # as a person would look at the losses
        last = steps
        if not expected or prefixes[steps][0] > prefixes[expected][0]:
            expected = steps
        if steps * G - expected * G >= patience:
            break
    rt = FolderRuntime(tmp_path)
    weights = trained(tmp_path, rt=rt, best=best(goal="max", patience=patience))
    assert last < STEPS and max(rt.logged) == last * G
    assert same(weights, prefixes[expected][1])
    with pytest.raises(Interrupted):
        cut = FolderRuntime(tmp_path / "cut", stop_at=(last - 1) * G, step=G)
        trained(cut.work, rt=cut, best=best(goal="max", patience=patience), log_every=1)
    rt = FolderRuntime(tmp_path / "cut")
    assert same(trained(rt.work, rt=rt, best=best(goal="max", patience=patience), log_every=1), weights)
    assert max(rt.logged) == last * G


def test_a_metric_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.best\.metric: validation gives no 'psnr'; it gives loss"):
        trained(tmp_path, best=best(metric="psnr"))
