"""The stage that trains decoders of pixels: labels, their dropping, and the pipeline of a folder of folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genpipe.artifacts import Artifact, read_manifest
from genpipe.data.shard_dataset import open_shards
from genpipe.models.decoder import Decoder
from genpipe.stages import pixel_decoder
from genpipe.training.objective import Batch, Step

if TYPE_CHECKING:
    from conftest import TinyPipeline

DIT = {"denoiser": {"patch_size": 2, "width": 32, "depth": 1, "heads": 2}}
UNET = {
    "denoiser": {
        "kind": "unet",
        "width": 16,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention_at": [2],
        "head_width": 8,
        "groups": 8,
    }
}
SHAPES = ["bar", "circle", "cross", "square", "triangle"]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def config(**settings: Any) -> pixel_decoder.Config:
    train = {"samples": 8, "global_batch_size": 4}
    observe = {"sampler": {"kind": "heun", "steps": 2}}
    return pixel_decoder.Config.model_validate({"image_size": 8, "train": train, "observe": observe, **settings})


def shard(**meta: Any) -> dict[str, Artifact]:
    return {"shard": Artifact(kind="shards", uri="", fingerprint="f" * 64, meta={"image_size": 16, **meta})}


def batch(count: int) -> Batch:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=seeded(0), dtype=torch.uint8)
    return {"images": images, "labels": torch.arange(count) % 3}


@pytest.mark.parametrize("condition", ["none", "label"])
@pytest.mark.parametrize("model", [DIT, UNET])
def test_every_form_trains_and_is_validated(condition: str, model: dict[str, Any]) -> None:
    cfg = config(condition=condition, model=model)
    torch.manual_seed(0)
    made = pixel_decoder.objective(cfg, shard(classes=["a", "b", "c"]), torch.device("cpu"))
    assert made.sizes.get("classes", 0) == (3 if condition == "label" else 0)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.02)
    losses = [made.loss("decoder", batch(4), Step(0, seeded(n)))[0] for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and losses[0].isfinite()
    losses[0].backward()
    assert [name for name, p in made.model.named_parameters() if p.grad is None] == []
    found = made.validate([batch(4)], seeded(2))
    assert all(np.isfinite(value) for value in found.metrics.values()) and "loss" in found.metrics
    assert found.images["samples"].std() > 0


def test_costs_are_known_before_the_classes_are() -> None:
    meta = torch.device("meta")
    with meta:
        made = pixel_decoder.objective(config(condition="label", model=DIT), shard(), meta)
        example = pixel_decoder.example_batch(made.cfg, shard(), batch_size=4)
        made.loss("decoder", example, Step(0, None))[0].backward()  # type: ignore[arg-type]
    assert all(p.grad is not None and p.device.type == "meta" for p in made.model.parameters())
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in batch(4).items()
    }


class Recording(Decoder):
    """A decoder that remembers what was dropped."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, **given: Any) -> Tensor:
        self.dropped = given["drop_label"]
        return super().forward(x_BCHW, t_B, **given)


def test_labels_are_dropped_as_often_as_asked() -> None:
    cfg = config(condition="label", model=DIT, drop_label=0.3)
    model = Recording(cfg.model, latent_channels=3, classes=3)
    made = pixel_decoder.Objective(cfg, model, {"latent_channels": 3, "classes": 3})
    with torch.no_grad():
        made.loss("decoder", batch(4000), Step(0, seeded(0)))
    assert model.dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "meta", "named"),
    [
        ({"condition": "label"}, {"classes": []}, ("condition label", "no class labels")),
        ({"image_size": 32}, {}, ("image_size 32", "16 px")),
        ({"model": {"denoiser": {"patch_size": 16}}}, {}, ("model.denoiser.patch_size", "image_size")),
        ({"model": {**DIT, "text_transformer": {"width": 16, "depth": 1, "heads": 2}}}, {}, ("text_transformer",)),
        ({"observe": {"sampler": {"kind": "ddpm", "variance": "learned"}}}, {}, ("variance",)),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], meta: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        pixel_decoder.check_inputs(config(**settings), shard(**meta))
    assert all(part in str(error.value) for part in named), error.value


def test_a_folder_of_folders_becomes_pictures_of_each_class(pixel_tiny: TinyPipeline) -> None:
    """`configs/pipeline/pixel-tiny.yaml`, whole."""
    samples = pixel_tiny.run("sample")
    assert samples.meta["classes"] == SHAPES and samples.meta["samples"] == {"train": 20, "heldout": 0}
    dataset = open_shards(samples, split="train")
    assert [dataset.captions(i)[0] for i in range(20)] == [shape for shape in SHAPES for _ in range(4)]
    assert dataset.labels(np.arange(20)).tolist() == [label for label in range(5) for _ in range(4)]
    assert dataset.image(0).shape == (16, 16, 3)
    decoder = pixel_tiny.run("decoder")
    assert decoder.meta["classes"] == SHAPES and decoder.meta["conditions"] == ["label"]
    manifest = read_manifest(decoder.uri)
    assert manifest is not None
    spec = pixel_tiny.spec("decoder")
    cfg = pixel_decoder.Config.model_validate(spec.config)
    untrained = pixel_decoder.objective(cfg, spec.inputs, torch.device("cpu"))  # gives 0 everywhere
    heldout = pixel_decoder.data(cfg, spec.inputs).heldout
    rows = np.arange(heldout.length)
    with torch.no_grad():
        before = untrained.validate([heldout.collate(rows, rows)], seeded(0)).metrics["loss"]
    assert manifest.metrics["loss"] < 0.5 * before


def test_captions_of_labeled_shards_bring_their_labels(pixel_tiny: TinyPipeline) -> None:
    samples = pixel_tiny.run("sample", "stages.sample.prompts={kind: captions, train: 6, heldout: 2}")
    shards = pixel_tiny.run("shard")
    drawn, source = (open_shards(artifact, split="train") for artifact in (samples, shards))
    label_of = {f"a {shape}": label for label, shape in enumerate(SHAPES)}
    assert drawn.labels(np.arange(6)).tolist() == [label_of[drawn.captions(i)[0]] for i in range(6)]
    assert source.captions(0)[0] in label_of


def test_nothing_may_be_asked_for(pixel_tiny: TinyPipeline) -> None:
    settings = [
        "stages.decoder.condition=none",
        "stages.decoder.train.samples=64",
        "stages.sample.prompts={kind: none, count: 5}",
    ]
    samples = pixel_tiny.run("sample", *settings)
    assert samples.meta["samples"] == {"train": 5, "heldout": 0} and samples.meta["classes"] == []
    dataset = open_shards(samples, split="train")
    assert [dataset.captions(i) for i in range(5)] == [[""]] * 5
