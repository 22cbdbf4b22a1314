"""Shares of pictures that show what was asked for, by task: of pictures of which that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gallery import Gallery, evaluation, measured, pictures

from genpipe.data.shape_scenes import TASKS, askable, caption_of, parse, render, scene_of
from genpipe.evaluation.metrics.composition import CompositionConfig
from genpipe.evaluation.per_sample import values_of
from genpipe.storage import open_storage

EACH = 4


def drawn(caption: str, seed: int) -> np.ndarray:
    asked = parse(caption)
    assert asked is not None
    return render(scene_of(asked, np.random.default_rng(seed)), size=64)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Four prompts of each task, no two of which mean the same."""
    return [caption_of(askable(task)[place]) for task in TASKS for place in (0, 1, 2, -1)]


def test_pictures_of_the_prompts_are_right_and_of_others_wrong(captions: list[str], tmp_path: Path) -> None:
    """The first of each task's training pictures shows another prompt of its task; of the held-out ones, all do."""
    others = [captions[EACH * (i // EACH) + (i + 1) % EACH] for i in range(len(captions))]
    shown = [other if i % EACH == 0 else own for i, (own, other) in enumerate(zip(captions, others, strict=True))]
    right = [(drawn(caption, i), own) for i, (own, caption) in enumerate(zip(captions, shown, strict=True))]
    wrong = [(drawn(caption, i), own) for i, (own, caption) in enumerate(zip(captions, others, strict=True))]
    sample = Gallery(tmp_path / "store").shards({"train": right, "heldout": wrong[:EACH]}, kind="samples")
    found = measured(CompositionConfig(), {"sample": sample}, tmp_path / "out")
    assert found == {
        **{f"train/composition_{task}": 0.75 for task in TASKS},
        "train/composition": pytest.approx(0.75),
        "heldout/composition_single_object": 0.0,
        "heldout/composition": 0.0,
    }


def test_every_task_counts_as_much(captions: list[str], tmp_path: Path) -> None:
    """However many prompts it has, after GenEval."""
    own = [(drawn(caption, i), caption) for i, caption in enumerate(captions[:EACH])]
    counted = captions[TASKS.index("counting") * EACH]
    other = [(np.full((64, 64, 3), 255, np.uint8), counted)]
    sample = Gallery(tmp_path / "store").shards({"train": [*own, *other]}, kind="samples")
    found = measured(CompositionConfig(), {"sample": sample}, tmp_path / "out")
    assert found["train/composition"] == 0.5 and found["train/composition_counting"] == 0.0


def test_values_of_pictures_are_kept(captions: list[str], tmp_path: Path) -> None:
    own = [(drawn(caption, i), caption) for i, caption in enumerate(captions)]
    sample = Gallery(tmp_path / "store").shards({"train": own}, kind="samples")
    measured(CompositionConfig(), {"sample": sample}, tmp_path / "out")
    storage = open_storage(str(tmp_path / "out"))
    values = values_of((storage, entry.key) for entry in storage.list())
    assert values.keys() == {f"train/composition_{task}" for task in TASKS}
    assert all(of.values.tolist() == [1.0] * EACH for of in values.values())


def test_prompts_about_anything_else_are_refused(tmp_path: Path) -> None:
    sample = Gallery(tmp_path).shards({"train": pictures([0], ["a dog"])}, kind="samples")
    with pytest.raises(ValueError, match=r"metrics\.composition: the prompt 'a dog' is none about shapes"):
        CompositionConfig().parts(evaluation({"sample": sample}))
