"""Processes that are there in a moment: forks of one that has imported torch and genpipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing as mp

IMPORTED = ("pytest", "hypothesis", "torch.distributed.fsdp", "genpipe.launch.local", "genpipe.training.loop")
"""What most of them import, which takes a fresh process seconds."""


def forkserver() -> ForkServerContext:
    """What starts such processes. Their environment is that of this process when it started the first of them."""
    multiprocessing.set_forkserver_preload([*IMPORTED])
    return multiprocessing.get_context("forkserver")


def run_ranks(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Call `work(rank, *arguments)` in so many of them, and wait for all; raises what one of them raised.

    `work` is a module's own, and found there by its name.
    """
    forkserver()
    mp.start_processes(work, args=arguments, nprocs=ranks, start_method="forkserver")
