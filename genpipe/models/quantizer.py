"""Bottlenecks of autoencoders, and the codebook of the discrete one.

Shapes: B batch, C channels of a code, H and W of the latent grid; N = B H W vectors, K codes.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.precision import fp32

REVIVED_PER_STEP = 256
"""Codes that one step can revive at most: as many encoder outputs are kept, and exchanged between ranks."""

_DISTANCES = 2**24  # computed at once when codes are looked up: 64 MiB


class Plain(Config):
    """Nothing between encoder and decoder, as in DC-AE (Chen et al. 2024)."""

    kind: Literal["plain"]


class Kl(Config):
    """A Gaussian for each latent, held near the standard one (Kingma & Welling 2014; LDM's KL-reg)."""

    kind: Literal["kl"] = "kl"


class Vq(Config):
    """The nearest of a set of learned codes (van den Oord et al. 2017; LDM's VQ-reg)."""

    kind: Literal["vq"]
    codes: int = Field(8192, ge=2, description="size of the codebook")
    update: Literal["ema", "gradient"] = Field(
        "ema", description="codes follow the mean of their vectors (appendix A.1), or the gradient of the loss (eq. 3)"
    )
    decay: float = Field(0.99, gt=0, lt=1, description="of the moving averages of update: ema, by optimizer step")
    commitment: float = Field(0.25, ge=0, description="beta: weight of pulling the encoder's outputs to their codes")
    normalize: bool = Field(False, description="compare and return unit vectors (ViT-VQGAN; Yu et al. 2021, sec. 3.2)")
    revive_after: int = Field(
        100, ge=0, description="steps without use after which a code becomes an output of the encoder; 0: never"
    )


Bottleneck = Annotated[Kl | Vq | Plain, Field(discriminator="kind")]


class Quantized(NamedTuple):
    """What the decoder sees [B, C, H, W] with the gradient passed straight through, the loss (a scalar), and how
    often each code was used, fp32 [K], by level of the codebook ("" where there is one)."""

    vectors: Tensor
    loss: Tensor
    counts: dict[str, Tensor]


class _Observed(NamedTuple):
    """Of one optimizer step: uses of each code [K], sums of their vectors [K, C], and encoder outputs [R, C] with the
    random keys [R] that they were drawn by."""

    counts: Tensor
    sums: Tensor
    keys: Tensor
    outputs: Tensor


class Quantizer(nn.Module):
    """A codebook. Always computes in fp32.

    Training has two halves, so that a step means the same however it is spread over ranks and micro-batches:
    `forward` with a generator notes what the step's vectors are, `update` moves the codes once all are seen.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    unused_steps: Tensor

    def __init__(self, cfg: Vq, channels: int) -> None:
        super().__init__()
        self.cfg = cfg
        codebook = torch.empty(cfg.codes, channels).uniform_(-1 / cfg.codes, 1 / cfg.codes)
        if cfg.update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_counts", torch.ones(cfg.codes))
            self.register_buffer("ema_sums", codebook.clone())
        # At the first step every unused code counts as dead, so that the codebook starts from the data.
        self.register_buffer("unused_steps", torch.full((cfg.codes,), max(0.0, cfg.revive_after - 1.0)))
        self._observed: _Observed | None = None

    def codes(self, latents: Tensor) -> Tensor:
        """The nearest code of each vector of [B, C, H, W], int64 [B, H, W]."""
        batch, _, height, width = latents.shape
        return self._nearest(self._rows(latents)).view(batch, height, width)

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors [B, C, H, W] that codes [B, H, W] stand for."""
        return F.embedding(codes, self._vectors()).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize [B, C, H, W]; `generator` is given in training, when the codebook is to learn from them.

        The loss is beta |z - sg(e)|^2, plus |sg(z) - e|^2 where codes follow its gradient, as means over elements.
        """
        with fp32(latents.device):
            rows_NC = self._rows(latents)
            nearest_N = self._nearest(rows_NC)
            vectors_NC = F.embedding(nearest_N, self._vectors())
            loss = self.cfg.commitment * F.mse_loss(rows_NC, vectors_NC.detach())
            if self.cfg.update == "gradient":
                loss = loss + F.mse_loss(vectors_NC, rows_NC.detach())
            counts_K = rows_NC.new_zeros(self.cfg.codes).index_add(0, nearest_N, torch.ones_like(rows_NC[:, 0]))
            if generator is not None:
                self._observe(rows_NC.detach(), nearest_N, counts_K, generator)
            through_NC = vectors_NC.detach() + (rows_NC - rows_NC.detach())  # exactly the codes
            batch, channels, height, width = latents.shape
            grid = through_NC.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return Quantized(grid, loss, {"": counts_K})

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what was noted since the last call, on all ranks alike; nothing noted, nothing moves."""
        if self._observed is None:
            return
        seen, self._observed = _over_ranks(self._observed), None
        if self.cfg.update == "ema":
            self.ema_counts.lerp_(seen.counts, 1 - self.cfg.decay)
            self.ema_sums.lerp_(seen.sums, 1 - self.cfg.decay)
            self.codebook.copy_(self.ema_sums / self._smoothed_counts()[:, None])
        if self.cfg.revive_after:
            self._revive(seen)

    def _smoothed_counts(self) -> Tensor:
        """The running counts [K] with Laplace smoothing, which keeps codes of rare use finite."""
        total, eps = self.ema_counts.sum(), 1e-5
        return (self.ema_counts + eps) / (total + self.cfg.codes * eps) * total

    def _revive(self, seen: _Observed) -> None:
        """Put dead codes on outputs of the encoder: the first dead code on the first drawn, and so on."""
        self.unused_steps.add_(1).mul_(seen.counts == 0)
        dead_K = self.unused_steps >= self.cfg.revive_after
        place_K = dead_K.cumsum(0) - 1
        fresh_KC = seen.outputs[place_K.clamp(0, len(seen.outputs) - 1)]
        # Of a step that is skipped for numbers that are not finite, no code may keep one: it can be a parameter.
        revived_K = dead_K & (place_K < len(seen.outputs)) & fresh_KC.isfinite().all(1)
        self.codebook.copy_(torch.where(revived_K[:, None], fresh_KC, self.codebook))
        self.unused_steps.mul_(~revived_K)
        if self.cfg.update == "ema":
            self.ema_sums.copy_(torch.where(revived_K[:, None], fresh_KC, self.ema_sums))
            self.ema_counts.copy_(torch.where(revived_K, 1.0, self.ema_counts))

    def _observe(self, rows_NC: Tensor, nearest_N: Tensor, counts_K: Tensor, generator: torch.Generator) -> None:
        keys = torch.rand(len(rows_NC), generator=generator, device=rows_NC.device)
        sums_KC = torch.zeros_like(self.codebook).index_add(0, nearest_N, rows_NC)
        now = _drawn(_Observed(counts_K, sums_KC, keys, rows_NC))
        if (before := self._observed) is not None:
            joined = torch.cat([before.keys, now.keys]), torch.cat([before.outputs, now.outputs])
            now = _drawn(_Observed(before.counts + now.counts, before.sums + now.sums, *joined))
        self._observed = now

    def _vectors(self) -> Tensor:
        return F.normalize(self.codebook, dim=-1) if self.cfg.normalize else self.codebook

    def _rows(self, latents: Tensor) -> Tensor:
        rows_NC = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        return F.normalize(rows_NC, dim=-1) if self.cfg.normalize else rows_NC

    @torch.no_grad()
    def _nearest(self, rows_NC: Tensor) -> Tensor:
        vectors_KC = self._vectors()
        square_K = vectors_KC.square().sum(1)
        with fp32(rows_NC.device):
            chunks = rows_NC.split(max(1, _DISTANCES // len(vectors_KC)))
            return torch.cat([torch.addmm(square_K, rows, vectors_KC.T, alpha=-2).argmin(1) for rows in chunks])


def codebook_use(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """From uses of each code [K] by level: `codes_used`, their share, and `perplexity`, exp of the entropy in nats.

    A perplexity of K means that all codes are used alike, 1 that one is used alone.
    """
    use: dict[str, Tensor] = {}
    for level, counts_K in counts.items():
        shares = counts_K / counts_K.sum()
        use[f"{level}codes_used"] = (counts_K > 0).float().mean()
        use[f"{level}perplexity"] = torch.special.entr(shares).sum().exp()
    return use


def _drawn(observed: _Observed) -> _Observed:
    """With no more encoder outputs than are needed: those of the smallest keys, in the keys' order."""
    keys, order = observed.keys.sort()
    return observed._replace(keys=keys[:REVIVED_PER_STEP], outputs=observed.outputs[order[:REVIVED_PER_STEP]])


def _over_ranks(observed: _Observed) -> _Observed:
    """What all ranks observed together."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return observed
    counts, sums = observed.counts.clone(), observed.sums.clone()  # the former are also a result
    dist.all_reduce(counts)
    dist.all_reduce(sums)
    return _drawn(_Observed(counts, sums, _gathered(observed.keys), _gathered(observed.outputs)))


def _gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
