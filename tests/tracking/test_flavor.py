"""Releases as MLflow loads them, in a real MLflow: what is drawn, against the Python API."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import predictions_to_json
from PIL import Image

from genpipe import load
from genpipe.artifacts import Artifact
from genpipe.tracking.flavor import signature_of
from genpipe.tracking.store import client_of

if TYPE_CHECKING:
    from conftest import TinyPipeline

ALONE = "stages.release.inputs={evaluate: null, sample: null}"
NAMED = "stages.release.observe.register_as=pictures"
SMALL = ("stages.release.rows=1", "stages.release.each=1")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def of_texts(tiny: TinyPipeline) -> Artifact:
    """A text-to-image system with upsamplers, registered as `pictures`."""
    return tiny.run("release", ALONE, NAMED, *SMALL, "stages.release.prompts=[a small red circle]")


@pytest.fixture(scope="module")
def of_classes(pixel_tiny: TinyPipeline) -> Artifact:
    return pixel_tiny.run("release", ALONE, NAMED, *SMALL)


def loaded(store: Path | str) -> Any:
    mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
    return mlflow.pyfunc.load_model("models:/pictures@candidate")


def pictures(table: pd.DataFrame) -> list[np.ndarray]:
    assert list(table.columns) == ["png"]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in table["png"]]


def test_a_table_of_prompts_is_what_the_system_draws(of_texts: Artifact, tiny: TinyPipeline) -> None:
    """Each row by itself, with its own seed, steps and guidance, and the index as it was."""
    table = pd.DataFrame(
        {"prompt": ["a red circle", "a blue bar"], "seed": [3, 4], "steps": [2, 3], "guidance_scale": [3.0, 1.0]},
        index=[7, 5],
    )
    system, drawn = load(of_texts.uri), loaded(tiny.store).predict(table)
    assert list(drawn.index) == [7, 5]
    for picture, row in zip(pictures(drawn), table.to_dict("records"), strict=True):
        settings = {name: row[name] for name in ("seed", "steps", "guidance_scale")}
        assert np.array_equal(picture, np.asarray(system.sample([row["prompt"]], **settings)[0]))
    known = Image.open(io.BytesIO(drawn["png"].iloc[0])).info
    assert (known["prompt"], known["seed"], known["system"]) == ("a red circle", "3", of_texts.fingerprint)


def test_a_list_of_records_is_a_table_and_the_rest_is_as_trained(of_texts: Artifact, tiny: TinyPipeline) -> None:
    [picture] = pictures(loaded(tiny.store).predict([{"prompt": "a large blue bar"}]))
    assert np.array_equal(picture, np.asarray(load(of_texts.uri).sample(["a large blue bar"])[0]))


def test_classes_are_a_column(of_classes: Artifact, pixel_tiny: TinyPipeline) -> None:
    drawn = pictures(loaded(pixel_tiny.store).predict(pd.DataFrame({"label": ["cross", "bar"], "seed": [1, 1]})))
    system = load(of_classes.uri)
    assert np.array_equal(drawn, [np.asarray(system.sample(labels=[name], seed=1)[0]) for name in ("cross", "bar")])


def test_the_example_is_drawn_and_the_signature_says_what_is_taken(of_texts: Artifact, tiny: TinyPipeline) -> None:
    model = loaded(tiny.store)
    assert model.metadata.signature == signature_of(of_texts)
    columns = {column.name: column.required for column in model.metadata.get_input_schema()}
    assert columns == {"prompt": True, "negative": False, "seed": False, "steps": False, "guidance_scale": False}
    [row] = model.input_example.to_dict("records")
    assert row == {"prompt": "a small red circle", "seed": 0}
    answer = io.StringIO()
    predictions_to_json(drawn := model.predict(model.input_example), answer)
    [served] = json.loads(answer.getvalue())["predictions"]
    assert base64.b64decode(served["png"]) == drawn["png"][0], "as `mlflow models serve` answers"
    [picture] = pictures(drawn)
    assert np.array_equal(picture, np.asarray(load(of_texts.uri).sample([row["prompt"]], seed=0)[0]))
    with pytest.raises(MlflowException, match="missing inputs"):
        model.predict(pd.DataFrame({"seed": [1]}))
    with pytest.raises(ValueError, match="negative: has no effect without guidance"):
        model.predict([{"prompt": "a bar", "negative": "a cross", "guidance_scale": 1.0}])


def test_nothing_in_it_is_a_pickle(of_texts: Artifact, tiny: TinyPipeline, tmp_path: Path) -> None:
    """Nor weights: it names the release in the store."""
    mlflow.set_tracking_uri(f"sqlite:///{tiny.store}/mlflow.db")
    folder = Path(mlflow.artifacts.download_artifacts("models:/pictures@candidate", dst_path=str(tmp_path)))
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert "MLmodel" in files and "input_example.json" in files
    assert {Path(name).suffix for name in files} <= {"", ".json", ".yaml", ".txt"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20_000
    assert "pickle" not in (folder / "requirements.txt").read_text()


def test_a_store_that_was_moved_and_a_release_that_is_gone(
    of_classes: Artifact, pixel_tiny: TinyPipeline, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(pixel_tiny.store, tmp_path / "moved"))
    client_of(f"sqlite:///{moved}/mlflow.db")
    store = Path(pixel_tiny.store)
    hidden = store.rename(store.with_name("away"))
    try:
        assert pictures(loaded(moved).predict([{"label": "bar"}]))[0].shape == (16, 16, 3)
        shutil.rmtree(moved / "artifacts" / of_classes.name)
        with pytest.raises(ValueError, match="is not there"):
            loaded(moved)
    finally:
        hidden.rename(store)
