"""What a step of the demo's stages takes with Muon in bf16 and in fp32, on one core.

    python tests/benchmarks/bench_muon.py STAGE... [PATH=VALUE]...

Their inputs must be committed in the store. The two take turns, step by step, on one batch. In CPU time, so that other
work does little harm; medians of twelve steps, and the ratio with the range of what each step of the one is to its
neighbor of the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from statistics import median

import numpy as np
import torch

from genpipe.launch.local import spec_of_stage
from genpipe.launch.process import keep_freed_memory
from genpipe.launch.run_stage import load_checked
from genpipe.models.precision import autocast, products_of
from genpipe.training.objective import Step
from genpipe.training.optim import build_optimizers, step_all

CPU, STEPS, WARM = torch.device("cpu"), 12, 2


def steps(stage: str, overrides: list[str]) -> Iterator[tuple[float, float]]:
    """Seconds of CPU time of a step with Muon in bf16, and of the next one in fp32."""
    spec = spec_of_stage("configs/pipeline/demo.yaml", stage, overrides)
    module, cfg = load_checked(spec)
    objective = module.objective(cfg, spec.inputs, CPU)
    [name] = objective.trainable
    network, rows = objective.trainable[name], np.arange(cfg.train.global_batch_size)
    batch = module.data(cfg, spec.inputs).train.collate(rows, rows)
    optimizers = build_optimizers(network, cfg.train.optim)
    products = products_of(cfg.train.precision, CPU)

    def step(seed: int, dtype: torch.dtype) -> float:
        begun = time.process_time()
        with autocast(CPU, products):
            loss, _ = objective.loss(name, batch, Step(0, torch.Generator().manual_seed(seed)))
        loss.backward()
        step_all(optimizers, share=0.01, skip=torch.tensor(0.0), products=dtype)
        network.zero_grad()
        return time.process_time() - begun

    for seed in range(WARM + STEPS):
        pair = step(seed, torch.bfloat16), step(seed, torch.float32)
        if seed >= WARM:
            yield pair


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    keep_freed_memory()
    overrides = [argument for argument in arguments if "=" in argument]
    for stage in (argument for argument in arguments if "=" not in argument):
        half, full = zip(*steps(stage, overrides), strict=True)
        ratios = sorted(one / other for one, other in zip(half, full, strict=True))
        told = f"{median(half):.3f} s in bf16, {median(full):.3f} s in fp32"
        print(f"{stage}: {told}, ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
