"""Nearest neighbors among features, and what they say of two sets. Distances are fp64: near ones are to be told apart.

Q queries, n rows of a pool that come together, N real and M generated pictures, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from genpipe.models.precision import fp32

BLOCK = 2**22
"""Distances that are held at a time: 32 MiB."""

TIE = 1e-9
"""Share of a squared distance by which another must be less to count as less: the same picture twice is a tie."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """fp64 [Q, n]: squared Euclidean distances of the rows [Q, D] and [n, D]."""
    with fp32(a.device):
        a, b = a.double(), b.double()
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _blocks(rows: Tensor, others: int) -> Iterator[tuple[int, Tensor]]:
    """[N, D] in pieces of which all distances to `others` rows are held together, each with its first row."""
    size = max(1, BLOCK // others)
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size]


def nearest(
    queries: Tensor, pool: Iterable[tuple[int, Tensor]], *, without: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared distance, fp64 [Q], and row, int64 [Q], of each query's nearest in a pool that is read piece by piece.

    queries [Q, D]; `pool` gives (row of the first, features [n, D]). `without` int64 [Q] is a row of the pool that
    does not count for each query: the query itself. Of equal ones the first is taken. Where there is none: inf, -1.
    """
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    found = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    for first, rows in pool:
        for start, block in _blocks(queries, len(rows)):
            here = slice(start, start + len(block))
            distances = squared_distances(block, rows.to(queries.device))
            if without is not None:
                columns = torch.arange(first, first + len(rows), device=queries.device)
                distances.masked_fill_(columns == without[here, None], torch.inf)
            least, at = distances.min(1)
            closer = least < best[here]
            best[here] = torch.where(closer, least, best[here])
            found[here] = torch.where(closer, at + first, found[here])
    return best, found


def radii(features: Tensor, *, k: int) -> Tensor:
    """fp64 [N]: squared distance of each row [N, D] to its k-th nearest other. Raises ValueError for fewer than k."""
    if len(features) <= k:
        raise ValueError(
            f"the {k}-th nearest other of {len(features)} pictures is asked for; take more, or a smaller k"
        )
    found = []
    for first, block in _blocks(features, len(features)):
        distances = squared_distances(block, features)
        own = torch.arange(len(block), device=features.device)
        distances[own, own + first] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def neighbor_shares(drawn: Tensor, real: Tensor, *, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage of generated pictures [M, D] against real ones [N, D].

    A picture's ball reaches to the k-th nearest other of its set. `precision`: the share of generated pictures in the
    ball of any real one; `recall`: of real ones in the ball of any generated one (Kynkaanniemi et al. 2019, eqs. 1 and
    2). `density`: in how many balls of real pictures a generated one lies, over k, which may exceed 1; `coverage`: the
    share of real pictures with a generated one in their ball (Naeem et al. 2020, section 3). As the `prdc` package
    has them: on a ball's surface is outside.
    """
    of_real, of_drawn = (radii(features, k=k) * (1 - TIE) for features in (real, drawn))
    inside = torch.zeros(len(drawn), dtype=torch.int64, device=drawn.device)
    covered = recalled = 0
    for first, block in _blocks(real, len(drawn)):
        distances = squared_distances(block, drawn)
        in_ball = distances < of_real[first : first + len(block), None]
        inside += in_ball.sum(0)
        covered += int(in_ball.any(1).sum())
        recalled += int((distances < of_drawn).any(1).sum())
    return {
        "precision": float((inside > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(inside.double().mean()) / k,
        "coverage": covered / len(real),
    }
