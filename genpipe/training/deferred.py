"""Validation while training goes on, by a process beside the ranks, which hand averaged weights over and do not wait.

What is handed over is written as a checkpoint is, by all ranks in the background, and what the validator finds comes
back as a file of the same name. Rank 0 logs it at the samples that the weights have seen, in their order, so that the
record is that of a rank 0 that validates by itself. A hand-over stays until it is validated, and what was found until
there is a checkpoint that is newer than its record: a process that is killed loses nothing.

Ranks never wait for a validator that falls behind: while `MOST_WAITING` hand-overs wait, validations are left out, and
the run says so. If there is no validator any more, or none that comes to an end, the ranks do what it has left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from genpipe.data.loader import Data
from genpipe.training.background import Background
from genpipe.training.checkpoint import Checkpoint, Snapshot
from genpipe.training.checkpoint_store import Canceled, samples_of
from genpipe.training.handover import MOST_WAITING, HandOverStore
from genpipe.training.objective import Objective, Validation
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.sharding import local
from genpipe.training.slices import local_piece, share_of
from genpipe.training.state import TrainState, agreed
from genpipe.training.validation import check_finite, measure, record

LOOK_SECONDS = 1.0
PATIENCE_SECONDS, PATIENCE = 120.0, 10.0
"""How long the end waits for one result: so long, or so many times as long as a validation takes the ranks."""


class Check(Protocol):
    """Validates the averages that the state has, on all ranks."""

    def __call__(self, *, samples_seen: int) -> Validation:
        """Every rank calls it; rank 0 gets what is found. `samples_seen` is for people."""
        ...


class Deferred:
    """One rank's part in validations that another process does. Rank 0 keeps the books."""

    def __init__(self, rt: Runtime, state: TrainState, check: Check) -> None:
        self.rt, self.state, self.check = rt, state, check
        self.store, self.attended = rt.handovers, rt.handovers.attended
        self._snapshot = Snapshot()
        self._looking, self._look_at = Background(), 0.0
        self._waiting: list[str] = []
        """Names of hand-overs whose results are not logged, oldest first."""
        self._found: dict[str, Validation] = {}
        self._logged: list[tuple[str, int]] = []
        """Names whose results are logged, and how many samples training had seen then."""
        self._gone = ""
        self._left_out = 0

    @classmethod
    def resumed(cls, rt: Runtime, state: TrainState, check: Check) -> Deferred:
        """With what earlier attempts handed over, up to where the state is; every rank calls it.

        What is newer is forgotten: it is trained again, perhaps otherwise.
        """
        deferred = cls(rt, state, check)
        deferred._take_up()
        return deferred

    def _take_up(self) -> None:
        if self.rt.rank == 0:
            self.store.weights.clear()
            for name in sorted({*self.store.weights.names(), *self.store.results()}):
                if samples_of(name) > self.state.samples_seen:
                    self.store.delete(name)
                else:
                    self._waiting.append(name)
        if not self.attended:
            self._catch_up()

    def validate(self) -> None:
        """Hand the averages of now over, or validate them here; every rank calls it."""
        if not self._handed_over():
            found = self.check(samples_seen=self.state.samples_seen)
            record(found, self.rt, samples_seen=self.state.samples_seen)
            self.state.heldout = found.metrics

    def _handed_over(self) -> bool:
        """Whether the averages of now are the validator's to validate."""
        if not self.attended:
            return False
        self.rt.enter("validation")
        gone, full = agreed(self.rt, self._situation() if self.rt.rank == 0 else None)
        if gone:
            self.attended = False
            self.state.handing.wait()
            self._catch_up()
            return False
        if not full:
            self._begin()
        return True

    def poll(self) -> None:
        """Log what has come back, and look for more in the background: rank 0's part, for which nobody waits."""
        if not self._waiting and not self._logged:
            return
        self._log_found()
        if not self._looking.busy and time.monotonic() >= self._look_at:
            self._looking.start(self._look, name="validations")
            self._look_at = time.monotonic() + LOOK_SECONDS

    def finish(self, *, samples_seen: int) -> Validation:
        """The last validation, of weights of `samples_seen`, by the ranks; every rank calls it.

        It is recorded after all that were handed over, which are waited for, though not for ever.
        """
        begun = time.monotonic()
        last = self.check(samples_seen=samples_seen)
        patience = max(PATIENCE_SECONDS, PATIENCE * (time.monotonic() - begun))
        if self.attended:
            self.rt.enter("validation")
            self.state.handing.wait()
            if self.rt.rank == 0:
                self._await(patience)
            self._catch_up()
        if self._left_out:
            self.rt.log_environment({"validations_left_out": str(self._left_out)})
        record(last, self.rt, samples_seen=samples_seen)
        return last

    def _situation(self) -> tuple[bool, bool]:
        """Whether there is no validator any more, and whether it has enough to do; both are told once."""
        self._log_found()
        if self._gone:
            self.rt.log_event(f"{self._gone}; the ranks validate", samples_seen=self.state.samples_seen)
            return True, False
        full = len(self._waiting) >= MOST_WAITING or self.state.handing.busy
        self._left_out += full
        if full and self._left_out == 1:
            told = f"the validator is {len(self._waiting)} validations behind, so that some are left out"
            remedy = "give it more resources (resources.validation), or raise observe.validate_every"
            self.rt.log_event(f"{told}: {remedy}", samples_seen=self.state.samples_seen)
        return False, full

    def _begin(self) -> None:
        """Copy this rank's share of the averages aside, and have it put in place in the background."""
        self.state.handing.wait()
        share = share_of(averaged(self.state), rank=self.rt.rank, world_size=self.rt.world_size)
        self._snapshot.copy(share, {"products": self.state.products}, device=self.rt.device)
        self.state.handing.start(partial(self._write, self.state.new_name()), name="hand-over")

    def _write(self, name: str) -> None:
        """Put this rank's part in place, in the background."""
        try:
            self.store.weights.put(
                name,
                self._snapshot,
                rank=self.rt.rank,
                world_size=self.rt.world_size,
                metrics={},
                canceled=self.state.handing.canceled,
            )
            if self.rt.rank == 0:
                self._waiting.append(name)
        except Canceled:
            pass
        except OSError as error:
            if self.rt.rank == 0:
                self._left_out += 1
                told = f"a validation is left out, as the averages could not be handed over: {error}"
                self.rt.log_event(told, samples_seen=samples_of(name))

    def _look(self) -> None:
        """Fetch what has come back, and delete what nobody needs any more."""
        try:
            for name in [name for name in self._waiting if name not in self._found]:
                found = self.store.result(name)
                if found is None:
                    break
                self.store.weights.delete(name)
                self._found[name] = found
            self._gone = self._gone or self.store.given_up()
            for name, at in [(name, at) for name, at in self._logged if self.state.newest > at]:
                self.store.delete(name)
                self._logged.remove((name, at))
        except OSError as error:
            print(f"cannot look for validations: {error}", flush=True)

    def _log_found(self) -> None:
        """Log what has come back, up to the first that has not. Raises FloatingPointError if it is not finite."""
        while self._waiting and self._waiting[0] in self._found:
            self._log(self._waiting[0], self._found.pop(self._waiting[0]))

    def _log(self, name: str, found: Validation) -> None:
        check_finite(found, samples_seen=samples_of(name))
        record(found, self.rt, samples_seen=samples_of(name))
        self._waiting.remove(name)
        self._logged.append((name, self.state.samples_seen))

    def _await(self, patience: float) -> None:
        """Log what comes back until all has, or nothing did for so many seconds, or there is no validator any more."""
        until = time.monotonic() + patience
        while self._waiting and not self._gone and time.monotonic() < until:
            before = len(self._waiting)
            self._looking.wait()
            self._look()
            self._log_found()
            if len(self._waiting) < before:
                until = time.monotonic() + patience
            elif self._waiting:
                time.sleep(LOOK_SECONDS / 10)
        if self._waiting:
            why = self._gone or f"the validator has found nothing for {patience:.0f} s"
            self.rt.log_event(f"{why}; the ranks validate what is left", samples_seen=self.state.samples_seen)

    def _catch_up(self) -> None:
        """Validate what is left; every rank calls it."""
        for name in agreed(self.rt, self._left() if self.rt.rank == 0 else None):
            with _in_place(self.store.weights.open(name), self.state):
                found = self.check(samples_seen=samples_of(name))
            if self.rt.rank == 0:
                self._log(name, found)
                self.store.weights.delete(name)

    def _left(self) -> list[str]:
        """What is still to be validated; what is damaged is passed over."""
        self._looking.wait()
        self._look()
        self._log_found()
        for name in list(self._waiting):
            if fault := self.store.weights.fault(name, rank=0, world_size=1):
                self.rt.log_event(f"a validation is left out: {fault}", samples_seen=samples_of(name))
                self._waiting.remove(name)
                self.store.delete(name)
        return list(self._waiting)


def answer(
    store: HandOverStore,
    name: str,
    objective: Objective,
    data: Data,
    cfg: TrainConfig,
    *,
    device: torch.device,
    heldout_samples: int,
) -> None:
    """Validate a hand-over with an objective of the same sizes, whose weights it replaces: the validator's part."""
    handed = store.weights.open(name)
    modules = objective.trainable.items()
    here = {f"{module}/{key}": tensor for module, of in modules for key, tensor in of.state_dict().items()}
    handed.load({key: local_piece(here[key]) for key in handed.shapes})
    products = handed.record["products"]
    found = measure(
        objective, objective.validate, data, cfg, device=device, products=products, heldout_samples=heldout_samples
    )
    if name in store.weights.names():  # otherwise the ranks want it no more
        store.put_result(name, found)


def averaged(state: TrainState) -> dict[str, Tensor]:
    """What validation sees of a state, by MODULE/NAME: averaged parameters, and buffers as they are."""
    found: dict[str, Tensor] = {}
    for name, module in state.trainable.items():
        parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
        seen = {key: tensor for key, tensor in module.state_dict().items() if key not in parameters}
        seen |= state.emas[name].weights()
        found |= {f"{name}/{key}": tensor for key, tensor in seen.items()}
    return found


@contextmanager
def _in_place(handed: Checkpoint, state: TrainState) -> Iterator[None]:
    """In the block validation sees what was handed over."""
    seen = averaged(state)
    kept = {name: local(tensor).clone() for name, tensor in seen.items()}
    handed.load({name: local_piece(tensor) for name, tensor in seen.items()})
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in seen.items():
                local(tensor).copy_(kept[name])
