"""A stage whose memory is planned and measured, and what the processes do that measure it."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from folder_runtime import FolderRuntime
from parallel_ranks import PATIENCE
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from genpipe.models.layers import ResidualBlock
from genpipe.stage_config import Resources
from genpipe.training.ema import Ema
from genpipe.training.objective import Batch, Metrics, Step, Validation
from genpipe.training.optim import build_optimizers
from genpipe.training.parallel import spread
from genpipe.training.settings import TrainConfig

WIDTH, HIDDEN, DEPTH, ROWS = 384, 1536, 4, 256
MICRO_BATCHES, STEPS = 2, 3
REPEATS = 3  # a free that goes unreported only ever adds to a peak


class Block(ResidualBlock):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows_in, self.rows_out = nn.Linear(32, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows_in(x)
        for block in self.blocks:
            x = block(x)
        return self.rows_out(x)


class Objective:
    def __init__(self) -> None:
        self.network = Network()
        self.trainable: dict[str, nn.Module] = {"network": self.network}

    def active(self, samples_seen: int) -> tuple[str, ...]:
        return ("network",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        return self.network(batch["rows"]).square().mean(), {}

    def after_step(self) -> None: ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        return Validation({})


def stage() -> ModuleType:
    module = ModuleType("rows")
    module.objective = lambda cfg, inputs, device: Objective()  # type: ignore[attr-defined]
    module.example_batch = lambda cfg, inputs, *, batch_size: {"rows": torch.zeros(batch_size, 32)}  # type: ignore[attr-defined]
    return module


def config(*, workers: int, **resources: Any) -> Any:
    """Two micro-batches a step."""
    train = TrainConfig.model_validate(
        {
            "samples": 1,
            "global_batch_size": workers * MICRO_BATCHES * ROWS,
            "micro_batch_size": ROWS,
            "precision": "fp32",
        }
    )
    return SimpleNamespace(train=train, resources=Resources.model_validate({"workers": workers, **resources}))


def steps_as_the_loop_takes_them(cfg: Any, rt: FolderRuntime) -> None:
    objective = Objective()
    for module in objective.trainable.values():
        module.to(rt.device)
    parallel = spread(objective, rt, cfg.resources)
    optimizers = build_optimizers(objective.network, cfg.train.optim)
    ema = Ema(objective.network, decay=0.9)
    batch = {"rows": torch.zeros(ROWS, 32, device=rt.device)}
    for _ in range(STEPS):
        with record_function("step"):
            for i in range(MICRO_BATCHES):
                with parallel.accumulating("network", last=i == MICRO_BATCHES - 1):
                    loss, _ = parallel.loss("network", batch, Step(0, torch.Generator()))
                    (loss / MICRO_BATCHES).backward()
            del loss
            for optimizer in optimizers:
                optimizer.step()
            parallel.zero_grad("network")
            ema.update()


def peak_of_last_step(cfg: Any, rt: FolderRuntime) -> int:
    """Bytes of torch's CPU allocator at the peak of the last step, beside what there was before all of it.

    What a thread of gloo frees is not reported: on a busy machine that can be the first buckets of DDP, which then
    seem to be there until their address is given to something else.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps_as_the_loop_takes_them(cfg, rt)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    begun = max(event.start_ns() for event in results.events() if event.name() == "step")
    alive: dict[int, int] = {}
    peak = 0
    for at, address, size in sorted(_allocations(results.experimental_event_tree())):
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)
        if at >= begun:
            peak = max(peak, sum(alive.values()))
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes; less than 0 where it was freed) of all allocations."""
    for event in events:
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)


def measure_peaks(rank: int, ranks: int, folder: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """One of several processes: the peak of each case, in `folder`."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    peaks = {}
    for name, resources in cases.items():
        rt = FolderRuntime(Path(folder), rank=rank, world_size=ranks)
        cfg = config(workers=ranks, **resources)
        peaks[name] = min(peak_of_last_step(cfg, rt) for _ in range(REPEATS))
    Path(folder, f"peaks-{rank}.json").write_text(json.dumps(peaks))
    dist.destroy_process_group()
