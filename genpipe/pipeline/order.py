"""Which stage goes first where several wait for one machine: the one on the longest remaining path."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from genpipe.pipeline.costs import training_flops
from genpipe.pipeline.plan import Planned
from genpipe.stages import is_training


def work(planned: Planned) -> float:
    """FLOPs that an instance is still to do: those of its training; data stages count for nothing beside them.

    A stage that cannot be stepped on the meta device is reported and counts for nothing, too.
    """
    stage, cfg = planned.instance.stage, planned.instance.cfg
    if planned.status == "cached" or not is_training(stage):
        return 0.0
    try:
        return training_flops(stage, cfg, planned.inputs) / cfg.resources.max_workers
    except Exception as error:  # of any stage, the user's own too; its turn is not worth the run
        print(f"{planned.name}: its work cannot be computed, so its turn is a late one: {error}", file=sys.stderr)
        return 0.0


def works_of(plans: Sequence[Planned]) -> dict[str, float]:
    """The `work` of each instance."""
    return {planned.name: work(planned) for planned in plans}


def longest_path_first(plans: Sequence[Planned], works: Mapping[str, float] | None = None) -> dict[str, int]:
    """The place of each instance, 0 first, by the work on the longest path that begins with it.

    `works` is the `work` of each if it is known. Of equals the one that is planned first goes first. Nothing is
    computed where there is no choice to make.
    """
    if sum(planned.status == "run" for planned in plans) < 3:
        return {planned.name: place for place, planned in enumerate(plans)}
    remaining: dict[str, float] = {}
    for planned in reversed(plans):
        after = (remaining[p.name] for p in plans if planned.name in p.instance.needs)
        own = work(planned) if works is None else works[planned.name]
        remaining[planned.name] = own + max(after, default=0.0)
    names = sorted((planned.name for planned in plans), key=lambda name: -remaining[name])  # a stable sort
    return {name: place for place, name in enumerate(names)}
