"""A release's grid shows prompts of every split, those that nobody trained on first, each once."""

from __future__ import annotations

from pathlib import Path

from gallery import Gallery, pictures

from genpipe.artifacts import Artifact
from genpipe.release.grid import grid_prompts

SYSTEM = Artifact(kind="system", uri="", fingerprint="0", meta={"conditioned_on": ["text"]})


def test_rows_are_of_each_split_in_turn(tmp_path: Path) -> None:
    of = {"train": ["a", "b", "a", "c"], "combinations": ["d"], "heldout": ["e", "b"]}
    drawn = Gallery(tmp_path).shards(
        {split: pictures(range(len(texts)), texts) for split, texts in of.items()},
        kind="samples",
        samples={split: len(texts) for split, texts in of.items()},
    )
    rows = grid_prompts(SYSTEM, drawn, (), rows=8)
    assert [row.text for row in rows] == ["e", "d", "a", "b", "c"]
    assert grid_prompts(SYSTEM, drawn, (), rows=3) == rows[:3]
