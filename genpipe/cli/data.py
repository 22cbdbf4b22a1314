"""`genpipe data ...`: inspect and verify shards, and remove samples from them."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from genpipe.cli import console
from genpipe.config import ConfigError

if TYPE_CHECKING:
    from genpipe.artifacts import Artifact
    from genpipe.data.takedown import Removal

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Inspect and verify shards, and remove samples from them.

SOURCE is a pipeline's YAML file, or the URI of an artifact: its shards are meant, also where it was made from some.
""",
)

TOLD = 20
"""Keys of a list that are named where they are not in the shards: one list may serve many datasets."""

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="a pipeline's YAML file, or an artifact's URI")]


@app.command()
def rejects(
    source: Source,
    reason: Annotated[str, typer.Option(help="only these, e.g. truncated")] = "",
    limit: Annotated[int, typer.Option(min=0, help="rows to print at most")] = 50,
    as_csv: Annotated[bool, typer.Option("--csv", help="every row as CSV, and nothing else")] = False,
) -> None:
    """Print the reject ledger: how many samples were left out of the shards, which, why, and what to do about it.

    Example: `genpipe data rejects configs/pipeline/demo.yaml --reason truncated --csv > truncated.csv`
    """
    from genpipe.data.reasons import remedy
    from genpipe.data.takedown import read_ledger

    ledger = read_ledger(_shards(source).uri)
    counts = Counter(reject.reason for reject in ledger)
    rows = [reject for reject in ledger if reason in ("", reject.reason)]
    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(("key", "source", "reason", "detail"))
        writer.writerows((reject.key, reject.source, reject.reason, reject.detail) for reject in rows)
        return
    if reason and reason not in counts:
        known = f"; there are {', '.join(sorted(counts))}" if counts else ""
        raise ConfigError(f"--reason {reason!r}: no sample was rejected for it{known}")
    console.table(("reason", "samples", "what to do"), [(why, n, remedy(why)) for why, n in counts.most_common()])
    if rows[:limit]:
        _say("")
        told = [(r.reason, *map(escape, (r.key, r.source, r.detail))) for r in rows[:limit]]
        console.table(("reason", "key", "source", "detail"), told)
    if len(rows) > limit:
        _say(f"... and {len(rows) - limit} more; --limit shows more, --csv all")


@app.command()
def show(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="the PNG to write")] = Path("sheet.png"),
    split: Annotated[Literal["train", "combinations", "heldout"], typer.Option(help="which samples")] = "train",
    count: Annotated[int, typer.Option("--n", min=1, max=1000, help="pictures")] = 64,
    seed: Annotated[int, typer.Option(help="other seeds show other samples")] = 0,
    font: Annotated[str, typer.Option(help="a font file (.ttf, .otf, .ttc) that has the captions' letters")] = "",
) -> None:
    """Draw a contact sheet of samples as they are stored, taken at random, with their first captions."""
    import numpy as np

    from genpipe.data.images import ImageError, decode
    from genpipe.data.order import order
    from genpipe.data.shard_dataset import open_shards
    from genpipe.data.sheets import contact_sheet

    cell = 160
    dataset = open_shards(_shards(source), split=split)
    chosen = order(np.arange(min(count, len(dataset))), n=len(dataset), seed=seed).tolist()
    pictures, captions = [], []
    for i in chosen:
        try:
            pictures.append(decode(dataset.image_bytes(i), least=cell))
            captions.append(dataset.captions(i)[0])
        except ImageError as error:
            console.problem(f"{dataset.key(i)} cannot be shown: {error}")
    if not pictures:
        raise ConfigError(f"{source}: all samples chosen are damaged; choose others with --n or --seed")
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = min(8, len(pictures))
    out.write_bytes(contact_sheet(pictures, columns=columns, cell=cell, captions=captions, font=font))
    _say(f"wrote {out}: {len(pictures)} of {len(dataset)} {split} samples")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="as above; of any artifact its own files")],
) -> None:
    """Rehash every file of an artifact and look for added ones; check every shard's index against its tar.

    Prints what is wrong and exits 1, or confirms that everything is as committed.
    """
    from genpipe.artifacts import added_files, damaged_files, read_manifest
    from genpipe.data.takedown import check_shards

    uri = _shards(source).uri if _is_config(source) else source
    faults = list(damaged_files(uri))
    manifest = read_manifest(uri, check_files=False)
    assert manifest is not None, "damaged_files found it"
    faults += added_files(manifest, uri)
    if manifest.artifact.kind in ("shards", "samples"):
        faults += check_shards(uri)
    for fault in faults:
        console.problem(fault)
    if faults:
        remedy = "restore those files from a copy and delete what was added, or delete"
        _say(f"{len(faults)} faults; {remedy} {uri} and run the pipeline again")
        raise typer.Exit(1)
    _say(f"{uri}: {len(manifest.files)} files are as committed")


@app.command()
def remove(
    source: Source,
    keys: Annotated[str, typer.Option("--keys", metavar="FILE", help="a key, or a stored image's sha256, per line")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    delete_old: Annotated[bool, typer.Option("--delete-old", help="then delete the shards that hold them")] = False,
) -> None:
    """Remove samples from shards: rewrite the shards without a byte of them, and list what was trained on them.

    An artifact never changes, so the new shards are a new artifact, beside the old one. Trained models keep what they
    have learned: what was made from the old shards is listed, to be trained again or deleted.
    """
    from genpipe.artifacts import MANIFEST
    from genpipe.data.filters import read_list
    from genpipe.data.takedown import plan_removal
    from genpipe.data.takedown import remove as remove_samples
    from genpipe.storage import open_storage

    wanted = read_list(keys, setting="--keys")
    if not wanted:
        raise ConfigError(f"--keys {keys}: holds no keys")
    removal = plan_removal(_shards(source).uri, wanted)
    _tell_plan(removal)
    if delete_old:
        _say(f"then {removal.uri} is deleted")
    if not yes:
        typer.confirm("go on?", abort=True)
    artifact = remove_samples(removal)
    _say(f"committed {artifact.uri}")
    if delete_old:
        storage = open_storage(removal.uri)
        storage.delete(MANIFEST)
        storage.delete_all()
    _tell_what_next(removal, artifact, keys, deleted=delete_old)


def _say(text: str) -> None:
    console.out.print(text, highlight=False, markup=False, soft_wrap=True)


def _tell_plan(removal: Removal) -> None:
    from genpipe.data.takedown import affected

    _say(f"{removal.uri}: {len(removal.samples)} samples leave, {len(removal.rewritten)} shards are rewritten")
    for value in removal.unknown[:TOLD]:
        _say(f"not there: {value}")
    if len(removal.unknown) > TOLD:
        _say(f"... and {len(removal.unknown) - TOLD} more of the list are not there")
    try:
        found = affected(removal)
    except ValueError as error:
        _say(str(error))
        return
    if found.made_from:
        _say("made from these shards, directly or through others:")
        console.table(("kind", "artifact"), [(artifact.kind, artifact.uri) for artifact in found.made_from])
        if any(artifact.kind == "release" for artifact in found.made_from):
            _say("releases may have been copied and registered: withdraw the copies, and versions of models, as well")
    else:
        _say("nothing in its store was made from these shards")
    if found.also_holding:
        _say("other shards with samples of these keys, to be treated in the same way:")
        console.table(("samples", "artifact"), [(count, artifact.uri) for artifact, count in found.also_holding])
    for fault in found.unreadable:
        _say(f"could not be looked at: {fault}")


def _tell_what_next(removal: Removal, artifact: Artifact, keys: str, *, deleted: bool) -> None:
    from genpipe.artifacts import cache_folder

    copies = cache_folder(removal.manifest.artifact)
    steps = [
        f"train on the new shards: genpipe run CONFIG stages.NAME.inputs.shard={artifact.uri}",
        f"keep the samples out when shards are made again: stages.shard.filters.blocklist={keys}",
        "delete what was made from the old shards, above all feature caches, and make it again",
        f"delete copies of the old shards on machines that read them from S3: {copies}*",
    ]
    if removal.manifest.run_id:
        steps.append(f"delete preview.png, which may show them, from MLflow run {removal.manifest.run_id}")
    if not deleted:
        steps.insert(0, f"delete the old shards, which still hold the samples: {removal.uri}")
    _say("what is left to do:")
    for step in steps:
        _say(f"- {step}")


def _is_config(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def _shards(source: str) -> Artifact:
    """The shards that a pipeline's file or an artifact's URI stands for. Raises ConfigError if there are none."""
    from genpipe.artifacts import read_manifest
    from genpipe.pipeline.graph import load_pipeline
    from genpipe.pipeline.plan import plan as plan_pipeline

    if _is_config(source):
        pipeline = load_pipeline(source)
        made = [name for name, instance in pipeline.instances.items() if instance.makes == "shards"]
        if len(made) != 1:
            raise ConfigError(f"{source}: makes {len(made)} artifacts of shards, not one; name it by its URI")
        planned = plan_pipeline(pipeline, only=made)[-1]
        if planned.status != "cached":
            raise ConfigError(f"{source}: its shards are not made yet; `genpipe stage {made[0]} {source}` makes them")
        return planned.artifact
    behind, gone = [source], []
    for uri in behind:
        manifest = read_manifest(uri)
        if manifest is None:
            gone.append(uri)
            continue
        if manifest.artifact.kind in ("shards", "samples"):
            return manifest.artifact.model_copy(update={"uri": uri})
        behind += [made_from.uri for made_from in manifest.inputs.values() if made_from.uri not in behind]
    if source in gone:
        raise ConfigError(f"{source}: nothing is committed there (no manifest.json)")
    if gone:
        raise ConfigError(f"{source}: what it was made from is not there any more: {', '.join(gone)}")
    raise ConfigError(f"{source}: this artifact was not made from shards")
