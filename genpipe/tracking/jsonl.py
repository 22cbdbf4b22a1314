"""Records in the store itself, without MLflow: `STORE/runs/KIND/FINGERPRINT/metrics.jsonl` and the pictures beside it.

Each line of the file is an object with the `time` and either `metrics` at `samples_seen`, a `picture` at
`samples_seen`, a `file`, `tags`, or a `status`. A resumed run goes on in the same file. They stand in for an MLflow
that does not answer, too: a line `handed_in` says that it has got all that is above.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genpipe import artifacts
from genpipe.files import DiskFull
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import join, local_path, open_storage, read_file
from genpipe.tracking.open_runs import OpenRun
from genpipe.tracking.recorder import Facts, File, Picture, Point, Record, Status, Steps

URI = "jsonl"
FILE = "metrics.jsonl"
PAUSE_SECONDS = 0.5
REMOTE_SECONDS = 30.0
"""Between writes to a store where a file can only be replaced as a whole."""


def runs_uri(spec: StageSpec) -> str:
    """Where the records of a stage's run lie."""
    return join(spec.store, "runs", spec.target.kind, spec.target.fingerprint[:16])


def check(uri: str) -> None:
    """A store can always be written."""


def claim_stage_run(spec: StageSpec) -> str:
    """A stage's run needs no id: its fingerprint names it."""
    return ""


class StageKeeper:
    """Keeps a stage's run as lines of a file."""

    run_id = ""

    def __init__(self, spec: StageSpec, run_id: str = "") -> None:
        self.spec = spec
        self.uri = runs_uri(spec)
        self.where = self.uri
        self.pause_seconds = PAUSE_SECONDS if local_path(self.uri) else REMOTE_SECONDS
        self.storage = open_storage(self.uri)
        self.steps = Steps()

    def open(self) -> None:
        """Look up the last step of every series; a line that a killed process left unfinished is ended."""
        text = _read(self.spec)
        if text and not text.endswith(b"\n"):
            self._append([])
        for line in _lines(text):
            step = line.get("samples_seen", 0)
            for name in [*line.get("metrics", {}), *([f"images/{line['picture']}"] if "picture" in line else [])]:
                self.steps.last[name] = max(step, self.steps.last.get(name, -1))

    def write(self, records: Sequence[Record]) -> None:
        """Append a line for each record; the points of one time and place in training share one."""
        news = [record for record in records if self.steps.is_new(record)]
        lines: list[dict[str, Any]] = []
        for (milliseconds, step, _), group in groupby(news, key=_moment):
            together = list(group)
            if metrics := {each.name: each.value for each in together if isinstance(each, Point)}:
                lines.append({"time": _iso(milliseconds), "samples_seen": step, "metrics": metrics})
            lines += [self._line(each) for each in together if not isinstance(each, Point)]
        if lines:
            self._append(lines)
        for record in news:
            self.steps.note(record)

    def refuses(self, error: Exception) -> bool:
        """A file takes everything."""
        return False

    def _line(self, record: Picture | File | Facts | Status) -> dict[str, Any]:
        if isinstance(record, Picture):
            packed = io.BytesIO()
            Image.fromarray(record.image).save(packed, "png")
            self.storage.write(f"images/{record.name}-{record.step:012d}.png", packed.getvalue())
            return {"time": _iso(record.milliseconds), "samples_seen": record.step, "picture": record.name}
        if isinstance(record, File):
            self.storage.write(f"files/{record.name}", record.data)
            return {"time": _iso(), "file": record.name}
        if isinstance(record, Facts):
            return {"time": _iso(), "tags": dict(record.tags)}
        return {"time": _iso(record.milliseconds), "status": record.status, **self._told(record)}

    def _told(self, record: Status) -> dict[str, Any]:
        """What is said of a run at its begin and at its end."""
        spec = self.spec
        if record.status == "RUNNING":
            return {
                "name": spec.name,
                "stage": spec.stage,
                "fingerprint": spec.target.fingerprint,
                "config": spec.config,
                "inputs": {role: artifact.fingerprint for role, artifact in spec.inputs.items()},
                "version": spec.version,
                "git_revision": spec.git_revision,
                "code": spec.code,
            }
        if record.status == "FINISHED" and (manifest := artifacts.read_manifest(spec.target.uri)) is not None:
            return {"artifact": spec.target.uri, "final_metrics": manifest.metrics}
        return {"error": record.error}

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, all or none, in one write; none ends the line that is there. Raises DiskFull."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode() or b"\n"
        if (folder := local_path(self.uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / FILE).open("ab", buffering=0) as file:
                with suppress(OSError):  # of file systems that have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if file.write(text) < len(text):
                    file.truncate(end)
                    raise DiskFull(str(folder))
            return
        self.storage.write(FILE, _read(self.spec) + text)


def kept(spec: StageSpec) -> list[Record]:
    """What the store holds of a stage's run that was not handed in yet, in its order."""
    lines = _lines(_read(spec))
    handed_in = max((number for number, line in enumerate(lines) if "handed_in" in line), default=-1)
    return [record for line in lines[handed_in + 1 :] for record in _records(spec, line)]


def mark_handed_in(spec: StageSpec, run_id: str) -> None:
    """Say that a run of MLflow has all that is kept."""
    StageKeeper(spec)._append([{"time": _iso(), "handed_in": run_id}])


def begin_pipeline(run: OpenRun, files: Sequence[Path]) -> str:
    """Keep a pipeline run in the store's folder `runs/pipelines/`; its id, which names the folder there."""
    assert run.pipeline is not None, "the run of a pipeline"
    name = re.sub(r"[^\w.-]+", "-", run.pipeline.name)
    storage = open_storage(join(run.store, "runs", "pipelines", name))
    for file in files:
        storage.write(f"config/{file.name}", file.read_bytes())
    return name


def end_pipeline(run: OpenRun) -> None:
    """Keep what became of the stages of a pipeline run, and how it ended."""
    assert run.pipeline is not None, "the run of a pipeline"
    summary = run.pipeline.model_dump(mode="json")
    storage = open_storage(join(run.store, "runs", "pipelines", run.run_id))
    storage.write("summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())


def _moment(record: Record) -> tuple[int, int, type]:
    """What records must share to stand in one line."""
    if isinstance(record, Point):
        return record.milliseconds, record.step, Point
    return 0, 0, type(record)


def _read(spec: StageSpec) -> bytes:
    try:
        return read_file(join(runs_uri(spec), FILE))
    except FileNotFoundError:
        return b""


def _lines(text: bytes) -> list[dict[str, Any]]:
    """The lines that are whole: a process may be killed, or a disk be full, in the midst of one."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "time" in value:
                found.append(value)
    return found


def _records(spec: StageSpec, line: Mapping[str, Any]) -> Iterator[Record]:
    """What a line was written for."""
    storage = open_storage(runs_uri(spec))
    milliseconds = round(datetime.fromisoformat(line["time"]).timestamp() * 1000)
    if "metrics" in line:
        for name, value in line["metrics"].items():
            yield Point(name, value, milliseconds, line["samples_seen"])
    elif "tags" in line:
        yield Facts(line["tags"])
    elif "status" in line:
        yield Status(line["status"], milliseconds, line.get("error", ""))
    with suppress(FileNotFoundError):  # cleared away by the user
        if "picture" in line:
            key = f"images/{line['picture']}-{line['samples_seen']:012d}.png"
            image = np.asarray(Image.open(io.BytesIO(storage.read(key))).convert("RGB"))
            yield Picture(line["picture"], image, milliseconds, line["samples_seen"])
        elif "file" in line:
            yield File(line["file"], storage.read(f"files/{line['file']}"))


def _iso(milliseconds: int | None = None) -> str:
    time = datetime.now(UTC) if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
    return time.isoformat(timespec="milliseconds")
