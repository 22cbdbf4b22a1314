"""What is asked of a system, by name and number; `test_loaded_system` asks trained ones."""

from __future__ import annotations

import pytest

from genpipe.data.shards import NO_LABEL
from genpipe.generation.asking import asked_of, wanted_of
from genpipe.generation.prompts import Prompt

CLASSES = ("bar", "circle", "10")


def test_each_prompt_has_its_label() -> None:
    both = asked_of(["a", "b"], ["circle", 0], conditioned_on={"text", "label"}, classes=CLASSES)
    assert both == [Prompt("a", 1), Prompt("b", 0)]
    assert asked_of("a", [], conditioned_on={"text"}, classes=()) == [Prompt("a", NO_LABEL)]
    assert asked_of([], ["10"], conditioned_on={"label"}, classes=CLASSES) == [Prompt("", 2)], "a name before a number"
    assert asked_of([], [], conditioned_on=set(), classes=()) == [Prompt("")], "one of an unconditional system"


def test_as_many_labels_as_prompts() -> None:
    with pytest.raises(ValueError, match="one for each prompt, not 1 for 2"):
        asked_of(["a", "b"], ["bar"], conditioned_on={"text", "label"}, classes=CLASSES)


def test_numbers_are_of_pictures_that_there_are() -> None:
    assert wanted_of(None, of=3) == {0, 1, 2} and wanted_of([2, 0, 2], of=3) == {0, 2}
    for numbers in ([3], [-1], []):
        with pytest.raises(ValueError, match="numbers: "):
            wanted_of(numbers, of=3)
