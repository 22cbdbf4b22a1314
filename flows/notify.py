"""Tells a webhook what came of a run."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from flows.reporting import StageResult

PATIENCE_SECONDS = 10.0


def tell(url: str, *, pipeline: str, run: str, results: Sequence[StageResult]) -> None:
    """Post a run's outcome as JSON to `url`, or to GENPIPE_NOTIFY where it is empty; neither: tell nobody.

    `text` is a sentence, as chat services show it; `status` is failed, missed a gate, finished, or nothing to do. A
    webhook that does not answer is told of on stderr and harms nothing; its URL, often a secret, is not printed.
    """
    url = url or os.environ.get("GENPIPE_NOTIFY", "")
    if not url:
        return
    failed = [f"{result.stage}: {result.message}" for result in results if result.status == "failed"]
    missed = [sentence for result in results for sentence in result.missed]
    ran = [result.stage for result in results if result.status == "ran"]
    status = "failed" if failed else "missed a gate" if missed else "finished" if ran else "nothing to do"
    said = "; ".join(failed or missed or [f"ran {', '.join(ran)}" if ran else "every stage is up to date"])
    message = {
        "text": f"{pipeline}: {status}: {said} ({run})",
        "pipeline": pipeline,
        "run": run,
        "status": status,
        "stages": {result.stage: result.status for result in results},
        "metrics": {result.stage: result.metrics for result in results if result.status == "ran"},
    }
    try:
        request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=PATIENCE_SECONDS).close()
    except (OSError, ValueError, HTTPException) as error:
        print(f"the webhook of `notify` did not take the message: {type(error).__name__}", file=sys.stderr, flush=True)
