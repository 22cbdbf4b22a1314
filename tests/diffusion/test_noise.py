"""Numbers for some pictures of a batch, against those of the whole batch; choices, against torch's multinomial."""

from __future__ import annotations

import pytest
import torch

from genpipe.diffusion.noise import RowGenerator, choices, integers, normal, restarted

CPU = torch.device("cpu")
COUNT, ROWS = 5, [3, 1]


def whole() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def rows() -> RowGenerator:
    return RowGenerator.of(whole(), count=COUNT, rows=ROWS)


def test_rows_get_what_they_get_in_the_batch_draw_after_draw() -> None:
    """Also where a batch follows itself, as the candidates of a prior do, and after another one was drawn."""
    of_all, of_some = whole(), rows()
    for times, shape in ((1, (4,)), (2, (3,)), (1, (2, 6))):
        everything = normal((times * COUNT, *shape), of_all, device=CPU).view(times, COUNT, *shape)
        found = normal((times * len(ROWS), *shape), of_some, device=CPU)
        assert torch.equal(found, everything[:, ROWS].flatten(0, 1))
    assert torch.equal(integers(2, 90, (2,), of_some, device=CPU), integers(2, 90, (COUNT,), of_all, device=CPU)[ROWS])
    probabilities = torch.rand(COUNT, 11, generator=whole())
    assert torch.equal(choices(probabilities[ROWS], of_some), choices(probabilities, of_all)[ROWS])


def test_a_generator_that_is_begun_again_draws_the_same() -> None:
    for generator in (whole(), rows()):
        count = len(ROWS) if isinstance(generator, RowGenerator) else COUNT
        first = normal((count, 9), generator, device=CPU)
        assert torch.equal(normal((count, 9), restarted(generator), device=CPU), first)


def test_choices_are_those_of_torch() -> None:
    probabilities = torch.rand(64, 50, generator=whole()).softmax(-1)
    expected = probabilities.multinomial(1, generator=whole()).squeeze(1)
    assert torch.equal(choices(probabilities, whole()), expected)


def test_a_row_outside_of_the_batch_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="places in the batch"):
        RowGenerator.of(whole(), count=COUNT, rows=[COUNT])
