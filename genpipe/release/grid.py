"""The grid of a release: drawn from what `release.json` records, here or anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import numpy as np
import torch

from genpipe.artifacts import Artifact
from genpipe.data.image_batches import to_uint8
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import NO_LABEL, SPLITS
from genpipe.evaluation.grids import hwc, tile
from genpipe.generation.conditions import Conditions
from genpipe.generation.systems import System
from genpipe.models.precision import autocast
from genpipe.release.record import Grid, GridPrompt
from genpipe.training.stream import seeded

LOOKED_AT = 4096
"""Samples of a split among which distinct prompts are looked for."""


@torch.no_grad()
def draw_grid(system: System, grid: Grid, *, device: torch.device) -> np.ndarray:
    """uint8 [rows * size, each * size, 3]: a row for each prompt, without text, whose letters differ by machine."""
    rows = []
    with _exactly(grid.threads):
        for number, prompt in enumerate(grid.prompts):
            conditions = Conditions(
                grid.each,
                texts=[prompt.text] * grid.each if "text" in system.conditioned_on else None,
                labels=[prompt.label] * grid.each if "label" in system.conditioned_on else None,
            )
            with autocast(device, grid.precision):
                images = system.sample(conditions, generator=seeded(device, grid.seed, "grid", number))
            rows.append(hwc(to_uint8(images)))
    return tile(rows, cell=system.size)


@contextmanager
def _exactly(threads: int) -> Iterator[None]:
    """With so many threads, and products of fp32 in fp32, as they were before afterwards."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def check_grid_prompts(system: Artifact, texts: Sequence[str], *, sampled: bool) -> None:
    """Raise ValueError where nobody says what the grid is to show, or `texts` say it to a system that is not told."""
    told: list[str] = system.meta["conditioned_on"]
    if texts and told != ["text"]:
        raise ValueError(f"prompts: the system is conditioned on {' and '.join(told) or 'nothing'}; leave them out")
    if "text" in told and not texts and not sampled:
        raise ValueError("prompts: the grid needs some; name them, or map samples to inputs.sample")


def grid_prompts(system: Artifact, samples: Artifact | None, texts: Sequence[str], *, rows: int) -> list[GridPrompt]:
    """What the rows show: `texts` if there are some, else the first distinct prompts of the samples, else classes.

    Of a system that is told nothing, `rows` rows of nothing.
    """
    told: list[str] = system.meta["conditioned_on"]
    if texts:
        return [GridPrompt(text=text, label=NO_LABEL) for text in texts]
    if not told:
        return [GridPrompt(text="", label=NO_LABEL)] * rows
    if "text" not in told:
        return [GridPrompt(text=name, label=label) for label, name in enumerate(system.meta["classes"][:rows])]
    assert samples is not None, "check_grid_prompts asks for them"
    return _prompts_of(samples)[:rows]


def _prompts_of(samples: Artifact) -> list[GridPrompt]:
    """Distinct prompts, of each split in turn, those of held-out subjects first: they say more about the system."""
    by_split = []
    for split in reversed(SPLITS):
        if samples.meta["samples"].get(split):  # there may be no combinations
            dataset = open_shards(samples, split=split)
            by_split.append([_prompt(dataset, i) for i in range(min(len(dataset), LOOKED_AT))])
    in_turn = (prompt for prompts in zip_longest(*by_split) for prompt in prompts if prompt is not None)
    return list(dict.fromkeys(in_turn))


def _prompt(dataset: ShardDataset, i: int) -> GridPrompt:
    return GridPrompt(text=dataset.captions(i)[0], label=int(dataset.labels(np.asarray([i]))[0]))
