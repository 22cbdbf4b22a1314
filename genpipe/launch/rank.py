"""One rank of a training stage, whoever started it: its runtime, and what it does."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from genpipe import artifacts
from genpipe.artifacts import CURVE
from genpipe.files import may_pass
from genpipe.launch import lease, stopping
from genpipe.launch.process import set_up_process
from genpipe.launch.run_stage import commit, load_checked
from genpipe.launch.validator import hand_over_store
from genpipe.launch.watchdog import Watched
from genpipe.pipeline.code import check_code
from genpipe.pipeline.curves import Band, Expectation, curve_text, read_curve
from genpipe.pipeline.forecast import RATE
from genpipe.pipeline.spec import Curve, Progress, StageSpec, read_progress, write_progress
from genpipe.stages import load_stage
from genpipe.storage import join, open_storage
from genpipe.tracking.recording import attach
from genpipe.training.averages import AverageStore
from genpipe.training.background import Background
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.handover import HandOverStore
from genpipe.training.loop import Interrupted, train
from genpipe.training.parallel import unsharded
from genpipe.training.runtime import Phase

HELDOUT = "heldout/"
"""What the loop puts before the names of held-out metrics."""

COMMIT_PAUSES = (1.0, 4.0, 16.0, *[60.0] * 10)
POLL_SECONDS = 0.2


def train_rank(
    spec: StageSpec,
    run_id: str,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    notice: Callable[[], str] = str,
    attended: bool = False,
) -> bool:
    """What every rank of a training stage does; rank 0 also exports, commits and records, and returns whether it could.

    `notice` says who takes this rank's machine away, once somebody does; `attended` whether a validator is beside the
    ranks (`launch/validator.py`). Raises StageStopped, on every rank, where the stage was asked to stop: it has its
    checkpoint, and rank 0 has answered the request.
    """
    check_code(spec)
    stage, cfg = load_checked(spec)
    set_up_process(cfg, products="medium")  # bf16 passes, TF32
    torch.manual_seed(cfg.train.seed)  # the same initial weights on every rank
    checkpoints = CheckpointStore(
        join(spec.work, "checkpoints"),
        keep=cfg.resources.keep_checkpoints,
        best=cfg.observe.keep_best,
        before_commit=lambda: rt.before_checkpoint(),
    )
    averages = AverageStore(spec.target.uri, fence=partial(lease.check, spec))
    handovers = hand_over_store(spec, attended=attended)
    watched = Watched(spec.work, rank=rank, world_size=world_size, seconds=cfg.resources.hang_seconds)
    with ExitStack() as stack:
        rt = RankRuntime(
            spec,
            run_id,
            rank=rank,
            world_size=world_size,
            device=device,
            checkpoints=checkpoints,
            averages=averages,
            handovers=handovers,
            total=cfg.train.samples,
            should_stop=stack.enter_context(stopping.listening(spec, rank=rank, notice=notice)),
            enter=stack.enter_context(watched).enter,
        )
        stack.enter_context(rt)
        objective = stage.objective(cfg, spec.inputs, device)
        try:
            result = train(objective, stage.data(cfg, spec.inputs), cfg.train, rt, cfg.resources, cfg.observe)
        except Interrupted as interrupted:
            rt.telling.wait()  # so that the last word is why it stopped
            respond = stopping.answer if rank == 0 else stopping.follow
            raise respond(spec, done=f"{interrupted.samples_seen:,} samples") from interrupted
        objective = unsharded(objective, lambda: stage.objective(cfg, spec.inputs, device), rank=rank)
        if rank == 0:
            rt.enter("export")

            def finish() -> None:
                with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                    meta = stage.export(objective, cfg, spec.inputs, Path(folder))
                    Path(folder, CURVE).write_text(curve_text(rt.curve))
                    commit(
                        spec,
                        folder=Path(folder),
                        parts=averages.parts() if cfg.train.ema_snapshots else (),
                        meta=meta,
                        metrics=result.metrics,
                        environment={**rt.environment, **rt.pace()},
                        run_id=run_id,
                    )

            rt.flush()
            _insisting(spec, finish, should_stop=rt.should_stop)
            return rt.finish()
    return False


def _insisting(spec: StageSpec, finish: Callable[[], None], *, should_stop: Callable[[], bool]) -> None:
    """Export and commit, again after pauses where a disk is full or the store away: all of the training is at stake.

    Not where somebody wants the stage to stop: the next attempt goes on from a checkpoint.
    """
    for tries, pause in enumerate((*COMMIT_PAUSES, 0.0)):
        try:
            if tries and artifacts.committed(spec.target):  # only the answer was lost
                return None
            return finish()
        except OSError as error:
            if not pause or not may_pass(error):
                raise
            print(f"{spec.name}: not committed, trying again in {pause:.0f} s: {error}", file=sys.stderr, flush=True)
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if should_stop():
                    raise
                time.sleep(POLL_SECONDS)
    raise AssertionError("the last try returns or raises")


@dataclass
class RankRuntime:
    """The Runtime of one rank: records go to the stage's run, checkpoints to its work folder."""

    spec: StageSpec
    run_id: str
    rank: int
    world_size: int
    device: torch.device
    checkpoints: CheckpointStore
    averages: AverageStore
    handovers: HandOverStore
    total: int
    should_stop: Callable[[], bool]
    enter: Callable[[Phase], None]
    environment: dict[str, str] = field(default_factory=dict)
    round_seconds: float = 0.1
    telling: Background = field(default_factory=Background)
    reports: tuple[tuple[float, int], ...] = ()
    """The times of the first report of this attempt and of the last, and the samples seen then."""
    curve: Curve = field(default_factory=dict)
    expected: Expectation = field(default_factory=lambda: Expectation(()))
    astray: frozenset[str] = frozenset()
    """The held-out metrics that have left what was expected of them."""

    def __enter__(self) -> RankRuntime:
        self.run = attach(self.spec, self.run_id) if self.rank == 0 else None
        before = read_progress(self.spec.work) if self.rank == 0 else None
        self.note = before.note if before else ""
        if self.rank == 0:
            self.curve = read_curve(self.spec.work)
            self._expect()
        return self

    def __exit__(self, *_: object) -> None:
        self.enter("end")
        self.telling.wait()  # the work folder is about to be deleted
        if self.run:
            self.run.close()

    def _expect(self) -> None:
        """Look for runs of like settings; a store that is away, or what is damaged there, is not to stop a training."""
        try:
            self.expected = Expectation.of(self.spec)
        except (OSError, ValueError) as error:
            print(f"nothing is expected of the held-out curve: {error}", flush=True)

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        """Record metrics in the run, and progress in the work folder; say where held-out ones are not as expected."""
        assert self.run is not None, "only rank 0 logs"
        self.run.log(metrics, samples_seen=samples_seen)
        found = {name.removeprefix(HELDOUT): of for name, of in metrics.items() if name.startswith(HELDOUT)}
        if found:
            self.curve[samples_seen] = found
            self._hold_against_others(found, samples_seen=samples_seen)
        rate = metrics.get("samples_per_second")
        if rate is not None:
            self.reports = (*self.reports[:1], (time.monotonic(), samples_seen))
            self._tell(Progress(done=samples_seen, total=self.total, rate=rate, metrics=metrics, note=self.note))

    def pace(self) -> dict[str, str]:
        """The samples a second of this attempt, all told, which say how long another training takes."""
        if len(self.reports) < 2:
            return {}
        (begun, first), (ended, last) = self.reports
        return {RATE: f"{(last - first) / (ended - begun):.4g}"}

    def _hold_against_others(self, found: dict[str, float], *, samples_seen: int) -> None:
        """Record the bands of a stage's headlines, and tell of one that is left, or come back to, once."""
        assert self.run is not None, "only rank 0 logs"
        headlines = load_stage(self.spec.stage).HEADLINES
        bands = {name: band for name in found if name in headlines and (band := self.expected.at(name, samples_seen))}
        for name, band in bands.items():
            ends = {"low": band.low, "mean": band.mean, "high": band.high}
            self.run.log({f"expected/{name}_{end}": of for end, of in ends.items()}, samples_seen=samples_seen)
        astray = frozenset(name for name, band in bands.items() if not band.low <= found[name] <= band.high)
        changed = [name for name in bands if (name in astray) != (name in self.astray)]
        self.astray = astray
        if changed:
            self.note = "; ".join(_told(name, found[name], bands[name], samples_seen) for name in changed)
            self.log_event(self.note, samples_seen=samples_seen)
            done = max([samples_seen, *(at for _, at in self.reports)])  # what was validated elsewhere comes late
            self._tell(Progress(done=done, total=self.total, note=self.note))

    def _tell(self, progress: Progress) -> None:
        """Write progress beside the training, which a slow store, or one that is full or away, is not to hold up."""

        def write() -> None:
            try:
                write_progress(self.spec.work, progress)
            except OSError as error:
                print(f"progress could not be written, training goes on: {error}", flush=True)

        if not self.telling.busy:  # else the next one tells as much
            self.telling.start(write, name="progress")

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        """Record pictures in the run."""
        assert self.run is not None, "only rank 0 logs"
        for name, image in images.items():
            self.run.log_image(name, image, samples_seen=samples_seen)

    def log_file(self, path: Path) -> None:
        """Record a file in the run."""
        assert self.run is not None, "only rank 0 logs"
        self.run.log_file(path)

    def log_environment(self, facts: dict[str, str]) -> None:
        """Tag the run, and keep the facts for the manifest."""
        assert self.run is not None, "only rank 0 logs"
        self.environment |= facts
        self.run.set_tags(facts)

    def log_event(self, message: str, *, samples_seen: int) -> None:
        """Print the event, and tag the run with it."""
        assert self.run is not None, "only rank 0 logs"
        print(f"at {samples_seen} samples: {message}", flush=True)
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.run.set_tags({f"event.{when}": f"at {samples_seen} samples: {message}"})

    def flush(self) -> None:
        """Have what was logged kept; before a commit, too, as nobody could tell it from there."""
        assert self.run is not None, "only rank 0 logs"
        self.run.flush()

    def finish(self) -> bool:
        """Record the committed artifact; whether all is on record. If not, whoever leads the stage tries once more."""
        assert self.run is not None, "only rank 0 records"
        try:
            artifact = artifacts.committed(self.spec.target)
            assert artifact is not None, "it has just been committed"
            self.run.finish(artifact)
        except (OSError, ValueError) as error:  # of the store: it is committed, so nothing has failed
            print(f"{self.spec.name}: not recorded by its rank: {error}", file=sys.stderr, flush=True)
        return self.run.kept

    def before_checkpoint(self) -> None:
        """Have what was logged kept before a checkpoint is: what goes on from there does not log it again.

        Raises LeaseLost if another attempt has taken over.
        """
        self.flush()
        lease.check(self.spec)
        if self.curve:
            open_storage(self.spec.work).write(CURVE, curve_text(self.curve).encode())


def _told(name: str, value: float, band: Band, samples_seen: int) -> str:
    """A sentence on a held-out metric that has left its band, or come back to it."""
    inside = "as" if band.low <= value <= band.high else "not as"
    return (
        f"after {samples_seen:,} samples held-out {name} is {value:.4g}, {inside} expected "
        f"({band.low:.4g} to {band.high:.4g}, by {band.runs} runs of like settings)"
    )
