"""Published networks that measure pictures, from files that the user names and whose content is pinned."""

from __future__ import annotations

import io
from pathlib import PurePosixPath

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.data.image_batches import to_uint8
from genpipe.models.interop.lpips import from_lpips
from genpipe.models.lpips import Lpips
from genpipe.models.precision import fp32
from genpipe.pinned_files import PinnedFile, read_pinned

INCEPTION_SIZE = 299


def load_lpips(file: PinnedFile, *, device: torch.device) -> Lpips:
    """LPIPS, frozen, from a .safetensors or .npz file with the tensors of `Lpips` or of the `lpips` package (vgg).

    On the meta device nothing is read. Raises ValueError where tensors are missing, unknown or of another shape.
    """
    if device.type == "meta":
        return Lpips().to(device).eval().requires_grad_(False)
    state = _tensors(file)
    if any(name.startswith("net.") for name in state):
        state = from_lpips(state)
    module = Lpips()
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file.weights}: does not hold the weights of LPIPS with VGG16: {error}") from error
    return module.to(device).eval().requires_grad_(False)


def _tensors(file: PinnedFile) -> dict[str, Tensor]:
    suffix = PurePosixPath(file.weights).suffix
    if suffix == ".safetensors":
        return load_safetensors(read_pinned(file))
    if suffix == ".npz":
        with np.load(io.BytesIO(read_pinned(file)), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    raise ValueError(f"{file.weights}: weights are read from .safetensors and .npz files only; convert it to one")


def load_inception(file: PinnedFile, *, device: torch.device) -> nn.Module:
    """FID's Inception network (the 2015-12-05 graph of TensorFlow, 2048 features) from its TorchScript file."""
    return torch.jit.load(io.BytesIO(read_pinned(file)), map_location=device).eval()


@torch.no_grad()
def inception_features(network: nn.Module, images: Tensor) -> Tensor:
    """fp32 [B, 2048] of RGB images [B, 3, H, W] in [-1, 1], as the published FID takes them.

    Rounded to 8 bits, resized to 299 by TensorFlow's bilinear rule (no antialiasing, corners at the top left), and
    scaled as (x - 128) / 128.
    """
    with fp32(images.device):
        pixels = resize_topleft(to_uint8(images).float(), size=INCEPTION_SIZE)
        return network((pixels - 128) / 128).flatten(1)


def resize_topleft(images: Tensor, *, size: int) -> Tensor:
    """Bilinear [B, C, H, W] to [B, C, size, size], where pixel i of the result lies at i * H / size of the image."""
    height, width = images.shape[-2:]
    shift_x, shift_y = 1 / width - 1 / size, 1 / height - 1 / size
    theta = torch.tensor([[1.0, 0.0, shift_x], [0.0, 1.0, shift_y]], device=images.device).expand(len(images), -1, -1)
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@torch.no_grad()
def lpips_distance(network: Lpips, images: Tensor, reference: Tensor) -> Tensor:
    """LPIPS of image pairs [B, 3, H, W] in [-1, 1] as a metric, fp32 [B]: in fp32, with images clamped."""
    with fp32(images.device):
        return network(images.float().clamp(-1, 1), reference.float())
