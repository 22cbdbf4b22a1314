"""Features of pictures as files that parts leave for the merge: fp32 [B, D], one file a part."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genpipe.evaluation.fidelity import FeatureMoments
from genpipe.storage import Storage


def save_features(path: Path, batches: Iterable[Tensor]) -> None:
    """Write the features of a part, batches [B, D] of them, as a .npy file."""
    np.save(path, np.concatenate([batch.float().cpu().numpy() for batch in batches]))


def moments_of_files(files: Storage, prefix: str) -> FeatureMoments:
    """Of the features in all files whose names begin so; one of them is in memory at a time."""
    arrays = (np.load(io.BytesIO(files.read(entry.key)), allow_pickle=False) for entry in files.list(prefix))
    return reduce(add, (FeatureMoments.of(torch.from_numpy(array)) for array in arrays))
