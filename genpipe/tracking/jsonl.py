"""Records in the store itself, without MLflow: `STORE/runs/KIND/FINGERPRINT/metrics.jsonl` and the pictures beside it.

Each line of the file is an object with the `time` and either `metrics` at `samples_seen`, `tags`, or a `status`. A
resumed run goes on in the same file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.storage import join, local_path, open_storage
from genpipe.tracking.recorder import Point, Recorder

if TYPE_CHECKING:
    from genpipe.pipeline.spec import StageSpec

URI = "jsonl"
FILE = "metrics.jsonl"
REMOTE_SECONDS = 30.0
"""Between writes to a store where a file can only be replaced as a whole."""


def runs_uri(spec: StageSpec) -> str:
    """Where the records of a stage's run lie."""
    return join(spec.store, "runs", spec.target.kind, spec.target.fingerprint[:16])


@contextmanager
def open_stage_run(spec: StageSpec) -> Iterator[JsonlRun]:
    """The run of `spec`; an exception in the block ends it as FAILED, an interruption as KILLED, and is raised on."""
    run = JsonlRun(spec)
    run.write(
        {
            "status": "RUNNING",
            "name": spec.name,
            "stage": spec.stage,
            "fingerprint": spec.target.fingerprint,
            "config": spec.config,
            "inputs": {role: artifact.fingerprint for role, artifact in spec.inputs.items()},
            "git_revision": spec.git_revision,
        }
    )
    try:
        yield run
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        run.write({"status": status, "error": f"{type(error).__name__}: {error}"})
        run.close()
        raise
    run.close()


def attach(spec: StageSpec, run_id: str) -> JsonlRun:
    """The run that `open_stage_run` opened in another process."""
    return JsonlRun(spec)


class JsonlRun:
    """A stage's run as lines of a file. Logging returns at once; a thread writes."""

    run_id = ""

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.uri = runs_uri(spec)
        self.storage = open_storage(self.uri)
        self.recorder = Recorder(
            write=lambda points: append_points(spec, points),
            refused=lambda error: False,
            label=f"the records in {self.uri}",
            pause_seconds=None if local_path(self.uri) else REMOTE_SECONDS,
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record with the time of now."""
        line = {"time": _iso(datetime.now(UTC)), **record}
        self.recorder.put(lambda: _append(self.spec, [line]))

    def log(self, metrics: Mapping[str, float], *, samples_seen: int) -> None:
        """Append the metrics as one record."""
        now = int(datetime.now(UTC).timestamp() * 1000)
        self.recorder.put([Point(name, float(value), now, samples_seen) for name, value in metrics.items()])

    def log_image(self, name: str, image: np.ndarray, *, samples_seen: int) -> None:
        """Keep a picture (uint8, HWC) as `images/NAME-SAMPLES.png`."""
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "png")
        self.recorder.put(lambda: self.storage.write(f"images/{name}-{samples_seen:012d}.png", packed.getvalue()))

    def log_file(self, path: Path) -> None:
        """Keep a copy of a file as `files/NAME`."""
        data, key = path.read_bytes(), f"files/{path.name}"
        self.recorder.put(lambda: self.storage.write(key, data))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Append the tags as one record."""
        if tags:
            self.write({"tags": dict(tags)})

    def finish(self, artifact: Artifact) -> None:
        """Append the artifact's URI and final metrics, and end the run."""
        manifest = artifacts.read_manifest(artifact.uri)
        assert manifest is not None, f"nothing is committed at {artifact.uri}"
        self.write({"status": "FINISHED", "artifact": artifact.uri, "final_metrics": manifest.metrics})
        self.close()

    def close(self) -> None:
        """Write what is left, within a bounded time."""
        self.recorder.close()


def append_points(spec: StageSpec, points: Sequence[Point]) -> None:
    """Append metrics to the records of `spec`: a line for those of one time and place in training."""
    lines = []
    for (milliseconds, step), group in groupby(points, key=lambda point: (point.milliseconds, point.step)):
        time = _iso(datetime.fromtimestamp(milliseconds / 1000, UTC))
        lines.append({"time": time, "samples_seen": step, "metrics": {point.name: point.value for point in group}})
    _append(spec, lines)


def _append(spec: StageSpec, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    uri = runs_uri(spec)
    if (folder := local_path(uri)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("ab") as file:
            file.write(text)
        return
    storage = open_storage(uri)
    with suppress(FileNotFoundError):
        text = storage.read(FILE) + text
    storage.write(FILE, text)


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
