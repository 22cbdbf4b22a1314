"""What MLflow's pages say of a run, in Markdown: what it is, what it was made from, and where to look next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.pipeline.spec import StageSpec, duration
from genpipe.tracking.open_runs import PipelineRecord

SIGNED = "<!-- written by genpipe; delete this line to keep a text of your own -->"
"""Ends each text, which is renewed as long as it is there."""

MAX_TEXT = 5000
"""Characters of a description that MLflow keeps everywhere."""

RunLink = Callable[[str], str]
"""Of a run's id: the address of its page."""


def is_ours(text: str) -> bool:
    """Whether a description is one to renew: nobody has written another."""
    return not text.strip() or text.rstrip().endswith(SIGNED)


def pipeline_page(record: PipelineRecord, *, link: RunLink, picture: str = "") -> str:
    """The page of a pipeline run: its stages with their numbers and runs, what it was told, and its picture.

    `picture` is the address of one, relative to MLflow's page.
    """
    lines = [_opening(record)]
    if record.error:
        lines += [f"**{_cell(record.error)}**"]
    if record.rows:
        lines += [_table(record, link)]
    if picture:
        lines += [f"![the pictures that it ended with]({picture})"]
    lines += _elsewhere({name.removeprefix("genpipe."): value for name, value in record.tags.items()})
    return _signed(lines)


def stage_page(spec: StageSpec, *, link: RunLink) -> str:
    """The page of a stage's run: what it makes, from whose runs, and who asked for it."""
    lines = [f"`{spec.name}`, a stage of kind `{spec.stage}`, makes `{spec.target.uri}`."]
    if spec.inputs:
        lines += ["\n".join(["It takes", "", *(_input(role, each, link) for role, each in spec.inputs.items())])]
    if spec.pipeline_run_id:
        lines += [f"Asked for last by [this run of the pipeline {spec.pipeline}]({link(spec.pipeline_run_id)})."]
    lines += _elsewhere(spec.links)
    return _signed(lines)


def _signed(paragraphs: Sequence[str]) -> str:
    text = "\n\n".join(paragraphs)
    room = MAX_TEXT - len(SIGNED) - 8
    if len(text) > room:  # cut at the end of a line: half a row of a table would break it
        text = text[:room].rpartition("\n")[0] + "\n\n..."
    return f"{text}\n\n{SIGNED}"


def _opening(record: PipelineRecord) -> str:
    config = record.tags.get("genpipe.config", "")
    said = f"`{config}`" if config else f"the pipeline `{record.name}`"
    if not record.settings:
        return f"A run of {said}, as it is written."
    settings = ", ".join(f"`{path} = {value}`" for path, value in record.settings.items())
    return f"A run of {said} with {settings}."


def _table(record: PipelineRecord, link: RunLink) -> str:
    lines = ["| stage | | time | what came of it | why |", "|---|---|---|---|---|"]
    for row in record.rows:
        stage, run_id = row["stage"], row.get("run_id", "")
        name = f"[{stage}]({link(run_id)})" if run_id else stage
        why = row.get("message", "") if row["status"] != "cached" else ""
        said = "; ".join(filter(None, (row.get("headline"), row.get("missed gates"), row.get("held gates"))))
        seconds = duration(row.get("seconds", 0.0)) if row["status"] == "ran" else ""
        lines.append(f"| {name} | {row['status']} | {seconds} | {_cell(said)} | {_cell(why)} |")
    return "\n".join(lines)


def _input(role: str, artifact: Artifact, link: RunLink) -> str:
    manifest = artifacts.read_manifest(artifact.uri, check_files=False)
    by = f", made by [this run]({link(manifest.run_id)})" if manifest and manifest.run_id else ""
    return f"- `{role}`: `{artifact.uri}`{by}"


def _elsewhere(links: Mapping[str, str]) -> list[str]:
    """Where else the run is to be seen."""
    found = []
    if url := links.get("prefect_url"):
        found.append(f"[its flow run in Prefect]({url})")
    if dashboard := links.get("ray_dashboard"):
        job = links.get("ray_job")
        found.append(f"[its job in Ray]({dashboard}/#/jobs/{job})" if job else f"[its jobs in Ray]({dashboard}/#/jobs)")
    return [f"See also {' and '.join(found)}."] if found else []


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
