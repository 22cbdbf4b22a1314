"""The stream of batches that a training run reads from where it stands, and the randomness of each."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack

import torch

from genpipe.data.loader import Batch, Batches, Data, training_order
from genpipe.stage_config import Resources
from genpipe.training.bad_samples import Damage
from genpipe.training.runtime import Runtime
from genpipe.training.settings import TrainConfig
from genpipe.training.state import TrainState


def open_stream(
    stack: ExitStack, data: Data, cfg: TrainConfig, rt: Runtime, resources: Resources, state: TrainState
) -> tuple[Batches, Damage]:
    """This rank's batches from where `state` stands, and the damage found in them; `stack` closes them.

    The stream that `stack` held before is closed.
    """
    stack.close()
    micro_batch = cfg.micro_batch(rt.world_size)
    loaders = resources.loader_processes or resources.loader_threads
    batches = Batches(
        data.train.collate,
        order=training_order(
            data,
            weights=cfg.source_weights,
            seed=cfg.seed,
            run=cfg.micro_batch_size or cfg.global_batch_size,
        ),
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=micro_batch,
        rank=rt.rank,
        world_size=rt.world_size,
        start=state.samples_seen,
        skip=tuple(state.guard.windows),
        prefetch=max(2 * cfg.global_batch_size // (micro_batch * rt.world_size), loaders + 1),
        threads=resources.loader_threads,
        processes=resources.loader_processes,
        pin=rt.device.type == "cuda",
    )
    stack.callback(batches.close)
    length, share = data.train.length, cfg.max_bad_share
    return batches, Damage(batches, rt, length=length, max_share=share, start=state.samples_seen)


def seeded(device: torch.device, *identity: object) -> torch.Generator:
    """A generator whose seed is a hash of `identity`."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied behind the host's back where its memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
