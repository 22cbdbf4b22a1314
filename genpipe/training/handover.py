"""What ranks hand over to a process that validates beside them, and what it finds, as files of the work folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from genpipe.storage import Storage, join, open_storage
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.objective import Validation
from genpipe.weights import save_tensors

MOST_WAITING = 4
"""Hand-overs that wait for their validation at the most: each is a copy of the averaged weights in the store."""

GIVEN_UP = "given-up"
SUFFIX = ".safetensors"


@dataclass
class HandOverStore:
    """The hand-overs of one training below `uri`, committed as checkpoints are, and results of the same names.

    `attended` says whether a validator takes them; `fence` raises where this process may no longer write.
    """

    uri: str
    attended: bool = False
    fence: Callable[[], None] = lambda: None
    weights: CheckpointStore = field(init=False)

    def __post_init__(self) -> None:
        self.weights = CheckpointStore(join(self.uri, "weights"), keep=MOST_WAITING, before_commit=self.fence)

    @property
    def _results(self) -> Storage:
        return open_storage(join(self.uri, "results"))

    def results(self) -> list[str]:
        """The names of what is validated, oldest first."""
        return sorted(entry.key.removesuffix(SUFFIX) for entry in self._results.list() if entry.key.endswith(SUFFIX))

    def waiting(self) -> list[str]:
        """The names of what is handed over and not validated, oldest first."""
        validated = set(self.results())
        return [name for name in reversed(self.weights.names()) if name not in validated]

    def result(self, name: str) -> Validation | None:
        """What was found of a hand-over; None while it is not validated."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._results.download(name + SUFFIX, path := Path(folder, "result"))
            except FileNotFoundError:
                return None
            with safe_open(path, "np") as file:
                images = {image: np.array(file.get_tensor(image)) for image in file.keys()}  # noqa: SIM118
                return Validation(json.loads(file.metadata()["metrics"]), images)

    def put_result(self, name: str, found: Validation) -> None:
        """Tell what was found of a hand-over."""
        images = {image: torch.from_numpy(np.ascontiguousarray(pixels)) for image, pixels in found.images.items()}
        with tempfile.TemporaryDirectory() as folder:
            save_tensors(images, path := Path(folder, "result"), metadata={"metrics": json.dumps(found.metrics)})
            self.fence()
            self._results.upload(name + SUFFIX, path)

    def delete(self, name: str) -> None:
        """Forget a hand-over and what was found of it."""
        self.weights.delete(name)
        self._results.delete(name + SUFFIX)

    def given_up(self) -> str:
        """Why there is no validator any more; empty while there may be one."""
        try:
            return open_storage(self.uri).read(GIVEN_UP).decode()
        except FileNotFoundError:
            return ""

    def give_up(self, why: str) -> None:
        """Tell the ranks that there is no validator any more."""
        open_storage(self.uri).write(GIVEN_UP, why.encode())

    def attend(self) -> None:
        """Begin to validate, whatever came of earlier validators."""
        open_storage(self.uri).delete(GIVEN_UP)
