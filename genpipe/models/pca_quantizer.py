"""Embeddings as short sequences of codes: principal components, each cut into buckets (Ramesh et al. 2022, sec. 2.2).

Shapes: B batch, F embeddings fitted on, D embedding width, K components kept, N buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class PrincipalCodes(nn.Module):
    """Image embeddings to codes and back, and text-image dot products to codes.

    Everything is a buffer, fitted before training (`fit`), so that it travels with the weights. Components are in
    the order of decreasing variance. Buckets are of equal probability: each holds as many of the embeddings fitted
    on, so none is without examples, the untrained loss is ln N nats a code, and the upper half of the dot products
    is the upper half of their buckets. A code decodes to the mean of its bucket.
    """

    def __init__(self, *, embed_dim: int, components: int, buckets: int, dot_buckets: int) -> None:
        super().__init__()
        self.mean_D = nn.Buffer(torch.zeros(embed_dim))
        self.basis_KD = nn.Buffer(torch.zeros(components, embed_dim))
        self.edges_KE = nn.Buffer(torch.zeros(components, buckets - 1))  # E = N - 1
        self.centers_KN = nn.Buffer(torch.zeros(components, buckets))
        self.dot_edges_E = nn.Buffer(torch.zeros(dot_buckets - 1))

    def encode(self, embed_BD: Tensor) -> Tensor:
        """Codes int64 [B, K] in [0, N); values beyond the outermost edges get the outermost codes."""
        # In fp64, which autocast leaves alone.
        values_BK = (embed_BD.double() - self.mean_D) @ self.basis_KD.double().T
        return torch.searchsorted(self.edges_KE, values_BK.float().T.contiguous()).T

    def decode(self, codes_BK: Tensor) -> Tensor:
        """The embeddings that codes stand for, fp32 [B, D]; not normalized."""
        values_BK = self.centers_KN.gather(1, codes_BK.T).T
        return (values_BK.double() @ self.basis_KD.double() + self.mean_D).float()

    def encode_dot(self, dot_B: Tensor) -> Tensor:
        """Codes int64 [B] of text-image dot products [B]."""
        return torch.searchsorted(self.dot_edges_E, dot_B.float())

    @torch.no_grad()
    def fit(self, mean_D: Tensor, basis_KD: Tensor, *, embeds: Iterable[Tensor], dot_F: Tensor) -> None:
        """Take these components, and buckets from `embeds`, chunks [*, D], and from the dot products of F pairs.

        Raises ValueError if there are fewer embeddings than buckets.
        """
        self.mean_D.copy_(mean_D)
        self.basis_KD.copy_(basis_KD)
        mean, basis = mean_D.double(), basis_KD.double()
        values_FK = torch.cat([((chunk.double() - mean) @ basis.T).float() for chunk in embeds])
        for k, values_F in enumerate(values_FK.T):
            edges, centers = equal_buckets(values_F, self.centers_KN.shape[1])
            self.edges_KE[k].copy_(edges)
            self.centers_KN[k].copy_(centers)
        self.dot_edges_E.copy_(equal_buckets(dot_F, len(self.dot_edges_E) + 1)[0])


def principal_components(
    embeds: Iterable[Tensor], *, variance: float, at_most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first K principal components [K, D] (orthonormal rows) of chunks [*, D], in fp64.

    K is the least number of components that keep a share `variance` of the variance, or `at_most`. The covariance is
    summed chunk by chunk, so memory does not grow with their number. Signs are fixed: the largest entry of each
    component is positive.
    """
    count, total, outer = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for chunk in embeds:
        x_BD = chunk.double()
        count, total, outer = count + len(x_BD), total + x_BD.sum(0), outer + x_BD.T @ x_BD
    mean_D = total / count
    values_D, vectors_DD = torch.linalg.eigh(outer / count - mean_D.outer(mean_D))
    kept = values_D.flip(0).clamp(min=0).cumsum(0)
    components = min(int((kept < variance * kept[-1]).sum()) + 1, at_most or len(kept))
    basis_KD = vectors_DD.T.flip(0)[:components]
    largest = basis_KD.gather(1, basis_KD.abs().argmax(1, keepdim=True))
    return mean_D, basis_KD * largest.sign()


def equal_buckets(values_F: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Edges [N - 1] that divide values [F] into N buckets of equal counts, and the buckets' means [N], in fp64.

    Raises ValueError if there are fewer values than buckets.
    """
    if len(values_F) < buckets:
        raise ValueError(f"{len(values_F)} values do not fill {buckets} buckets")
    ordered = values_F.double().sort().values
    ends = torch.arange(buckets + 1) * len(ordered) // buckets
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])[ends]
    inner = ends[1:-1]
    return (ordered[inner - 1] + ordered[inner]) / 2, sums.diff() / ends.diff()
