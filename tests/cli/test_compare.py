"""`genpipe compare` on the tiny pipeline, and on one that is worse for a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.slow

WORSE = "stages.decoder.train.samples=16"
Command = Callable[..., tuple[int, str, str]]


def test_the_command_prints_and_draws(tiny: TinyPipeline, genpipe: Command, tmp_path: Path) -> None:
    one, other, seed = (tiny.run("evaluate", *overrides).uri for overrides in ((), (WORSE,), ("stages.sample.seed=1",)))
    code, printed, error = genpipe("compare", one, other, seed, "--out", str(tmp_path / "out"))
    assert code == 0, error
    assert re.search(rf"^A +{re.escape(one)} ", printed, re.MULTILINE)
    cosine = next(line for line in printed.splitlines() if line.startswith("train/self_cosine "))
    assert re.search(r"-0\.\d+ \[-[\d.]+, -[\d.]+\] \*", cosine), "B is worse beyond doubt"
    assert "C has other pictures than A: drawn with seed 1, the baseline with 0" in printed
    assert re.search(r"^decoder +train.samples +1280 +16 +1280 *$", printed, re.MULTILINE)
    assert re.search(r"^sample +seed +0 +0 +1 *$", printed, re.MULTILINE)
    assert re.search(r"^\d+ of \d+ numbers are the same in all$", printed, re.MULTILINE)
    assert "decoder: held-out loss" in (tmp_path / "out/curves.svg").read_text()
    picture = Image.open(tmp_path / "out/pictures.png")
    assert picture.height > 4 * 128 and picture.width > 3 * 128, "the four held-out prompts at the least"


def test_what_cannot_be_compared_is_refused(tiny: TinyPipeline, genpipe: Command, tmp_path: Path) -> None:
    scores = tiny.run("evaluate").uri
    for sources, told in {
        (scores,): "takes 2 to 26 runs",
        (scores, tiny.run("clip").uri): "is an artifact of kind clip, not scores",
        (scores, str(tmp_path)): "neither a pipeline's YAML file, nor scores",
        (scores, "0" * 32): "in which MLflow?",
    }.items():
        code, _, error = genpipe("compare", *sources)
        assert code == 2 and told in " ".join(error.split()), error
