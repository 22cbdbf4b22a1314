"""Tensors that are sharded over ranks (DTensors) beside those that every rank has whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

T = TypeVar("T", bound=Tensor)


def is_sharded(x: Any) -> TypeIs[DTensor]:
    """Whether ranks have shards of a tensor.

    As long as nobody has imported the module of DTensors, there are none. It takes seconds, and who draws has no use
    for it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory: a shard, or the tensor itself."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """The tensor with the shards of all ranks, which all must call this, or the tensor itself."""
    return x.full_tensor() if is_sharded(x) else x


def in_host_memory(x: Tensor) -> Tensor:
    """A copy of what this rank has of a tensor in host memory, pinned if it comes from a GPU; a shard remains one."""
    here = local(x)
    copy = torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda).copy_(here)
    return _with_shard(x, copy) if is_sharded(x) else copy


def whole_from_host(x: Tensor, device: torch.device) -> Tensor:
    """`whole` of a tensor of `in_host_memory`: ranks reach one another from `device` alone."""
    if not is_sharded(x):
        return x
    return _with_shard(x, x.to_local().to(device)).full_tensor()


def _with_shard(x: DTensor, shard: Tensor) -> DTensor:
    """A tensor that is sharded as `x` is, of which this rank has `shard`."""
    from torch.distributed.tensor import DTensor

    return DTensor(shard, x._spec, requires_grad=False)


def by_sharding(tensors: Iterable[T]) -> list[list[T]]:
    """The tensors that every rank has whole, and those that are sharded, each where there are any, in their order."""
    both: tuple[list[T], list[T]] = ([], [])
    for x in tensors:
        both[is_sharded(x)].append(x)
    return [alike for alike in both if alike]
