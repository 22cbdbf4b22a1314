"""A loaded system: what it draws, against the rooms below it, and what becomes of pictures that are given to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import genpipe
from genpipe.artifacts import Artifact
from genpipe.data.image_batches import cut, to_uint8
from genpipe.generation.conditions import Conditions
from genpipe.generation.pictures import read_picture, square
from genpipe.generation.systems import load_system
from genpipe.training.stream import seeded

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue bar", "a small green cross"]


@pytest.fixture(scope="module")
def artifact(tiny: TinyPipeline) -> Artifact:
    return tiny.run("system")


@pytest.fixture(scope="module")
def system(artifact: Artifact) -> genpipe.LoadedSystem:
    return genpipe.load(artifact.uri, precision="fp32")


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pictures_are_those_of_the_system_in_its_own_room(system: genpipe.LoadedSystem, artifact: Artifact) -> None:
    drawn = load_system(artifact, device=CPU).sample(Conditions(3, texts=PROMPTS), generator=seeded(CPU, 5, 0))
    pictures = system.sample(PROMPTS, seed=5)
    assert [picture.size for picture in pictures] == [(32, 32)] * 3 and pictures[0].mode == "RGB"
    assert np.array_equal(arrays(pictures), to_uint8(drawn).permute(0, 2, 3, 1).numpy())


def test_batches_follow_one_another_and_each_keeps_its_prompt(system: genpipe.LoadedSystem) -> None:
    seen: list[Image.Image] = []
    pictures = system.sample(PROMPTS, each=2, batch_size=4, on_picture=seen.append)
    assert seen == pictures and len(pictures) == 6
    assert [picture.info["prompt"] for picture in pictures] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [picture.info["number"] for picture in pictures] == list("012345")
    first = system.sample(PROMPTS[:2], each=2, batch_size=4)
    assert np.array_equal(arrays(pictures[:4]), arrays(first)), "what comes later changes nothing"
    assert not np.array_equal(arrays(pictures[:1]), arrays(pictures[1:2])), "each has noise of its own"


def test_a_picture_is_drawn_by_its_number_and_no_other(system: genpipe.LoadedSystem) -> None:
    """Of the second batch, too, where the places begin anew. Rounding may move a pixel over the edge of a level."""
    asked = {"prompts": PROMPTS, "each": 2, "batch_size": 4, "seed": 5}
    everything = system.sample(**asked)
    picked = system.sample(**asked, numbers=[5, 1])
    assert [picture.info for picture in picked] == [everything[1].info, everything[5].info], "in the order of numbers"
    for picture, number in zip(picked, (1, 5), strict=True):
        assert gap(picture, everything[number]) <= 1
        others = [gap(picture, other) for place, other in enumerate(everything) if place != number]
        assert min(others) > 10
    small = system.sample(**asked, draft=True)
    assert {picture.size for picture in small} == {(16, 16)} and small[0].info["use"] == "draft"
    [one] = system.sample(**asked, draft=True, numbers=[4])
    assert gap(one, small[4]) <= 1


@pytest.mark.parametrize(
    ("numbers", "named"), [([6], "no picture 6; 6 are asked for"), ([-1], "-1"), ([], "at least one")]
)
def test_numbers_that_no_picture_has(system: genpipe.LoadedSystem, numbers: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=f"numbers: .*{named}"):
        system.sample(PROMPTS, each=2, numbers=numbers)


def test_one_prompt_needs_no_list(system: genpipe.LoadedSystem) -> None:
    assert np.array_equal(arrays(system.sample(PROMPTS[0])), arrays(system.sample(PROMPTS[:1])))


def test_steps_and_guidance_are_those_of_a_system_that_was_made_with_them(
    tiny: TinyPipeline, system: genpipe.LoadedSystem
) -> None:
    """And hold for the one call."""
    before = arrays(system.sample(PROMPTS[0]))
    settings = ("stages.system.model.decoder.steps=2", "stages.system.model.decoder.guidance_scale=3.5")
    other = genpipe.load(tiny.run("system", *settings).uri, precision="fp32")
    given = arrays(system.sample(PROMPTS[0], steps=2, guidance_scale=3.5))
    assert np.array_equal(given, arrays(other.sample(PROMPTS[0]))) and not np.array_equal(given, before)
    assert np.array_equal(before, arrays(system.sample(PROMPTS[0])))


@pytest.mark.parametrize(
    ("prompts", "settings", "named"),
    [
        ((), {}, "prompts: required"),
        (["a cat", "\u200b"], {}, r"prompts\[1\]: is empty"),
        (["a cat"], {"labels": ["cross"]}, "labels: the system is conditioned on text"),
        (["a" * 2**15 + "b"], {}, "too long"),
        (["a cat"], {"steps": 0}, "steps: .* 0"),
        (["a cat"], {"guidance_scale": -1.0}, "guidance_scale: .* -1"),
        (["a cat"], {"each": 0}, "each and batch_size"),
        (["a cat"], {"batch_size": 0}, "each and batch_size"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    system: genpipe.LoadedSystem, prompts: list[str], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        system.sample(prompts, **settings)


def test_classes_are_given_by_name_or_number(pixel_tiny: TinyPipeline) -> None:
    system = genpipe.load(pixel_tiny.run("system").uri)
    assert system.classes == ("bar", "circle", "cross", "square", "triangle")
    by_name, by_number = (system.sample(labels=labels) for labels in (["cross", "bar"], [2, "0"]))
    assert np.array_equal(arrays(by_name), arrays(by_number))
    assert [picture.info["label"] for picture in by_name] == ["cross", "bar"] and "prompt" not in by_name[0].info
    with pytest.raises(ValueError, match=r"labels: 5 is none .* bar, circle, cross"):
        system.sample(labels=[5])
    with pytest.raises(ValueError, match=r"labels: -1 is none"):
        system.sample(labels=[-1])


@pytest.fixture(scope="module")
def plain(tiny: TinyPipeline) -> genpipe.LoadedSystem:
    """The same parts without the upsampler, which draws noise of its own."""
    settings = ("stages.system.inputs={upsamplers: []}", "stages.system.model.upsamplers=[]")
    return genpipe.load(tiny.run("system", *settings).uri, precision="fp32")


@pytest.fixture(scope="module")
def pixels(pixel_tiny: TinyPipeline) -> genpipe.LoadedSystem:
    return genpipe.load(pixel_tiny.run("system").uri, precision="fp32")


@pytest.fixture(scope="module")
def picture(tiny: TinyPipeline) -> Path:
    return sorted(tiny.shapes.glob("*.png"))[0]


def gap(one: Image.Image | np.ndarray, other: Image.Image | np.ndarray) -> int:
    """The greatest difference, of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_a_negative_prompt_that_is_the_prompt_cancels_the_guidance(plain: genpipe.LoadedSystem) -> None:
    """uncond + s (cond - uncond) with both the same is the conditional model; another one leads elsewhere."""
    without = plain.sample(PROMPTS[0], guidance_scale=1.0)[0]
    same = plain.sample(PROMPTS[0], guidance_scale=4.0, negative=PROMPTS[0])[0]
    assert gap(same, without) <= 1
    [other] = plain.sample(PROMPTS[0], guidance_scale=4.0, negative=PROMPTS[1])
    assert gap(other, without) > 10 and gap(other, plain.sample(PROMPTS[0], guidance_scale=4.0)[0]) > 10
    assert other.info["negative"] == PROMPTS[1]


def test_a_negative_prompt_needs_guidance_and_text(plain: genpipe.LoadedSystem, pixels: genpipe.LoadedSystem) -> None:
    with pytest.raises(ValueError, match="negative: has no effect without guidance"):
        plain.sample(PROMPTS[0], guidance_scale=1.0, negative="a bar")
    with pytest.raises(ValueError, match="negative: the system is not conditioned on text"):
        pixels.sample(labels=["bar"], guidance_scale=2.0, negative="a bar")


def test_without_change_every_use_of_the_embedding_gives_the_picture_back(
    plain: genpipe.LoadedSystem, picture: Path
) -> None:
    """As the autoencoder reconstructs it."""
    system = load_system(plain.artifact, device=CPU)
    image = square(read_picture(picture), size=16, device=CPU)
    itself = to_uint8(system.decode(system.encode(image)))[0].permute(1, 2, 0).numpy()
    assert gap(plain.vary(picture, eta=0.0, each=1, steps=16)[0], itself) <= 2
    assert gap(plain.blend(picture, Path(picture), count=2, steps=16)[1], itself) <= 2
    assert gap(plain.change(picture, "a blue bar", thetas=[0.0], steps=16)[0], itself) <= 2
    assert gap(plain.vary(Image.open(picture), each=1, steps=16)[0], itself) > 10


def test_blends_lead_from_end_to_end(plain: genpipe.LoadedSystem, picture: Path) -> None:
    made = plain.blend(picture, PROMPTS[0], count=3, seed=4, steps=8)
    assert len(made) == 3 and gap(made[0], plain.vary(picture, eta=0.0, each=1, steps=8)[0]) <= 1
    between_captions = plain.blend(PROMPTS[1], PROMPTS[0], count=2, seed=4, steps=8)
    assert gap(between_captions[0], between_captions[1]) > 10
    assert [one.info["number"] for one in made] == list("012") and made[0].info["use"] == "blend"


def test_components_are_those_of_the_pictures_given(plain: genpipe.LoadedSystem, tiny: TinyPipeline) -> None:
    paths = sorted(tiny.shapes.glob("*.png"))[:24]
    made = plain.reconstruct(paths[0], pictures=paths, steps=4)
    assert len(made) == 5, "1, 2, 4, 8 and all 16"
    assert gap(plain.reconstruct(paths[0], components=[1], pictures=paths, steps=4)[0], made[0]) <= 1
    with pytest.raises(ValueError, match="give pictures to find them in"):
        plain.reconstruct(paths[0])


def test_an_attacked_picture_is_embedded_and_varied_as_one_that_was_given(
    plain: genpipe.LoadedSystem, picture: Path
) -> None:
    found = plain.attack(picture, ["circle", "bar", "cross"], caption="a small red {}", each=2, steps=4)
    assert [attacked.words for attacked in found] == ["", "bar", "cross"]
    for attacked in found:
        assert list(attacked.probabilities) == ["circle", "bar", "cross"]
        assert sum(attacked.probabilities.values()) == pytest.approx(1)
        alone = plain.vary(attacked.picture, each=2, steps=4)
        assert np.array_equal(arrays(attacked.variations), arrays(alone))
    assert gap(found[0].picture, Image.open(picture).resize((16, 16))) < 30 < gap(found[1].picture, found[0].picture)
    system = load_system(plain.artifact, device=CPU)
    image = square(read_picture(found[1].picture), size=16, device=CPU)
    tokens = system.encode_text([f"a small red {label}" for label in ("circle", "bar", "cross")])
    logits = system.clip.logit_scale.exp() * system.embed(image) @ tokens.embed.T
    assert list(found[1].probabilities.values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("use", ["vary", "blend", "change", "reconstruct", "attack"])
def test_a_system_without_image_embeddings_says_so(pixels: genpipe.LoadedSystem, picture: Path, use: str) -> None:
    given = {"blend": ("a bar",), "change": ("a bar",), "attack": (["bar", "cross"],)}
    arguments = (picture, *given.get(use, ()))
    with pytest.raises(ValueError, match="needs a system of kind unclip"):
        getattr(pixels, use)(*arguments)


def masks(size: int) -> tuple[np.ndarray, Image.Image]:
    """What is kept, bool [size, size], and the mask that says so: the right half is white, and a corner."""
    hole = np.zeros((size, size), np.uint8)
    hole[:, size // 2 :] = hole[: size // 8, : size // 8] = 255
    return hole == 0, Image.fromarray(hole)


@pytest.mark.parametrize("kind", ["unclip", "pixel"])
def test_what_the_mask_leaves_black_is_kept_exactly(
    kind: str, system: genpipe.LoadedSystem, pixels: genpipe.LoadedSystem, picture: Path
) -> None:
    """Through latents and upsamplers; transparency says the same as the mask."""
    loaded = {"unclip": system, "pixel": pixels}[kind]
    told: dict[str, Any] = {"prompt": PROMPTS[1]} if kind == "unclip" else {"label": "bar"}
    size = loaded.size
    image = Image.fromarray(np.array(cut(read_picture(picture), height=size, width=size)))
    keep, mask = masks(size)
    made = loaded.inpaint(image, mask=mask, each=2, **told)
    for one in made:
        assert one.size == (size, size) and np.array_equal(np.asarray(one)[keep], np.asarray(image)[keep])
        assert gap(np.asarray(one)[~keep], np.asarray(image)[~keep]) > 10
    assert gap(made[0], made[1]) > 10
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.where(keep, 255, 0).astype(np.uint8)))
    seen = np.asarray(loaded.inpaint(clear, **told)[0])
    assert np.array_equal(seen[keep], np.asarray(image)[keep]) and gap(seen[~keep], np.asarray(image)[~keep]) > 10


def test_masks_that_say_nothing_are_refused(pixels: genpipe.LoadedSystem, picture: Path) -> None:
    image = Image.open(picture).convert("RGB")
    with pytest.raises(ValueError, match="nothing of it is transparent"):
        pixels.inpaint(image, label="bar")
    with pytest.raises(ValueError, match=r"nothing of the image .* is white"):
        pixels.inpaint(image, mask=Image.new("L", image.size), label="bar")
    with pytest.raises(ValueError, match="mask: is 3 x 5 pixels and the picture 40 x 40"):
        pixels.inpaint(image, mask=Image.new("L", (3, 5), 255), label="bar")
    with pytest.raises(ValueError, match=r"mask: absent\.png cannot be read"):
        pixels.inpaint(image, mask="absent.png", label="bar")
    with pytest.raises(ValueError, match="labels: required"):
        pixels.inpaint(image, mask=Image.new("L", image.size, 255))


def test_a_picture_is_extended(pixels: genpipe.LoadedSystem, picture: Path) -> None:
    size = pixels.size
    [made] = pixels.outpaint(picture, left=4, bottom=10, label="circle")
    assert made.size == (size + 4, size + 10)
    image = np.asarray(cut(read_picture(picture), height=size, width=size))
    assert np.array_equal(np.asarray(made)[:size, 4:], image)
    with pytest.raises(ValueError, match="by how many pixels"):
        pixels.outpaint(picture, label="circle")


def test_strength_is_how_far_a_picture_is_left(plain: genpipe.LoadedSystem, picture: Path) -> None:
    image = np.asarray(cut(read_picture(picture), height=16, width=16)).astype(float)
    made = [plain.redraw(picture, PROMPTS[1], strength=s, steps=20, guidance_scale=1.0)[0] for s in (0.1, 0.5, 1.0)]
    gaps = [float(np.abs(np.asarray(one) - image).mean()) for one in made]
    assert gaps[0] < gaps[1] < gaps[2] and made[0].info["strength"] == "0.1"
    assert gap(made[2], plain.redraw(picture, PROMPTS[1], strength=1.0, steps=20, seed=1, guidance_scale=1.0)[0]) > 10
    with pytest.raises(ValueError, match="strength lies between 0"):
        plain.redraw(picture, PROMPTS[1], strength=1.1)
    with pytest.raises(ValueError, match="prompts: required"):
        plain.redraw(picture)
