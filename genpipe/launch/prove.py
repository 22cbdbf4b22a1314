"""The proof that a stage resumes to the last bit on this machine: straight through against a stop, a kill, a resume.

`prove` runs a training stage's first steps twice in processes of their own, as `python -m genpipe.launch.local` does,
and compares all that their last checkpoints hold. `python -m genpipe.launch.prove JOB` is one rank of such a run.
Nothing but the inputs is read from the store, and nothing is written there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from genpipe.config import Config
from genpipe.launch.local import LocalLauncher
from genpipe.launch.process import end_process, set_up_process
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import load_stage
from genpipe.training.averages import AverageStore
from genpipe.training.checkpoint import Checkpoint
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.handover import HandOverStore
from genpipe.training.loop import Interrupted, train
from genpipe.training.runtime import Phase

POLL_SECONDS = 0.02
LEAST_AFTER = 4
"""Steps from the stop to the end: to resume, to go on, to be killed, and to resume once more before the last one."""

NEVER, ALWAYS = 1e9, 1e-9
"""Seconds between checkpoints."""

ORDER = ("trainable/", "optimizers/")
"""Of names: weights first, as what everything else follows from."""


class Difference(NamedTuple):
    """The first tensor that differs: how many of its elements do, and by how much at most."""

    name: str
    differing: int
    elements: int
    most: float


class Proof(NamedTuple):
    """What a proof found. `difference` is None where every tensor is the same to the last bit."""

    step: int
    """The step at which both runs ended and were compared."""

    stopped: int
    resumed: int
    """The steps that the interrupted run went on from: after its stop, and after it was killed."""

    tensors: int
    nbytes: int
    difference: Difference | None
    repeatable: bool = True
    """Whether the same steps, run straight through once more, gave the same; found out where there is a difference."""


class Job(Config):
    """What one rank of a run is to do: go on from the newest checkpoint below `work` and stop after step `stop`."""

    spec: StageSpec
    work: str
    stop: int
    victim: bool = False
    """To be killed: it writes checkpoints all the time, tells when it has made a step, waits before the last."""


def prove(spec: StageSpec, *, workers: int, steps: int, stop: int, scratch: Path, tell: Callable[[str], None]) -> Proof:
    """Run the first `steps` of a training stage straight through, and interrupted after step `stop` and by a kill.

    `scratch` is a folder for checkpoints and logs; `tell` is told what begins. Raises ValueError where the stage does
    not train as long, or not on so many workers, and RuntimeError with the log of a run that failed.
    """
    cfg = load_stage(spec.stage).Config.model_validate(spec.config)
    cfg.train.check_ranks([workers])
    if not 1 <= stop <= steps - LEAST_AFTER:
        raise ValueError(f"--at {stop}: must be from 1 to {steps - LEAST_AFTER}, {LEAST_AFTER} less than --steps")
    if steps + 1 >= (most := cfg.train.steps):
        raise ValueError(f"--steps {steps}: the stage has only {most} in all; take fewer, or raise train.samples")
    whole, parts, again = (str(scratch / name) for name in ("whole", "parts", "again"))

    def run(work: str, *, until: int) -> Checkpoint:
        with _ranks(Job(spec=spec, work=work, stop=until), workers, scratch) as ranks:
            ranks.wait()
        return _newest(work)

    tell(f"steps 1 to {steps}, straight through")
    straight = run(whole, until=steps)
    tell(f"steps 1 to {stop}, then a stop with a checkpoint")
    stopped = run(parts, until=stop)
    tell("on from there, until it is killed")
    with _ranks(Job(spec=spec, work=parts, stop=steps, victim=True), workers, scratch) as ranks:
        ranks.wait(until=Path(parts, "under-way").exists)
        ranks.kill()
    resumed = _newest(parts)
    tell(f"on from step {resumed.record['step']} to {steps}")
    interrupted = run(parts, until=steps)
    difference = first_difference(straight, interrupted)
    repeatable = True
    if difference is not None:
        tell(f"they differ; steps 1 to {steps} once more, straight through, to see whether those agree")
        repeatable = first_difference(straight, run(again, until=steps)) is None
    return Proof(
        step=straight.record["step"],
        stopped=stopped.record["step"],
        resumed=resumed.record["step"],
        tensors=len(straight.shapes),
        nbytes=sum(int(np.prod(shape)) * straight.dtypes[name].itemsize for name, shape in straight.shapes.items()),
        difference=difference,
        repeatable=repeatable,
    )


def first_difference(one: Checkpoint, other: Checkpoint) -> Difference | None:
    """The first tensor that is not the same in two checkpoints, by its bits; weights come first, the record last."""
    assert one.record["step"] == other.record["step"], "both ended at the same step"
    names = one.shapes.keys() | other.shapes.keys()
    for name in sorted(names, key=lambda name: ([not name.startswith(prefix) for prefix in ORDER], name)):
        if one.shapes.get(name) != other.shapes.get(name):
            elements = max(int(np.prod(each.shapes[name])) for each in (one, other) if name in each.shapes)
            return Difference(name, elements, elements, float("inf"))
        a, b = one.tensor(name), other.tensor(name)
        same = (a.reshape(-1, 1).view(torch.uint8) == b.reshape(-1, 1).view(torch.uint8)).all(dim=1)
        if not same.all():
            most = (a.double() - b.double()).abs().max().item()
            return Difference(name, int((~same).sum()), a.numel(), most)
    same_record = json.dumps(one.record) == json.dumps(other.record)  # by text, as no NaN equals another
    return None if same_record else Difference("the record beside the tensors", 1, 1, float("nan"))


def _newest(work: str) -> Checkpoint:
    store = CheckpointStore(work)
    return store.open(store.names()[0])


class _Ranks:
    """The processes of a run, and the log that they share."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
        self.processes, self.log = processes, log

    def wait(self, *, until: Callable[[], bool] | None = None) -> None:
        """Return when all have ended well, or `until` is true. Raises RuntimeError, with the log, if one fails."""
        while not (until and until()):
            codes = [process.poll() for process in self.processes]
            if any(codes) or (until and None not in codes):
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"a rank of the proof ended with exit code {next(filter(None, codes), 0)}:\n{tail}")
            if None not in codes:
                return
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL to every process."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


@contextmanager
def _ranks(job: Job, workers: int, scratch: Path) -> Iterator[_Ranks]:
    """Start the ranks of a run; none is left after the block."""
    file, log = scratch / "job.json", scratch / "log"
    file.write_text(job.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a user's own stages are found there, too
    command = [sys.executable, "-m", "genpipe.launch.prove", str(file)]
    with log.open("wb") as out:
        ranks = _Ranks([], log)
        try:
            for rank in range(workers):
                environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                ranks.processes.append(process)
            yield ranks
        finally:
            ranks.kill()


@dataclass
class _ProofRuntime:
    """The Runtime of one rank of a proof: it keeps checkpoints and no records."""

    job: Job
    batch_size: int
    rank: int
    world_size: int
    device: torch.device
    checkpoints: CheckpointStore
    averages: AverageStore
    handovers: HandOverStore
    round_seconds: float = 0.0
    logged: int = 0
    """The last step that was logged, which rank 0 does after each."""

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        """Note the step."""
        self.logged = samples_seen // self.batch_size
        if self.job.victim:
            Path(self.job.work, "under-way").touch()

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        """Nothing."""

    def log_file(self, path: Path) -> None:
        """Nothing."""

    def log_environment(self, facts: dict[str, str]) -> None:
        """Nothing."""

    def log_event(self, message: str, *, samples_seen: int) -> None:
        """Print it: it is in the log of a run that fails."""
        print(f"at {samples_seen} samples: {message}", flush=True)

    def enter(self, phase: Phase) -> None:
        """Nothing."""

    def should_stop(self) -> bool:
        """After the step `stop`; before it a victim waits for its end."""
        while self.job.victim and self.logged >= self.job.stop - 2:
            time.sleep(POLL_SECONDS)
        return self.rank == 0 and self.logged >= self.job.stop - 1


def run_rank(job: Job) -> None:
    """One rank: train as `launch.rank` does, up to the step where the job ends."""
    launcher, spec = LocalLauncher(), job.spec
    stage = load_stage(spec.stage)
    cfg = stage.Config.model_validate(spec.config)
    set_up_process(cfg, products="medium")
    torch.manual_seed(cfg.train.seed)
    rt = _ProofRuntime(
        job,
        batch_size=cfg.train.global_batch_size,
        rank=launcher.rank,
        world_size=launcher.world_size,
        device=launcher.device,
        checkpoints=CheckpointStore(job.work),
        averages=AverageStore(f"{job.work}-averages"),
        handovers=HandOverStore(f"{job.work}-handovers"),
    )
    observe = cfg.observe.model_copy(update={"log_every": 1, "validate_every": 0})
    resources = cfg.resources.model_copy(update={"checkpoint_seconds": ALWAYS if job.victim else NEVER})
    objective = stage.objective(cfg, spec.inputs, rt.device)
    try:
        train(objective, stage.data(cfg, spec.inputs), cfg.train, rt, resources, observe)
    except Interrupted:
        return
    raise AssertionError("a proof ends before the training does")


if __name__ == "__main__":
    run_rank(Job.model_validate_json(Path(sys.argv[1]).read_text()))
    end_process(0)
