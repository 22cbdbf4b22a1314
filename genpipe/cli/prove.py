"""`genpipe prove`: whether a training stage, killed and resumed, ends with the same bits on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from genpipe.cli import console
from genpipe.cli.arguments import ConfigFile, Overrides
from genpipe.config import ConfigError


def prove(
    config: ConfigFile,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="a stage that trains, by its key under `stages:`")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="optimizer steps in all")] = 12,
    at: Annotated[int, typer.Option("--at", help="the step to stop after; the kill comes later")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="ranks, on this machine")] = 1,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", help="a folder for some checkpoints; default: the temporary one")
    ] = None,
) -> None:
    """Prove that a training stage resumes to the last bit: run its first steps straight through, and interrupted.

    The interrupted run is stopped, resumed, killed with SIGKILL in mid-training and resumed again. Weights, optimizers
    and averages of both are compared. Inputs must be committed; the store is left as it is. Exits 1 if a tensor
    differs, and names the first.

    Example: `genpipe prove configs/pipeline/demo.yaml decoder --workers 2`
    """
    from genpipe.launch.local import spec_of_stage
    from genpipe.launch.prove import prove as run_proof
    from genpipe.stages import is_training, load_stage

    spec = spec_of_stage(config, stage, overrides or [])
    if not is_training(load_stage(spec.stage)):
        raise ConfigError(f"{config}: stages.{stage}: does not train, so it has no checkpoints to resume from")

    def tell(message: str) -> None:
        console.out.print(message, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="genpipe-prove-", dir=scratch) as folder:
        proof = run_proof(spec, workers=workers, steps=steps, stop=at, scratch=Path(folder), tell=tell)
    tell(
        f"stopped after step {proof.stopped}, killed and resumed from step {proof.resumed}, compared after step "
        f"{proof.step}: {proof.tensors:,} tensors, {proof.nbytes / 1e6:,.1f} MB"
    )
    if proof.difference is None:
        tell(f"{stage}: the same to the last bit")
        return
    name, differing, elements, most = proof.difference
    console.problem(f"{stage}: {name} is the first that differs: {differing:,} of {elements:,} elements, by {most:.3g}")
    if not proof.repeatable:
        console.problem(
            "the same steps straight through differ from one run to the next, too: what this machine computes cannot "
            "be repeated, so a resume cannot be judged (on a GPU, look at torch.use_deterministic_algorithms)"
        )
    raise typer.Exit(1)
