"""What a metric is: settings that say what is needed, which parts there are, and how a part is measured.

A metric is one file: a Config that is a `Metric`, and an entry in the union `MetricConfig`. One with numbers that are
means over pictures is a `per_sample.PerSample`, too, so that they can be compared picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from genpipe.artifacts import Artifact, Role, read_manifest
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import ShardDataset, open_splits
from genpipe.data.shards import Split
from genpipe.diffusion.process import DiffusionConfig
from genpipe.diffusion.samplers import Denoise
from genpipe.evaluation.reference import Reference
from genpipe.pinned_files import PinnedFile, read_pinned
from genpipe.storage import Storage

SAMPLE = {"sample": Role("samples")}
REFERENCE = {"shard": Role("shards", "samples")}
"""Roles that several metrics have: the generated pictures, and the real ones that they are held against."""

Partial = dict[str, Any]
"""What was found in one part, as JSON values."""
Measure = Callable[[str, Path], Partial]
"""Measures one part; arrays and pictures go into the folder, under names that no other part gives."""


class PixelModel(NamedTuple):
    """A diffusion model of pictures of side `size`. `told` captions and labels of B pictures, it is a denoiser."""

    size: int
    diffusion: DiffusionConfig
    told: Callable[[Sequence[str], Sequence[int]], Denoise]


class Metric(Protocol):
    """The settings of a metric and what follows from them."""

    @property
    def kind(self) -> str:
        """The metric's name in the union, and by default in the results."""
        ...

    def roles(self) -> dict[str, Role]:
        """What it takes; never a role that another metric takes otherwise."""
        ...

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """The numbers that it gives, as far as they are known before: patterns of `fnmatch`."""
        ...

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError where inputs do not fit, those that are only planned by their `meta` alone."""
        ...

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Its units of work, stable across runs."""
        ...

    def measure(self, evaluation: Evaluation) -> Measure:
        """Load what measuring takes; the result is called on each part."""
        ...

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """The numbers, from what all parts found, in order, and from the files that they left."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how much at a time.

    `part_size` pictures make a part, `batch_size` of them pass through a network together. `validate` repeats the
    held-out validation of a trained artifact, `pixel_model` loads a system of pixels.
    """

    inputs: Mapping[str, Artifact]
    part_size: int
    batch_size: int
    device: torch.device
    validate: Callable[[Artifact, torch.device], dict[str, float]]
    pixel_model: Callable[[Artifact, torch.device], PixelModel]

    @cached_property
    def samples(self) -> dict[Split, ShardDataset]:
        """The generated pictures, by the split that their prompts are from."""
        return open_splits(self.inputs["sample"])

    @cached_property
    def reference(self) -> Reference:
        """The real pictures."""
        return Reference(open_splits(self.inputs["shard"]))

    @cached_property
    def seed(self) -> int | None:
        """What the generated pictures' noise was drawn with; None where the stage `sample` did not draw them."""
        manifest = read_manifest(self.inputs["sample"].uri, check_files=False)
        return manifest.config.get("seed") if manifest and manifest.identity["stage"] == "sample" else None

    @property
    def size(self) -> int:
        """Side of the generated pictures in pixels: the shorter one of the first."""
        first = next(iter(self.samples.values()))
        return min(int(side) for side in first.image(0).shape[:2])

    def sample_parts(self) -> list[str]:
        """Parts of the generated pictures, for `part_of`."""
        return [part for split, dataset in self.samples.items() for part in self.parts_of(split, len(dataset))]

    def parts_of(self, split: Split, length: int) -> list[str]:
        """Parts of `length` pictures of a split, for `part_of`."""
        size = self.part_size
        return [f"{split} {first} {min(first + size, length)}" for first in range(0, length, size)]

    def batches(self, rows: range) -> Iterator[np.ndarray]:
        """`rows` in pieces of the batch size, int64."""
        for first in range(rows.start, rows.stop, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, rows.stop), dtype=np.int64)

    def pictures(self, split: Split, rows: np.ndarray, *, size: int) -> Tensor:
        """Generated pictures [B, 3, size, size] in [-1, 1], on the device."""
        return to_float(image_batch(self.samples[split], rows, size=size).to(self.device))

    def originals(self, rows: np.ndarray, *, size: int) -> Tensor:
        """Pictures of the reference [B, 3, size, size] in [-1, 1], on the device."""
        return to_float(self.reference.images(rows, size=size).to(self.device))


def part_of(part: str) -> tuple[Split, range]:
    """The split and the rows that a part of `Evaluation.parts_of` stands for."""
    split, first, stop = part.split()
    return cast(Split, split), range(int(first), int(stop))


def check_file(file: PinnedFile, read: Callable[[PinnedFile], object] = read_pinned, *, setting: str) -> None:
    """Raise ValueError if a file does not hold what `read` wants. One that is not here may be where workers run."""
    try:
        read(file)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


def check_classes(inputs: Mapping[str, Artifact], *, setting: str) -> None:
    """Raise ValueError if samples and reference are known to have other classes, or none."""
    known = [inputs[role].meta["classes"] for role in ("sample", "shard") if "classes" in inputs[role].meta]
    if any(classes != known[0] or not classes for classes in known):
        raise ValueError(
            f"{setting}: the samples and the reference (role shard) do not have the same classes; map the shards that "
            "the system was trained on, and measure what needs no classes where there are none"
        )
