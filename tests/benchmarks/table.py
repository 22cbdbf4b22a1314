"""Contenders measured in turn, round after round, and their ratios with the spread over the rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from genpipe.launch.process import keep_freed_memory


class Rate(NamedTuple):
    """Microseconds a sample: of CPU, all threads together, and of the clock."""

    cpu: float
    wall: float


def measure(contenders: Mapping[str, Callable[[], int]], *, rounds: int) -> dict[str, list[Rate]]:
    """Call each contender once to warm up, then all in turn `rounds` times; a call returns how many samples it did."""
    torch.set_num_threads(1)
    for run in contenders.values():
        run()
    rates: dict[str, list[Rate]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            cpu, wall = time.process_time(), time.perf_counter()
            samples = run()
            spent = Rate(time.process_time() - cpu, time.perf_counter() - wall)
            rates[name].append(Rate(*(1e6 * seconds / samples for seconds in spent)))
    return rates


def show(title: str, rates: Mapping[str, list[Rate]], *, subject: str) -> None:
    """Print each contender's median microseconds, and how many times as fast as it `subject` is (median, range)."""
    rounds = len(rates[subject])
    print(f"\n{title} ({rounds} rounds in turn, warm cache, one thread)")
    print(f"  {'':44}{'CPU us':>10}{'wall us':>10}   {subject} is this many times as fast, by CPU (and by wall)")
    for name, mine in rates.items():
        row = f"  {name:44}{median(rate.cpu for rate in mine):10.1f}{median(rate.wall for rate in mine):10.1f}"
        if name != subject:
            row += f"   {_ratio(mine, rates[subject], 0)} ({_ratio(mine, rates[subject], 1)})"
        print(row)


def _ratio(others: list[Rate], mine: list[Rate], axis: int) -> str:
    ratios = [other[axis] / own[axis] for other, own in zip(others, mine, strict=True)]
    return f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


def single_thread() -> None:
    """What thread pools must be told before they start; and the allocator, as workers of stages tell it."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", WDS_VERBOSE_CACHE="0")
    keep_freed_memory()
