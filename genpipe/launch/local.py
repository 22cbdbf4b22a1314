"""Run a stage in this process, or under torchrun in as many as it started, with torch alone.

`python -m genpipe.launch.local CONFIG STAGE [PATH=VALUE]...` runs one stage of a pipeline on inputs that are committed,
with neither Ray nor Prefect nor MLflow; under torchrun it is `torchrun --nproc-per-node 8 -m genpipe.launch.local ...`.
Without MLflow, or with `tracking.uri=jsonl`, its metrics are lines of `metrics.jsonl` in the store's folder `runs/`.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import ConfigError
from genpipe.data.prefetch import prefetched
from genpipe.launch import stopping
from genpipe.launch.lease import LeaseLost, leave
from genpipe.launch.process import end_process
from genpipe.launch.rank import train_rank
from genpipe.launch.run_stage import PartWorker, execute, parts_at_once
from genpipe.launch.stopping import StageStopped
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, spec_of
from genpipe.pipeline.presence import heartbeat
from genpipe.pipeline.spec import Progress, StageSpec, read_progress, write_progress
from genpipe.training.agreement import PATIENCE

POLL_SECONDS = 1.0
TELL_SECONDS = 15.0
"""Between two lines that say how far a stage is."""


class LocalLauncher:
    """This process does the work; RANK, WORLD_SIZE and LOCAL_RANK are torchrun's."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.decided = False
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)

    def train(self, spec: StageSpec, run_id: str) -> bool:
        """Train as this process's rank, with the ranks that torchrun started beside it."""
        if self.rank == 0:
            if spec.config["resources"]["validation"]:
                print(f"{spec.name}: only Ray starts a process for resources.validation; rank 0 validates", flush=True)
            self.lead(trains=True)
            stopping.withdraw(spec)
        return train_rank(spec, run_id, rank=self.rank, world_size=self.world_size, device=self.device)

    def lead(self, *, trains: bool) -> bool:
        """Tell the other ranks whether there is something to train, or on them hear it from rank 0."""
        if self.world_size == 1 or self.decided:
            return trains
        self.decided = True
        word = torch.tensor([trains], dtype=torch.uint8, device=self.device)
        dist.broadcast(word, src=0)
        return bool(word.item())

    def map(self, spec: StageSpec, parts: Sequence[str]) -> None:
        """Call the stage's worker on one part after the other, or on as many at a time as it can take."""
        stopping.withdraw(spec)
        worker = PartWorker(spec)
        at_once, done = parts_at_once(spec, len(parts), workers=1), 0
        write_progress(spec.work, Progress(done=0, total=len(parts), unit="parts"))
        with stopping.listening(spec, rank=0) as should_stop:
            wanted = itertools.takewhile(lambda part: not should_stop(), parts)
            threads = at_once if at_once > 1 else 0
            for done, _ in enumerate(prefetched(worker, wanted, threads=threads, ahead=at_once), 1):
                write_progress(spec.work, Progress(done=done, total=len(parts), unit="parts"))
            if done < len(parts):
                raise stopping.answer(spec, done=f"{done} of {len(parts)} parts")


def run_local(spec: StageSpec, *, lost: Callable[[LeaseLost], None] = print) -> Artifact:
    """Run a stage here and return its artifact; under torchrun rank 0 leads and the others only train with it.

    `lost` is called on another thread if somebody else takes over. Raises StageStopped once it has stopped on request.
    """
    launcher = LocalLauncher()
    if launcher.rank == 0:
        made = execute(spec, launcher, lost=lost)
        if spec.trains:
            launcher.lead(trains=False)  # unless it has trained: somebody else made the artifact
        return made
    if spec.trains and launcher.lead(trains=False):
        launcher.train(spec, run_id="")
    while (artifact := artifacts.committed(spec.target)) is None:  # for longer than a collective would wait
        time.sleep(POLL_SECONDS)
    return artifact


def spec_of_stage(config: str, stage: str, overrides: Sequence[str] = ()) -> StageSpec:
    """What is to be run for one instance of a pipeline.

    Raises ConfigError if the configuration is wrong or an input is not committed.
    """
    pipeline = load_pipeline(config, overrides)
    plans = {planned.name: planned for planned in plan(pipeline, only=[stage])}
    absent = [name for name in plans[stage].instance.needs if plans[name].status == "run"]
    if absent:
        raise ConfigError(
            f"{config}: stages.{stage}: its input {absent[0]} is not committed for this configuration; run "
            f"`python -m genpipe.launch.local {config} {absent[0]}` first, or name another artifact with "
            f"stages.{stage}.inputs.ROLE=URI"
        )
    return spec_of(plans[stage], pipeline)


def _teller(spec: StageSpec) -> Callable[[], None]:
    """What prints how far the stage is, where it has got on since the last call."""
    told = -1

    def tell() -> None:
        nonlocal told
        progress = read_progress(spec.work)
        if progress and progress.done != told:
            told = progress.done
            print(f"{spec.name}: {progress.describe()}", flush=True)

    return tell


def main(arguments: Sequence[str]) -> int:
    """The command; the exit status."""
    if len(arguments) < 2:
        print("usage: python -m genpipe.launch.local CONFIG STAGE [PATH=VALUE]...", file=sys.stderr)
        return 2
    config, stage, *overrides = arguments
    leads = int(os.environ.get("RANK", 0)) == 0
    try:
        spec = spec_of_stage(config, stage, overrides)
        with heartbeat(_teller(spec), seconds=TELL_SECONDS) if leads else nullcontext():
            artifact = run_local(spec, lost=leave)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageStopped as stop:
        if leads:
            print(f"{stage}: {stop}")
        return stop.stopped.status
    if leads:
        manifest = artifacts.read_manifest(artifact.uri)
        assert manifest is not None, "run_local returns a committed artifact"
        print(f"{stage}: {artifact.uri}")
        for name, value in sorted(manifest.metrics.items()):
            print(f"  {name} {value:.4g}")
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
