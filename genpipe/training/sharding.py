"""Tensors that are sharded over ranks (DTensors) beside those that every rank has whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory: a shard, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The tensor with the shards of all ranks, which all must call this, or the tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def by_sharding(tensors: Iterable[T]) -> list[list[T]]:
    """The tensors that every rank has whole, and those that are sharded, each where there are any, in their order."""
    both: tuple[list[T], list[T]] = ([], [])
    for x in tensors:
        both[isinstance(x, DTensor)].append(x)
    return [alike for alike in both if alike]
