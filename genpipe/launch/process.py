"""How a process that does a stage's work begins and ends."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from typing import Literal, NoReturn

from genpipe.stage_config import StageConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

CPU_MEMORY = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In the environment of a process that trains on a CPU, on another thread than its first, as Ray Train's ranks do.

Such a thread would allocate in an arena of its own, and glibc gives the memory of those back whatever
`keep_freed_memory` says. And glibc (2.35 or newer) asks for huge pages, which Linux mostly gives to who asks for them:
without, a step spends some percent of its time on finding its pages.
"""


def set_up_process(cfg: StageConfig, *, products: Literal["medium", "high"]) -> None:
    """As many threads as the worker has cores; the precision of fp32 matrix products; memory that is kept."""
    import torch  # here, as not every process that ends by `end_process` has it

    torch.set_num_threads(max(1, int(cfg.resources.cpus)))
    torch.set_float32_matmul_precision(products)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 256 MiB, for the next allocation; nothing on other systems.

    Activations come and go with every step on a CPU. Given back to the kernel each time, they are cleared and mapped
    anew, page by page, for a sixth of a decoder's step.
    """
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it accepts


def end_process(status: int) -> NoReturn:
    """End this process at once, when all that it made is committed.

    Taking the interpreter down would add seconds to every stage, and meanwhile a process group can abort its rank
    ('terminate called without an active exception').
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
