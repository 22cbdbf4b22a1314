"""Which scores a run in MLflow ended in."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from genpipe.artifacts import Artifact
from genpipe.pipeline.plan import resolve_uri
from genpipe.tracking.store import check, client_of, first_line, redacted

RUN_ID = re.compile(r"[0-9a-f]{32}")
SUMMARY = "summary.json"
"""The table of stages that a pipeline's run keeps."""


def scores_of_run(run_id: str, *, tracking_uri: str) -> Artifact:
    """The committed scores of a stage's run, or of the only stage of a pipeline's run that measures.

    Raises ValueError where there is no such run, or it has none, or several.
    """
    check(tracking_uri)
    from mlflow.exceptions import MlflowException

    where = redacted(tracking_uri)
    try:
        made = _artifacts_of(run_id, tracking_uri)
    except MlflowException as error:
        said = redacted(first_line(error), of=tracking_uri)
        raise ValueError(f"{run_id}: not found in MLflow at {where}: {said}") from None
    found = {artifact.fingerprint: artifact for artifact in map(resolve_uri, made) if artifact.kind == "scores"}
    if len(found) != 1:
        raise ValueError(
            f"{run_id}: a run in MLflow at {where} that made {len(found)} scores; name the run of a stage that measures"
        )
    return next(iter(found.values()))


def _artifacts_of(run_id: str, tracking_uri: str) -> set[str]:
    """The URIs of the artifact of a stage's run, or of those of a pipeline's run that may be scores."""
    client = client_of(tracking_uri)
    if uri := client.get_run(run_id).data.tags.get("genpipe.artifact"):
        return {uri}
    if SUMMARY not in {file.path for file in client.list_artifacts(run_id)}:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        rows = json.loads(Path(client.download_artifacts(run_id, SUMMARY, folder)).read_text())["stages"]
    return {row["artifact"] for row in rows if "/artifacts/scores/" in row["artifact"]}
