"""The command line: `genpipe --help` says what there is."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe import __version__
from genpipe.cli import console
from genpipe.cli import data as data_commands
from genpipe.cli import deploy as deploy_commands
from genpipe.cli import uses as use_commands
from genpipe.cli.arguments import ConfigFile, Overrides
from genpipe.cli.compare import compare as compare_command
from genpipe.cli.curves import curves as curves_command
from genpipe.cli.ema import ema as ema_command
from genpipe.cli.gallery import gallery as gallery_command
from genpipe.cli.gc import gc as gc_command
from genpipe.cli.init import init as init_command
from genpipe.cli.prove import prove as prove_command
from genpipe.cli.release import promote as promote_command
from genpipe.cli.release import verify as verify_command
from genpipe.cli.sample import sample as sample_command
from genpipe.cli.ui import ui as ui_command
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from flows.reporting import Reporter, StageResult
    from genpipe.pipeline.graph import Pipeline
    from genpipe.pipeline.plan import Planned

app = typer.Typer(
    name="genpipe",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Trains image-generating systems in stages.

A pipeline is one YAML file: a graph of stages, each with its settings and inputs. What a stage made is kept under a
fingerprint of both, so a run does only what is not done yet.

Begin with `genpipe doctor`, then `genpipe init FOLDER --images YOUR_IMAGES`, then `genpipe run FOLDER/pipeline.yaml`.
Any setting can be overridden: `genpipe run configs/pipeline/demo.yaml stages.decoder.train.samples=200000`.
""",
)

app.add_typer(data_commands.app)
app.add_typer(deploy_commands.app)


def _tell_version(asked: bool) -> None:
    if asked:
        from genpipe.revision import git_revision

        revision = git_revision()
        typer.echo(f"genpipe {__version__}{f' ({revision})' if revision else ''}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show stack traces")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="say which version this is")
    ] = False,
) -> None:
    if debug:
        os.environ["GENPIPE_DEBUG"] = "1"


app.command("init")(init_command)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run a pipeline: every stage that is not done yet, side by side where resources allow.

    Interrupted with Ctrl-C, or after a failure, the same command goes on from what is committed and from the last
    checkpoints. Exits 1 if a stage failed or the evaluation's gate was missed.
    """
    from genpipe import api

    with _watched() as reporter:
        results = api.run(config, overrides or [], reporter=reporter)
    code = _summary(results)
    _next_steps(config, overrides or [], results)
    if code:
        raise typer.Exit(code)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="NAME", help="its key under `stages:`")],
    config: ConfigFile,
    overrides: Overrides = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="ROLE=URI", help="take this artifact: short for stages.NAME.inputs.ROLE=URI"),
    ] = None,
) -> None:
    """Run one stage by hand. Its inputs are those that CONFIG's fingerprints name, or are given with --input.

    Example: `genpipe stage decoder configs/pipeline/demo.yaml stages.decoder.train.optim.lr=1e-3`
    """
    from flows.pipeline import run_one

    base = name.partition("@")[0]
    given = [f"stages.{base}.inputs.{text}" for text in inputs or []]
    with _watched() as reporter:
        result = run_one(name, config, [*(overrides or []), *given], reporter=reporter)
    if code := _summary([result]):
        raise typer.Exit(code)


@app.command()
def cancel(
    config: ConfigFile,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE]... [PATH=VALUE]...", help="stages; default: all. Settings as they were run with"
        ),
    ] = None,
    wait: Annotated[float, typer.Option(min=1, help="seconds for a stage to write its checkpoint and end")] = 60,
) -> None:
    """Stop stages that run, wherever and by whomever they were started; running them again goes on from there.

    Training stops within a step, with a checkpoint; a data stage keeps the parts that are finished. Exits 1 if a stage
    has begun and does not answer: it does not run any more, or it did not stop.
    """
    from genpipe.launch.cancel import cancel as cancel_stages
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan as plan_pipeline

    names = [argument for argument in arguments or [] if "=" not in argument]
    pipeline = load_pipeline(config, [argument for argument in arguments or [] if "=" in argument])
    plans = [p for p in plan_pipeline(pipeline, only=names) if p.name in names or not names]
    by = f"genpipe cancel on {socket.gethostname()} at {datetime.now():%H:%M:%S}"
    silent = cancel_stages(
        pipeline, plans, by=by, seconds=wait, tell=lambda line: console.out.print(line, highlight=False)
    )
    if silent:
        console.problem(f"no answer within {wait:g} s from {', '.join(silent)}: nobody runs it, or it does not stop")
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of its peak that a GPU does")] = 0.4,
    peak: Annotated[float, typer.Option("--peak", min=1, help="peak of a GPU in bf16, TFLOP/s")] = 989,
    price: Annotated[float, typer.Option(min=0, help="of one GPU-hour")] = 2.5,
    graph: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="draw the graph: .svg, .png or .pdf")
    ] = None,
) -> None:
    """Say what a run would do and why, how long it takes, and what its training stages cost, without doing it.

    Times are those of this machine, by a probe of 0.1 s or, better, by what is trained in the store already. GPU-hours,
    where GPUs are configured, are those of `--mfu` and `--peak` (of an H100 by default). Both are estimates by
    arithmetic: what large data take to read is in neither.
    """
    from genpipe import api
    from genpipe.pipeline.graph import load_pipeline

    try:
        plans = api.plan(config, overrides or [])
    except ConfigError as error:  # the costs are worth knowing before there are data; any other fault comes again
        plans = api.plan(config, overrides or [], sources=False)
        console.problem(f"{error}; planned as if nothing were made yet")
    console.table(("stage", "", "why", "artifact"), [(p.name, p.status, p.why, p.artifact.uri) for p in plans])
    if graph is not None:
        from genpipe.pipeline.drawing import draw

        draw(plans, graph, title=load_pipeline(config, overrides or []).cfg.name)
        console.out.print(f"wrote {graph}", highlight=False)
    here = not load_pipeline(config, overrides or []).cfg.ray.address
    _costs(plans, mfu=mfu, peak_tflops=peak, price=price, here=here)


@app.command()
def check(configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="pipelines' YAML files")]) -> None:
    """Validate pipelines without running: every setting, that the stages agree with one another, and their data.

    Data that are not here are told of and are no fault, as a pipeline may be checked elsewhere than where it runs.
    """
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan as plan_pipeline

    faults = []
    for config in configs:
        try:
            pipeline = load_pipeline(config)
            plan_pipeline(pipeline, sources=False)
            console.out.print(f"{config}: ok{_absent_data(pipeline)}", highlight=False, soft_wrap=True)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))


app.command("compare")(compare_command)
app.command("curves")(curves_command)
app.command("gc")(gc_command)
app.command()(sample_command)
app.command("gallery")(gallery_command)
for _use in (
    use_commands.vary,
    use_commands.blend,
    use_commands.edit,
    use_commands.components,
    use_commands.signals,
    use_commands.attack,
):
    app.command()(_use)
app.command()(verify_command)
app.command()(promote_command)
app.command()(prove_command)
app.command("ema")(ema_command)
app.command()(ui_command)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="also try its addresses")] = None,
) -> None:
    """Say whether this machine has what genpipe needs, and how to get what is missing. Exits 1 if something is."""
    from genpipe.cli.doctor import examine

    findings = examine(config)
    marks = {True: "ok", False: "MISSING"}
    console.table(("", "what", "found"), [(marks[f.ok], f.what, f.found) for f in findings])
    for finding in findings:
        if finding.remedy and not finding.ok:
            console.problem(f"{finding.what}: {finding.remedy}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line: a user's mistake ends with one message and exit code 2, never with a stack trace."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        console.problem("interrupted; what is committed stays, and the same command goes on from there")
        code = 130
    except typer.Abort:
        code = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = _explain(error)
    sys.exit(code)


def _explain(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's, of which typer may carry its own copy
        error.show()
        return int(error.exit_code)
    console.problem(str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}")
    if not isinstance(error, ValueError):
        console.err.print("(--debug before the command shows where)", highlight=False)
    return 2


def _watched() -> AbstractContextManager[Reporter]:
    """A reporter for whoever watches: bars on a terminal, a plain line now and then elsewhere."""
    from flows.pipeline import PlainReporter

    return console.Display() if console.out.is_terminal else nullcontext(PlainReporter())


def _absent_data(pipeline: Pipeline) -> str:
    """What is wrong with the data of a pipeline that is right for the rest."""
    from genpipe.pipeline.plan import plan as plan_pipeline

    try:
        plan_pipeline(pipeline)
    except ConfigError as error:
        return f", but for its data: {error}"
    return ""


def _costs(plans: Sequence[Planned], *, mfu: float, peak_tflops: float, price: float, here: bool) -> None:
    """What the training stages of a plan cost, each and all, as tables; the time that it takes if it runs `here`."""
    from genpipe.pipeline.costs import cost_of
    from genpipe.pipeline.forecast import forecast
    from genpipe.pipeline.spec import duration
    from genpipe.stage_config import cores
    from genpipe.stages import is_training

    costs = {
        p.name: cost_of(p.instance.stage, p.instance.cfg, p.inputs) for p in plans if is_training(p.instance.stage)
    }
    columns = {
        "stage": [*costs, "all"],
        "parameters": [f"{sum(cost.parameters.values()) / 1e6:,.2f} M" for cost in costs.values()],
        "GFLOP a sample": [f"{cost.flops / 1e9:,.3g}" for cost in costs.values()],
        "samples": [f"{cost.samples:,}" for cost in costs.values()],
        "workers": [f"{cost.workers}{'' if cost.validator is None else ' + 1'}" for cost in costs.values()],
    }
    to_run = {p.name for p in plans if p.status == "run"}
    works = {p.name: 0.0 for p in plans}
    works |= {name: cost.flops * cost.samples / cost.workers for name, cost in costs.items() if name in to_run}
    expected = forecast(plans, capacity={"CPU": float(cores())}, works=works, probe=here)
    if expected is not None:
        times = [duration(expected.seconds[name]) if name in to_run else "done" for name in costs]
        columns["about"] = [*times, duration(expected.total())]
    gpus = any(p.instance.cfg.resources.gpus for p in plans)
    if gpus:
        hours = [cost.gpu_hours(mfu=mfu, peak_tflops=peak_tflops) for cost in costs.values()]
        columns["GPU-hours"] = [f"{each:,.3g}" for each in (*hours, sum(hours))]
        columns["cost"] = [f"{each * price:,.2f}" for each in (*hours, sum(hours))]
    console.table(list(columns), list(zip_longest(*columns.values(), fillvalue="")))
    parts = ("weights", "gradients", "optimizer", "averages", "gathered", "activations")
    sizes = [(name, *(cost.memory[part] / 2**30 for part in parts), cost.peak / 2**30) for name, cost in costs.items()]
    memory = [(name, *(f"{size:,.3f}" for size in row)) for name, *row in sizes]
    console.table(("GiB a GPU" if gpus else "GiB a worker", *parts, "all"), memory)


def _summary(results: Sequence[StageResult]) -> int:
    """The table at the end of a run, and the pictures; the exit code."""
    from genpipe.pipeline.spec import duration
    from genpipe.storage import open_storage

    rows = [(r.stage, r.status, duration(r.seconds), r.headline, r.run_id or "-") for r in results]
    console.table(("stage", "", "wall time", "headline", "MLflow run"), rows)
    failed = [r for r in results if r.status == "failed"]
    for result in failed:
        console.problem(f"{result.stage}: {result.message}")
    for result in results:
        if result.artifact is not None and result.artifact.kind == "scores":
            for picture in sorted(open_storage(result.artifact.uri).list(), key=lambda entry: entry.key):
                if picture.key.endswith(".png"):
                    console.out.print(f"{result.artifact.uri}/{picture.key}", highlight=False, soft_wrap=True)
    for sentence in (sentence for result in results for sentence in result.held):
        console.out.print(sentence, highlight=False, soft_wrap=True)
    missed = [message for result in results for message in result.missed]
    for message in missed:
        console.problem(f"gate missed: {message}")
    return 1 if failed or missed else 0


def _next_steps(config: str, overrides: Sequence[str], results: Sequence[StageResult]) -> None:
    """What a person may want next: to see the runs, and to draw something else."""
    program = "genpipe" if shutil.which("genpipe") else os.path.relpath(sys.argv[0])
    steps = [("see the runs", shlex.join([program, "ui", config, *overrides]))]
    for system in (r.artifact for r in results if r.artifact is not None and r.artifact.kind == "system"):
        place = system.uri if "://" in system.uri else os.path.relpath(system.uri)
        told = {"text": ['"a prompt of your own"'], "label": ["--label", "NAME"]}
        given = [word for condition in sorted(system.meta["conditioned_on"]) for word in told.get(condition, [])]
        steps.append(("draw", " ".join([shlex.join([program, "sample", place]), *given, "--out", "drawn.png"])))
    for what, command in steps:
        console.out.print(f"{what}: {command}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
