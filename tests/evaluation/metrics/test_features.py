"""Features in files: each part once, whole again when read, and none that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gallery import SIDE, Gallery, evaluation, features_of, pictures
from pydantic import TypeAdapter
from scripted import PLAIN, network_file, projected
from torch import Tensor, nn

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics import MetricConfig
from genpipe.evaluation.metrics.feature_networks import AnyNetwork, Network
from genpipe.evaluation.metrics.features import FeatureSet, FeatureWorker, chosen_rows, parts_of_sets


class Infinite(nn.Module):
    """A network that overflows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 1e30 * 1e30


def network(**settings: Any) -> AnyNetwork:
    found: AnyNetwork = TypeAdapter(Network).validate_python(settings)
    return found


def test_features_are_read_back_in_order_and_by_rows(
    two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path
) -> None:
    cfg = TypeAdapter(MetricConfig).validate_python({"kind": "kid", "network": projection, "against": "heldout"})
    found, of = features_of(cfg, evaluation(two_sets), tmp_path), cfg.network
    expected = projected(range(100, 120), dims=7)
    blocks = list(found.blocks(of, "sample", "train"))
    assert [first for first, _ in blocks] == [0, 5, 10, 15]
    torch.testing.assert_close(torch.cat([block for _, block in blocks]), expected)
    rows = np.asarray([0, 4, 5, 13, 19])
    torch.testing.assert_close(found.rows(of, "sample", "train", rows), expected[rows])
    assert (found.splits(of), found.count(of, "sample", "train"), found.count(of, "heldout", "heldout")) == (
        ["train"],
        20,
        12,
    )
    heldout = projected(range(24, 36), dims=7).double()
    moments = found.moments(of, "heldout", "heldout")
    torch.testing.assert_close(moments.covariance, heldout.T.cov(), rtol=1e-4, atol=1e-5)
    chosen = found.chosen(of, "sample", "train", most=6)
    torch.testing.assert_close(chosen, expected[chosen_rows(20, most=6)])


def test_chosen_rows_are_a_random_sample() -> None:
    rows = chosen_rows(1000, most=100)
    assert len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < 1000
    assert 350 < rows.mean() < 650 and chosen_rows(5, most=100).tolist() == [0, 1, 2, 3, 4]


def test_what_two_metrics_want_is_one_part(two_sets: dict[str, Artifact]) -> None:
    pixels, other = network(kind="pixels"), network(kind="pixels", side=4)
    of = evaluation(two_sets)
    both = parts_of_sets(
        [FeatureSet(pixels, "reference"), FeatureSet(pixels, "train"), FeatureSet(pixels, "train")], of
    )
    assert both == parts_of_sets([FeatureSet(pixels, "train"), FeatureSet(pixels, "heldout")], of)
    two = parts_of_sets([FeatureSet(pixels, "sample"), FeatureSet(other, "sample")], of)
    assert len(two) == 2 * len(of.sample_parts())


def test_a_split_that_is_not_there_is_missed_before_anything_is_computed(tmp_path: Path) -> None:
    shard = Gallery(tmp_path).shards({"train": pictures([0], ["a"])})
    with pytest.raises(ValueError, match="has no heldout split"):
        parts_of_sets([FeatureSet(network(kind="pixels"), "heldout")], evaluation({"shard": shard}))


def test_features_that_are_not_finite_are_refused(two_sets: dict[str, Artifact], tmp_path: Path) -> None:
    of = network(**network_file(tmp_path, Infinite(), size=SIDE, name="infinite", **PLAIN))
    [part, *_] = parts_of_sets([FeatureSet(of, "sample")], evaluation(two_sets))
    with pytest.raises(ValueError, match=r"infinite-\w+: the network gave features that are not finite"):
        FeatureWorker([of], evaluation(two_sets))(part, tmp_path)


def test_no_more_than_one_part_is_read_at_a_time(
    two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path
) -> None:
    """However many pictures there are: blocks are of the part's size, and read when they are asked for."""
    cfg = TypeAdapter(MetricConfig).validate_python({"kind": "frechet", "network": projection, "against": "train"})
    found = features_of(cfg, evaluation(two_sets, part_size=3), tmp_path)
    blocks = found.blocks(cfg.network, "train", "train")
    assert next(blocks)[1].shape == (3, 7)
    for path in sorted(tmp_path.glob("features/*/train-train-*.npy"))[1:]:
        path.write_bytes(b"not read before it is its turn")
    with pytest.raises(ValueError):
        next(blocks)
