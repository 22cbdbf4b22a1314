"""A release as a model of MLflow's flavor `python_function`: from a table of prompts to pictures.

MLflow is given a few files: the signature, an example, and the name of the release, whose weights stay in the store.
`genpipe.pyfunc` is what loads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe import __version__
from genpipe.artifacts import Artifact
from genpipe.storage import join, read_file

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

LOADER = "genpipe.pyfunc"


def write_flavor(release: Artifact, folder: Path, *, model_id: str, run_id: str) -> Path:
    """Write MLflow's files of a release, as its logged model `model_id`, below `folder`; where they are."""
    from mlflow.models import Model
    from mlflow.pyfunc import save_model
    from pandas import DataFrame

    named, made = folder / "release.json", folder / "model"
    named.write_text(release.model_dump_json(), encoding="utf-8")
    save_model(
        str(made),
        loader_module=LOADER,
        data_path=str(named),
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        signature=signature_of(release),
        input_example=DataFrame([_example(release)]),
        pip_requirements=[f"genpipe=={__version__}"],  # else MLflow draws a picture to find out
    )
    return made


def signature_of(release: Artifact) -> ModelSignature:
    """The columns that the model of a release takes, and the one that it gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    told = release.meta["conditioned_on"]
    required = [name for condition, name in (("text", "prompt"), ("label", "label")) if condition in told]
    optional = {
        **({"negative": "string"} if "text" in told else {}),
        "seed": "long",
        "steps": "long",
        "guidance_scale": "double",
    }
    inputs = [
        *(ColSpec("string", name) for name in required),
        *(ColSpec(kind, name, required=False) for name, kind in optional.items()),
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec("binary", "png")]))


def _example(release: Artifact) -> dict[str, Any]:
    """What the first row of the release's grid shows, with a seed."""
    from genpipe.release.record import RECORD_FILE

    grid = json.loads(read_file(join(release.uri, RECORD_FILE)))["grid"]
    prompt, classes = grid["prompts"][0], release.meta.get("classes", ())
    told = {"text": ("prompt", prompt["text"]), "label": ("label", _class(prompt["label"], classes))}
    return {**dict(told[condition] for condition in release.meta["conditioned_on"]), "seed": grid["seed"]}


def _class(label: int, classes: list[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else str(max(label, 0))
