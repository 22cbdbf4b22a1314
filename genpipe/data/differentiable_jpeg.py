"""JPEG's losses for a batch, on any device: the quantization of its cosine transform, without the entropy coding.

Shapes: B batch, H and W pixels; planes are [B, H, W] in [0, 255].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Annex K of the standard (ITU-T T.81), row by row.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(images_B3HW: Tensor, quality_B: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] as JPEG returns them, fp32 on the 8-bit grid; quality_B [B] is 1 to 100, whole.

    As libjpeg: its scaling of the standard's tables, colors at half the resolution, interpolated when read.
    """
    height, width = images_B3HW.shape[-2:]
    pixels = ((images_B3HW.float() + 1.0) * 127.5).round().clamp(0, 255)
    ycc = torch.einsum("oc,bchw->bohw", pixels.new_tensor(TO_YCC), pixels).round()
    ycc = F.pad(ycc, (0, -width % 16, 0, -height % 16), mode="replicate")
    luma = _quantized(ycc[:, 0] - 128.0, LUMINANCE, quality_B)
    colors = F.avg_pool2d(ycc[:, 1:], 2).round()
    colors = torch.stack([_quantized(plane, CHROMINANCE, quality_B) for plane in colors.unbind(1)], dim=1)
    colors = F.interpolate(colors, scale_factor=2.0, mode="bilinear")
    ycc = torch.cat([luma[:, None] + 128.0, colors], dim=1)
    rgb = torch.einsum("oc,bchw->bohw", pixels.new_tensor(TO_RGB), ycc)[..., :height, :width]
    return rgb.round().clamp(0, 255) / 127.5 - 1.0


def _quantized(plane: Tensor, table: tuple[tuple[int, ...], ...], quality_B: Tensor) -> Tensor:
    """A plane around 0, sides multiples of 8, through the quantized transform of its 8 x 8 blocks."""
    scale = torch.where(quality_B < 50, torch.floor(5000.0 / quality_B), 200.0 - 2.0 * quality_B)
    steps = torch.floor((plane.new_tensor(table) * scale[:, None, None] + 50.0) / 100.0).clamp(1.0, 255.0)
    cosines = _cosines(plane.device)
    blocks = plane.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)  # [B, rows, columns, 8, 8]
    spectrum = cosines @ blocks @ cosines.T
    steps = steps[:, None, None]
    blocks = cosines.T @ (torch.round(spectrum / steps) * steps) @ cosines
    blocks = blocks.round().clamp(-128.0, 127.0)
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal cosine transform of eight samples, a row for each frequency [8, 8]."""
    k = torch.arange(8, device=device, dtype=torch.float32)
    rows = torch.cos(math.pi * (2 * k + 1) * k[:, None] / 16) / 2
    return torch.where(k[:, None] == 0, rows / math.sqrt(2.0), rows)
