"""What a validator finds, on its way back to the ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from genpipe.training.handover import HandOverStore
from genpipe.training.objective import Validation


def test_what_is_found_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = HandOverStore(str(tmp_path))
    pictures = {"a/b": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1], "c": np.zeros((1, 1, 3), np.uint8)}
    metrics = {"loss": 0.1 + 0.2, "psnr": math.inf, "none": math.nan}
    for name, images in (("some", pictures), ("none", {})):
        store.put_result(name, Validation(metrics, images))
        found = store.result(name)
        assert found is not None
        assert str(found.metrics) == str(metrics) and found.images.keys() == images.keys()
        assert all(np.array_equal(found.images[image], images[image]) for image in images)
    assert store.result("other") is None and store.results() == ["none", "some"]
