"""Random numbers of a batch of pictures, and of some pictures of one as if all of it were drawn. B pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

Shape = tuple[int, ...]


class RowGenerator(torch.Generator):
    """A generator for the pictures `rows` of a batch of `count`: they get the numbers that they get in that batch.

    Numbers for all of the batch are drawn, and those of the others are dropped. What draws by the functions of this
    module needs not know of it.
    """

    count: int
    rows: list[int]

    @classmethod
    def of(cls, generator: torch.Generator, *, count: int, rows: Sequence[int]) -> Self:
        """From where `generator` began. `rows` are places in the batch."""
        assert all(0 <= row < count for row in rows), "places in the batch"
        made = cls(generator.device)
        made.manual_seed(generator.initial_seed())
        made.count, made.rows = count, list(rows)
        return made


def restarted(generator: torch.Generator) -> torch.Generator:
    """Another generator, from where this one began."""
    if isinstance(generator, RowGenerator):
        return RowGenerator.of(generator, count=generator.count, rows=generator.rows)
    return torch.Generator(generator.device).manual_seed(generator.initial_seed())


def normal(shape: Shape, generator: torch.Generator | None, *, device: torch.device) -> Tensor:
    """Standard normal noise fp32 of `shape` [B, ...], or [times * B, ...] for batches that follow one another."""
    return _of_rows(lambda whole: torch.randn(whole, generator=generator, device=device), shape, generator)


def integers(low: int, high: int, shape: Shape, generator: torch.Generator, *, device: torch.device) -> Tensor:
    """Numbers int64 of `shape` [B, ...] in [low, high), all as likely."""
    return _of_rows(lambda whole: torch.randint(low, high, whole, generator=generator, device=device), shape, generator)


def choices(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A place int64 [B] for each row of probabilities [B, N], by an exponential race, as torch.multinomial does it."""

    def race(whole: Shape) -> Tensor:
        return probabilities.new_empty(whole).exponential_(generator=generator)

    return (probabilities / _of_rows(race, tuple(probabilities.shape), generator)).argmax(dim=1)


def _of_rows(draw: Callable[[Shape], Tensor], shape: Shape, generator: torch.Generator | None) -> Tensor:
    if not isinstance(generator, RowGenerator):
        return draw(shape)
    times, *rest = shape[0] // len(generator.rows), *shape[1:]
    whole = draw((times * generator.count, *rest))
    return whole.view(times, generator.count, *rest)[:, generator.rows].flatten(0, 1)
