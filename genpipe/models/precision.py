"""Where a network must not follow autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def fp32(device: torch.device) -> AbstractContextManager[object]:
    """Computation in the tensors' own precision, whatever autocast says; on the meta device there is none to stop."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
