"""Do pictures show what their prompts say? How often CLIP finds a picture's caption among all captions.

A picture counts as right if its prompt is among the k captions most similar to it, of the first captions of the whole
reference. `ceiling` is the same measure on the real pictures. A CLIP that conditions the system says how faithful the
pictures are to its embedding, not how good they are; it is refused as a judge, unless the settings ask for it by name.

B pictures of a part, n samples of a chunk of the pool, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import Config
from genpipe.data.features import open_features
from genpipe.data.shards import SPLITS
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.metrics.judge import (
    CLIP_ROLE,
    FEATURES_ROLE,
    PREFIX,
    Judge,
    check_judge,
    check_judge_content,
    judge_roles,
)
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, Measure, Partial, part_of
from genpipe.evaluation.per_sample import Better, write_values
from genpipe.evaluation.reference import Matches, check_matched
from genpipe.evaluation.retrieval import BLOCK, Chunk, chunked_ranks
from genpipe.evaluation.validation import cosine
from genpipe.lineage import check_lineage, check_made_from
from genpipe.models.clip import CLIP
from genpipe.storage import Storage
from genpipe.weights import load_weights


class RetrievalConfig(Config):
    """Recall of the pictures' captions by a CLIP, its ceiling, and the similarity of embeddings.

    For each split with samples it gives `SPLIT/recall_at_K` and `SPLIT/ceiling_at_K` (shares); `SPLIT/cosine`, the
    mean cosine of the embeddings of a picture and of the real one with its caption, and `SPLIT/cosine_unrelated`, that
    with the real ones of all other pictures; `SPLIT/pictures`, how many were measured; and `pool`, the number of
    captions to choose from. The CLIP is the role `judge`, and `judge_features` must be those that it gave of `shard`.

    With `judge: self` it is the role `clip`, which may condition the system, with `features`; all numbers but the
    counts are then `SPLIT/self_...`.
    """

    kind: Literal["retrieval"] = "retrieval"
    judge: Judge = Field("independent", description="whether the CLIP may be one that conditions the system")
    recall_at: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="how many of the nearest captions count")

    def roles(self) -> dict[str, Role]:
        """Pictures, the reference, and what a CLIP says of it."""
        return {**SAMPLE, **REFERENCE, **judge_roles(self.judge), FEATURES_ROLE[self.judge]: Role("features")}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All of them."""
        measured = [f"{name}_at_{k}" for name in ("recall", "ceiling") for k in self.recall_at]
        named = [PREFIX[self.judge] + name for name in (*measured, "cosine", "cosine_unrelated")]
        return ["pool", *(f"{split}/{name}" for split in SPLITS for name in (*named, "pictures"))]

    def per_sample(self) -> dict[str, Better]:
        """Whether each caption is found, and the cosine of each pair."""
        named = [*(f"{name}_at_{k}" for name in ("recall", "ceiling") for k in self.recall_at), "cosine"]
        return {f"{split}/{PREFIX[self.judge]}{name}": "higher" for split in SPLITS for name in named}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError unless the features are of this reference by this CLIP, and the CLIP may judge."""
        check_judge(inputs, judge=self.judge, setting="metrics.retrieval")
        check_lineage(self.made_together(inputs))

    def made_together(self, inputs: Mapping[str, Artifact]) -> dict[str, Artifact]:
        """The reference, the CLIP and its features, by the names that they have as each other's inputs."""
        names = {"shard": "shard", "clip": CLIP_ROLE[self.judge], "features": FEATURES_ROLE[self.judge]}
        return {name: inputs[role] for name, role in names.items()}

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Parts of the pictures."""
        return evaluation.sample_parts()

    def measure(self, evaluation: Evaluation) -> Measure:
        """Loads CLIP and opens the features. Raises ValueError if they were not made for one another."""
        return _Measure(self, evaluation)

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """Shares and means over all pictures of each split."""
        metrics: dict[str, float] = {}
        for split in SPLITS:
            if found := [partial for partial in partials if partial["split"] == split]:
                count = sum(partial["pictures"] for partial in found)
                sums = {name: sum(partial["sums"][name] for partial in found) for name in found[0]["sums"]}
                prefix = f"{split}/{PREFIX[self.judge]}"
                metrics |= {f"{prefix}{name}": value / count for name, value in sums.items()}
                metrics[f"{split}/pictures"] = float(count)
                if count > 1:
                    drawn, real = (np.sum([partial[name] for partial in found], axis=0) for name in ("drawn", "real"))
                    unrelated = (float(drawn @ real) - sums["cosine"]) / (count * (count - 1))
                    metrics[f"{prefix}cosine_unrelated"] = unrelated
        return metrics | {"pool": float(partials[0]["pool"])}


class _Measure:
    """CLIP, and its view of the reference, mapped and not held."""

    def __init__(self, cfg: RetrievalConfig, evaluation: Evaluation) -> None:
        self.cfg, self.evaluation = cfg, evaluation
        check_judge_content(evaluation.inputs, judge=cfg.judge, setting="metrics.retrieval")
        inputs = cfg.made_together(evaluation.inputs)
        check_made_from(inputs)
        weights = load_weights(fetch(inputs["clip"]), kind="clip", device=evaluation.device)
        self.clip = cast(CLIP, weights.module)
        self.features = {split: open_features(inputs["features"], split=split) for split in evaluation.reference.ranges}

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> Partial:
        split, rows = part_of(part)
        reference = self.evaluation.reference
        prompts = first_captions(self.evaluation.samples[split], rows)
        matches = reference.match(prompts)
        originals = matches.originals(np.asarray(rows), within=reference.range_of(split))
        check_matched(originals, prompts, setting="metrics.retrieval")
        drawn, real = self._drawn(part), self._real(originals)
        ranks = self._ranks(torch.cat([drawn, real]), matches).view(2, -1)
        values = {
            f"{name}_at_{k}": (of < k).double()
            for name, of in zip(("recall", "ceiling"), ranks, strict=True)
            for k in self.cfg.recall_at
        }
        values["cosine"] = cosine(drawn, real).double()
        sums = {name: float(of.sum()) for name, of in values.items()}
        write_values(
            out,
            f"retrieval-{split}-{rows.start:09d}",
            {f"{split}/{PREFIX[self.cfg.judge]}{name}": of.cpu().numpy() for name, of in values.items()},
            better=self.cfg.per_sample(),
            keys=prompts,
            rows=rows,
            seed=self.evaluation.seed,
        )
        vectors = {name: embeds.double().sum(0).tolist() for name, embeds in (("drawn", drawn), ("real", real))}
        return {"split": split, "pictures": len(rows), "pool": len(reference), "sums": sums, **vectors}

    def _drawn(self, part: str) -> Tensor:
        """The embeddings of the generated pictures, unit vectors [B, D]."""
        split, rows = part_of(part)
        size = self.clip.cfg.image_size
        batches = (self.evaluation.pictures(split, batch, size=size) for batch in self.evaluation.batches(rows))
        return torch.cat([self.clip.encode_image(images) for images in batches])

    def _real(self, originals: np.ndarray) -> Tensor:
        """The embeddings of the real pictures, from the cache, [B, D]."""
        read = lambda split, rows: self.features[split].image_embeds(rows)  # noqa: E731
        return self.evaluation.reference.gather(originals, read).float().to(self.evaluation.device)

    def _ranks(self, queries: Tensor, matches: Matches) -> Tensor:
        """The ranks of 2 B queries: of the generated pictures, then of the real ones."""
        size = max(1, BLOCK // len(queries))

        def pool() -> Iterator[Chunk]:
            for split, rows in self.evaluation.reference.ranges.items():
                first = rows.start
                for embeds in self.features[split].chunks("text_embeds", size=size):
                    own = matches.own(range(first, first + len(embeds)))
                    yield embeds.to(queries.device), own.repeat(2, 1).to(queries.device)
                    first += len(embeds)

        return chunked_ranks(queries, pool)
