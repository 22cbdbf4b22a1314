"""The source of drawn shapes: every picture follows from seed and number, and tasks come in turn."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from genpipe.data.samples import Sample
from genpipe.data.shape_scenes import TASKS, parse, subject_of, task_of
from genpipe.data.sources import declared_classes, has_conditions, open_source
from genpipe.data.sources.shapes import ShapesConfig, ShapesSource


def source(*, part_size: int = 10, **settings: Any) -> ShapesSource:
    return ShapesSource(ShapesConfig.model_validate({"kind": "shapes", "count": 24, **settings}), part_size=part_size)


def samples(of: ShapesSource) -> list[Sample]:
    return [sample for part in of.parts() for sample in of.read(part) if isinstance(sample, Sample)]


def test_pictures_follow_from_seed_and_number_alone() -> None:
    first = samples(source())
    assert source().parts() == ["00000", "00001", "00002"] and len(first) == 24
    assert samples(source(part_size=7)) == first, "whatever the parts are"
    assert samples(source(count=12)) == first[:12], "however many there are"
    other = samples(source(seed=1))
    assert [sample.key for sample in other] == [sample.key for sample in first]
    assert all(one.image != another.image for one, another in zip(first, other, strict=True))
    assert len({sample.image for sample in first}) == 24


def test_tasks_come_in_turn_and_captions_belong_to_them() -> None:
    for number, sample in enumerate(samples(source(size=48))):
        asked = parse(sample.captions[0])
        assert asked is not None and task_of(asked) == sample.meta["task"] == TASKS[number % len(TASKS)]
        assert sample.group == subject_of(asked)
        assert np.asarray(Image.open(io.BytesIO(sample.image))).shape == (48, 48, 3)
    only = samples(source(tasks=["counting"]))
    assert {sample.meta["task"] for sample in only} == {"counting"}


def test_the_digest_is_that_of_the_settings() -> None:
    assert source().digest() == source(part_size=3).digest()
    assert len({source(**{name: value}).digest() for name, value in (("seed", 1), ("count", 25), ("size", 32))}) == 3


def test_it_is_one_of_the_sources() -> None:
    cfg = ShapesConfig(kind="shapes", count=3)
    assert isinstance(open_source(cfg, part_size=2), ShapesSource)
    assert declared_classes(cfg) == () == source().classes() and not has_conditions(cfg)
