"""The Python API: what it loads, draws and says, against the rooms below it and against MLflow's registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

import genpipe
from genpipe.artifacts import Artifact
from genpipe.data.image_batches import to_uint8
from genpipe.generation.conditions import Conditions
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


def test_importing_genpipe_reads_neither_torch_nor_pydantic() -> None:
    script = "import sys, genpipe; print({'torch', 'pydantic', 'numpy'} & set(sys.modules), callable(genpipe.load))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"
    with pytest.raises(AttributeError, match="laod"):
        _ = genpipe.laod  # type: ignore[attr-defined]


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
def registered(tiny: TinyPipeline, artifact: Artifact) -> Iterator[str]:
    """Where the system is the registered model `shapes` with the alias `best`, and its decoder `half`."""
    uri, before = tiny.load().tracking_uri, mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)  # MLflow looks a logged model up there, whatever the client's own URI
    client = MlflowClient()
    experiment = client.get_experiment_by_name(tiny.load().experiment)
    assert experiment is not None
    for name, made in (("shapes", artifact), ("half", tiny.run("decoder"))):
        query = f"tags.`genpipe.artifact` = '{made.uri}'"
        [model] = client.search_logged_models([experiment.experiment_id], query)
        client.create_registered_model(name)
        client.create_model_version(name, source=f"models:/{model.model_id}", model_id=model.model_id)
        client.set_registered_model_alias(name, "best", "1")
    yield uri
    mlflow.set_tracking_uri(before)


def test_a_registered_system_is_loaded(registered: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="in which MLflow"):
        genpipe.load("models:/shapes@best")
    with pytest.raises(ValueError, match=r"models:/half@best: stands for an artifact of kind decoder"):
        genpipe.load("models:/half@best", tracking_uri=registered)
    assert genpipe.load("models:/shapes@best", tracking_uri=registered).artifact == artifact
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered)
    assert genpipe.load("models:/shapes@best").artifact == artifact


def test_a_plan_says_what_a_run_would_do(tiny: TinyPipeline, artifact: Artifact) -> None:
    where = [f"store={tiny.store}", f"stages.shard.source.path={tiny.shapes}"]
    plans = {planned.name: planned for planned in genpipe.plan(tiny.config, where)}
    assert plans["system"].artifact == artifact and plans["system"].status == "cached"
    changed = {p.name: p.status for p in genpipe.plan(tiny.config, [*where, "stages.decoder.train.seed=7"])}
    assert (changed["prior"], changed["decoder"], changed["system"]) == ("cached", "run", "run")
    with pytest.raises(ValueError, match=r"stages\.decoder\.trian: unknown key"):
        genpipe.plan(tiny.config, [*where, "stages.decoder.trian.seed=7"])


def test_a_run_that_cannot_begin_says_so(tiny: TinyPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.shard: source\.path: the folder .*absent does not exist"):
        genpipe.run(tiny.config, [f"store={tmp_path}", f"stages.shard.source.path={tmp_path}/absent"])
