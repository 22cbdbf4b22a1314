"""What the whole stack costs beside a bare PyTorch loop, which computes the same steps.

    python tests/benchmarks/bench_train.py [--launcher ray|local] [--gpu] [--starts 6] [--pairs 10] [--block 20]

A stage is trained as `genpipe run` trains it: in a Ray Train worker (or by `run_local`), with the loader, MLflow's
records and checkpoints. In blocks of some steps it takes turns with a process that has the same model, batch,
optimizer, clipping and average, and nothing else; whoever has no turn is stopped, with all its processes. Expect a
ratio of at most 1.03. What starting takes is told apart. On a machine that others use, too, believe the CPU time.
On a GPU both train a DiT-B/2 in bf16; the host runs ahead of it, so that single steps are not told.

Two processes that compute the same differ by some percent, each as long as it lives, so both sides are started several
times. Blocks last seconds, so that timers that came due while a side was stopped take a small part of them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from benchmarks import clocked_stage  # noqa: E402

from genpipe.launch.local import run_local, spec_of_stage  # noqa: E402
from genpipe.launch.local_ray import ALONE, TUNING  # noqa: E402
from genpipe.launch.process import keep_freed_memory  # noqa: E402
from genpipe.launch.run_stage import execute  # noqa: E402

DECAY, CLIP, LR = 0.999, 1.0, 1e-3
WARM = 3
"""Blocks of either side that are not counted."""


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    size: str
    batch: int
    precision: str
    gpus: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")

    @property
    def flags(self) -> list[str]:
        return ["--gpu"] if self.gpus else []

    @property
    def pipeline(self) -> str:
        return f"""
name: bench
stages:
  clocked:
    kind: benchmarks.clocked_stage
    size: {self.size}
    train:
      samples: 1000000000
      global_batch_size: {self.batch}
      optim: {{kind: adamw, lr: {LR}}}
      decay: constant
      grad_clip: {CLIP}
      ema_decay: {DECAY}
      precision: {self.precision}
    observe: {{log_every: 10, validate_every: 0}}
    resources: {{cpus: 1, gpus: {self.gpus}, checkpoint_seconds: 60}}
"""


ON_CPU = Case(size="small", batch=16, precision="fp32", gpus=0)
ON_GPU = Case(size="base", batch=64, precision="bf16", gpus=1)


def run_stack(case: Case, launcher: str, folder: Path, settings: Sequence[str]) -> None:
    """The stage, as a job's driver runs it."""
    (folder / "bench.yaml").write_text(case.pipeline)
    spec = spec_of_stage(str(folder / "bench.yaml"), "clocked", [f"store={folder / 'store'}", *settings])
    if launcher == "local":
        run_local(spec)
        return
    os.environ.update(TUNING | ALONE)  # as a run starts its own Ray
    import ray

    from genpipe.launch.ray import RayLauncher

    ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_port=0, _temp_dir=str(folder / "ray"))
    execute(spec, RayLauncher("bench"))


def run_bare(case: Case, address: str, block: int) -> None:
    """The same steps: model, data in memory, AdamW, clipping, an average of the weights."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    keep_freed_memory()
    torch.manual_seed(0)
    device = case.device
    objective = clocked_stage.Objective(clocked_stage.Clock(address, block=block), case.size, device)
    model = objective.model
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    rng, generator = np.random.default_rng(0), torch.Generator(device).manual_seed(0)
    for number in count():
        images = clocked_stage.images(case.size, rng.integers(clocked_stage.SAMPLES, size=case.batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            step = clocked_stage.Step(number * case.batch, generator)
            loss, _ = objective.loss("dit", {"images": images.to(device)}, step)
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
        # In a session of its own, so that what interrupts the measurement does not end the side that has its turn.
        started = subprocess.Popen([sys.executable, __file__, *arguments], start_new_session=True)
        self.driver = psutil.Process(started.pid)
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
def both(case: Case, launcher: str, folder: Path, block: int) -> Iterator[tuple[Side, Side]]:
    """The stack and the bare loop, started and stopped."""
    address = str(folder / "clock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    settings = [f"stages.clocked.clock={address}", f"stages.clocked.block={block}"]
    stack = Side([*case.flags, "--as-stack", str(folder), "--launcher", launcher, *settings], server)
    try:
        bare = Side([*case.flags, "--as-bare", address, "--block", str(block)], server)
        try:
            yield stack, bare
        finally:
            bare.end()
    finally:
        stack.end()


def interval(stack: np.ndarray, bare: np.ndarray) -> str:
    """The ratio of the two sides' blocks, float [S, N] seconds each, with a 95 % interval over resampled starts.

    Over its pairs, if there was one start: that leaves out by how much a process is slower or faster than its like.
    """
    if len(bare) == 1:
        stack, bare = stack.T, bare.T
    drawn = np.random.default_rng(0).integers(len(bare), size=(10_000, len(bare)))
    ratios = stack.sum(1)[drawn].sum(1) / bare.sum(1)[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{stack.sum() / bare.sum():.3f} [{low:.3f}, {high:.3f}]"


def checkpoints(folder: Path) -> set[str]:
    """Those that there are, begun or whole."""
    return {str(path) for path in (folder / "store").glob("work/**/checkpoints/**/*")}


Blocks = dict[str, list[dict[str, Any]]]
"""What either side told of each of its turns."""


def compare(case: Case, launcher: str, *, starts: int, pairs: int, block: int) -> None:
    """Measure, and print what came out."""
    enough: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # what there is by then is told, and both sides are ended
        signal.signal(number, lambda received, _: enough.append(received))
    found: list[Blocks] = []
    while len(found) < starts and not enough:
        blocks = turns(case, launcher, pairs=pairs, block=block, enough=enough)
        if len(blocks["bare"]) == pairs or (blocks["bare"] and not found):
            found.append(blocks)
            print(f"  ratio by the clock {ratio_of(blocks):.3f}", flush=True)
    if found:
        report(case, launcher, found, block=block)


def turns(case: Case, launcher: str, *, pairs: int, block: int, enough: Sequence[int]) -> Blocks:
    """The blocks of one start of both sides, but for the first WARM."""
    blocks: Blocks = {"stack": [], "bare": []}
    with (
        tempfile.TemporaryDirectory(prefix="bench") as name,
        both(case, launcher, Path(name), block) as (stack, bare),
    ):
        print(f"start: stack {stack.start_seconds:.1f} s, bare loop {bare.start_seconds:.1f} s", flush=True)
        while len(blocks["bare"]) < WARM + pairs and not enough:
            before = checkpoints(Path(name))
            blocks["stack"].append(stack.turn())
            blocks["stack"][-1]["saving"] = checkpoints(Path(name)) != before
            blocks["bare"].append(bare.turn())
    return {side: of[WARM:] for side, of in blocks.items()}


def ratio_of(blocks: Blocks) -> float:
    """Of the two sides' seconds in one start."""
    stack, bare = (sum(sum(turn["steps"]) for turn in blocks[side]) for side in ("stack", "bare"))
    return float(stack / bare)


def report(case: Case, launcher: str, starts: Sequence[Blocks], *, block: int) -> None:
    """Print the ratios, and the steps of either side."""

    def of_turns(told: Callable[[dict[str, Any]], Any]) -> dict[str, np.ndarray]:
        return {side: np.array([[told(turn) for turn in each[side]] for each in starts]) for side in ("stack", "bare")}

    steps, cpu = of_turns(lambda turn: turn["steps"]), of_turns(lambda turn: turn["cpu"])
    wall = of_turns(lambda turn: sum(turn["steps"]))
    saving = np.array([[each["saving"] for each in blocks["stack"]] for blocks in starts])
    pairs = wall["bare"].shape[1]
    print(f"{launcher}: {len(starts)} starts, {pairs} pairs of {block} steps each, {saving.sum()} with a checkpoint")
    for side in ("stack", "bare"):
        typical, each = np.median(wall[side]) / block, cpu[side].sum() / steps[side].size
        print(f"  {side}: {1e3 * typical:.1f} ms a step in the median block, CPU {1e3 * each:.1f} ms a step")
    if not case.gpus:
        report_late(steps, saving)
    each = ", ".join(f"{ratio_of(blocks):.3f}" for blocks in starts)
    print(f"  ratio by the clock {interval(wall['stack'], wall['bare'])}, of the starts {each}")
    print(f"  ratio by CPU time  {interval(cpu['stack'], cpu['bare'])}")


def report_late(steps: dict[str, np.ndarray], saving: np.ndarray) -> None:
    """Print how many steps, float [S, N, B] seconds each, took long; bool [S, N]: the blocks with a checkpoint.

    Each is held against the median of its own start.
    """
    medians = {side: each / np.median(each, (1, 2), keepdims=True) for side, each in steps.items()}
    apart = {"stack without the blocks with a checkpoint": medians["stack"][~saving]}
    for name, each in (medians | apart).items():
        late = each > 1.5
        print(
            f"  {name}: {late.sum()} of {late.size} steps over 1.5 medians, {late[..., 0].sum()} of them the first "
            f"of a block, the longest {each.max():.1f} medians"
        )


def main() -> None:
    """The measurement, or one of its two sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=["ray", "local"], default="ray")
    parser.add_argument("--gpu", action="store_true", help="on one GPU instead of one core")
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--as-stack")
    parser.add_argument("--as-bare")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    case = ON_GPU if given.gpu else ON_CPU
    if given.as_stack:
        run_stack(case, given.launcher, Path(given.as_stack), given.settings)
    elif given.as_bare:
        run_bare(case, given.as_bare, given.block)
    else:
        compare(case, given.launcher, starts=given.starts, pairs=given.pairs, block=given.block)


if __name__ == "__main__":
    main()
