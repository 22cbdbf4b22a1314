"""Tensors that are sharded over ranks (DTensors) beside those that every rank has whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory: a shard, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The tensor with the shards of all ranks, which all must call this, or the tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def in_host_memory(x: Tensor) -> Tensor:
    """A copy of what this rank has of a tensor in host memory, pinned if it comes from a GPU; a shard remains one."""
    here = local(x)
    copy = torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda).copy_(here)
    return DTensor(copy, x._spec, requires_grad=False) if isinstance(x, DTensor) else copy


def whole_from_host(x: Tensor, device: torch.device) -> Tensor:
    """`whole` of a tensor of `in_host_memory`: ranks reach one another from `device` alone."""
    if not isinstance(x, DTensor):
        return x
    return DTensor(x.to_local().to(device), x._spec, requires_grad=False).full_tensor()


def by_sharding(tensors: Iterable[T]) -> list[list[T]]:
    """The tensors that every rank has whole, and those that are sharded, each where there are any, in their order."""
    both: tuple[list[T], list[T]] = ([], [])
    for x in tensors:
        both[isinstance(x, DTensor)].append(x)
    return [alike for alike in both if alike]
