"""The ranks of a training stage as a group of Ray Train, with no process that they do not need and no import of torch.

Ray Train's `TorchTrainer` does the same, but has torch imported in every process that hears of it: the driver, and the
controller, a process of its own. Here only the ranks themselves import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

LEAVE_SECONDS = 30.0
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class RankTrainer(DataParallelTrainer):
    """Calls a function on every rank, once they are in one process group of torch, if there are several.

    Without two of the processes that Ray Train starts beside: the one that splits Ray Data's datasets, of which there
    are none here, and the one that frees the places of a group whose controller has died. With its controller a driver
    ends here, and with the driver's job Ray frees them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, UNUSED)]


@dataclass
class ProcessGroup(BackendConfig):
    """The process group of the ranks, whose collectives go through `backend`."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """What makes it."""
        return _Setup


class _Setup(Backend):
    """Sets ranks up as Ray's own backend for torch does, if there are several, and has them hear signals.

    Those arrive on the main thread of a process, where this is called, and Ray Train trains on another one.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        if len(worker_group) == 1:  # a rank alone would have a thread that waits for the others all the time
            return
        address, port = worker_group.execute_single(0, get_address_and_port)
        meet = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        worker_group.execute(_join, meet, backend_config.backend)

    def on_training_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        worker_group.execute(_hear_signals)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        if (ranks := len(worker_group)) > 1:
            ray.wait(worker_group.execute_async(_leave), num_returns=ranks, timeout=LEAVE_SECONDS)


def _join(meet: dict[str, str], backend: str) -> None:
    from ray.train.torch import config

    from genpipe.training.agreement import PATIENCE

    os.environ.update(meet)
    config._set_torch_distributed_env_vars()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config._setup_torch_process_group(backend, rank, world_size, "env://", int(PATIENCE.total_seconds()))


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def _hear_signals() -> None:
    from genpipe.launch import stopping

    stopping.hear_signals()
