"""Validation by another process: the record is that of validation by rank 0, whatever becomes of the other process."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from folder_runtime import CPU, FolderRuntime
from rank_processes import RANKS, defer_toys
from small_objective import G, Small, stream, train_small
from toybox import wait_for

from genpipe.data.loader import Batch
from genpipe.training import deferred
from genpipe.training.checkpoint_store import samples_of
from genpipe.training.deferred import answer
from genpipe.training.handover import HandOverStore
from genpipe.training.loop import Interrupted
from genpipe.training.objective import Validation
from genpipe.training.settings import TrainConfig

STEPS, EVERY = 50, 14
LOOKS = [14 * G, 28 * G, 42 * G]
"""Samples after which training is validated, beside the end."""


class Judged(Small):
    """Its held-out loss depends on every parameter and on the running statistics, and on the noise."""

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        errors = []
        for batch in batches:
            x = torch.stack([batch["x"], torch.randn(len(batch["x"]), generator=generator)], dim=1)
            errors.append((self.model(x)[:, 0] - (3 * batch["x"]).sin()).square().mean())
        loss = float(torch.stack(errors).mean())
        return Validation({"loss": loss}, {"picture": np.full((2, 3, 3), loss.hex().encode()[-6], np.uint8)})


@dataclass
class Recording(FolderRuntime):
    """Notes what is logged of validations, in order, and lets no work in the background be overtaken by training.

    With `waits` training waits for the validator.
    """

    waits: bool = False
    heldout: list[tuple[int, float]] = field(default_factory=list)
    images: list[tuple[int, bytes]] = field(default_factory=list)

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        super().log(metrics, samples_seen=samples_seen)
        if "heldout/loss" in metrics:
            self.heldout.append((samples_seen, metrics["heldout/loss"]))
        for thread in threading.enumerate():
            if thread.name in ("hand-over", "validations", "checkpoint"):
                thread.join()
        if self.waits:
            wait_for(lambda: not self.handovers.waiting())

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        super().log_images(images, samples_seen=samples_seen)
        self.images.append((samples_seen, images["picture"].tobytes()))


def attended(folder: Path, **settings: Any) -> Recording:
    rt = Recording(folder, step=G, **settings)
    rt.handovers.attended = True
    return rt


def trained(rt: FolderRuntime, **settings: Any) -> dict[str, torch.Tensor]:
    given = {"steps": STEPS, "log_every": 1, "validate_every": EVERY * G, "build": Judged, "ema_decay": 0.5}
    return train_small(stream(), rt, **given | settings)


@contextmanager
def validator(store: HandOverStore) -> Iterator[list[int]]:
    """Validates what is handed over, in a thread; yields the samples of what it has."""
    objective, ended, done = Judged(), threading.Event(), list[int]()

    def work() -> None:
        while not ended.wait(0.01):
            for name in store.waiting()[:1]:
                cfg = TrainConfig(samples=G, global_batch_size=G)
                answer(store, name, objective, stream(), cfg, device=CPU, heldout_samples=8)
                done.append(samples_of(name))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A run that validates in the loop."""
    rt = Recording(tmp_path_factory.mktemp("alone"))
    trained(rt)
    assert [at for at, _ in rt.heldout] == [*LOOKS, STEPS * G]
    assert len({loss for _, loss in rt.heldout}) == len(rt.heldout)
    return rt


def test_a_validator_finds_what_rank_0_finds(alone: Recording, tmp_path: Path) -> None:
    rt = attended(tmp_path / "beside")
    with validator(rt.handovers) as done:
        weights = trained(rt)
    assert done == LOOKS, "the last one is the ranks' own"
    assert rt.heldout == alone.heldout and rt.images == alone.images
    assert rt.events == [] and not rt.handovers.weights.names()
    other = trained(FolderRuntime(tmp_path / "again"))
    assert all(torch.equal(weights[name], other[name]) for name in other)


def test_what_nobody_validates_the_ranks_do(alone: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(deferred, "PATIENCE", 0.0)
    rt = attended(tmp_path)
    trained(rt)
    assert rt.heldout == alone.heldout and rt.images == alone.images
    assert rt.events == ["the validator has found nothing for 0 s; the ranks validate what is left"]


def test_a_validator_that_is_given_up_is_replaced_by_the_ranks(
    alone: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "LOOK_SECONDS", 0.0)
    rt = attended(tmp_path)
    rt.handovers.give_up("the validator was lost")
    trained(rt)
    assert rt.heldout == alone.heldout
    [told] = rt.events
    assert told.startswith("the validator was lost; the ranks validate")
    rt.handovers.attend()
    assert rt.handovers.given_up() == ""


@pytest.mark.parametrize("still_attended", [True, False])
def test_a_resumed_run_logs_every_validation_once(alone: Recording, tmp_path: Path, still_attended: bool) -> None:
    """Also one that has no validator any more."""
    first = attended(tmp_path, stop_at=30 * G)
    with pytest.raises(Interrupted):
        trained(first)
    assert first.heldout == [] and len(first.handovers.waiting()) == 2
    if still_attended:
        second = attended(tmp_path)
        with validator(second.handovers) as done:
            trained(second)
        assert done == LOOKS
    else:
        trained(second := Recording(tmp_path, step=G))
    assert second.heldout == alone.heldout and second.images == alone.images
    third = Recording(tmp_path, step=G, stop_at=G)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(Interrupted):
        trained(third)
    assert third.heldout == [] and third.handovers.results() == [], "of a training that began anew nothing is there"


def test_what_is_trained_again_is_validated_again(alone: Recording, tmp_path: Path) -> None:
    """The newest checkpoint is lost: of what was handed over since the one before nothing is taken."""
    with pytest.raises(Interrupted):
        trained(attended(tmp_path, stop_at=20 * G))
    first = attended(tmp_path, stop_at=30 * G)
    with pytest.raises(Interrupted):
        trained(first)
    before, after = first.handovers.waiting()
    assert [samples_of(before), samples_of(after)] == LOOKS[:2]
    first.handovers.put_result(before, Validation({"loss": 7.0}, {"picture": np.zeros((1, 1, 3), np.uint8)}))
    first.handovers.put_result(after, Validation({"loss": 8.0}))
    shutil.rmtree(tmp_path / "checkpoints" / first.checkpoints.names()[0])
    second = attended(tmp_path)
    with validator(second.handovers):
        trained(second)
    assert second.heldout == [(LOOKS[0], 7.0), *alone.heldout[1:]], "one is taken as it was found, and no other"


def test_results_are_kept_until_a_checkpoint_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed before may lose what it has logged."""
    monkeypatch.setattr(deferred, "LOOK_SECONDS", 0.0)
    first = attended(tmp_path, stop_at=20 * G, waits=True)
    with validator(first.handovers), pytest.raises(Interrupted):
        trained(first)
    assert [at for at, _ in first.heldout] == LOOKS[:1]
    [name] = first.handovers.results()
    second = attended(tmp_path, waits=True)
    with validator(second.handovers):
        trained(second, checkpoint_seconds=1e-9)
    assert [at for at, _ in second.heldout] == [*LOOKS, STEPS * G]
    assert name not in second.handovers.results(), "the new checkpoints hold what was logged"


def test_a_validator_that_is_too_slow_costs_validations(
    alone: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "MOST_WAITING", 1)
    monkeypatch.setattr(deferred, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(deferred, "PATIENCE", 0.0)
    rt = attended(tmp_path)
    trained(rt)
    assert rt.heldout == [alone.heldout[0], alone.heldout[-1]]
    assert rt.events[0].startswith("the validator is 1 validations behind, so that some are left out: give it more")
    assert rt.environment["validations_left_out"] == "2"


def test_a_metric_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    first = attended(tmp_path, stop_at=20 * G)
    with pytest.raises(Interrupted):
        trained(first)
    [name] = first.handovers.waiting()
    first.handovers.put_result(name, Validation({"loss": math.nan, "x": 1.0}))
    with pytest.raises(FloatingPointError, match=f"held-out loss is not finite after {LOOKS[0]} samples"):
        trained(attended(tmp_path))


def test_a_damaged_hand_over_is_passed_over(tmp_path: Path) -> None:
    first = attended(tmp_path, stop_at=20 * G)
    with pytest.raises(Interrupted):
        trained(first)
    [name] = first.handovers.waiting()
    file = Path(first.handovers.weights.uri, name, "rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    second = Recording(tmp_path, step=G)
    trained(second)
    assert [at for at, _ in second.heldout] == [*LOOKS[1:], STEPS * G]
    [told] = second.events
    assert told.startswith("a validation is left out: ") and "differs from the manifest's sha256" in told


@pytest.mark.slow
@pytest.mark.services
def test_sharded_ranks_hand_over_what_one_process_validates(tmp_path: Path) -> None:
    """In the loop, by a validator that has whole weights, and by the ranks after all."""
    mp.spawn(defer_toys, args=(str(tmp_path),), nprocs=RANKS)
    loop, beside, left = (torch.load(tmp_path / f"{case}.pt", weights_only=True) for case in ("loop", "beside", "left"))
    assert loop.keys() == beside.keys() == left.keys() and len(loop) == 2
    assert left == loop
    assert beside == pytest.approx(loop, rel=1e-6)
