"""Who may write for a stage: one attempt at a time, each under a higher fencing number than the one before.

In the stage's work folder `lease/claims/NUMBER` names the attempt that holds the lease. It takes over by creating the
next number, which one of several who try can do, and then deletes the lower ones; whoever finds its own claim gone has
lost the lease, and `check` says so before every checkpoint, part and commit. The holder renews it by changing
`lease/beats/NUMBER`. It may be taken over once it was given back, once its process is known to be gone, or once nothing
has changed for `LEASE_SECONDS` by the clock of the one who looks: clocks of different machines are never compared, and
jumps of one do not matter.

What remains is a holder that is suspended between its `check` and the write that follows for longer than the lease.
It cannot replace a manifest, which is created and never overwritten.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple

from pydantic import ValidationError

from genpipe import artifacts
from genpipe.config import Config
from genpipe.launch.failure import JobLost, first_line, forget_parts_begun
from genpipe.pipeline.presence import heartbeat, started, this_machine
from genpipe.pipeline.spec import Attempt, StageSpec
from genpipe.storage import Storage, open_storage

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
POLL_SECONDS = 1.0
LEASE = "lease"
CLAIMS, BEATS = f"{LEASE}/claims/", f"{LEASE}/beats/"
GIVEN_BACK = b"given back"


class LeaseLost(JobLost):
    """Another attempt has taken over; this one may write no more."""


class Claim(Config):
    """What a claim says: the attempt, and the process that makes it, to be looked up by others on its machine."""

    attempt: str
    machine: str
    process: int
    started: str


class Holder(NamedTuple):
    """The claim with the highest number, and the last beat of its holder."""

    number: int
    claim: Claim
    beat: bytes


def new_attempt(spec: StageSpec) -> str:
    """An id for an attempt at a stage, which is also that of its Ray job; none is ever given twice."""
    return f"genpipe-{spec.target.kind}-{spec.target.fingerprint[:16]}-{secrets.token_hex(4)}"


@contextmanager
def hold(spec: StageSpec, attempt: str, *, lost: Callable[[LeaseLost], None]) -> Iterator[StageSpec | None]:
    """Hold the lease of a stage during the block, which gets `spec` with its `attempt`.

    Waits while somebody else holds it; yields None once the artifact is committed. `lost` is called on another
    thread when the lease turns out to be lost.
    """
    storage = open_storage(spec.work)
    number = _acquire(spec, storage, attempt)
    if number is None:
        yield None
        return
    held = spec.model_copy(update={"attempt": Attempt(id=attempt, number=number)})
    forget_parts_begun(spec.work)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(held, ended, lost), name="lease", daemon=True)
    renewal.start()
    try:
        yield held
    finally:
        ended.set()
        renewal.join(RENEW_SECONDS)
        with suppress(LeaseLost, OSError):  # it expires by itself
            give_back(held)


def check(spec: StageSpec) -> None:
    """Raise LeaseLost if the attempt of `spec` may no longer write. One that has none has nothing to lose."""
    if spec.attempt is None:
        return
    claim = _claim(open_storage(spec.work), spec.attempt.number)
    if claim is None or claim.attempt != spec.attempt.id:
        raise LeaseLost(f"{spec.name}: {spec.attempt.id} stood still for so long that another attempt has taken over")


def give_back(spec: StageSpec) -> None:
    """Let the next attempt begin at once. Raises LeaseLost."""
    assert spec.attempt is not None, "an attempt that holds the lease"
    check(spec)
    open_storage(spec.work).write(_beat_key(spec.attempt.number), GIVEN_BACK)


def renew(spec: StageSpec, beat: int) -> None:
    """Show that the holder is alive; `beat` differs from the last one. Raises LeaseLost."""
    assert spec.attempt is not None, "an attempt that holds the lease"
    check(spec)
    open_storage(spec.work).write(_beat_key(spec.attempt.number), str(beat).encode())


def leave(lost: LeaseLost) -> None:
    """End this process without a trace in the stage's records, which are the other attempt's now."""
    print(f"error: {lost}", file=sys.stderr, flush=True)
    os._exit(1)


def find_holder(storage: Storage) -> Holder | None:
    """Who holds the lease, or held it last; None if nobody did. `storage` is a work folder."""
    for number in reversed(_numbers(storage)):
        if claim := _claim(storage, number):
            try:
                return Holder(number, claim, storage.read(_beat_key(number)))
            except FileNotFoundError:
                return Holder(number, claim, b"")
    return None


def may_be_held(work: str) -> bool:
    """Whether somebody may be at work: one who has neither given the lease back nor is known to be gone."""
    try:
        holder = find_holder(open_storage(work))
    except OSError:  # it cannot be known now
        return True
    return holder is not None and not Watch().is_over(holder)


def clear_work(spec: StageSpec) -> None:
    """Delete what was kept to resume a stage that is committed now, unless somebody is still at work there."""
    if not may_be_held(spec.work):
        open_storage(spec.work).delete_all()


@contextmanager
def seized(work: str, holder: Holder | None) -> Iterator[bool]:
    """Hold the lease of a work folder during the block after `holder`, the last one, who is gone.

    Yields False, without the lease, if somebody has moved since `holder` was looked up. The folder is deleted at the
    end of a block that ends well.
    """
    storage = open_storage(work)
    number = holder.number + 1 if holder else 1
    if find_holder(storage) != holder or not take(storage, number, f"genpipe-gc-{secrets.token_hex(4)}"):
        yield False
        return
    beats = count(1)
    with heartbeat(lambda: storage.write(_beat_key(number), str(next(beats)).encode()), seconds=RENEW_SECONDS):
        yield True
    storage.delete_all()


class Watch:
    """Tells whether a holder is gone, by what its watcher sees and the watcher's own clock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.seen: Holder | None = None
        self.since = 0.0

    def is_over(self, holder: Holder) -> bool:
        """Whether the lease of `holder`, as it is now, may be taken over."""
        if holder != self.seen:
            self.seen, self.since = holder, self.clock()
        return holder.beat == GIVEN_BACK or _has_died(holder.claim) or self.clock() - self.since > LEASE_SECONDS

    def forget(self) -> None:
        """Begin anew: for a while the store could not be seen, and perhaps not be written either."""
        self.seen = None


def take(storage: Storage, number: int, attempt: str) -> bool:
    """Claim the lease under `number`, and end all lower claims; False if somebody else was faster."""
    claim = Claim(attempt=attempt, machine=this_machine(), process=os.getpid(), started=started(os.getpid()))
    try:
        storage.create(_claim_key(number), claim.model_dump_json().encode())
    except FileExistsError:
        return False
    numbers = _numbers(storage)
    if numbers[-1] > number:  # what was seen before was out of date
        storage.delete(_claim_key(number))
        return False
    for lower in numbers[:-1]:
        storage.delete(_claim_key(lower))
        storage.delete(_beat_key(lower))
    return True


def _acquire(spec: StageSpec, storage: Storage, attempt: str) -> int | None:
    """The number under which `attempt` holds the lease from now on; None once the artifact is committed."""
    watch = Watch()
    told = ""
    while artifacts.committed(spec.target) is None:
        try:
            holder = find_holder(storage)
            number = holder.number + 1 if holder else 1
            if (holder is None or watch.is_over(holder)) and take(storage, number, attempt):
                if artifacts.committed(spec.target) is None:
                    return number
                storage.delete_all()  # what remained of a work that is done
                return None
        except ConnectionError as error:
            if watch.seen is None:
                raise
            print(f"{spec.name}: {first_line(error)}; trying again", file=sys.stderr, flush=True)
            watch.forget()
            holder = None
        if holder is not None and told != holder.claim.attempt:
            told = holder.claim.attempt
            print(f"{spec.name}: waiting for {told}, which makes the same artifact", flush=True)
        time.sleep(POLL_SECONDS)
    return None


def _renew(spec: StageSpec, ended: threading.Event, lost: Callable[[LeaseLost], None]) -> None:
    beat = 0
    while not ended.wait(RENEW_SECONDS):
        beat += 1
        try:
            renew(spec, beat)
        except LeaseLost as error:
            if not ended.is_set():
                lost(error)
            return
        except OSError as error:  # nobody takes over while the store is away: others do not see it, either
            print(f"{spec.name}: the lease was not renewed: {first_line(error)}", file=sys.stderr, flush=True)


def _numbers(storage: Storage) -> list[int]:
    return sorted(int(entry.key.removeprefix(CLAIMS)) for entry in storage.list(CLAIMS))


def _claim(storage: Storage, number: int) -> Claim | None:
    try:
        return Claim.model_validate_json(storage.read(_claim_key(number)))
    except FileNotFoundError:
        return None
    except ValidationError:  # half written, on a file system without links
        return Claim(attempt="", machine="", process=0, started="")


def _claim_key(number: int) -> str:
    return f"{CLAIMS}{number:06d}"


def _beat_key(number: int) -> str:
    return f"{BEATS}{number:06d}"


def _has_died(claim: Claim) -> bool:
    """Whether the claimant is known to be gone: it ran on this machine, and there is no such process any more."""
    return bool(claim.machine) and claim.machine == this_machine() and started(claim.process) != claim.started
