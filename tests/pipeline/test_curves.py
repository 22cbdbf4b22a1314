"""What finished runs let one expect of the next."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t
from toybox import Toys

from genpipe.launch.local import run_local
from genpipe.lineage import content_digest
from genpipe.pipeline.curves import STUDENT, Expectation, curve_text, read_curve
from genpipe.pipeline.spec import Curve

ONE: Curve = {100: {"loss": 1.0}, 200: {"loss": 0.5}}
OTHER: Curve = {100: {"loss": 0.8}, 300: {"loss": 0.4}}


def quick(store: Path) -> Toys:
    """Toys whose runs are kept in plain files."""
    toys = Toys(store)
    toys.tracking_uri = "jsonl"
    return toys


def test_a_band_is_a_prediction_interval() -> None:
    """At 150, 0.75 on the line of the one and 0.7 on that of the other."""
    band = Expectation((ONE, OTHER)).at("loss", 150)
    assert band is not None and (band.mean, band.runs) == (pytest.approx(0.725), 2)
    half = t.ppf(0.995, 1) * math.sqrt(0.05**2 / 2) * math.sqrt(1.5)
    assert (band.low, band.high) == pytest.approx((0.725 - half, 0.725 + half), rel=1e-3)


@pytest.mark.parametrize("runs", [3, 8, 40])
def test_the_next_run_is_inside_99_times_of_100(runs: int) -> None:
    rng, trials, inside = np.random.default_rng(runs), 1000, 0
    for _ in range(trials):
        *before, now = rng.normal(3.0, 0.5, runs + 1).tolist()
        band = Expectation(tuple({100: {"loss": value}} for value in before)).at("loss", 100)
        assert band is not None
        inside += band.low <= now <= band.high
    assert binomtest(inside, trials, 0.99, alternative="less").pvalue > 0.001
    if runs <= len(STUDENT):
        assert t.ppf(0.995, runs - 1) == pytest.approx(STUDENT[runs - 2], rel=1e-3)
        assert binomtest(inside, trials, 0.99).pvalue > 0.001, "nor is it wider than that"


def test_runs_that_are_equal_leave_one_percent() -> None:
    band = Expectation((ONE, ONE)).at("loss", 200)
    assert band is not None and (band.low, band.high) == pytest.approx((0.495, 0.505))


def test_nothing_is_expected_beyond_the_curves() -> None:
    both = Expectation((ONE, OTHER))
    assert both.at("loss", 200) is not None
    assert both.at("loss", 250) is None, "of one run alone"
    assert both.at("loss", 50) is None and both.at("loss", 301) is None and both.at("accuracy", 150) is None
    assert Expectation(()).at("loss", 100) is None


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_curve(str(tmp_path)) == {}
    (tmp_path / "curve.json").write_text(curve_text({200: {"loss": 0.5}, 100: {"loss": 1.0}}))
    assert read_curve(str(tmp_path)) == ONE
    assert list(json.loads((tmp_path / "curve.json").read_text())) == ["100", "200"]


def test_runs_of_like_settings_are_those_that_differ_in_the_seed_alone(tmp_path: Path) -> None:
    toys = quick(tmp_path)
    data, more = (run_local(toys.spec("toy_data", parts=parts)) for parts in (1, 2))
    first = run_local(toys.line(data))
    run_local(toys.line(data, train={"seed": 1}))
    run_local(toys.line(data, train={"grad_clip": 0.5}))
    run_local(toys.line(data, samples=40))
    run_local(toys.line(more))

    def expected(**train: object) -> tuple[Curve, ...]:
        return Expectation.of(toys.line(data, train=train)).curves

    assert len(expected(seed=2)) == 2 and read_curve(first.uri) in expected(seed=2)
    assert len(expected(seed=2, grad_clip=0.5)) == 1
    assert not expected(seed=2, ema_decay=0.5)


def test_how_often_a_training_was_looked_at_is_not_its_content(tmp_path: Path) -> None:
    digests = []
    for name, every in (("a", 20), ("b", 0)):
        toys = quick(tmp_path / name)
        line = run_local(toys.line(run_local(toys.spec("toy_data", parts=1)), observe={"validate_every": every}))
        assert len(read_curve(line.uri)) == (4 if every else 1)
        digests.append(content_digest(line))
    assert digests[0] == digests[1]
