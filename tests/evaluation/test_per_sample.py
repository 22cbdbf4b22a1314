"""The values of single pictures, as metrics write them and as they are read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gallery import Gallery

from genpipe.evaluation.per_sample import read_values, write_values


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return Gallery(tmp_path / "store")


def write(out: Path, name: str, first: int, keys: list[str], *, seed: int | None = 3) -> None:
    rows = range(first, first + len(keys))
    found = {"train/right": np.asarray(rows) % 2 == 0, "train/far": np.asarray(rows) / 10}
    better = {"train/right": "higher", "train/far": "lower"}
    write_values(out, name, found, better=better, keys=keys, rows=rows, seed=seed)  # type: ignore[arg-type]


def test_parts_are_read_as_one_in_the_order_of_the_pictures(gallery: Gallery, tmp_path: Path) -> None:
    write(out := tmp_path / "out", "a-later", 3, ["cat", "dog"])
    write(out, "b-first", 0, ["cat", "cat", "cow"])
    found = read_values(gallery.commit("scores", out))
    assert found.keys() == {"train/right", "train/far"}
    right = found["train/right"]
    assert right.keys == ["cat", "cat", "cow", "cat", "dog"] and right.values.tolist() == [1, 0, 1, 0, 1]
    assert (right.better, found["train/far"].better, right.seeds) == ("higher", "lower", {3})
    assert right.pictures == {("cat", 0): 1, ("cat", 1): 0, ("cow", 0): 1, ("cat", 2): 0, ("dog", 0): 1}


def test_numbers_have_the_name_that_a_metric_was_given(gallery: Gallery, tmp_path: Path) -> None:
    write(out := tmp_path / "out", "x", 0, ["cat"], seed=None)
    write(out / "mine", "x", 0, ["cat", "dog"])
    scores = gallery.commit("scores", out)
    assert read_values(scores).keys() == {"train/right", "train/far", "mine/train/right", "mine/train/far"}
    [only] = read_values(scores.uri, ["mine/train/far"]).values()
    assert only.values.tolist() == [0, 0.1]
    assert not read_values(scores, ["train/far"])["train/far"].seeds


def test_pandas_reads_them_as_one_table(tmp_path: Path) -> None:
    write(tmp_path, "one", 0, ["cat", "dog"])
    write(tmp_path, "two", 2, ["cow"], seed=None)
    table = pd.read_parquet(tmp_path / "per_sample")
    assert table.groupby("number")["value"].mean().to_dict() == pytest.approx({"train/right": 2 / 3, "train/far": 0.1})


def test_scores_that_are_gone_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scores are committed here"):
        read_values(str(tmp_path))
