"""What MLflow loads a registered release as: `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(prompts)`.

`tracking/flavor.py` writes this module's name into the model. Nothing is unpickled: the model holds the name of the
release, and the release lies in its store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genpipe.artifacts import Artifact, find
from genpipe.generation.pictures import png_file
from genpipe.loaded_system import LoadedSystem

if TYPE_CHECKING:
    from pandas import DataFrame


class PicturesOfPrompts:
    """A system as a function of tables, as MLflow calls it."""

    def __init__(self, system: LoadedSystem) -> None:
        self.system = system

    def predict(self, model_input: DataFrame) -> DataFrame:
        """A column `png` with the file of a picture for each row, by the row's `prompt` and `label`.

        `negative`, `seed` (0), `steps` and `guidance_scale` may be there as well, and are those of
        `LoadedSystem.sample`. Each row is drawn by itself, so that its picture is the same however a table is divided.
        Raises ValueError for what the system is not conditioned on, and for what it must be told and is not.
        """
        from pandas import DataFrame

        drawn = [png_file(self._drawn(row)) for row in model_input.to_dict("records")]
        return DataFrame({"png": drawn}, index=model_input.index)

    def _drawn(self, row: dict[str, Any]) -> Any:
        told = {name: value for name, value in row.items() if value is not None and value == value}  # NaN is not itself
        steps, guidance = told.get("steps"), told.get("guidance_scale")
        [picture] = self.system.sample(
            [told["prompt"]] if "prompt" in told else [],
            labels=[told["label"]] if "label" in told else [],
            negative=told.get("negative", ""),
            seed=int(told.get("seed", 0)),
            steps=None if steps is None else int(steps),
            guidance_scale=None if guidance is None else float(guidance),
        )
        return picture


def _load_pyfunc(path: str) -> PicturesOfPrompts:
    """MLflow's entry: the release that the file at `path` names. Raises ValueError where it is not there."""
    released = Artifact.model_validate_json(Path(path).read_text("utf-8"))
    folders = [released.uri, *(str(folder / "artifacts" / released.name) for folder in Path(path).parents)]
    for folder in folders:  # where it was made, or in a store that was moved with its MLflow
        found = find(folder)
        if found is not None and found.fingerprint == released.fingerprint:
            return PicturesOfPrompts(LoadedSystem(found, device=_device()))
    raise ValueError(
        f"{released.uri}: the release {released.fingerprint[:16]} is not there (any more); load the model where its "
        "store can be reached, or copy the release back"
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
