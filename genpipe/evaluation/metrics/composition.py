"""Do pictures show the shapes, numbers, colors and places that were asked for? Their pixels say so, and no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shape_scenes import TASKS, Task, parse, task_of
from genpipe.data.shards import SPLITS
from genpipe.evaluation.metrics.metric import SAMPLE, Evaluation, Measure, Partial, part_of
from genpipe.evaluation.per_sample import Better, write_values
from genpipe.evaluation.shapes_seen import seen_in, shows
from genpipe.storage import Storage


class CompositionConfig(Config):
    """The share of pictures that show what was asked for and nothing else, of prompts about colored shapes.

    `SPLIT/composition_TASK` of each task, and `SPLIT/composition`, the mean over the tasks that there are, after
    GenEval (Ghosh et al. 2023). Prompts are those of `prompts: {kind: shapes}`, or captions of the source `shapes`.
    """

    kind: Literal["composition"] = "composition"

    def roles(self) -> dict[str, Role]:
        """The generated pictures."""
        return dict(SAMPLE)

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All of each split."""
        return [f"{split}/composition{end}" for split in SPLITS for end in ("", *(f"_{task}" for task in TASKS))]

    def per_sample(self) -> dict[str, Better]:
        """Whether each picture of a task is right."""
        return {f"{split}/composition_{task}": "higher" for split in SPLITS for task in TASKS}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Prompts are known once they are drawn."""

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Parts of the pictures. Raises ValueError for prompts that are not about shapes."""
        for dataset in evaluation.samples.values():
            for row in range(len(dataset)):
                if parse(caption := dataset.captions(row)[0]) is None:
                    raise ValueError(
                        f"metrics.composition: the prompt {caption!r} is none about shapes; draw those of prompts.kind "
                        "shapes, or captions of source.kind shapes"
                    )
        return evaluation.sample_parts()

    def measure(self, evaluation: Evaluation) -> Measure:
        """Looks at every picture of a part."""

        def looked_at(part: str, out: Path) -> Partial:
            split, rows = part_of(part)
            dataset = evaluation.samples[split]
            by_task: dict[Task, list[tuple[int, str, bool]]] = {}
            for row in rows:
                caption = dataset.captions(row)[0]
                asked = parse(caption)
                assert asked is not None, "all prompts were checked"
                is_right = shows(seen_in(dataset.image(row)), asked)
                by_task.setdefault(task_of(asked), []).append((row, caption, is_right))
            for task, found in by_task.items():
                at, captions, are_right = zip(*found, strict=True)
                write_values(
                    out,
                    f"composition-{split}-{task}-{rows.start:09d}",
                    {f"{split}/composition_{task}": np.asarray(are_right)},
                    better=self.per_sample(),
                    keys=captions,
                    rows=at,
                    seed=evaluation.seed,
                )
            right = {task: sum(is_right for *_, is_right in found) for task, found in by_task.items()}
            pictures = {task: len(found) for task, found in by_task.items()}
            return {"split": split, "right": right, "pictures": pictures}

        return looked_at

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """The shares."""
        metrics: dict[str, float] = {}
        for split in SPLITS:
            right, pictures = Counter[str](), Counter[str]()
            for partial in partials:
                if partial["split"] == split:
                    right.update(partial["right"])
                    pictures.update(partial["pictures"])
            shares = {task: right[task] / count for task, count in pictures.items()}
            metrics |= {f"{split}/composition_{task}": share for task, share in shares.items()}
            if shares:
                metrics[f"{split}/composition"] = sum(shares.values()) / len(shares)
        return metrics
