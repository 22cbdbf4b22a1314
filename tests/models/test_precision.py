"""Which precision `auto` takes, and what a probe of it measures."""

from __future__ import annotations

import time

import pytest
import torch

from genpipe.models import precision
from genpipe.models.precision import autocast, gflops, products_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_measures_what_a_large_product_reaches(dtype: torch.dtype) -> None:
    begun = time.perf_counter()
    found = gflops(CPU, dtype)
    assert time.perf_counter() - begun < 1
    matrix = torch.ones(1024, 1024, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.3:  # emulated bf16 takes seconds a product
        begun = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begun)
    assert 0.2 < found / (2 * 1024**3 / min(seconds) / 1e9) < 5, "other processes take their share of the cores"


def test_the_probe_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    gflops(CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state()), "the first weights are drawn from it"


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"),
    [(28, 138, "fp32"), (450, 110, "bf16"), (217, 55, "bf16"), (100, 100, "fp32")],  # as measured on real processors
)
def test_auto_takes_bf16_where_the_processor_is_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, bf16: float, fp32: float, expected: str
) -> None:
    precision._fastest.cache_clear()
    monkeypatch.setattr(precision, "gflops", lambda device, dtype: bf16 if dtype == torch.bfloat16 else fp32)
    assert products_of("auto", CPU) == expected
    precision._fastest.cache_clear()


def test_auto_takes_fp16_on_gpus_that_are_slow_at_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a V100, in TFLOP/s: fp32 15, bf16 emulated, fp16 100. No processor is asked for fp16."""
    precision._fastest.cache_clear()
    rates = {torch.bfloat16: 11.0, torch.float32: 15.0, torch.float16: 100.0}
    monkeypatch.setattr(precision, "gflops", lambda device, dtype: rates[dtype])
    assert products_of("auto", torch.device("cuda")) == "fp16"
    assert products_of("auto", CPU) == "fp32"
    rates[torch.bfloat16] = 90.0
    precision._fastest.cache_clear()
    assert products_of("auto", torch.device("cuda")) == "bf16"
    precision._fastest.cache_clear()


def test_what_is_asked_for_is_taken_and_autocast_follows() -> None:
    matrix = torch.ones(2, 2)
    for asked, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert products_of(asked, CPU) == asked  # type: ignore[arg-type]
        with autocast(CPU, asked):  # type: ignore[arg-type]
            assert (matrix @ matrix).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast(CPU, "fp32"):
        assert (matrix @ matrix).dtype == torch.float32, "even inside of another autocast"
