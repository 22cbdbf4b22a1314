"""`genpipe sample`: pictures of prompts, drawn with a trained system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genpipe.cli import console
from genpipe.config import ConfigError, changed
from genpipe.stage_config import UNFINGERPRINTED

if TYPE_CHECKING:
    from genpipe.artifacts import Artifact, Manifest
    from genpipe.generation.systems import Conditions, System
    from genpipe.pipeline.graph import Pipeline


def sample(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="pipeline YAML, or the URI of a system")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="what to draw")] = None,
    system: Annotated[str, typer.Option("--system", help="which of the pipeline's systems, if it has several")] = "",
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="a class to draw, by name or number; may be repeated")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="the PNG to write")] = Path("grid.png"),
    seed: Annotated[int, typer.Option(help="the same seed and prompts give the same pictures")] = 0,
    each: Annotated[int, typer.Option("--each", min=1, help="pictures of each prompt or class")] = 4,
) -> None:
    """Draw pictures of prompts with a trained system and write them as one PNG.

    Example: `genpipe sample configs/pipeline/demo.yaml "an emoji of a red apple, twemoji style" --out apple.png`
    """
    import torch
    from PIL import Image

    from genpipe.data.image_batches import to_uint8
    from genpipe.evaluation.grids import hwc, labeled_grid
    from genpipe.generation.systems import load_system
    from genpipe.training.stream import seeded

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_system(_system(source, system), device=device)
    captions, conditions = _conditions(loaded, prompts or [], labels or [], each=each)
    with torch.no_grad():
        pictures = hwc(to_uint8(loaded.sample(conditions, generator=seeded(device, seed, *captions))))
    rows = [pictures[i : i + each] for i in range(0, len(pictures), each)]
    picture = labeled_grid(rows, captions=captions, columns=[""] * each, cell=loaded.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(out)
    console.out.print(f"wrote {out}", highlight=False)


def _conditions(
    system: System, prompts: Sequence[str], labels: Sequence[str], *, each: int
) -> tuple[list[str], Conditions]:
    """The captions of the rows, and what the system is told of all pictures.

    Raises ConfigError for what the system is not conditioned on, and for what it must be told and is not.
    """
    from genpipe.generation.conditions import Conditions

    given = {"text": ("PROMPT", len(prompts)), "label": ("--label", len(labels))}
    for condition, (option, count) in given.items():
        if count and condition not in system.conditioned_on:
            known = " and ".join(sorted(system.conditioned_on)) or "nothing"
            raise ConfigError(f"{option}: the system is conditioned on {known}; leave it out")
        if not count and condition in system.conditioned_on:
            raise ConfigError(f"{option}: required, as the system is conditioned on {condition}; say what to draw")
    if system.conditioned_on == {"text", "label"} and len(prompts) != len(labels):
        raise ConfigError(f"--label: the system takes one for each prompt, not {len(labels)} for {len(prompts)}")
    numbers = [_class(system, label) for label in labels]
    rows = list(prompts) or [system.classes[number] for number in numbers] or [""]
    texts = [prompt for prompt in prompts for _ in range(each)]
    repeated = [number for number in numbers for _ in range(each)]
    return rows, Conditions(len(rows) * each, texts=texts or None, labels=repeated or None)


def _class(system: System, label: str) -> int:
    """The place of a class, given by name or place. Raises ConfigError."""
    if label in system.classes:
        return system.classes.index(label)
    if label.isdecimal() and int(label) < len(system.classes):
        return int(label)
    few = ", ".join(system.classes[:10]) + (", ..." if len(system.classes) > 10 else "")
    raise ConfigError(f"--label {label!r}: the system has no such class; it has {few}, numbered from 0")


def _system(source: str, name: str) -> Artifact:
    """The committed system that a pipeline's file or a URI stands for. Raises ConfigError."""
    from genpipe.artifacts import read_manifest
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan as plan_pipeline

    if not source.endswith((".yaml", ".yml")):
        manifest = read_manifest(source)
        if manifest is None or manifest.artifact.kind != "system":
            raise ConfigError(f"{source}: neither a pipeline's YAML file nor the folder of a system")
        return manifest.artifact
    pipeline = load_pipeline(source)
    systems = [instance.name for instance in pipeline.instances.values() if instance.makes == "system"]
    if name and name not in systems:
        raise ConfigError(f"--system {name}: {source} has no such system; it has {', '.join(systems) or 'none'}")
    if not name and len(systems) != 1:
        raise ConfigError(f"{source}: has {len(systems)} systems ({', '.join(systems)}); name one with --system")
    name = name or systems[0]
    try:
        planned = plan_pipeline(pipeline, only=[name])[-1]
    except ConfigError as error:  # the data may be elsewhere by now, and the system does not need them
        found = _made_without_data(pipeline, name)
        if found is None:
            raise ConfigError(f"{error}; nor is there a system of these settings in {pipeline.cfg.store}") from error
        return found
    if planned.status != "cached":
        raise ConfigError(f"{source}: {name} is not made yet ({planned.why}); `genpipe run {source}` makes it")
    return planned.artifact


def _made_without_data(pipeline: Pipeline, name: str) -> Artifact | None:
    """The newest committed system of these settings, whatever data it was trained on."""
    from genpipe.artifacts import ManifestError, read_manifest
    from genpipe.storage import join, open_storage

    folder = join(pipeline.cfg.store, "artifacts", "system")
    found: list[Manifest] = []
    for artifact in open_storage(folder).folders():
        try:
            manifest = read_manifest(join(folder, artifact))
        except ManifestError:
            continue
        if manifest is not None and _is_of(manifest, pipeline, name):
            found.append(manifest)
    return max(found, key=lambda manifest: manifest.created).artifact if found else None


def _is_of(manifest: Manifest, pipeline: Pipeline, name: str) -> bool:
    """Whether an artifact is one of this instance but for the content of the data: by settings, and so its inputs."""
    from genpipe.artifacts import read_manifest
    from genpipe.pipeline.graph import is_uri

    instance = pipeline.instances[name]
    identity = manifest.identity
    settings = changed(instance.cfg, without=UNFINGERPRINTED)
    if (identity["stage"], identity["version"], identity["settings"]) != (
        instance.kind, instance.stage.VERSION, settings,
    ):  # fmt: skip
        return False
    references = {
        f"{role}.{i}" if instance.roles[role].several else role: reference
        for role, several in instance.inputs.items()
        for i, reference in enumerate(several)
    }
    if references.keys() != manifest.inputs.keys():
        return False
    for role, reference in references.items():
        if is_uri(reference):
            continue
        made_from = read_manifest(manifest.inputs[role].uri, check_files=False)
        if made_from is not None and not _is_of(made_from, pipeline, reference):  # shards may be gone as well
            return False
    return True
