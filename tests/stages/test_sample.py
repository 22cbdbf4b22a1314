"""The sample stage: ordinary shards of pictures, the same whatever worker draws which part."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from genpipe import artifacts
from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.config import ConfigError
from genpipe.data.image_batches import to_uint8
from genpipe.data.shard_dataset import open_shards
from genpipe.data.takedown import check_shards
from genpipe.data.train_sets import image_data
from genpipe.generation.systems import Conditions, load_system
from genpipe.models.precision import autocast, products_of
from genpipe.stages import sample
from genpipe.training.stream import seeded

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tiny: TinyPipeline) -> Artifact:
    """16 training and 4 held-out captions, in batches of 16."""
    return tiny.run("sample")


def described(samples: Artifact) -> dict[str, dict[str, Any]]:
    """What the tars say of each sample, by key."""
    found = {}
    for path in fetch(samples).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name.removesuffix(".json")] = json.load(content)
    return found


def test_samples_are_shards(samples: Artifact) -> None:
    assert samples.meta["samples"] == {"train": 16, "heldout": 4} and samples.meta["image_size"] == 32
    assert list(check_shards(samples.uri)) == []
    batch = image_data(samples, size=16).train.collate(np.arange(3), np.arange(3))
    assert batch["images"].shape == (3, 3, 16, 16)
    dataset = open_shards(samples, split="train")
    assert dataset.shards() == ["train-00000-00"] and dataset.image(0).shape == (32, 32, 3)
    with Image.open(io.BytesIO(dataset.image_bytes(0))) as picture:
        assert picture.format == "PNG"


def test_a_sample_says_where_its_prompt_came_from(tiny: TinyPipeline, samples: Artifact) -> None:
    shard, records = tiny.run("shard"), described(samples)
    for split in ("train", "heldout"):
        source, drawn = (open_shards(artifact, split=split) for artifact in (shard, samples))  # type: ignore[arg-type]
        row_of = {source.key(i): i for i in range(len(source))}
        for i in range(len(drawn)):
            meta = records[drawn.key(i)]["meta"]
            reference = row_of[meta["reference"]]
            assert source.captions(reference)[0] == drawn.captions(i)[0]
            assert source.group(reference) == drawn.group(i)
            assert (meta["seed"], meta["batch"], meta["prompt"]) == (0, 0, i)
    references = [record["meta"]["reference"] for record in records.values()]
    assert len(set(references)) == 20


def test_pictures_are_those_of_the_system(tiny: TinyPipeline, samples: Artifact) -> None:
    """Drawn again by hand, from the seed of the batch."""
    drawn = open_shards(samples, split="heldout")
    prompts = [drawn.captions(i)[0] for i in range(4)]
    system = load_system(tiny.run("system"), device=CPU)
    with torch.no_grad(), autocast(CPU, products_of("auto", CPU)):
        again = to_uint8(system.sample(Conditions(4, texts=prompts), generator=seeded(CPU, 0, "heldout", 0)))
    assert np.array_equal(again.permute(0, 2, 3, 1).numpy(), np.stack([drawn.image(i) for i in range(4)]))


def test_an_interrupted_stage_goes_on_with_the_next_part(tiny: TinyPipeline, tmp_path: Path) -> None:
    settings = ["stages.sample.each=3", "stages.sample.batch_size=8", "stages.sample.prompts={train: 5, heldout: 1}"]
    spec = tiny.spec("sample", *settings)
    cfg = sample.Config.model_validate(spec.config)
    parts = sample.parts(cfg, spec.inputs)
    assert parts == ["train 0", "train 8", "heldout 0"]
    other = sample.Worker(cfg, spec.inputs)(parts[1], tmp_path)
    artifacts.add_part(spec.target.uri, parts[1], tmp_path, other)
    written = Path(spec.target.uri, "train-00001-00.tar").stat().st_mtime_ns
    finished = tiny.run("sample", *settings)
    assert Path(finished.uri, "train-00001-00.tar").stat().st_mtime_ns == written
    assert finished.meta["samples"] == {"train": 15, "heldout": 3}
    dataset = open_shards(finished, split="train")
    captions = [dataset.captions(i)[0] for i in range(15)]
    assert captions == [captions[3 * (i // 3)] for i in range(15)] and len(set(captions)) == 5
    keys = [dataset.key(i) for i in range(15)]
    assert [described(finished)[key]["meta"]["prompt"] for key in keys] == [i // 3 for i in range(15)]
    assert len({dataset.image_bytes(i) for i in range(15)}) == 15, "each has noise of its own"


def test_a_file_of_prompts_is_part_of_what_is_made(tiny: TinyPipeline, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a unicorn\na large red bar\n")
    settings = f"stages.sample.prompts={{kind: file, path: {path}}}"
    made = tiny.run("sample", settings)
    assert made.meta["samples"] == {"train": 0, "heldout": 2}
    dataset = open_shards(made, split="heldout")
    assert [dataset.captions(i)[0] for i in range(2)] == ["a unicorn", "a large red bar"]
    manifest = read_manifest(made.uri)
    assert manifest is not None and manifest.inputs.keys() == {"system"}
    path.write_text("a unicorn\n")
    assert tiny.plan(settings)["sample"].status == "run"


def test_a_caption_that_is_not_there_is_found_as_soon_as_there_are_shards(tiny: TinyPipeline) -> None:
    tiny.run("shard")
    listed = "stages.sample.prompts={kind: list, captions_of: train, texts: [a large red bat]}"
    with pytest.raises(ConfigError, match=r"stages\.sample: prompts\.texts: .*'a large red bat'; the nearest is"):
        tiny.plan(listed, "stages.decoder.train.seed=7")


def test_prompts_must_fit_the_system_before_anything_is_trained(tiny: TinyPipeline) -> None:
    with pytest.raises(ConfigError, match=r"stages\.sample: prompts\.kind classes: .* text"):
        tiny.plan("stages.sample.prompts={kind: classes}")


def test_nothing_to_draw_is_refused(tiny: TinyPipeline, samples: Artifact) -> None:
    spec = tiny.spec("sample", "stages.sample.prompts={train: 0, heldout: 0}")
    with pytest.raises(ValueError, match="prompts: there is nothing to draw"):
        sample.parts(sample.Config.model_validate(spec.config), spec.inputs)
