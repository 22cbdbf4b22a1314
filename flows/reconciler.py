"""A flow that tells Prefect and MLflow of runs whose process is gone, so that none stays Running.

A run keeps a heartbeat in its store (`STORE/runs/open/`). The next run on that store settles what a dead one left,
which on a schedule may be a day later; this flow looks every few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName

from flows import server
from flows.pipeline import FLOW_RUN, pipeline_flow
from genpipe.pipeline.graph import load_pipeline
from genpipe.tracking.recording import dead_pipelines, settle_store


@flow(name="genpipe-reconciler", flow_run_name="reconcile")
def reconcile(stores: Sequence[str] = ()) -> list[str]:
    """Mark dead flow runs Crashed and end their runs in MLflow; the ids of those flow runs.

    It looks into `stores` and into those of all pipelines that are deployed. A store that does not answer is told of,
    and left for the next time. The Ray jobs of a dead run go on, for the next one to adopt.
    """
    crashed: list[str] = []
    for store in sorted({*stores, *_deployed_stores()}):
        try:
            dead = [record.tags.get(FLOW_RUN, "") for record in dead_pipelines(store)]
            server.crash_flow_runs(dead)  # first, as a record is gone once MLflow has it
            settle_store(store)
            crashed += dead
        except OSError as error:
            print(f"{store}: not looked at: {error}", file=sys.stderr, flush=True)
    return crashed


def _deployed_stores() -> set[str]:
    """The stores of the pipelines that the Prefect server has deployments of, as far as they can be read here."""
    pipelines = FlowFilter(name=FlowFilterName(any_=[pipeline_flow.name]))
    with get_client(sync_client=True) as client:
        given = [deployment.parameters or {} for deployment in client.read_deployments(flow_filter=pipelines)]
    stores = set()
    for parameters in given:
        try:
            stores.add(load_pipeline(parameters["config"], parameters.get("overrides") or ()).cfg.store)
        except (KeyError, ValueError, OSError) as error:
            print(f"a deployment's pipeline cannot be read here: {error}", file=sys.stderr, flush=True)
    return stores
