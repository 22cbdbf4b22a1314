"""Renaming the tensors of a state, and joining or splitting those that another library keeps apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Names = Mapping[str, tuple[str, ...]]
"""Ours: theirs, where several of theirs, concatenated along the first axis, make one of ours."""


def joined(theirs: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our state. Raises ValueError naming the keys that are missing or have no place here."""
    wanted = {key for keys in names.values() for key in keys}
    if missing := sorted(wanted - theirs.keys()):
        raise ValueError(f"the weights lack {', '.join(missing)}")
    if unknown := sorted(theirs.keys() - wanted):
        raise ValueError(f"the weights hold what has no place here: {', '.join(unknown)}")
    found = {ours: [theirs[key] for key in keys] for ours, keys in names.items()}
    return {ours: torch.cat(parts) if len(parts) > 1 else parts[0] for ours, parts in found.items()}


def split(ours: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Inverse of `joined`."""
    parts = {keys: ours[name].chunk(len(keys)) if len(keys) > 1 else (ours[name],) for name, keys in names.items()}
    return {key: tensor for keys, tensors in parts.items() for key, tensor in zip(keys, tensors, strict=True)}
