"""Going back: to a checkpoint from before training left its course, to skip what it met there."""

from __future__ import annotations

from dataclasses import replace

from genpipe.training.guard import Verdict
from genpipe.training.runtime import Runtime
from genpipe.training.state import TrainState


def roll_back(state: TrainState, verdict: Verdict, rt: Runtime) -> None:
    """Put `state` back to the newest checkpoint from before the verdict's window, which is skipped from now on.

    What was trained before the window is trained again as it was, so that the outcome does not depend on when
    checkpoints were taken, as long as one that is kept is older than the window; otherwise the window begins at the
    oldest. A run that is killed meanwhile comes to the same verdict again.

    Raises FloatingPointError, on all ranks, if this would be one time more than `train.guard.rollbacks`.
    """
    earlier = state.guard.verdicts
    if len(earlier) >= state.guard.cfg.rollbacks:
        raise FloatingPointError(
            f"{verdict.reason} after {verdict.window[1]} samples, in {state.guard.cfg.steps} steps on end, and "
            f"{len(earlier)} other parts of the data are skipped already; lower train.optim.lr or train.grad_clip, set "
            "train.precision=fp32, or raise train.guard.rollbacks (the last checkpoint is from before this)"
        )
    state.wait(rt)
    if rt.rank == 0:
        rt.checkpoints.rewind(verdict.window[0])
    if not state.resume(rt):
        raise FloatingPointError(
            f"{verdict.reason} after {verdict.window[1]} samples, and there is no checkpoint to go back to"
        )
    verdict = replace(verdict, window=(max(verdict.window[0], state.samples_seen), verdict.window[1]))
    state.guard.verdicts = [*earlier, verdict]
    state.skip_windows()
    state.heldout = {}  # of weights that are no more
    if rt.rank == 0:
        rt.log_event(f"went back, and skip samples {verdict}", samples_seen=verdict.window[1])
        rt.log_environment(facts(state))


def facts(state: TrainState) -> dict[str, str]:
    """What the run must tell of steps and data that were skipped, and of weights that are not the last ones."""
    guard = state.guard
    found = {"skipped_samples": ", ".join(map(str, guard.verdicts)), "skipped_steps": str(guard.skipped_steps or "")}
    if state.best and state.best.value is not None:
        found["weights_of_samples"] = str(state.best.samples_seen)
    return {name: value for name, value in found.items() if value}
