"""The validator of a training stage (`launch/validator.py`) as a task of Ray, beside Ray Train's group."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from genpipe.launch.failure import first_line
from genpipe.launch.placement import options_of, places_beside
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources

if TYPE_CHECKING:
    from genpipe.training.handover import HandOverStore

IDLE_SECONDS, BUSY_SECONDS = 1.0, 0.2
"""Between two looks at whether there is something to validate, and whether the validator still runs and is to."""
KILL_SECONDS = 30.0


@contextmanager
def validator(spec: StageSpec) -> Iterator[None]:
    """During the block a task validates what the ranks hand over, where `resources.validation` asks for it.

    Ray starts it again `max_failures` times, whether it was lost or failed; then the ranks are told to do without.
    """
    resources = Resources.model_validate(spec.config["resources"])
    if resources.validator is None:
        yield
        return
    from genpipe.launch.validator import hand_over_store  # imports torch, which the driver needs for nothing else

    store, ended = hand_over_store(spec), threading.Event()
    store.attend()
    watching = threading.Thread(target=_keep, args=(spec, resources, store, ended), name="validator", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join(KILL_SECONDS)  # what it writes to goes with the work folder


def ranks_beside(resources: Resources) -> int | tuple[int, int]:
    """The ranks to ask Ray Train for; of a range no more than leave a place to the process that validates."""
    if resources.validator is None or isinstance(resources.workers, int):
        return resources.workers
    import ray

    least, most = resources.workers
    fit = places_beside(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    return (least, min(fit, most)) if fit > least else least


def _keep(spec: StageSpec, resources: Resources, store: HandOverStore, ended: threading.Event) -> None:
    """Start the validator and follow it to its end, or until `ended`, when it is killed.

    It takes its place when there is something to validate: of two stages that both hold one before their ranks have
    theirs, neither might get on.
    """
    import ray

    while not _something(store):
        if ended.wait(IDLE_SECONDS):
            return
    assert resources.validator is not None, "asked for"
    lives = {"max_retries": resources.max_failures, "retry_exceptions": True}
    task = ray.remote(_validate).options(**options_of(resources.validator), **lives)
    running = [task.remote(spec.model_dump(mode="json"))]
    while not ray.wait(running, timeout=BUSY_SECONDS)[0]:
        if ended.is_set():
            ray.cancel(running[0], force=True)
            ray.wait(running, timeout=KILL_SECONDS)
            return
    try:
        ray.get(running)
    except Exception as error:
        why = first_line(getattr(error, "cause", None) or error)
        store.give_up(f"the validator was lost or failed {resources.max_failures + 1} times: {why}")


def _something(store: HandOverStore) -> bool:
    """Whether there is something to validate; not while the store is away, which may be back at the next look."""
    with suppress(OSError):
        return bool(store.waiting())
    return False


def _validate(spec: dict[str, Any]) -> None:
    """The validator of a training stage, as a task of Ray."""
    import ray
    import torch

    from genpipe.launch.validator import validate_beside

    validate_beside(StageSpec.model_validate(spec), device=torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
