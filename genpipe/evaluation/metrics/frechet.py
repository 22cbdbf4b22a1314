"""How far the generated pictures, as a set, are from real ones: FID, and its like with other networks.

B pictures of a part, D features.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import Discriminator, Tag
from torch import Tensor

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import Config, by_kind
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.fidelity import FeatureMoments, Moments, StoredMoments, frechet_distance
from genpipe.evaluation.metrics.features import moments_of_files, save_features
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, Measure, Partial, check_file, part_of
from genpipe.evaluation.networks import inception_features, load_inception
from genpipe.evaluation.reference import check_matched
from genpipe.models.clip import CLIP
from genpipe.pinned_files import PinnedFile, read_pinned
from genpipe.storage import Storage
from genpipe.weights import load_weights

REAL = "reference"


class InceptionNetwork(PinnedFile):
    """FID's Inception as a TorchScript file: 2048 features. The metric is called `fid_N`."""

    kind: Literal["inception"] = "inception"


class ClipNetwork(Config):
    """The image embeddings of the role `clip`. The metric is called `frechet_clip_N`."""

    kind: Literal["clip"] = "clip"


Network = Annotated[
    Annotated[InceptionNetwork, Tag("inception")] | Annotated[ClipNetwork, Tag("clip")], by_kind("inception")
]
Against = Annotated[
    Annotated[Literal["originals", "train", "heldout"], Tag("split")] | Annotated[PinnedFile, Tag("file")],
    Discriminator(lambda value: "split" if isinstance(value, str) else "file"),
]
NAMES = {"inception": "fid", "clip": "frechet_clip"}


class FrechetConfig(Config):
    """The Frechet distance of N pictures, `SPLIT/fid_N`, for each split with samples.

    `against` is what they are held against: `originals`, as many real pictures that have their captions; all of a
    split of the reference; or stored statistics, a .npz file with `mu` [D] and `sigma` [D, D] as they are published.
    """

    kind: Literal["frechet"] = "frechet"
    network: Network
    against: Against = "originals"

    def roles(self) -> dict[str, Role]:
        """Pictures; the reference unless its statistics are stored; the CLIP if that is the network."""
        clip = {"clip": Role("clip")} if isinstance(self.network, ClipNetwork) else {}
        return {**SAMPLE, **({} if isinstance(self.against, PinnedFile) else REFERENCE), **clip}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """One for each split, with the number of pictures at its end."""
        return [f"{split}/{NAMES[self.network.kind]}_*" for split in SPLITS]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network's file, or that of the statistics, is here and not what the settings say."""
        if isinstance(self.network, PinnedFile):
            check_file(self.network, setting="metrics.frechet.network")
        if isinstance(self.against, PinnedFile):
            check_file(self.against, stored_moments, setting="metrics.frechet.against")

    def parts(self, evaluation: Evaluation) -> list[str]:
        """Parts of the pictures, then those of the split that they are held against."""
        parts = [f"sample {part}" for part in evaluation.sample_parts()]
        if not isinstance(self.against, str) or self.against == "originals":
            return parts
        length = len(evaluation.reference.range_of(self.against))
        if not length:
            raise ValueError(f"metrics.frechet.against: the reference (role shard) has no {self.against} split")
        return [*parts, *(f"{REAL} {part}" for part in evaluation.parts_of(self.against, length))]

    def measure(self, evaluation: Evaluation) -> Measure:
        """Loads the network."""
        return _Measure(self, evaluation)

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """The distances. Raises ValueError where features do not fit the statistics, or for a set of one."""
        metrics: dict[str, float] = {}
        for split in SPLITS:
            if any(partial["split"] == split and partial["of"] == "sample" for partial in partials):
                drawn = moments_of_files(files, f"sample-{split}-")
                distance = frechet_distance(drawn, self._real(split, drawn, files))
                metrics[f"{split}/{NAMES[self.network.kind]}_{drawn.count}"] = distance
        return metrics

    def _real(self, split: Split, drawn: FeatureMoments, files: Storage) -> Moments:
        if not isinstance(self.against, PinnedFile):
            return moments_of_files(files, f"{REAL}-{split if self.against == 'originals' else self.against}-")
        stored = stored_moments(self.against)
        if stored.mean.shape != drawn.mean.shape:
            raise ValueError(
                f"metrics.frechet.against: {self.against.weights} holds statistics of {len(stored.mean)} features, but "
                f"the network gives {len(drawn.mean)}; use statistics of the same network"
            )
        return stored


class _Measure:
    """The network; a part's features become files, fp32 [B, D]."""

    def __init__(self, cfg: FrechetConfig, evaluation: Evaluation) -> None:
        self.cfg, self.evaluation = cfg, evaluation
        self.features = _network(cfg.network, evaluation)
        clip = evaluation.inputs["clip"].meta["clip_image_size"] if isinstance(cfg.network, ClipNetwork) else 0
        self.size: int = clip or evaluation.size

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> Partial:
        of, _, rest = part.partition(" ")
        split, rows = part_of(rest)
        if of == REAL:
            first = self.evaluation.reference.range_of(split).start
            self._save(out, of, split, rows, np.asarray(rows) + first)
            return {"of": of, "split": split}
        self._save(out, of, split, rows, None)
        if self.cfg.against == "originals":
            self._save(out, REAL, split, rows, self._originals(split, rows))
        return {"of": of, "split": split}

    def _save(self, out: Path, of: str, split: Split, rows: range, real: np.ndarray | None) -> None:
        """The features of the generated pictures of `rows`, or of the pictures `real` of the reference."""

        def read(batch: np.ndarray) -> Tensor:
            if real is None:
                return self.evaluation.pictures(split, batch + rows.start, size=self.size)
            return self.evaluation.originals(real[batch], size=self.size)

        batches = self.evaluation.batches(range(len(rows)))
        save_features(out / f"{of}-{split}-{rows.start:09d}.npy", (self.features(read(batch)) for batch in batches))

    def _originals(self, split: Split, rows: range) -> np.ndarray:
        reference = self.evaluation.reference
        prompts = first_captions(self.evaluation.samples[split], rows)
        originals = reference.match(prompts).originals(np.asarray(rows), within=reference.range_of(split))
        check_matched(originals, prompts, setting="metrics.frechet.against")
        return originals


def _network(cfg: InceptionNetwork | ClipNetwork, evaluation: Evaluation) -> Callable[[Tensor], Tensor]:
    """What gives the features [B, D] of images [B, 3, H, W] in [-1, 1]."""
    if isinstance(cfg, ClipNetwork):
        weights = load_weights(fetch(evaluation.inputs["clip"]), kind="clip", device=evaluation.device)
        return cast(CLIP, weights.module).encode_image
    network = load_inception(cfg, device=evaluation.device)
    return lambda images: inception_features(network, images)


def stored_moments(file: PinnedFile) -> StoredMoments:
    """The statistics of a .npz file: `mu` [D] and `sigma` [D, D]. Raises ValueError if it holds others."""
    data = read_pinned(file)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.weights}: no .npz file of statistics with `mu` and `sigma`: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{file.weights}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
    return StoredMoments(mean, covariance)
