"""Pictures of a training, as they are found again in a real MLflow and in the store's files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toybox import Toys

from genpipe.artifacts import Manifest, read_manifest
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.tracking.progress_pictures import series_of
from genpipe.tracking.recording import attach, claim

STEPS = (40, 1000, 80)


def drawn(step: int) -> np.ndarray:
    return np.full((4, 6, 3), step % 251, np.uint8)


def recorded(spec: StageSpec, steps: tuple[int, ...] = STEPS) -> Manifest:
    """A run with pictures of two names, which is then made."""
    run = attach(spec, claim(spec))
    for step in sorted(steps):
        run.log_image("held/out", drawn(step), samples_seen=step)
    run.log_image("other", drawn(7), samples_seen=7)
    run.close()
    manifest = read_manifest(run_local(spec).uri)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("keeper", ["mlflow", "jsonl"])
def test_pictures_are_found_by_name_in_the_order_of_samples(tmp_path: Path, keeper: str) -> None:
    toys = Toys(tmp_path / "store")
    spec = toys.spec("toy_data")
    if keeper == "jsonl":
        spec = spec.model_copy(update={"tracking_uri": "jsonl"})
    manifest = recorded(spec)
    held, other = series_of(manifest, store=toys.store, tracking_uri=spec.tracking_uri)
    assert (held.name, list(held.pictures)) == ("held/out", sorted(STEPS))
    assert (other.name, list(other.pictures), other.manifest) == ("other", [7], manifest)
    for step, read in held.pictures.items():
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(read())).convert("RGB")), drawn(step))


def test_what_mlflow_does_not_have_is_none(tmp_path: Path) -> None:
    """An artifact that was made elsewhere, with a run that this MLflow has never seen; and one without a run."""
    toys = Toys(tmp_path / "store")
    manifest = recorded(toys.spec("toy_data"))
    for run_id in ("0" * 32, ""):
        assert not series_of(
            manifest.model_copy(update={"run_id": run_id}), store=toys.store, tracking_uri=toys.tracking_uri
        )
    with pytest.raises(ValueError, match=r"tracking\.uri"):
        series_of(manifest, store=toys.store, tracking_uri="http://127.0.0.1:9")
