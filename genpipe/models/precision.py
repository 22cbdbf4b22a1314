"""The precision of matrix products: which one is fast on this machine, and where a network must not follow autocast."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""As configured. `auto` is bf16 where the hardware is faster at it than at fp32, fp16 on GPUs that are so at this
alone, else fp32."""

Products = Literal["bf16", "fp16", "fp32"]
"""As used."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

PROBE_SECONDS = 0.02
PROBE_SIZE = {"cpu": 512, "cuda": 4096}
WORTH_CASTING = 1.2
"""Times as fast as fp32 that products in a half precision must be to make up for the casts around them."""


def fp32(device: torch.device) -> AbstractContextManager[object]:
    """Computation in the tensors' own precision, whatever autocast is set to; nothing on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast(device: torch.device, products: Products) -> torch.autocast:
    """Autocast to bf16 or fp16, or none for fp32."""
    half = products != "fp32"
    return torch.autocast(device.type, dtype=DTYPES[products] if half else None, enabled=half)


def products_of(precision: Precision, device: torch.device) -> Products:
    """What a configured precision means on `device`. `auto` is decided by a probe of 0.1 s, once a process.

    fp32 is measured as this process computes it (`torch.set_float32_matmul_precision`, the number of threads).
    """
    return _fastest(device) if precision == "auto" else precision


def gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Billions of floating-point operations a second in products of square matrices of `dtype`: the best of 20 ms."""
    size = PROBE_SIZE.get(device.type, 512)
    matrix = torch.rand(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    best, ends = float("inf"), 0.0
    while best == float("inf") or time.perf_counter() < ends:  # once at the least, however busy the machine is
        begun = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if ends:
            best = min(best, time.perf_counter() - begun)
        ends = ends or time.perf_counter() + PROBE_SECONDS  # the first only warms up
    return 2 * size**3 / best / 1e9


@cache
def _fastest(device: torch.device) -> Products:
    rates = [[gflops(device, dtype) for dtype in (torch.bfloat16, torch.float32)] for _ in range(2)]
    bf16, full = (max(rate) for rate in zip(*rates, strict=True))  # twice, in turn, as others may use the machine
    if bf16 > WORTH_CASTING * full:
        return "bf16"
    fp16 = device.type == "cuda" and gflops(device, torch.float16) > WORTH_CASTING * full  # before Ampere
    return "fp16" if fp16 else "fp32"
