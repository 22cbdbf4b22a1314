"""How long a run takes: the arithmetic of its stages at this machine's rate, laid out as their turns come.

An estimate for people. Training is known by its FLOPs; what data stages do is not, so each counts for what the demo's
take beside starting, and a large data set takes longer than is said here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from genpipe import artifacts
from genpipe.models.precision import DTYPES, Precision, gflops, products_of
from genpipe.pipeline.costs import training_flops
from genpipe.pipeline.order import longest_path_first
from genpipe.pipeline.plan import Planned
from genpipe.stages import is_training

STAGE_SECONDS = 10.0
"""Of any stage: its job, its process, its records; and the work of a small data stage."""

ELSE = 0.7
"""What is no product takes as long on a CPU as the products would at this share of their rate in fp32: so it is in the
demo's networks, at 71 to 229 GFLOP/s a core where products alone reach 1,300 in bf16 and 175 in fp32."""

RATE = "samples_per_second"
"""The fact of a trained artifact's environment that says how fast it was made, by all workers together."""


@dataclass(frozen=True)
class Forecast:
    """What each stage of a run that is still to do takes, in seconds, and what it takes of the machine.

    `left` are the stages that have not ended, by what is estimated of their time; those of `running` have begun.
    """

    plans: Sequence[Planned]
    capacity: Mapping[str, float]
    order: Mapping[str, int]
    seconds: Mapping[str, float]
    left: dict[str, float] = field(default_factory=dict)
    running: frozenset[str] = frozenset()

    def total(self) -> float:
        """Seconds until all has ended, if each stage begins as soon as its inputs and its share are there."""
        needs = {p.name: [n for n in p.instance.needs if n in self.left] for p in self.plans if p.name in self.left}
        shares = {p.name: _share(p) for p in self.plans if p.name in self.left}
        return makespan(self.left, needs=needs, shares=shares, capacity=self.capacity, order=self.order,
                        begun=self.running)  # fmt: skip

    def after(self, *, left: Mapping[str, float], running: Sequence[str]) -> Forecast:
        """The same when some stages have ended, and of others it is known what is left."""
        return replace(self, left=dict(left), running=frozenset(running))


def forecast(
    plans: Sequence[Planned], *, capacity: Mapping[str, float], works: Mapping[str, float], probe: bool
) -> Forecast | None:
    """What is to be expected of a run on machines of this `capacity` (CPU, GPU; empty: enough), None if nothing tells.

    The rate is that at which finished trainings of the plan were made, if there are some; else, if it is to `probe`,
    that of this machine, which says nothing of stages on GPUs. `works` is what `order.works_of` gives.
    """
    to_run = [planned for planned in plans if planned.status == "run"]
    reached = _reached(plans)
    seconds = {}
    for planned in to_run:
        resources = planned.instance.cfg.resources
        seconds[planned.name] = STAGE_SECONDS
        if works[planned.name]:
            rate = reached.get(resources.gpus > 0)
            if rate is None and (resources.gpus or not probe):
                return None
            precision = planned.instance.cfg.train.precision  # type: ignore[attr-defined]
            rate = rate or probed(threads=max(1, int(resources.cpus)), precision=precision)
            seconds[planned.name] += works[planned.name] / rate
    order = longest_path_first(plans, works)
    return Forecast(plans, capacity, order, seconds, dict(seconds))


@cache
def probed(*, threads: int, precision: Precision) -> float:
    """FLOP/s that a training stage may reach with so many threads on this machine's CPU; measured once."""
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products, full = gflops(cpu, DTYPES[products_of(precision, cpu)]), gflops(cpu, torch.float32)
    finally:
        torch.set_num_threads(before)
    return 1e9 / (1 / products + 1 / (ELSE * full))


def makespan(
    seconds: Mapping[str, float],
    *,
    needs: Mapping[str, Sequence[str]],
    shares: Mapping[str, Mapping[str, float]],
    capacity: Mapping[str, float],
    order: Mapping[str, int],
    begun: frozenset[str] = frozenset(),
) -> float:
    """Seconds until all stages have ended, if their turns come as `launch.resource_queue` gives them.

    A stage waits for its `needs` and, unless it is `begun`, for its share of the `capacity` (empty: there is enough),
    in its `order`: nobody overtakes. A stage that fits nothing takes all that there is.
    """
    free, now = dict(capacity), 0.0
    waiting, ends = sorted(set(seconds) - begun, key=order.__getitem__), dict[str, float]()
    for name in begun & set(seconds):
        _take(free, shares[name], sign=-1)
        ends[name] = seconds[name]
    while waiting or ends:
        for name in [name for name in waiting if not set(needs[name]) & {*waiting, *ends}]:
            if any(free[kind] < min(amount, capacity[kind]) for kind, amount in shares[name].items() if kind in free):
                break
            _take(free, shares[name], sign=-1)
            waiting.remove(name)
            ends[name] = now + seconds[name]
        if not ends:
            assert not waiting, "a graph without cycles goes on"
            break
        first = min(ends, key=ends.__getitem__)
        now = max(now, ends.pop(first))
        _take(free, shares[first], sign=1)
    return now


def _take(free: dict[str, float], share: Mapping[str, float], *, sign: int) -> None:
    for kind, amount in share.items():
        if kind in free:
            free[kind] += sign * amount


def _share(planned: Planned) -> dict[str, float]:
    resources = planned.instance.cfg.resources
    return resources.taken(resources.max_workers)


def _reached(plans: Sequence[Planned]) -> dict[bool, float]:
    """FLOP/s of one worker in the trainings of a plan that are done, on CPUs and on GPUs: the median of each."""
    rates: dict[bool, list[float]] = {}
    for planned in plans:
        cfg = planned.instance.cfg
        if planned.status != "cached" or not is_training(planned.instance.stage):
            continue
        manifest = artifacts.read_manifest(planned.artifact.uri, check_files=False)
        rate = float(manifest.environment.get(RATE, 0)) if manifest else 0.0
        if rate and cfg.train.samples:  # type: ignore[attr-defined]
            flops = training_flops(planned.instance.stage, cfg, planned.inputs) / cfg.train.samples  # type: ignore[attr-defined]
            rates.setdefault(cfg.resources.gpus > 0, []).append(flops * rate / cfg.resources.max_workers)
    return {on_gpus: statistics.median(found) for on_gpus, found in rates.items()}
