"""The figure of all that a system is used for, of docs/using.md.

python docs/site/uses.py [runs/demo] [docs/assets/uses.jpg]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

import genpipe
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.evaluation.grids import labeled_grid
from genpipe.generation.signals import SIGNALS
from genpipe.lineage import manifests_behind
from genpipe.pipeline.systems import find_system

LABELS = ("apple", "clock", "frog")
APPLE, PEAR = "a red apple, drawn in twemoji style", "a pear, drawn in twemoji style"
GREEN = "a green apple, drawn in twemoji style"
FROG, PANDA = "a frog, drawn in twemoji style", "a panda, drawn in twemoji style"
COUNT = 6


def main(source: str = "runs/demo", out: str = "docs/assets/uses.jpg") -> None:
    """Draw the figure with the system of `source`, a store."""
    system = genpipe.load(source)
    real = partial(real_picture, training_pictures(source))
    frog, panda, apple = real("frog"), real("panda"), real("red apple")
    half = Image.new("L", frog.size)
    ImageDraw.Draw(half).rectangle((0, 0, frog.width // 2, frog.height), fill=255)
    side = frog.width // 2
    rows = {
        f"sample: {APPLE}": system.sample([APPLE], each=COUNT),
        "vary a frog: eta 0, 0.25, 0.5, 0.75 and 1": [
            frog,
            *(system.vary(frog, eta=eta, each=1)[0] for eta in (0.0, 0.25, 0.5, 0.75, 1.0)),
        ],
        "blend a frog and a panda": system.blend(frog, panda, count=COUNT),
        "blend the captions of an apple and a pear": system.blend(APPLE, PEAR, count=COUNT),
        "edit a red apple into a green one, by the difference of the captions": [
            apple,
            *system.change(apple, GREEN, before=APPLE),
        ],
        "components: 1, 4, 16, 32, 64 and 128 of what CLIP sees of a frog": system.reconstruct(
            frog, components=[1, 4, 16, 32, 64, 128], pictures=several(training_pictures(source))
        ),
        "edit with strength 0.2, 0.4, 0.6, 0.8 and 1": [
            apple,
            *(system.redraw(apple, PEAR, strength=strength)[0] for strength in (0.2, 0.4, 0.6, 0.8, 1.0)),
        ],
        "edit the left half of a frog, told it is a panda": [
            frog,
            *system.inpaint(frog, PANDA, mask=half, each=COUNT - 1),
        ],
        "extend a frog at left and right": [frog, *fitted(system.outpaint(frog, FROG, left=side, right=side, each=1))],
        **under_attack(system, apple),
        f"signals: {'; '.join(SIGNALS)}": system.signals([APPLE])[0],
    }
    picture = labeled_grid(
        [[np.asarray(each.convert("RGB")) for each in row] for row in rows.values()],
        captions=list(rows),
        columns=[""] * COUNT,
        cell=96,
    )
    Image.fromarray(picture).save(out, quality=88)


def under_attack(system: genpipe.LoadedSystem, apple: Image.Image) -> dict[str, list[Image.Image]]:
    """A row of an apple with nothing and with other words written on it, a variation beside each."""
    found = system.attack(apple, LABELS, caption="an emoji of a {}, in twemoji style", each=1)
    shares = ", ".join(f"{attacked.probabilities[LABELS[0]]:.2f}" for attacked in found)
    told = (
        f"attack an apple with nothing, {' and '.join(LABELS[1:])}, a variation beside each; CLIP says apple: {shares}"
    )
    return {told: [picture for attacked in found for picture in (attacked.picture, *attacked.variations)]}


def training_pictures(source: str) -> ShardDataset:
    """What the system was trained on."""
    behind, _ = manifests_behind(find_system(source))
    return open_shards(next(of.artifact for of in behind if of.artifact.kind == "shards"), split="train")


def real_picture(dataset: ShardDataset, subject: str) -> Image.Image:
    """The training picture of a subject in Twemoji's style."""
    wanted = f" {subject}, in twemoji style"
    found = next(i for i in range(len(dataset)) if any(caption.endswith(wanted) for caption in dataset.captions(i)))
    return opened(dataset, found)


def several(dataset: ShardDataset, count: int = 256) -> list[Image.Image]:
    """Pictures whose embeddings have the principal components."""
    return [opened(dataset, i) for i in np.linspace(0, len(dataset) - 1, count, dtype=int)]


def opened(dataset: ShardDataset, i: int) -> Image.Image:
    """A picture of a dataset."""
    return Image.open(BytesIO(dataset.image_bytes(i))).convert("RGB")


def fitted(pictures: Sequence[Image.Image], *, side: int = 96) -> list[Image.Image]:
    """Wide pictures on white squares."""
    squares = []
    for picture in pictures:
        picture.thumbnail((side, side))
        squares.append(Image.new("RGB", (side, side), "white"))
        squares[-1].paste(picture, (0, (side - picture.height) // 2))
    return squares


if __name__ == "__main__":
    main(*sys.argv[1:])
