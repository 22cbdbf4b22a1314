"""How training is spread over ranks: every rank with all of it (DDP), or weights and their state sharded (FSDP2).

What is sharded are the blocks of a network (`models.blocks`): each is gathered for its own forward and backward pass
and dropped again. What is around them (embeddings, heads, scalars) is small, and every rank keeps it whole. Weights,
gradients, the optimizer's state and the averages of a block are DTensors of one sharding, and products are cast by
autocast as on one rank, so that sharding changes nothing of what is learned, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genpipe.models.blocks import blocks_of, recompute_blocks
from genpipe.stage_config import Resources
from genpipe.training.objective import Batch, Metrics, Objective, Step, Validation
from genpipe.training.runtime import Runtime
from genpipe.training.sharding import is_sharded, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Parallel(Protocol):
    """The forward passes of an objective on this rank, and the averages of gradients over all."""

    together: bool
    """Whether all ranks must take part in every forward pass, validation's too."""

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """`Objective.loss` of this rank's micro-batch."""
        ...

    def accumulating(self, name: str, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; after the `last` gradients are means over ranks."""
        ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """`Objective.validate`: on one rank by itself, or on all of them if they must go `together`."""
        ...

    def zero_grad(self, name: str) -> None:
        """Forget the gradients of a module."""
        ...


def spread(objective: Objective, rt: Runtime, resources: Resources) -> Parallel:
    """Spread the modules of an objective over the ranks as `resources` say; rank 0's weights count.

    To be called before optimizers and averages are made. Raises ValueError where sharding does not fit the ranks, or
    the networks have no blocks.
    """
    if resources.recompute_blocks:
        for module in objective.trainable.values():
            recompute_blocks(module)
    shards = resources.shards(rt.world_size)
    return Replicated(objective, rt) if shards == 1 else Sharded(objective, rt, shards=shards)


class Replicated:
    """All of the training on every rank. Gradients lie in DDP's buckets, and nowhere else."""

    together = False

    def __init__(self, objective: Objective, rt: Runtime) -> None:
        self.objective = objective
        self.several = rt.world_size > 1
        self.losses = {name: self._loss(name, module) for name, module in objective.trainable.items()}

    def _loss(self, name: str, module: nn.Module) -> nn.Module:
        loss = _Loss(self.objective, name, module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.several or not parameters:  # DDP takes none without
            return loss
        for p in parameters:
            p.grad = torch.zeros_like(p)  # which DDP puts into its buckets, so that nothing is ever beside them
        return DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """By DDP, or in this process alone."""
        found: tuple[Tensor, Metrics] = self.losses[name](batch, step)
        return found

    def accumulating(self, name: str, *, last: bool) -> AbstractContextManager[None]:
        """Only the last backward pass communicates."""
        alone = last or not self.several
        return nullcontext() if alone else self.losses[name].no_sync()  # type: ignore[operator]

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """On this rank by itself."""
        return self.objective.validate(batches, generator)

    def zero_grad(self, name: str) -> None:
        """In place where gradients lie in buckets."""
        for p in self.objective.trainable[name].parameters():
            if self.several and p.grad is not None:
                p.grad.zero_()
            else:
                p.grad = None


class Sharded:
    """Blocks sharded over groups of `shards` ranks each (FSDP2), and replicated between the groups if there are more.

    Gradients of blocks are reduced to shards after every micro-batch, because whole ones would take the memory that
    sharding saves; between groups, and around the blocks, they are averaged after the last.
    """

    together = True

    def __init__(self, objective: Objective, rt: Runtime, *, shards: int) -> None:
        from torch.distributed.fsdp import fully_shard  # which takes seconds, and only those who shard need

        self.objective = objective
        modules = objective.trainable
        blocks = [block for module in modules.values() for block in blocks_of(module)]
        if not blocks:
            raise ValueError(
                "resources.shard_over: the networks of this stage have no blocks to shard; set it to 1, or put the "
                "layers of your network into an nn.ModuleList, or into classes derived from ResidualBlock"
            )
        for tensor in (t for module in modules.values() for t in [*module.parameters(), *module.buffers()]):
            dist.broadcast(tensor.detach(), src=0)
        mesh = _mesh(rt, shards)
        for block in blocks:
            scalars = {p for p in block.parameters() if p.ndim == 0}  # which FSDP does not take
            fully_shard(block, mesh=mesh, ignored_params=scalars)
        self.around = {name: [p for p in module.parameters() if not is_sharded(p)] for name, module in modules.items()}
        self.root = _Root(modules)
        fully_shard(self.root, mesh=mesh, ignored_params={p for around in self.around.values() for p in around})
        self.root(lambda: None)  # at its first forward pass FSDP settles dtypes, by what then needs a gradient: all

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """With each block gathered while it is computed."""
        found: tuple[Tensor, Metrics] = self.root(self.objective.loss, name, batch, step)
        return found

    @contextmanager
    def accumulating(self, name: str, *, last: bool) -> Iterator[None]:
        """Blocks are reduced as they pass, all else after the last."""
        self.root.set_requires_all_reduce(last)  # type: ignore[operator]
        yield
        if last:
            _average([p.grad for p in self.around[name] if p.grad is not None])

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """On all ranks alike, as each needs the others' shards; they find the same."""
        found: Validation = self.root(self.objective.validate, batches, generator)
        return found

    def zero_grad(self, name: str) -> None:
        """Free them."""
        for p in self.objective.trainable[name].parameters():
            p.grad = None


class _Loss(nn.Module):
    """The loss of one trainable module as a module itself, which is what DDP wraps."""

    def __init__(self, objective: Objective, name: str, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.objective = objective
        self.name = name

    def forward(self, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        return self.objective.loss(self.name, batch, step)


class _Root(nn.Module):
    """All trainable modules, under which any work with them is a forward pass, as FSDP wants it."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules_by_name = nn.ModuleDict(modules)

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        torch.set_autocast_cache_enabled(False)  # until autocast ends: it would keep what is cast of dropped weights
        return work(*args)


def _mesh(rt: Runtime, shards: int) -> DeviceMesh:
    """The ranks in a row, or groups of `shards` neighbors."""
    from torch.distributed.device_mesh import init_device_mesh

    if shards == rt.world_size:
        return init_device_mesh(rt.device.type, (shards,), mesh_dim_names=("shards",))
    grid = (rt.world_size // shards, shards)
    return init_device_mesh(rt.device.type, grid, mesh_dim_names=("replicas", "shards"))


def _average(gradients: list[Tensor]) -> None:
    """Replace gradients by their means over all ranks."""
    if gradients:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])


def unsharded(objective: Objective, build: Callable[[], Objective], *, rank: int) -> Objective:
    """An objective with the weights of `objective` as plain tensors, on rank 0; `objective` itself if it has no others.

    `build` makes another one of the same sizes. Every rank calls this; the others get `objective` back.
    """
    parameters = [p for module in objective.trainable.values() for p in module.parameters()]
    if not any(is_sharded(p) for p in parameters):
        return objective
    states = {name: _gathered(module, keep=rank == 0) for name, module in objective.trainable.items()}
    if rank != 0:
        return objective
    plain = build()
    for name, module in plain.trainable.items():
        module.load_state_dict(states[name])
    return plain


def _gathered(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors of a module, in host memory; nothing where they are not to be kept."""
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        full = whole(tensor)
        if keep:
            state[name] = full.cpu()
    return state
