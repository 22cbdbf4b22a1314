"""The commands that talk to a standing Prefect server: `genpipe deploy`, `deployments`, `runs` and `logs`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from genpipe.cli import console
from genpipe.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from flows.deployments import Deployed

app = typer.Typer()

FOLLOW_SECONDS = 2.0

Name = Annotated[str, typer.Argument(metavar="NAME", help="of the deployment, as `genpipe deployments` lists it")]


@app.command()
def deploy(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a pipeline's YAML file, or a deployment's name")],
    overrides: Overrides = None,
    cron: Annotated[str, typer.Option(help="when it runs, as in crontab: '0 3 * * *'; default: when asked to")] = "",
    timezone: Annotated[str, typer.Option(help="of --cron")] = "UTC",
    pool: Annotated[str, typer.Option(help="the work pool whose workers run it")] = "genpipe",
    overlap: Annotated[
        Literal["queue", "skip"], typer.Option(help="what a run does that is due while the one before still runs")
    ] = "queue",
    pause: Annotated[bool, typer.Option("--pause", help="schedule no more runs of the deployment CONFIG")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on scheduling them")] = False,
    now: Annotated[bool, typer.Option("--now", help="ask for a run of the deployment CONFIG now")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="delete the deployment CONFIG; what it made stays")] = False,
) -> None:
    """Have a Prefect server run a pipeline on a schedule: make or update its deployment.

    The pipeline travels in its store, so CONFIG may change or go afterwards; deploy it again to have the change run.
    Each run looks at its sources again and makes what is not there yet. Needs PREFECT_API_URL and a worker:
    `prefect worker start --pool genpipe --type process`.
    """
    from flows import deployments

    if pause + resume + now + remove > 1:
        raise typer.BadParameter("give one of --pause, --resume, --now and --remove")
    if remove:
        deployments.remove(config)
        console.out.print(f"{config}: removed")
    elif now:
        console.out.print(f"{config}: flow run {deployments.start(config)}")
    elif pause or resume:
        _show([deployments.pause(config, paused=pause)])
    else:
        made = deployments.deploy(config, overrides or [], cron=cron, timezone=timezone, pool=pool, overlap=overlap)
        _show([made])


@app.command("deployments")
def deployments_command() -> None:
    """List the deployments of pipelines, with their next and last runs."""
    from flows import deployments

    _show(deployments.deployments())


@app.command()
def runs(
    pipeline: Annotated[str, typer.Argument(metavar="[PIPELINE]", help="its name; default: all")] = "",
    limit: Annotated[int, typer.Option(min=1, max=200, help="most runs that are listed")] = 20,
) -> None:
    """List what runs, waits and ran, the newest first."""
    from flows.deployments import recent_runs
    from genpipe.pipeline.spec import duration

    rows = [
        (
            run.name,
            run.state_name or "",
            _when(run.start_time or run.expected_start_time),
            duration(run.total_run_time.total_seconds()) if run.start_time else "",
            (run.state.message or "").splitlines()[0] if run.state and run.state.message else "",
        )
        for run in recent_runs(pipeline, limit=limit)
    ]
    console.table(("run", "", "began", "for", ""), rows)


@app.command()
def logs(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="its key under `stages:`")],
    config: ConfigFile,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the stage ends")] = False,
) -> None:
    """Print what a stage's last job printed, on the cluster that CONFIG names."""
    from genpipe.launch.jobs import log_of
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan

    pipeline = load_pipeline(config, overrides or [])
    [planned] = [planned for planned in plan(pipeline, only=[stage]) if planned.name == stage]
    shown = 0
    while True:
        text, running = log_of(planned.artifact, store=pipeline.cfg.store, address=pipeline.cfg.ray.address)
        console.out.print(text[shown:], end="", markup=False, highlight=False, soft_wrap=True)
        shown = len(text)
        if not (follow and running):
            return
        time.sleep(FOLLOW_SECONDS)


def _show(found: list[Deployed]) -> None:
    rows = [
        (
            each.name,
            "paused" if each.paused else each.schedule or "when asked to",
            each.pool,
            _when(each.next_run),
            f"{each.last_run.state_name} {_when(each.last_run.end_time)}" if each.last_run else "",
            each.config,
        )
        for each in found
    ]
    console.table(("deployment", "schedule", "pool", "next run", "last run", "pipeline"), rows)


def _when(moment: datetime | None) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}" if moment else ""
