"""The diffusion loss and its per-sample weight."""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.parameterizations import Predict


def diffusion_loss(pred: Tensor, tgt: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample in fp32: pred, tgt [B, ...] -> [B], times `weight` [B] when given.

    The caller takes the mean, so that a per-sample loss can be binned by time or masked first.
    """
    per_sample = (pred.float() - tgt.float()).square().flatten(1).mean(1)
    return per_sample if weight is None else per_sample * weight


def min_snr_weight(predict: Predict, *, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight (Hang et al. 2023, sec. 3.4) of a squared error on `predict`; shape of alpha.

    The paper weighs the error on x0 by min(SNR, gamma). An error on another prediction moves x0 in
    proportion, so its weight is min(SNR, gamma) times the square of that proportion: min(SNR, gamma) / SNR
    for eps and, where variance is preserved, min(SNR, gamma) / (SNR + 1) for v.
    """
    snr = alpha.square() / sigma.square().clamp(min=1e-20)
    capped = snr.clamp(max=gamma)
    if predict == "eps":
        # capped / snr, written so that SNR = 0 gives 1 instead of 0 / 0.
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr.clamp(min=gamma))
    if predict == "x0":
        return capped
    if predict == "v":
        return capped * (sigma / (alpha.square() + sigma.square())).square()
    if predict == "flow":
        return capped * (sigma / (alpha + sigma)).square()
    raise ValueError(f"unknown prediction {predict!r}: use 'eps', 'x0', 'v' or 'flow'")
