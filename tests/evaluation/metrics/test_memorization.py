"""Copies of training pictures are flagged, held-out pictures are not; the statistic is scipy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from gallery import SIDE, Gallery, evaluation, measured, picture, pictures
from PIL import Image
from pydantic import ValidationError
from scipy.stats import mannwhitneyu
from scripted import PLAIN, Projection, network_file

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics import memorization
from genpipe.evaluation.metrics.memorization import MemorizationConfig, copied, copying_z

TRAIN, HELDOUT = list(range(60)), list(range(60, 110))
COPIED, FRESH = [7, 41, 12, 3], list(range(200, 212))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def shard(gallery: Gallery) -> Artifact:
    return gallery.shards({"train": named(TRAIN), "heldout": named(HELDOUT)}, each=16)


def named(seeds: list[int], *, noise: float = 0.0) -> list[tuple[np.ndarray, str]]:
    """Pictures, and with noise those that are nearly the same."""
    of = pictures(seeds, [f"picture {seed}" for seed in seeds])
    draws = np.random.default_rng(0)
    return [((image + noise * draws.standard_normal(image.shape)).clip(0, 255).astype(np.uint8), c) for image, c in of]


@pytest.fixture
def cfg(tmp_path: Path) -> MemorizationConfig:
    """By the pixels and by a projection of them."""
    projection = network_file(tmp_path, Projection(SIDE, 12), size=SIDE, **PLAIN)
    networks: list[dict[str, Any]] = [{"kind": "pixels", "side": 8}, projection]
    return MemorizationConfig.model_validate({"networks": networks, "level": 0.05, "shown": 6})


def test_copies_are_flagged_and_held_out_pictures_are_not(
    gallery: Gallery, shard: Artifact, cfg: MemorizationConfig, tmp_path: Path
) -> None:
    """Of a mix just the copies, though they are noisy; each is found to be of the picture that it is of."""
    mix = gallery.shards({"train": [*named(COPIED, noise=2), *named(FRESH)]}, kind="samples", name="mix")
    found = measured(cfg, {"shard": shard, "sample": mix}, tmp_path)
    table = pq.read_table(tmp_path / "memorization.parquet").to_pandas()
    flagged = table["p"] <= cfg.level
    assert flagged[: len(COPIED)].all() and flagged[len(COPIED) :].mean() <= 0.1
    assert found["train/memorized"] == pytest.approx(flagged.mean())
    for name in ("pixels", "other"):
        assert table[f"nearest_{name}"][: len(COPIED)].tolist() == COPIED
    assert found["memorized_heldout"] <= cfg.level
    assert set(cfg.names({})) > set(found)


def test_only_copies_have_a_far_statistic(
    gallery: Gallery, shard: Artifact, cfg: MemorizationConfig, tmp_path: Path
) -> None:
    found = {}
    for name, drawn in (("copies", named(TRAIN[:20], noise=2)), ("fresh", named(list(range(300, 340))))):
        of = gallery.shards({"heldout": drawn}, kind="samples", name=name)
        found[name] = measured(cfg, {"shard": shard, "sample": of}, tmp_path / name)
    for network in ("pixels", "other"):
        assert found["copies"][f"heldout/copying_z_{network}"] < -5
        assert abs(found["fresh"][f"heldout/copying_z_{network}"]) < 3
    assert found["copies"]["heldout/memorized"] == 1 and found["fresh"]["heldout/memorized"] <= 0.1
    assert found["copies"]["heldout/copied"] == 1 and found["fresh"]["heldout/copied"] < 0.5


def test_damaged_copies_are_copied_though_not_nearly_training_pictures(
    gallery: Gallery, shard: Artifact, cfg: MemorizationConfig, tmp_path: Path
) -> None:
    """As near as noise lets them be: no nearer than the nearest held-out picture, but nearer than most."""
    of = gallery.shards({"train": named(TRAIN[:40], noise=40)}, kind="samples", name="damaged")
    found = measured(cfg, {"shard": shard, "sample": of}, tmp_path)
    assert found["train/copied"] > 0.9 and found["train/memorized"] < 0.9


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_share_of_copies_is_that_of_a_mix(share: float) -> None:
    draws = np.random.default_rng(0)
    p = np.where(draws.random(20_000) < share, draws.uniform(0, 0.2, 20_000), draws.random(20_000))
    assert copied(p) == pytest.approx(share, abs=0.03)


def test_the_null_distribution_is_that_of_held_out_pictures(
    gallery: Gallery, shard: Artifact, cfg: MemorizationConfig, tmp_path: Path
) -> None:
    of = gallery.shards({"train": named(COPIED)}, kind="samples", name="exact")
    measured(cfg, {"shard": shard, "sample": of}, tmp_path)
    null = pq.read_table(tmp_path / "memorization-null.parquet").to_pandas()
    small = {seed: np.asarray(Image.fromarray(picture(seed)).reduce(2), np.float64) for seed in [*TRAIN, *HELDOUT]}
    distances = [[np.linalg.norm(small[h] - small[t]) / 127.5 for t in TRAIN] for h in HELDOUT]
    np.testing.assert_allclose(null["distance_pixels"], np.min(distances, axis=1), rtol=0.01)
    assert null["nearest_pixels"].tolist() == np.argmin(distances, axis=1).tolist()
    table = pq.read_table(tmp_path / "memorization.parquet").to_pandas()
    assert table["p"].tolist() == [1 / (1 + len(HELDOUT))] * len(COPIED), "nothing is nearer than a picture itself"
    np.testing.assert_allclose(table["distance_pixels"], 0, atol=1e-5)


def test_the_worst_pairs_stand_side_by_side(
    gallery: Gallery, shard: Artifact, cfg: MemorizationConfig, tmp_path: Path
) -> None:
    mix = gallery.shards({"train": [*named(FRESH), *named(COPIED)]}, kind="samples", name="last")
    measured(cfg.model_copy(update={"shown": 2}), {"shard": shard, "sample": mix}, tmp_path)
    shown = np.asarray(Image.open(tmp_path / "memorization-train.png"))
    cell, margin = memorization.CELL, 6
    for row in range(2):
        top = len(shown) - (2 - row) * (cell + margin)
        cells = [shown[top : top + cell, 190 + x * (cell + margin) :][:, :cell] for x in range(3)]
        assert (cells[0] == cells[1]).all() and (cells[0] == cells[2]).all(), "a copy and the picture that it is of"
        assert cells[0].std() > 10


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5])
def test_the_statistic_is_scipys(shift: float) -> None:
    draws = np.random.default_rng(0)
    drawn, heldout = np.round(draws.normal(shift, 1, 37), 1), np.round(draws.normal(0, 1, 53), 1)
    u = mannwhitneyu(drawn, heldout).statistic
    expected = (u - 37 * 53 / 2) / np.sqrt(37 * 53 * (37 + 53 + 1) / 12)
    assert copying_z(drawn, heldout) == pytest.approx(expected)


def test_what_cannot_be_judged_is_refused(gallery: Gallery, shard: Artifact, cfg: MemorizationConfig) -> None:
    inputs = {"shard": shard, "sample": gallery.shards({"train": named(FRESH)}, kind="samples", name="few")}
    strict = cfg.model_copy(update={"level": 0.01})
    with pytest.raises(ValueError, match=r"metrics\.memorization\.level: 0\.01 needs 99 held-out pictures.* are 50"):
        strict.check(evaluation(inputs))
    with pytest.raises(ValidationError, match="two of one name"):
        MemorizationConfig.model_validate({"networks": [{"kind": "pixels"}, {"kind": "pixels", "side": 4}]})
