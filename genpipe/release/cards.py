"""The model card and the data card of a release, written from manifests: nothing in them is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from genpipe import __version__
from genpipe.artifacts import Artifact, Manifest
from genpipe.config import flatten
from genpipe.generation.released import PARTS
from genpipe.generation.speed import SPEED
from genpipe.release.record import GRID_FILE, Grid, Machine
from genpipe.release.samples_page import SAMPLES_FILE
from genpipe.release.scores import COPIED, MEMORIZED, intervals, missed_gates, shares
from genpipe.stage_config import Observe
from genpipe.weights import count_parameters

MODEL_CARD, DATA_CARD = "MODEL_CARD.md", "DATA_CARD.md"
NOTHING: tuple[Any, ...] = (None, "", False, 0, [], {})
"""Settings that say nothing, and are not shown."""

SHORT = 12
"""Digits of a fingerprint that a person is shown."""


@dataclass(frozen=True)
class Statements:
    """What only people know of a release; empty where nothing was said."""

    name: str
    license: str
    intended_use: str
    limits: str
    data_licenses: Mapping[str, str]


@dataclass(frozen=True)
class Known:
    """What the manifests say: of the system, of its scores, and of all that the system was made from.

    `samples` are those that were measured, as far as they are there.
    """

    system: Manifest
    scores: Sequence[Manifest]
    behind: Sequence[Manifest]
    gone: Sequence[Artifact]
    samples: Sequence[Manifest] = ()


def model_card(
    said: Statements, known: Known, *, grid: Grid, machine: Machine, elsewhere: Mapping[str, str], folder: Path
) -> str:
    """The model card, as Markdown. `elsewhere` says of each part where other libraries find it, or why they do not."""
    meta = known.system.artifact.meta
    told = " and a ".join({"text": "text", "label": "class label"}[name] for name in meta["conditioned_on"])
    sections = {
        f"# {said.name}": f"A system of kind {meta['kind']} that draws pictures of {meta['size']} x {meta['size']} "
        f"pixels{f' of a {told}' if told else ''}, made with genpipe {__version__}. What it was trained on: "
        f"[{DATA_CARD}]({DATA_CARD}).",
        "## Use": _use(meta),
        "## Intended use": said.intended_use or "Nothing was stated.",
        "## Limits": said.limits or "Nothing was stated.",
        "## License": said.license or "None was stated.",
        "## Metrics": _metrics(known.scores),
        "## Gates": _gates(known.scores),
        "## Memorization": _memorization(known.scores),
        "## Speed": _speed(known.samples),
        "## Parts": _parts(known, folder),
        "## Samplers": _fenced(known.system.config["model"]),
        "## In other libraries": _table(("part", "where"), elsewhere.items()) if elsewhere else "Nothing was written.",
        "## Grid": _grid(grid, machine, samples=(folder / SAMPLES_FILE).exists()),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"


def data_card(said: Statements, known: Known) -> str:
    """The data card, as Markdown: a section for each set of shards that the system was trained on."""
    shards = [manifest for manifest in known.behind if manifest.artifact.kind in ("shards", "samples")]
    sections = [f"# Data of {said.name}", *(_shards(manifest, said.data_licenses) for manifest in shards)]
    gone = [f"- {artifact.kind} `{artifact.fingerprint[:SHORT]}`" for artifact in known.gone]
    if gone:
        sections.append(
            "\n".join(["## Not there any more", "", "Of these nothing is known but their names:", "", *gone])
        )
    sections.append("\n\n".join(["## Weights from elsewhere", _initial(known.behind)]))
    return "\n\n".join(sections) + "\n"


def _use(meta: Mapping[str, Any]) -> str:
    asked = {"text": '["a prompt"]', "label": f"labels=[{(meta.get('classes') or ['0'])[0]!r}]"}
    arguments = ", ".join(asked[name] for name in meta["conditioned_on"])
    return "\n".join(
        [
            "```python",
            "import genpipe",
            "",
            'system = genpipe.load("this folder")',
            f"[picture] = system.sample({arguments})",
            "```",
            "",
            "`genpipe verify FOLDER` says whether a copy is what was made.",
        ]
    )


def _metrics(scores: Sequence[Manifest]) -> str:
    rows = []
    for manifest in scores:
        ends_of = _ends(manifest.metrics)
        given = {name: tuple(manifest.metrics[end] for end in ends) for name, ends in ends_of.items()}
        hidden = {end for ends in ends_of.values() for end in ends}
        between = {**intervals(manifest), **given}
        for name, value in sorted(manifest.metrics.items()):
            if name not in hidden:
                rows.append((f"`{name}`", f"{value:.4g}", " to ".join(f"{end:.4g}" for end in between.get(name, ()))))
    return _table(("metric", "value", "95 % interval"), rows) if rows else "No scores were given to this release."


def _ends(metrics: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """The names of the ends of intervals that metrics give: `kid_low_1000` and `kid_high_1000` of `kid_1000`."""
    found = {low.replace("_low", ""): (low, low.replace("_low", "_high")) for low in metrics if "_low" in low}
    return {name: ends for name, ends in found.items() if name in metrics and ends[1] in metrics}


def _gates(scores: Sequence[Manifest]) -> str:
    rows = []
    for manifest in scores:
        for name, gate in Observe.model_validate({"gates": manifest.config["observe"]["gates"]}).gates.items():
            bounds = [f"at least {gate.min:g}"] if gate.min is not None else []
            bounds += [f"at most {gate.max:g}"] if gate.max is not None else []
            passed = "no" if gate.missed(name, manifest.metrics) else "yes"
            rows.append((f"`{name}`", " and ".join(bounds), f"{manifest.metrics.get(name, math.nan):.4g}", passed))
    assert not missed_gates(scores), "such a release is refused"
    return _table(("metric", "gate", "value", "passed"), rows) if rows else "None were set."


def _memorization(scores: Sequence[Manifest]) -> str:
    told = {
        MEMORIZED: "Pictures that lie as near to a training picture as hardly any held-out picture does:",
        COPIED: "Pictures that are nearer to training pictures than new ones would be, by estimate:",
    }
    found = {text: shares(scores, kind) for kind, text in told.items()}
    paragraphs = [
        "\n".join([text, "", *(f"- `{name}`: {100 * share:.3g} % of the pictures" for name, share in of.items())])
        for text, of in found.items()
        if of
    ]
    return "\n\n".join(paragraphs) or (
        "It was not measured: how many of its pictures are copies of training pictures is not known."
    )


def _speed(samples: Sequence[Manifest]) -> str:
    """What drawing the pictures cost that were measured, and on what."""
    told = []
    for manifest in samples:
        rows = [(f"`{name}`", f"{value:,.4g}") for name, value in manifest.metrics.items() if name.startswith(SPEED)]
        if rows:  # of samples that an earlier genpipe drew nothing is known
            where = f"{manifest.environment['hardware']}, products in {manifest.environment['precision_used']}"
            told += [f"{where}, {manifest.config['batch_size']} pictures at a time:", _table(("metric", "value"), rows)]
    return "\n\n".join(told) or "It was not measured."


def _parts(known: Known, folder: Path) -> str:
    by_fingerprint = {manifest.artifact.fingerprint: manifest for manifest in known.behind}
    rows = []
    for role, artifact in known.system.inputs.items():
        manifest = by_fingerprint[artifact.fingerprint]
        train = manifest.config.get("train", {})
        seen = f"{train['samples']:,}" if train else ""
        revision = manifest.environment.get("git_revision", "")[:SHORT]
        count = f"{count_parameters(folder / PARTS / role):,}"
        rows.append(
            (f"`{PARTS}/{role}`", manifest.identity["stage"], count, seen, revision, artifact.fingerprint[:SHORT])
        )
    return _table(("part", "made by", "parameters", "samples, at most", "revision", "fingerprint"), rows)


def _grid(grid: Grid, machine: Machine, *, samples: bool) -> str:
    rows = [f"1. {prompt.text or 'nothing'}" for prompt in grid.prompts]
    drawn = (
        f"Seed {grid.seed}, {grid.each} pictures a row, products in {grid.precision}, {grid.threads} threads, torch "
        f"{machine.torch}, {machine.hardware}. The rows:"
    )
    more = ["", f"More pictures, and what metrics say of each: [{SAMPLES_FILE}]({SAMPLES_FILE})"] if samples else []
    return "\n".join([f"![The grid]({GRID_FILE})", "", drawn, "", *rows, *more])


def _shards(manifest: Manifest, licenses: Mapping[str, str]) -> str:
    meta = manifest.artifact.meta
    samples, rejected = meta["samples"], meta["rejected"]
    rejects = [(f"`{reason}`", f"{count:,}") for reason, count in rejected.items()]
    facts = [
        ("made", manifest.created),
        ("fingerprint", manifest.artifact.fingerprint[:SHORT]),
        *((f"{split} samples", f"{count:,}") for split, count in samples.items()),
        ("stored size", f"{meta['image_size']} pixels"),
        ("classes", ", ".join(meta.get("classes", ())) or "none"),
        ("takedowns behind it", str(len(meta.get("removed_from", ())))),
    ]
    settings = _settings(manifest.config.get("source", {}))
    filters = _settings(manifest.config.get("filters", {}))
    return "\n\n".join(
        [
            f"## {manifest.artifact.kind.capitalize()} {manifest.artifact.fingerprint[:SHORT]}",
            _table(("", ""), facts),
            "### Source",
            _table(("setting", "value"), settings),
            "### Licenses",
            _table(("source", "license"), licenses.items()) if licenses else "None were stated.",
            "### Filters",
            _table(("setting", "value"), filters) if filters else "None.",
            "### Rejects",
            _table(("reason", "samples"), rejects) if rejects else "None.",
        ]
    )


def _settings(block: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{key}`", _public(value)) for key, value in flatten(block).items() if value not in NOTHING]


def _initial(behind: Iterable[Manifest]) -> str:
    """Published weights and other files with digests that training began with."""
    rows = []
    for manifest in behind:
        for key, value in flatten(manifest.config).items():
            if key.endswith(("initial.weights", "model.folder", "tokenizer.vocabulary")) and value:
                rows.append((manifest.identity["stage"], f"`{key}`", _public(value)))
    return _table(("stage", "setting", "file"), rows) if rows else "None: every part began with random weights."


def _public(value: Any) -> str:
    """A setting without what is nobody's business: folders of the machine it came from, credentials in URLs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_public(inner)}" for key, inner in value.items() if inner not in NOTHING)
    if isinstance(value, list | tuple):
        return "; ".join(map(_public, value))
    if not isinstance(value, str):
        return str(value)
    if "://" in value:
        url = urlsplit(value)
        return f"{url.scheme}://{url.hostname or ''}{url.path}"
    return f".../{Path(value).name}" if Path(value).is_absolute() else value


def _fenced(value: Mapping[str, Any]) -> str:
    lines = [f"{key}: {inner}" for key, inner in flatten(value).items() if inner is not None]
    return "\n".join(["```yaml", *lines, "```"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [list(columns), ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
