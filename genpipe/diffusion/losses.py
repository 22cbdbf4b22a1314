"""The squared error of a prediction and its per-sample weight."""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.parameterizations import SIGMA_DATA, Predict, x0_gain


def diffusion_loss(pred: Tensor, tgt: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample in fp32: pred, tgt [B, ...] -> [B], times `weight` [B] when given.

    The caller takes the mean, so that a per-sample loss can be binned by time or masked first.
    """
    per_sample = (pred.float() - tgt.float()).square().flatten(1).mean(1)
    return per_sample if weight is None else per_sample * weight


def min_snr_weight(
    predict: Predict, *, alpha: Tensor, sigma: Tensor, gamma: float = 5.0, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Min-SNR weight (Hang et al. 2023, sec. 3.4) of a squared error on `predict`; shape of alpha.

    The paper weighs the error on x0 by min(SNR, gamma). An error on another prediction moves x0 in
    proportion, so its weight is min(SNR, gamma) times the square of that proportion: min(SNR, gamma) / SNR
    for eps and, where variance is preserved, min(SNR, gamma) / (SNR + 1) for v.
    """
    snr = alpha.square() / sigma.square().clamp(min=1e-20)
    if predict == "eps":
        # min(SNR, gamma) / SNR, written so that SNR = 0 gives 1 instead of 0 / 0.
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr.clamp(min=gamma))
    gain = x0_gain(predict, alpha=alpha, sigma=sigma, sigma_data=sigma_data)
    return snr.clamp(max=gamma) * gain.square()


def edm_weight(predict: Predict, *, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Karras et al. 2022's weight (table 1, lambda) of a squared error on `predict`; shape of alpha.

    On x0 it is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma standing for sigma / alpha; on the
    edm prediction that is 1 at every time.
    """
    gain = x0_gain(predict, alpha=alpha, sigma=sigma, sigma_data=sigma_data)
    unit = x0_gain("edm", alpha=alpha, sigma=sigma, sigma_data=sigma_data)
    return (gain / unit.clamp(min=1e-6)).square()
