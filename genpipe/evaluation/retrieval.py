"""Retrieval between two sets of embeddings.

B queries, N entries of a pool, n of a chunk of it, I images, T texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from genpipe.models.precision import fp32

BLOCK = 2**24
"""Similarities that are held at a time: 64 MiB, however large the sets."""

TIE = 1e-6
"""Cosines closer than this are equal: a product of unit vectors in fp32 is no more exact."""

Chunk = tuple[Tensor, Tensor]
"""Some of a pool: embeddings [n, D], and bool [B, n], which of them belong to each query."""


def retrieval_ranks(queries: Tensor, pool: Tensor, target: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """How many of the pool are more similar to each query than its own, int64 [B]; 0 is a first place.

    queries [B, D] and pool [N, D] are unit vectors, target [B] the pool's row that belongs to each query. With
    `groups`, int64 [N], a query's own are all of the group `target`. See `chunked_ranks`.
    """
    groups = torch.arange(len(pool), device=pool.device) if groups is None else groups
    rows = max(1, BLOCK // len(pool))
    parts = zip(queries.split(rows), target.split(rows), strict=True)
    return torch.cat([chunked_ranks(part, _whole(pool, own[:, None] == groups)) for part, own in parts])


def _whole(pool: Tensor, own_BN: Tensor) -> Callable[[], Iterable[Chunk]]:
    """A pool in memory, as a single chunk."""
    return lambda: [(pool, own_BN)]


def chunked_ranks(queries: Tensor, pool: Callable[[], Iterable[Chunk]]) -> Tensor:
    """How many of a pool are more similar to each query than its own, int64 [B], the pool read chunk by chunk.

    queries [B, D] are unit vectors. `pool` is called twice, and each time gives the same chunks. Of a query's own, of
    which there is one at least, the most similar counts, and the others are not in its way. Others that tie with it
    count as ahead of it, so that a constant embedding scores worst and not best.
    """
    best = queries.new_full((len(queries), 1), -torch.inf, dtype=torch.float32)
    for embeds, own_Bn in pool():
        if own_Bn.any():
            of_own = _cosines(queries, embeds).masked_fill_(~own_Bn, -torch.inf)
            best = torch.maximum(best, of_own.amax(1, keepdim=True))
    assert best.isfinite().all(), "every query has an entry of its own in the pool"
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for embeds, own_Bn in pool():
        ranks += (_cosines(queries, embeds).masked_fill_(own_Bn, -torch.inf) >= best - TIE).sum(1)
    return ranks


def _cosines(queries: Tensor, embeds: Tensor) -> Tensor:
    with fp32(queries.device):  # bf16 has too few digits to tell near ones apart
        return queries.float() @ embeds.float().T


def recall_at(ranks: Tensor, k: int) -> float:
    """The share of queries whose own is among the first k."""
    return (ranks < k).float().mean().item()


def retrieval_recalls(images: Tensor, texts: Tensor, *, image_groups: Tensor, text_groups: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, as CLIP is reported on Flickr30k and COCO (Radford et al. 2021, sec. 3.1).

    images [I, D], texts [T, D] unit vectors; image_groups int64 [I], text_groups int64 [T]: an image and a text of one
    group belong together, and of several the first that is found counts. On COCO a group is an image and its texts;
    where several images have the very same text, it is all of them. Neither an image nor a text is alone in its group.
    """
    ranks = {
        "image_to_text": retrieval_ranks(images, texts, image_groups, groups=text_groups),
        "text_to_image": retrieval_ranks(texts, images, text_groups, groups=image_groups),
    }
    return {f"{way}_r{k}": recall_at(found, k) for way, found in ranks.items() for k in (1, 5, 10)}
