"""Averages that are made afterwards, against the profiles of the paper, and against those that were made meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from folder_runtime import FolderRuntime
from safetensors.torch import load_file
from small_objective import G, stream, train_small
from test_guard import Deaf
from torch import nn
from typer.testing import CliRunner

from genpipe import artifacts
from genpipe.cli.main import app
from genpipe.launch.local import run_local
from genpipe.training.averages import combination, inner_product, reconstruct
from genpipe.training.ema import Ema, gamma_of
from genpipe.training.loop import Interrupted
from genpipe.training.settings import EmaSnapshots
from genpipe.weights import WEIGHTS_FILE, load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

STEPS, EVERY = 2000, 50
WIDTHS = (0.05, 0.1)


def profile(s: np.ndarray, t: float, gamma: float) -> np.ndarray:
    """EDM2, equation 122: that of the average up to t, at s."""
    values: np.ndarray = np.where(s < t, (gamma + 1) / t * (s / t) ** gamma, 0.0)
    return values


@pytest.mark.parametrize(("t", "u"), [(700.0, 1000.0), (1000.0, 700.0), (400.0, 400.0)])
def test_inner_products_are_integrals(t: float, u: float) -> None:
    gamma, delta = gamma_of(0.05), gamma_of(0.2)
    s = (np.arange(1_000_000) + 0.5) / 1000
    expected = (profile(s, t, gamma) * profile(s, u, delta)).sum() / 1000
    found = inner_product(*(np.float64([value]) for value in (t, gamma, u, delta)))
    assert found[0] == pytest.approx(expected, rel=1e-5)


def walk(seed: int = 0) -> np.ndarray:
    """A weight over training: from one place to another, in steps at random."""
    steps = np.random.default_rng(seed).normal(size=STEPS) / STEPS**0.5
    return np.cumsum(steps) + np.exp(-np.arange(STEPS) / 300)


def averaged(weights: Sequence[float], widths: Sequence[float], *, every: int) -> dict[tuple[float, int], float]:
    """Averages of all steps so far, by their widths and the number of steps."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    emas = [Ema(module, decay=0.0, sigma_rel=width) for width in widths]
    found = {}
    for step, weight in enumerate(weights, 1):
        with torch.no_grad():
            module.weight.fill_(weight)
        for ema in emas:
            ema.update()
            if step % every == 0 and ema.sigma_rel:
                found[ema.sigma_rel, step] = ema.shadow["weight"].item()
    return found


def test_an_average_has_the_profile_of_its_width() -> None:
    """What step s counts for is the integral of the profile over it."""
    weights, gamma = walk(), gamma_of(0.1)
    edges = (np.arange(STEPS + 1) / STEPS) ** (gamma + 1)
    found = averaged(weights.tolist(), [0.1], every=STEPS)
    assert found[0.1, STEPS] == pytest.approx(weights @ np.diff(edges), rel=1e-12)


def test_one_that_was_kept_is_taken_as_it_is() -> None:
    updates = [(k + 1) * 100.0 for k in range(20) for _ in WIDTHS]
    shares, error = combination(updates, WIDTHS * 20, at=2000, sigma_rel=0.1)
    assert error < 1e-6
    assert shares == pytest.approx([0.0] * 39 + [1.0], abs=1e-9)


@pytest.mark.parametrize(
    ("sigma_rel", "close"), [(0.03, 0.05), (0.05, 1e-6), (0.07, 2e-3), (0.085, 2e-3), (0.15, 2e-3), (0.25, 0.03)]
)
def test_those_made_afterwards_are_those_made_meanwhile(sigma_rel: float, close: float) -> None:
    """In fp64, from 40 snapshots: as near as the Cauchy-Schwarz inequality allows for the error of the profile."""
    weights = walk()
    kept = averaged(weights.tolist(), WIDTHS, every=EVERY)
    direct = averaged(weights.tolist(), [sigma_rel], every=STEPS)[sigma_rel, STEPS]
    widths, updates = zip(*kept, strict=True)
    shares, error = combination(updates, widths, at=STEPS, sigma_rel=sigma_rel)
    assert error < close and sum(shares) == pytest.approx(1.0, abs=1e-9)
    gamma = gamma_of(sigma_rel)
    norm = ((gamma + 1) ** 2 / ((2 * gamma + 1) * STEPS)) ** 0.5
    off = abs(shares @ np.array(list(kept.values())) - direct)
    assert off <= error * norm * np.linalg.norm(weights) + 1e-9
    assert off < close * np.abs(weights).max()


def test_too_few_snapshots_are_told_by_their_profile() -> None:
    [_, many], [_, few] = (
        combination([STEPS * (k + 1) / n for k in range(n)], [0.1] * n, at=STEPS, sigma_rel=0.03) for n in (40, 4)
    )
    assert many < few and few > 0.2


def kept(rt: FolderRuntime) -> dict[str, str]:
    """The sha256 of every file of the parts that count."""
    finished = artifacts.finished_parts(rt.averages.uri)
    return {file["path"]: file["sha256"] for part in finished.values() for file in part["files"]}


SETTINGS: dict[str, Any] = {"steps": 12, "log_every": 1, "ema_snapshots": {"every": 3 * G, "sigma_rel": WIDTHS}}


def test_a_resumed_run_keeps_the_same_averages(tmp_path: Path) -> None:
    straight = FolderRuntime(tmp_path / "straight")
    train_small(stream(), straight, **SETTINGS)
    assert straight.averages.parts() == [f"averages-{k * 3 * G:015d}" for k in (1, 2, 3, 4)]
    assert len(kept(straight)) == 8
    with pytest.raises(Interrupted):
        train_small(stream(), FolderRuntime(tmp_path / "cut", stop_at=32), **SETTINGS)
    again = FolderRuntime(tmp_path / "cut")
    later = again.averages.parts()
    assert later, "some were kept before"
    train_small(stream(), again, **SETTINGS)
    assert kept(again) == kept(straight)


def test_steps_that_are_taken_back_leave_no_trace_in_averages(tmp_path: Path) -> None:
    """Steps 141 to 143 are bad, and averages kept among them; 138 to 143 are skipped (`test_guard`)."""
    settings: dict[str, Any] = {"build": Deaf, "guard": {"steps": 3}}
    settings["ema_snapshots"] = {"every": 71 * G, "sigma_rel": WIDTHS}
    found, expected = FolderRuntime(tmp_path / "bad"), FolderRuntime(tmp_path / "without")
    train_small(stream(dict.fromkeys((141, 142, 143), ("x", float("nan")))), found, steps=160, **settings)
    train_small(stream(left_out=range(138, 144)), expected, steps=154, **settings)
    assert found.logged[160 * G]["rollbacks"] == 1
    assert found.averages.parts() == [f"averages-{at * G:015d}" for at in (71, 144, 160)]
    one, other = (load_file(Path(rt.averages.uri, sorted(kept(rt))[-1])) for rt in (found, expected))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_weights_of_a_width_are_those_of_a_run_with_it(tiny: TinyPipeline) -> None:
    """A prior, trained twice: with the width that is wanted, and with others that are kept."""
    settings = ("train.samples=512", "train.global_batch_size=8", "observe.validate_every=0", "train.precision=fp32")
    given = tuple(f"stages.prior.{setting}" for setting in settings)
    direct = run_local(tiny.spec("prior", *given, "stages.prior.train.ema_sigma_rel=0.08"))
    source = run_local(tiny.spec("prior", *given, "stages.prior.train.ema_snapshots={every: 32}"))
    made, error = reconstruct(source.uri, sigma_rel=0.08)
    assert error < 1e-2 and reconstruct(source.uri, sigma_rel=0.08)[0] == made
    assert not any(file.path.startswith(artifacts.ASIDE) for file in artifacts.verify(made.uri).files)
    assert made.meta == source.meta and made.uri.rpartition("/")[0] == source.uri.rpartition("/")[0]
    load_weights(Path(made.uri), kind="prior", device=torch.device("cpu"))
    wanted, found, last = (load_file(Path(each.uri, WEIGHTS_FILE)) for each in (direct, made, source))
    change = max((wanted[name] - last[name]).abs().max().item() for name in wanted)
    off = max((wanted[name] - found[name]).abs().max().item() for name in wanted)
    assert off < 0.05 * change
    said = CliRunner().invoke(app, ["ema", source.uri, "--sigma-rel", "0.08", "--sigma-rel", "0.1"])
    assert said.exit_code == 0 and made.uri in said.output and len(said.output.split()) > 6
    with pytest.raises(ValueError, match=r"its 32 averages come no closer than \d+% to the width 0.01; choose one"):
        reconstruct(source.uri, sigma_rel=0.01)
    with pytest.raises(ValueError, match=r"has no averages of its prior; train with train\.ema_snapshots"):
        reconstruct(direct.uri, sigma_rel=0.08)


def test_widths_are_named_once() -> None:
    with pytest.raises(ValueError, match="name each width once"):
        EmaSnapshots(every=10, sigma_rel=(0.1, 0.1))
