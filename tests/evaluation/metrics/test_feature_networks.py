"""What networks are shown of a picture, and that a file that is another is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import SIDE, Gallery, evaluation, picture, pictures
from PIL import Image
from pydantic import TypeAdapter
from scripted import Projection, network_file
from torch import nn

from genpipe.artifacts import Artifact
from genpipe.data.image_batches import to_float
from genpipe.evaluation.metrics.feature_networks import AnyNetwork, Network, key_of, named

CHANNELS = [[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]]


def network(**settings: object) -> AnyNetwork:
    found: AnyNetwork = TypeAdapter(Network).validate_python(settings)
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    gallery = Gallery(tmp_path_factory.mktemp("store"))
    return {"sample": gallery.shards({"train": pictures(range(3), ["a", "b", "c"])}, kind="samples")}


def stack(count: int) -> torch.Tensor:
    return to_float(torch.from_numpy(np.stack([picture(seed) for seed in range(count)])).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("kind", "resample"), [("bicubic", "BICUBIC"), ("bilinear", "BILINEAR")])
def test_a_file_is_shown_what_pillow_makes_of_a_picture(
    inputs: dict[str, Artifact], tmp_path: Path, kind: str, resample: str
) -> None:
    """Shrunk by the filter with antialiasing, in [0, 1], less the mean, over the deviation."""
    settings = network_file(tmp_path, nn.Flatten(), size=6, filter=kind, mean=CHANNELS[0], std=CHANNELS[1])
    of = network(**settings)
    found = of.load(evaluation(inputs))(stack(2)).reshape(2, 3, 6, 6)
    for seed in range(2):
        small = Image.fromarray(picture(seed)).resize((6, 6), Image.Resampling[resample])
        expected = (np.asarray(small) / 255 - CHANNELS[0]) / CHANNELS[1]
        np.testing.assert_allclose(found[seed].permute(1, 2, 0).numpy(), expected, atol=1 / 255 / 0.2)
    assert of.reads_at(evaluation(inputs)) == SIDE


def test_a_network_that_does_not_pool_is_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    of = network(**network_file(tmp_path, nn.Identity(), size=SIDE))
    with pytest.raises(ValueError, match=r"gives \(2, 3, 16, 16\), not \[B, D\]"):
        of.load(evaluation(inputs))(stack(2))


def test_a_file_that_is_another_is_found(tmp_path: Path) -> None:
    settings = network_file(tmp_path, Projection(4, 2), size=4)
    network(**settings).check_inputs({}, setting="metrics.kid.network")
    with pytest.raises(ValueError, match=r"metrics\.kid\.network: .*other\.pt: sha256"):
        network(**settings | {"sha256": "0" * 64}).check_inputs({}, setting="metrics.kid.network")


def test_pixels_are_the_picture(inputs: dict[str, Artifact]) -> None:
    of = network(kind="pixels", side=SIDE)
    images = evaluation(inputs).pictures("train", np.arange(2), size=of.reads_at(evaluation(inputs)))
    torch.testing.assert_close(of.load(evaluation(inputs))(images), stack(2).flatten(1))


def test_names_and_keys_tell_networks_apart(tmp_path: Path) -> None:
    file = {"weights": "a.pt", "sha256": "0" * 64}
    networks = [
        network(**file),
        network(**file | {"sha256": "1" * 64}),
        network(kind="torchscript", name="dinov2", **file),
        network(kind="torchscript", name="dinov2", size=196, **file),
        network(kind="clip"),
        network(kind="clip", judge="self"),
        network(kind="pixels"),
    ]
    assert len({key_of(of) for of in networks}) == len(networks)
    assert key_of(network(**file)) == key_of(network(**file | {"weights": "elsewhere.pt"}))
    assert [named("kid", of) for of in networks[1:]] == [
        "kid", "kid_dinov2", "kid_dinov2", "kid_clip", "kid_self_clip", "kid_pixels"
    ]  # fmt: skip
