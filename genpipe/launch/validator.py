"""The process beside the ranks that validates what they hand over (`training/deferred.py`), whoever starts it.

It knows only the work folder: it may be killed at any time, and another one goes on where it was.
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial

import torch

from genpipe.launch import lease
from genpipe.launch.failure import first_line
from genpipe.launch.process import set_up_process
from genpipe.pipeline.code import check_code
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import load_stage
from genpipe.storage import join
from genpipe.training.checkpoint_store import insisting
from genpipe.training.deferred import answer
from genpipe.training.handover import HandOverStore

POLL_SECONDS = 0.5


def hand_over_store(spec: StageSpec, *, attended: bool = False) -> HandOverStore:
    """Where the ranks of a stage and its validator meet."""
    return HandOverStore(join(spec.work, "validations"), attended=attended, fence=partial(lease.check, spec))


def validate_beside(spec: StageSpec, *, device: torch.device) -> None:
    """Validate what the ranks of a stage hand over, the oldest first, until somebody ends this process.

    Numbers are those that rank 0 would find: the weights, samples, noise, precision and number of threads are its own.
    Raises whatever the stage raises, and LeaseLost once another attempt has taken over.
    """
    check_code(spec)
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    set_up_process(cfg, products="medium")
    torch.manual_seed(cfg.train.seed)
    objective, data = stage.objective(cfg, spec.inputs, device), stage.data(cfg, spec.inputs)
    store = hand_over_store(spec)

    def validate(name: str) -> None:
        answer(store, name, objective, data, cfg.train, device=device, heldout_samples=cfg.observe.heldout_samples)

    while True:
        waiting = _waiting(store)
        if not waiting:
            time.sleep(POLL_SECONDS)
            continue
        try:
            insisting(partial(validate, waiting[0]), canceled=threading.Event())
        except Exception:
            lease.check(spec)
            if waiting[0] in store.waiting():  # otherwise the ranks have taken it back
                raise


def _waiting(store: HandOverStore) -> list[str]:
    """What waits to be validated; nothing while the storage is away, which may well be back at the next look."""
    try:
        return store.waiting()
    except OSError as error:
        print(f"cannot look for what is to be validated: {first_line(error)}", file=sys.stderr, flush=True)
        return []
