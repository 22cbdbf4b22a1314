"""When a fault strikes: at something that was seen to happen, and a seeded while after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from chaos import processes
from chaos.lab import SAMPLES, Case

Moment = Literal["starting", "mapping", "training", "validating", "saving", "committing", "committed"]
PATIENCE_SECONDS = 600.0
T = TypeVar("T")


class Missed(Exception):
    """The run ended before the moment came."""


def wait_for_moment(case: Case, moment: Moment) -> str:
    """Return when the moment has come; what it was, for people. Raises Missed, or TimeoutError."""
    draw = case.random.uniform
    if moment == "starting":
        if case.launcher == "pipeline":
            _until(case, lambda: processes.of_role("driver"))
        return _after(draw(0.2, 8.0 if case.launcher == "pipeline" else 3.0), "of starting")
    if moment == "mapping":
        count = case.random.randint(0, 4)
        _until(case, lambda: len(_parts(case)) >= count and processes.of_role("data worker"))
        return _after(draw(0.0, 0.3), f"after {count} parts")
    if moment == "validating":
        _until(case, lambda: processes.of_role("validator"))
        return _after(draw(0.0, 8.0), "of a process that validates")
    if moment in ("committing", "committed"):
        wanted = "" if moment == "committing" else "manifest.json"
        _until(case, lambda: any(key.endswith(wanted) for key in case.keys("artifacts/decoder/")))
        return _after(draw(0.0, 0.03 if moment == "committing" else 0.3), moment)
    samples = round(draw(0.05, 0.9) * SAMPLES)
    seen = _until(case, lambda: (case.progress() or 0) >= samples and case.checkpoints())
    if moment == "saving":
        _until(case, lambda: set(case.checkpoints()) - set(seen))
        return _after(draw(0.0, 0.03), f"of saving after {case.progress()} samples")
    return _after(draw(0.0, 0.25), f"after {case.progress()} samples")


def _parts(case: Case) -> list[str]:
    """The keys of finished parts of the data stage."""
    return [key for key in case.keys("artifacts/toy_data/") if key.endswith(".npy")]


def _after(seconds: float, what: str) -> str:
    time.sleep(seconds)
    return f"{1000 * seconds:.0f} ms {what}"


def _until(case: Case, happened: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := happened()):
        if not case.running():
            raise Missed(f"the run ended first: {case.output()[-500:]}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing to strike at within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.05 if case.launcher == "pipeline" else 0.005)
    return found
