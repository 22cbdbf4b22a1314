"""The state of a training run, and its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genpipe.data.loader import skip_ranges
from genpipe.files import DiskFull
from genpipe.models.precision import Products
from genpipe.training.averages import Average
from genpipe.training.background import Background
from genpipe.training.best import Best
from genpipe.training.checkpoint import Checkpoint, Snapshot
from genpipe.training.checkpoint_store import Canceled, insisting, name_of, samples_of
from genpipe.training.ema import Ema
from genpipe.training.guard import Guard
from genpipe.training.loss_scale import LossScale
from genpipe.training.optim import build_optimizers
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.slices import local_piece, share_of

GRACE_SECONDS = 10.0
"""For a checkpoint under way, when training fails."""

MOST_FAILED, MOST_SECONDS = 3, 1800.0
"""Training gives up once so many checkpoints on end could not be written, and none for so long: it is for nothing."""

RECORD = ("samples_seen", "step", "products", "compiled")
"""The fields of the state that a checkpoint holds as JSON, beside those of `guard` and `best`."""


@dataclass
class TrainState:
    """All that a resumed run needs. The place in the data and all randomness follow from `samples_seen`."""

    trainable: dict[str, nn.Module]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    emas: dict[str, Ema]
    scales: dict[str, LossScale]
    """Of the modules' losses; used with fp16 products alone."""

    guard: Guard
    best: Best | None = None
    """The weights that validated best, where `train.best` asks for them."""

    tracked: dict[str, list[Ema]] = field(default_factory=dict)
    """By module, further averages that are kept for afterwards."""

    samples_seen: int = 0
    step: int = 0
    products: Products = "fp32"
    """The precision of matrix products, which a run keeps to its end."""

    compiled: bool = True
    """Whether blocks may be compiled: not in a run that found them wrong."""

    heldout: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation, on rank 0: they tell the best checkpoint."""

    stall_seconds: float = 0.0
    """How long the last `save` kept the loop from going on."""

    write_seconds: float = 0.0
    """How long the last checkpoint took in all, until it was committed."""

    newest: int = 0
    """Samples seen of the newest checkpoint that is committed, as far as this rank knows: rank 0 does."""

    fault: str = ""
    """Why the last checkpoint could not be written; empty if it could, or is not written yet."""

    failed: int = 0
    """Checkpoints on end that could not be written."""

    handing: Background = field(default_factory=Background)
    """Hands averages over to be validated elsewhere, before a checkpoint that is saved later is committed."""

    _written_at: float = field(default_factory=time.monotonic)
    _attempt: int = 0
    _saved: int = 0
    _snapshot: Snapshot = field(default_factory=Snapshot)
    _background: Background = field(default_factory=Background)

    @classmethod
    def fresh(cls, trainable: dict[str, nn.Module], cfg: TrainConfig, *, offload: bool = False) -> TrainState:
        """The state before the first step: each module's optimizers as `cfg` says, averages of the first weights.

        The averages are in host memory if they are to be offloaded.
        """
        average = partial(Ema, decay=cfg.ema_decay, offloaded=offload)
        widths = cfg.ema_snapshots.sigma_rel if cfg.ema_snapshots else ()
        return cls(
            trainable=trainable,
            optimizers={name: build_optimizers(module, cfg.of(name).optim) for name, module in trainable.items()},
            emas={name: average(module, sigma_rel=cfg.ema_sigma_rel) for name, module in trainable.items()},
            tracked={name: [average(module, sigma_rel=s) for s in widths] for name, module in trainable.items()},
            scales={name: LossScale(_device(module)) for name, module in trainable.items()},
            guard=Guard(cfg.guard, global_batch_size=cfg.global_batch_size),
            best=Best(cfg.best, trainable) if cfg.best else None,
        )

    def take_best(self, trainable: dict[str, nn.Module]) -> int:
        """Make the averages those that validated best, where these are kept; how many samples they have seen."""
        if self.best is None:
            return self.samples_seen
        self.best.put_back(trainable, self.emas)
        return self.best.samples_seen

    def advance(self) -> None:
        """Count a step, and pass over the data that is skipped."""
        self.samples_seen += self.guard.global_batch_size
        self.skip_windows()

    def skip_windows(self) -> None:
        """Pass over data that is skipped: it counts as seen, so that schedules and the end stay in place."""
        self.samples_seen = skip_ranges(self.samples_seen, self.guard.windows)
        self.step = self.samples_seen // self.guard.global_batch_size

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name, in the same order on every rank.

        `trainable/MODULE/WEIGHT`, `emas/MODULE/WEIGHT`, `tracked/MODULE/WIDTH/WEIGHT`, and of an optimizer that has
        made a step `optimizers/MODULE/0/WEIGHT/exp_avg`: what belongs to a weight goes by its name, not by its place in
        a group.
        """
        found = self._kept()
        for prefix, module, optimizer in self._optimizers():
            for name, p in module.named_parameters():
                for key, value in sorted(optimizer.state.get(p, {}).items()):
                    if value is not None:
                        assert isinstance(value, Tensor), f"{prefix}{name}/{key} is a tensor"
                        found[f"{prefix}{name}/{key}"] = value
        return found

    def update_averages(self, name: str) -> None:
        """Take the weights of a module into its averages, after an optimizer step."""
        for ema in (self.emas[name], *self.tracked[name]):
            ema.update()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written. On rank 0: whether any rank's part of it is still missing."""
        return self._background.busy

    def save(self, rt: Runtime) -> None:
        """Copy the state aside and have it committed as a checkpoint in the background; every rank calls it.

        Waits for the checkpoint before, if that is still being written. One that cannot be written (a full disk, a
        storage that is away) is an event of the run, and a `fault`, not an error; anything else that goes wrong in the
        background is raised by the next `save` or `wait`.
        """
        self.wait(rt)
        begun = time.monotonic()
        share = share_of(self.tensors(), rank=rt.rank, world_size=rt.world_size)
        record = {key: getattr(self, key) for key in RECORD} | {"guard": self.guard.state_dict()}
        if self.best:
            record["best"] = self.best.state_dict()
        self._snapshot.copy(share, record, device=rt.device)
        name, metrics = self.new_name(), dict(self.heldout)
        self._background.start(lambda: self._write(rt, name, metrics, begun), name="checkpoint")
        self.stall_seconds = time.monotonic() - begun

    def new_name(self) -> str:
        """A name for what is saved now, the same on every rank, that is never given again."""
        self._saved += 1
        return name_of(self.samples_seen, attempt=self._attempt, count=self._saved - 1)

    def wait(self, rt: Runtime) -> None:
        """Return when the last checkpoint is committed, or has failed, however slow its storage is."""
        rt.enter("checkpoint")
        self._background.wait()

    def keep_averages(self, rt: Runtime) -> None:
        """Copy the tracked averages aside and have rank 0 keep them in the background; every rank calls it.

        They are there before a checkpoint that is saved later. Those that cannot be written are an event of the run.
        """
        self.wait(rt)
        found = [
            Average(name, ema.sigma_rel or 0.0, ema.updates, ema.gathered(keep=rt.rank == 0))
            for name, emas in self.tracked.items()
            for ema in emas
        ]
        if rt.rank == 0:
            work = partial(self._write_averages, rt, found, self.samples_seen)
            self._background.start(work, name="averages")

    @property
    def hopeless(self) -> bool:
        """Whether checkpoints have failed so often, and for so long, that training should not go on: rank 0 knows."""
        return self.failed >= MOST_FAILED and time.monotonic() - self._written_at > MOST_SECONDS

    def give_up(self, rt: Runtime) -> None:
        """Raise OSError, on every rank, with why checkpoints cannot be written, which rank 0 knows."""
        failed, newest, fault = agreed(rt, (self.failed, self.newest, self.fault))
        raise OSError(
            f"the last {failed} checkpoints could not be written, the newest that could is that of {newest:,} samples: "
            f"{fault}"
        )

    def newest_of_all(self, rt: Runtime) -> tuple[int, str]:
        """Samples seen of the newest committed checkpoint, and why there is none of now, if so; every rank calls it."""
        self.wait(rt)
        newest, fault = agreed(rt, (self.newest, self.fault))
        return newest, fault

    @contextmanager
    def checkpoints_finished(self, rt: Runtime) -> Iterator[None]:
        """Leave the block with no checkpoint under way: it is awaited, or after an error given some seconds at most."""
        try:
            yield
        except BaseException:
            rt.enter("checkpoint")
            self.handing.cancel(grace_seconds=GRACE_SECONDS)
            self._background.cancel(grace_seconds=GRACE_SECONDS)
            raise
        self.wait(rt)

    def resume(self, rt: Runtime) -> bool:
        """Go on from the newest intact checkpoint, the same on every rank; False if there is none.

        Ranks and their sharding may be others than those that wrote it. Damaged ones are passed over, and said so in
        the run. Raises ValueError where a checkpoint's tensors are not those of this model.
        """
        self.wait(rt)
        names, self._attempt = agreed(rt, _found(rt) if rt.rank == 0 else None)
        for name in names:
            faults = _gathered(rt, rt.checkpoints.fault(name, rank=rt.rank, world_size=rt.world_size))
            fault = next((fault for fault in faults if fault), None)
            if fault is None:
                self._load(rt.checkpoints.open(name))
                self.newest = samples_of(name)
                self._rewind_averages(rt)
                return True
            rt.checkpoints.damaged.add(name)
            if rt.rank == 0:
                rt.log_event(f"passed over a damaged checkpoint: {fault}", samples_seen=samples_of(name))
        self._rewind_averages(rt)
        return False

    def _rewind_averages(self, rt: Runtime) -> None:
        """Forget averages that are newer than the state: of steps that are done again, perhaps otherwise."""
        if rt.rank == 0 and any(self.tracked.values()):
            rt.averages.rewind(self.samples_seen)

    def _write_averages(self, rt: Runtime, averages: list[Average], samples_seen: int) -> None:
        """Keep averages, in the background."""
        try:
            put = partial(rt.averages.put, averages, samples_seen=samples_seen)
            insisting(put, canceled=self._background.canceled)
        except Canceled:
            pass
        except OSError as error:
            rt.log_event(f"averages could not be written, training goes on: {error}", samples_seen=samples_seen)

    def _write(self, rt: Runtime, name: str, metrics: dict[str, float], begun: float) -> None:
        """Put this rank's part in place, in the background."""
        self.handing.join()
        try:
            rt.checkpoints.put(
                name,
                self._snapshot,
                rank=rt.rank,
                world_size=rt.world_size,
                metrics=metrics,
                canceled=self._background.canceled,
            )
            self.newest, self.fault, self.failed = samples_of(name), "", 0
            self._written_at = time.monotonic()
            self.write_seconds = self._written_at - begun
        except Canceled:
            pass
        except OSError as error:
            full = f"{error.where}: no space left; make room there" if isinstance(error, DiskFull) else ""
            self.fault = full or str(error)
            self.failed += 1
            told = f"a checkpoint could not be written, training goes on: {self.fault}"
            if rt.rank == 0:
                rt.log_event(told, samples_seen=samples_of(name))
            else:
                print(f"rank {rt.rank}: {told}", flush=True)

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        for key in RECORD:
            setattr(self, key, checkpoint.record[key])
        self.guard.load_state_dict(checkpoint.record["guard"])
        if self.best:
            self.best.load_state_dict(checkpoint.record["best"])
        kept = self._kept()
        states = [_optimizer_state(checkpoint, *found) for found in self._optimizers()]
        tensors = kept | {name: tensor for by_name, _ in states for name, tensor in by_name.items()}
        checkpoint.load({name: local_piece(tensor) for name, tensor in tensors.items()})
        for prefix, ema in self._averages():
            ema.load_state_dict({name.removeprefix(prefix): t for name, t in kept.items() if name.startswith(prefix)})
        for (_, _, optimizer), (_, state) in zip(self._optimizers(), states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _kept(self) -> dict[str, Tensor]:
        """The tensors that are there from the beginning: writing to them writes to modules and averages."""
        found: dict[str, Tensor] = {}
        for name, module in self.trainable.items():
            found |= {f"trainable/{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        for prefix, ema in self._averages():
            found |= {f"{prefix}{key}": tensor for key, tensor in ema.state_dict().items()}
        for name, scale in self.scales.items():
            found |= {f"scales/{name}/{key}": tensor for key, tensor in scale.tensors().items()}
        if self.best:
            found |= {f"best/{key}": tensor for key, tensor in self.best.tensors().items()}
        return found

    def _averages(self) -> Iterator[tuple[str, Ema]]:
        """Every average, with the prefix of its tensors' names."""
        for name, ema in self.emas.items():
            yield f"emas/{name}/", ema
        for name, emas in self.tracked.items():
            for ema in emas:
                yield f"tracked/{name}/{ema.sigma_rel:g}/", ema

    def _optimizers(self) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
        """Every optimizer, with the prefix of its tensors' names and the module whose weights it has."""
        for name, group in self.optimizers.items():
            for i, optimizer in enumerate(group):
                yield f"optimizers/{name}/{i}/", self.trainable[name], optimizer


def _optimizer_state(
    checkpoint: Checkpoint, prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Room for the tensors that a checkpoint has of an optimizer: by their names there, and as its `state_dict` does.

    What has the shape of its weight is sharded as that is.
    """
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    weights = dict(module.named_parameters())
    by_name: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, shape in checkpoint.shapes.items():
        if name.startswith(prefix):
            weight, _, key = name.removeprefix(prefix).rpartition("/")
            if weight not in weights or id(weights[weight]) not in index:
                raise ValueError(f"{checkpoint.storage.uri}: holds {name}, which this model's optimizer does not have")
            p, dtype = weights[weight], checkpoint.dtypes[name]
            alike = shape == tuple(p.shape)
            by_name[name] = torch.zeros_like(p, dtype=dtype) if alike else p.new_zeros(shape, dtype=dtype)
            state.setdefault(index[id(p)], {})[key] = by_name[name]
    return by_name, state


def _device(module: nn.Module) -> torch.device:
    """Where a module's parameters are, or its buffers."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _found(rt: Runtime) -> tuple[list[str], int]:
    """The checkpoints that there are, newest first, and the name of a new attempt to go on from one."""
    rt.checkpoints.clear()
    return rt.checkpoints.names(), time.time_ns() // 10**6


def agreed(rt: Runtime, mine: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [mine]
    if rt.world_size > 1:
        dist.broadcast_object_list(values, src=0, device=rt.device)
    return values[0]


def _gathered(rt: Runtime, mine: str | None) -> list[str | None]:
    """The values of all ranks, on every rank."""
    values: list[str | None] = [mine]
    if rt.world_size > 1:
        values = [None] * rt.world_size
        dist.all_gather_object(values, mine)
    return values
