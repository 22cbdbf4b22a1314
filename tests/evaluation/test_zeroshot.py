"""Zero-shot classification by hand and by sklearn, and which class a caption names."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F

from genpipe.evaluation.zeroshot import ZeroShotConfig, class_embeds, named_class, zero_shot_accuracy


def test_prompts_stand_class_by_class() -> None:
    cfg = ZeroShotConfig(classes=("cat", "hot dog"), templates=("a photo of a {}.", "{}!"))
    assert cfg.prompts() == ["a photo of a cat.", "cat!", "a photo of a hot dog.", "hot dog!"]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"classes": ("cat",)}, "at least 2 items"),
        ({"classes": ("cat", "Cat")}, "cat stands there twice"),
        ({"classes": ("cat", "dog"), "templates": ("a photo",)}, "should match pattern"),
        ({"classes": ("cat", "dog"), "templates": ("{0.__class__}",)}, "should match pattern"),
        ({"classes": ("cat", "dog"), "templates": ()}, "at least 1 item"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ZeroShotConfig(**fields)


def test_templates_are_averaged_as_unit_vectors_and_renormalized() -> None:
    """Of (1, 0) and (0, 1) the mean points to 45 degrees, however long the second was."""
    prompts = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [-2.0, 0.0]])
    half = 0.5**0.5
    torch.testing.assert_close(class_embeds(prompts, classes=2), torch.tensor([[half, half], [-1.0, 0.0]]))


def test_accuracy_is_sklearns() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    labels = torch.randint(12, (200,), generator=generator)
    images = F.normalize(classes[labels] + 0.7 * torch.randn(200, 8, generator=generator), dim=-1)
    found = zero_shot_accuracy(images, labels, classes)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, (images @ classes.T).numpy(), k=k, labels=range(12))
        assert found[f"zero_shot_top{k}"] == pytest.approx(expected)
    assert 1 / 12 < found["zero_shot_top1"] < found["zero_shot_top5"] < 1


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A Cat on a mat", 0),
        ("a hot dog", 1),
        ("a dog", 2),
        ("dogs and catalogs", -1),
        ("a cat and a dog", -1),
        ("a cat and another cat", 0),
        ("hot dog, dog", -1),
        ("a c++ book", 3),
        ("a cat flap", 4),
        ("", -1),
    ],
)
def test_the_class_that_a_caption_names(caption: str, named: int) -> None:
    assert named_class(caption, ("cat", "Hot dog", "dog", "C++", "cat flap")) == named
