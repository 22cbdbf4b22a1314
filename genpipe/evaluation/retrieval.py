"""Retrieval between two sets of embeddings. B queries, N in the pool, I images, T texts, D embedding width."""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.models.precision import fp32

BLOCK = 2**24
"""Similarities that are held at a time: 64 MiB, however large the sets."""


def retrieval_ranks(queries: Tensor, pool: Tensor, target: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """How many of the pool are more similar to each query than its own, int64 [B]; 0 is a first place.

    queries [B, D] and pool [N, D] are unit vectors, target [B] the pool's row that belongs to each query. With
    `groups`, int64 [N], a query's own are all of the group `target`: the most similar of them counts, and the others
    are not in its way. Entries that tie with the own one count as ahead of it, so that a constant embedding scores
    worst and not best.
    """
    groups = torch.arange(len(pool), device=pool.device) if groups is None else groups
    rows = max(1, BLOCK // len(pool))
    parts = zip(queries.split(rows), target.split(rows), strict=True)
    return torch.cat([_ranks(part, pool, own[:, None] == groups) for part, own in parts])


def _ranks(queries: Tensor, pool: Tensor, own_BN: Tensor) -> Tensor:
    with fp32(queries.device):  # bf16 has too few digits to tell near ones apart
        similarity = queries.float() @ pool.float().T
    best = similarity.masked_fill(~own_BN, -torch.inf).amax(1, keepdim=True)
    return (similarity.masked_fill_(own_BN, -torch.inf) >= best).sum(1)


def recall_at(ranks: Tensor, k: int) -> float:
    """The share of queries whose own is among the first k."""
    return (ranks < k).float().mean().item()


def retrieval_recalls(images: Tensor, texts: Tensor, *, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, as CLIP is reported on Flickr30k and COCO (Radford et al. 2021, sec. 3.1).

    images [I, D], texts [T, D] unit vectors; image_of_text int64 [T], the image that each text describes. Of an
    image's several texts the first that is found counts. Each image has one at least.
    """
    every_image = torch.arange(len(images), device=images.device)
    ranks = {
        "image_to_text": retrieval_ranks(images, texts, every_image, groups=image_of_text),
        "text_to_image": retrieval_ranks(texts, images, image_of_text),
    }
    return {f"{way}_r{k}": recall_at(found, k) for way, found in ranks.items() for k in (1, 5, 10)}
