"""What samplers are conditioned on: statistics are undone, cached text is padded, conditions are repeated."""

from __future__ import annotations

import pytest
import torch

from genpipe.generation.conditions import Conditions, Given, Statistics, Text

CPU = torch.device("cpu")


def test_statistics_are_undone() -> None:
    statistics = Statistics.of([1.0, -2.0], [0.5, 4.0], axes=2, device=CPU)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(statistics.restore(statistics.standardize(x)), x)
    torch.testing.assert_close(statistics.standardize(x)[:, 1], (x[:, 1] + 2) / 4)


def cached() -> dict[str, torch.Tensor]:
    """Two captions of one and three tokens, from an encoder without pooled embeddings."""
    places = torch.tensor([[0, -1, -1], [1, 2, 3]])
    return {"text_encodings": torch.arange(8).view(4, 2).half(), "text_places": places}


def test_cached_text_is_padded_with_zeros() -> None:
    text = Text.from_cache({**cached(), "text_embeds": torch.ones(2, 5).half()})
    assert text.embed.dtype == text.encodings.dtype == torch.float32
    assert text.text_mask.tolist() == [[True, False, False], [True, True, True]]
    assert text.encodings.tolist() == [[[0, 1], [0, 0], [0, 0]], [[2, 3], [4, 5], [6, 7]]]


def test_an_encoder_may_have_no_pooled_embedding() -> None:
    assert Text.from_cache(cached()).embed.shape == (2, 0)


def test_conditions_are_repeated_and_cut_together() -> None:
    given = Given(torch.tensor([[1.0], [2.0]]), Text.from_cache(cached()), torch.tensor([7, 8]))
    twice = given.repeated(2)
    assert twice.image_embed is not None and twice.text is not None and twice.labels is not None
    assert twice.image_embed.flatten().tolist() == [1, 2, 1, 2] and twice.labels.tolist() == [7, 8, 7, 8]
    assert torch.equal(twice.text.text_mask[2:], twice.text.text_mask[:2])
    first = given.first(1)
    assert first.labels is not None and first.text is not None
    assert first.labels.tolist() == [7] and len(first.text.text_mask) == 1
    assert Given().repeated(2) == Given() == Given().first(1)


def test_there_is_one_condition_for_each_picture() -> None:
    with pytest.raises(AssertionError):
        Conditions(2, texts=["a cat"])


def test_conditions_follow_one_another_padded_to_the_longest() -> None:
    one = Given(torch.tensor([[1.0], [2.0]]), Text.from_cache(cached()), torch.tensor([7, 8]))
    short = Text(torch.ones(1, 0), torch.full((1, 1, 2), 9.0), torch.tensor([[True]]))
    both = one.followed_by(Given(torch.tensor([[3.0]]), short, torch.tensor([-1])))
    assert both.image_embed is not None and both.text is not None and both.labels is not None
    assert both.image_embed.flatten().tolist() == [1, 2, 3] and both.labels.tolist() == [7, 8, -1]
    assert both.text.text_mask.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert both.text.encodings[2].tolist() == [[9, 9], [0, 0], [0, 0]]
    again = Given(text=short).followed_by(Given(text=Text.from_cache(cached())))
    assert again.text is not None and again.text.text_mask[0].tolist() == [True, False, False]


def test_the_opposite_is_asked_for_without_labels() -> None:
    assert Conditions(2, texts=["a", "b"]).opposite() is None
    asked = Conditions(2, texts=["a", "b"], labels=[3, 4], negative=["c", "d"])
    assert asked.opposite() == Conditions(2, texts=["c", "d"], labels=[-1, -1])
