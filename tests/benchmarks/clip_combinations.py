"""What a CLIP makes of captions whose subject it has seen in another style only.

    python tests/benchmarks/clip_combinations.py CLIP SHARDS

The artifacts of a CLIP and of shards that hold out combinations. Shows, of the first captions of each split, how many
find their own picture first and among ten of all pictures; and how many of the combinations' have a training picture
of their subject among the ten nearest training pictures.
"""

from __future__ import annotations

import sys
from typing import cast

import numpy as np
import torch
from torch.nn import functional as F

from genpipe.artifacts import Artifact, fetch, find
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.shard_dataset import open_splits
from genpipe.generation.parts import clip_text
from genpipe.models.clip import CLIP
from genpipe.weights import load_weights

CPU, BATCH = torch.device("cpu"), 256


@torch.no_grad()
def main(clip_uri: str, shards_uri: str) -> None:
    artifact, shards = found(clip_uri), found(shards_uri)
    clip = cast(CLIP, load_weights(fetch(artifact), kind="clip", device=CPU).module)
    encode, size = clip_text(artifact, clip, device=CPU), clip.cfg.image_size
    images, texts, splits, groups = [], [], [], []
    for split, dataset in open_splits(shards).items():
        for first in range(0, len(dataset), BATCH):
            rows = np.arange(first, min(first + BATCH, len(dataset)))
            images.append(clip.encode_image(to_float(image_batch(dataset, rows, size=size))))
            texts.append(encode([dataset.captions(int(row))[0] for row in rows]).embed)
            splits += [split] * len(rows)
            groups += [dataset.group(int(row)) for row in rows]
    of_split, of_group = np.asarray(splits), np.asarray(groups)
    similar = F.normalize(torch.cat(texts), dim=-1) @ F.normalize(torch.cat(images), dim=-1).T
    rank = (similar > similar.diagonal()[:, None]).sum(1).numpy()
    for split in dict.fromkeys(splits):
        own = rank[of_split == split]
        print(f"{split}: own picture first {(own < 1).mean():.3f}, among ten {(own < 10).mean():.3f}, of {len(own)}")
    asked, train = np.flatnonzero(of_split == "combinations"), np.flatnonzero(of_split == "train")
    ten = train[similar[asked][:, train].topk(10).indices.numpy()]
    same = (of_group[ten] == of_group[asked][:, None]).any(1)
    print(f"combinations: a training picture of the subject among ten {same.mean():.3f}")


def found(uri: str) -> Artifact:
    artifact = find(uri)
    assert artifact is not None, f"{uri}: nothing is committed here"
    return artifact


if __name__ == "__main__":
    main(*sys.argv[1:])
