"""What the whole stack costs beside a bare PyTorch loop, which computes the same steps.

    python tests/benchmarks/bench_train.py [--launcher ray|local] [--pairs 60] [--block 5]

A stage is trained as `genpipe run` trains it: in a Ray Train worker (or by `run_local`), with the loader, MLflow's
records and checkpoints. In blocks of some steps it takes turns with a process that has the same model, batch,
optimizer, clipping and average, and nothing else; whoever has no turn is stopped, with all its processes. Expect a
ratio of at most 1.03. What starting takes is told apart. On a machine that others use, too, believe the CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from benchmarks import clocked_stage  # noqa: E402

from genpipe.launch.local import run_local, spec_of_stage  # noqa: E402
from genpipe.launch.process import keep_freed_memory  # noqa: E402
from genpipe.launch.run_stage import execute  # noqa: E402

BATCH, DECAY, CLIP, LR = 16, 0.999, 1.0, 1e-3
WARM = 3
"""Blocks of either side that are not counted."""

PIPELINE = f"""
name: bench
stages:
  clocked:
    kind: benchmarks.clocked_stage
    train:
      samples: 1000000000
      global_batch_size: {BATCH}
      optim: {{kind: adamw, lr: {LR}}}
      decay: constant
      grad_clip: {CLIP}
      ema_decay: {DECAY}
      precision: fp32
    observe: {{log_every: 10, validate_every: 0}}
    resources: {{cpus: 1, checkpoint_seconds: 60}}
"""


def run_stack(launcher: str, folder: Path, settings: Sequence[str]) -> None:
    """The stage, as a job's driver runs it."""
    (folder / "bench.yaml").write_text(PIPELINE)
    spec = spec_of_stage(str(folder / "bench.yaml"), "clocked", [f"store={folder / 'store'}", *settings])
    if launcher == "local":
        run_local(spec)
        return
    import ray

    from genpipe.launch.ray import RayLauncher

    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=str(folder / "ray"))
    execute(spec, RayLauncher("bench"))


def run_bare(address: str, block: int) -> None:
    """The same steps: model, data in memory, AdamW, clipping, an average of the weights."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    keep_freed_memory()
    torch.manual_seed(0)
    objective = clocked_stage.Objective(clocked_stage.Clock(address, block=block))
    model = objective.model
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for number in count():
        batch = {"images": clocked_stage.images(rng.integers(clocked_stage.SAMPLES, size=BATCH))}
        loss, _ = objective.loss("dit", batch, clocked_stage.Step(number * BATCH, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - DECAY)
        objective.after_step()


class Side:
    """One of the two, with all the processes that it started."""

    def __init__(self, arguments: Sequence[str], server: socket.socket) -> None:
        began = time.perf_counter()
        self.driver = psutil.Process((started := subprocess.Popen([sys.executable, __file__, *arguments])).pid)
        server.settimeout(1.0)
        while True:
            with suppress(TimeoutError):
                connection, _ = server.accept()
                break
            assert started.poll() is None, "it ended before its first step"
        connection.setblocking(True)
        self.connection, self.lines = connection, connection.makefile()
        self.pid = json.loads(self.lines.readline())["pid"]
        self.start_seconds = time.perf_counter() - began
        self._signal(signal.SIGSTOP)

    def turn(self) -> dict[str, Any]:
        """A block of steps, from here to where all is stopped again."""
        self._signal(signal.SIGCONT)
        self.connection.sendall(b"g")
        told: dict[str, Any] = json.loads(self.lines.readline())
        self._signal(signal.SIGSTOP)
        return told

    def end(self) -> None:
        """Kill all of it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in [*self.driver.children(recursive=True), self.driver]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def both(launcher: str, folder: Path, block: int) -> Iterator[tuple[Side, Side]]:
    """The stack and the bare loop, started and stopped."""
    address = str(folder / "clock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    settings = [f"stages.clocked.clock={address}", f"stages.clocked.block={block}"]
    stack = Side(["--as-stack", str(folder), "--launcher", launcher, *settings], server)
    try:
        bare = Side(["--as-bare", address, "--block", str(block)], server)
        try:
            yield stack, bare
        finally:
            bare.end()
    finally:
        stack.end()


def interval(stack: np.ndarray, bare: np.ndarray, *, of: str) -> str:
    """The ratio of the two sides' blocks, float [N] seconds each, with a 95 % interval over resampled pairs."""
    pairs = np.random.default_rng(0).integers(len(bare), size=(10_000, len(bare)))
    if of == "median":
        ratio, drawn = np.median(stack / bare), np.median(stack[pairs] / bare[pairs], axis=1)
    else:
        ratio, drawn = stack.sum() / bare.sum(), stack[pairs].sum(1) / bare[pairs].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def checkpoints(folder: Path) -> set[str]:
    """Those that there are, begun or whole."""
    return {str(path) for path in (folder / "store").glob("work/**/checkpoints/**/*")}


def compare(launcher: str, *, pairs: int, block: int) -> None:
    """Measure, and print what came out."""
    enough: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # what there is by then is told, and both sides are ended
        signal.signal(number, lambda received, _: enough.append(received))
    with tempfile.TemporaryDirectory(prefix="bench") as name, both(launcher, Path(name), block) as (stack, bare):
        print(f"start: stack {stack.start_seconds:.1f} s, bare loop {bare.start_seconds:.1f} s", flush=True)
        blocks: dict[str, list[dict[str, Any]]] = {"stack": [], "bare": []}
        while len(blocks["bare"]) < WARM + pairs and not enough:
            before = checkpoints(Path(name))
            blocks["stack"].append(stack.turn())
            blocks["stack"][-1]["saving"] = checkpoints(Path(name)) != before
            blocks["bare"].append(bare.turn())
    counted = {side: found[WARM:] for side, found in blocks.items()}
    pairs = len(counted["bare"])
    wall = {side: np.array([sum(each["steps"]) for each in found]) for side, found in counted.items()}
    cpu = {side: np.array([each["cpu"] for each in found]) for side, found in counted.items()}
    steps = {side: np.concatenate([each["steps"] for each in found]) for side, found in counted.items()}
    saving = np.array([each["saving"] for each in counted["stack"]])
    print(
        f"{launcher}: {pairs} pairs of {block} steps, {saving.sum()} with a checkpoint; 95 % intervals over the pairs"
    )
    for side in ("stack", "bare"):
        typical, each = np.median(steps[side]), cpu[side].sum() / len(steps[side])
        late, longest = 100 * (steps[side] > 1.5 * typical).mean(), steps[side].max() / typical
        print(f"  {side}: median step {1e3 * typical:.1f} ms, CPU {1e3 * each:.1f} ms a step")
        print(f"    {late:.1f} % of the steps over 1.5 medians, the longest {longest:.1f} medians")
    apart = steps["stack"].reshape(pairs, block)[~saving]
    late = (apart > 1.5 * np.median(apart)).mean()
    print(f"  stack without the blocks with a checkpoint: {100 * late:.1f} % of the steps over 1.5 medians")
    print(f"  ratio by the clock, median of pairs {interval(wall['stack'], wall['bare'], of='median')}")
    print(f"  ratio by the clock, in all          {interval(wall['stack'], wall['bare'], of='sum')}")
    print(f"  ratio by CPU time, in all           {interval(cpu['stack'], cpu['bare'], of='sum')}")


def main() -> None:
    """The measurement, or one of its two sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=["ray", "local"], default="ray")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--as-stack")
    parser.add_argument("--as-bare")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    if given.as_stack:
        run_stack(given.launcher, Path(given.as_stack), given.settings)
    elif given.as_bare:
        run_bare(given.as_bare, given.block)
    else:
        compare(given.launcher, pairs=given.pairs, block=given.block)


if __name__ == "__main__":
    main()
