"""Measure generated pictures against a reference, with any number of metrics (`genpipe.evaluation.metrics`).

It knows neither how the pictures came to be nor any other stage: it takes what its metrics ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, StringConstraints, field_validator

from genpipe.artifacts import Artifact, Role, fetch, read_manifest
from genpipe.data.loader import sample_batches
from genpipe.evaluation.metrics import MetricConfig
from genpipe.evaluation.metrics.metric import Evaluation, Measure, Metric
from genpipe.models.precision import autocast, products_of
from genpipe.stage_config import StageConfig
from genpipe.stages import is_training, load_stage
from genpipe.storage import Storage, join, open_storage
from genpipe.training.stream import seeded, to_device
from genpipe.weights import load_weights

VERSION = 2
MAKES = "scores"
HEADLINES = ("train/recall_at_10", "heldout/recall_at_10", "reconstruction/psnr")

Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]+$")]


class Config(StageConfig):
    """What to measure.

    A metric's `kind` is its name unless it is given. Under a name of its own, its numbers and files have that name
    before theirs: `frechet` gives `train/fid_1000`, `{coco: {kind: frechet, ...}}` gives `coco/train/fid_1000`.
    """

    metrics: dict[Name, MetricConfig] = Field(min_length=1, description="by name; the kind is the name by default")
    part_size: int = Field(1024, ge=1, description="pictures that one worker measures at a time")
    batch_size: int = Field(32, ge=1, description="pictures of one forward pass")

    @field_validator("metrics", mode="before")
    @classmethod
    def _kinds(cls, metrics: Any) -> Any:
        """With the kind of each, which is its name by default."""
        if not isinstance(metrics, Mapping):
            return metrics
        return {
            name: {"kind": name, **(values or {})} if values is None or isinstance(values, Mapping) else values
            for name, values in metrics.items()
        }


def roles(cfg: Config) -> dict[str, Role]:
    """What the metrics ask for."""
    return {role: takes for _, metric in _metrics(cfg) for role, takes in metric.roles().items()}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Nothing is promised. Raises ValueError for inputs that do not fit a metric, or a gate that none gives."""
    known: list[str] = []
    for name, metric in _metrics(cfg):
        taken = _taken(metric, inputs)
        metric.check_inputs(taken)
        known += [_prefix(name, metric) + pattern for pattern in metric.names(taken)]
    for gate in cfg.observe.gates:
        if not any(fnmatchcase(gate, pattern) for pattern in known):
            near = get_close_matches(gate, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"they give {', '.join(known) or 'none'}"
            raise ValueError(f"observe.gates: the metrics give no number {gate!r}; {remedy}")
    return {}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The parts of every metric, each after the metric's name."""
    return [
        f"{name} {part}" for name, metric in _metrics(cfg) for part in metric.parts(_evaluation(cfg, metric, inputs))
    ]


class Worker:
    """Measures parts; what a metric takes is loaded at the first part of it."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.measures: dict[str, Measure] = {}

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Measure a part: which metric's it is, and what was found."""
        name, _, rest = part.partition(" ")
        metric: Metric = self.cfg.metrics[name]
        if name not in self.measures:
            self.measures[name] = metric.measure(_evaluation(self.cfg, metric, self.inputs))
        folder = out / _prefix(name, metric)
        folder.mkdir(exist_ok=True)
        return {"metric": name, "found": self.measures[name](rest, folder)}


def merge_parts(cfg: Config, made: Storage, results: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The numbers of all metrics, as a single result."""
    numbers: dict[str, float] = {}
    for name, metric in _metrics(cfg):
        prefix = _prefix(name, metric)
        partials = [result["found"] for result in results if result["metric"] == name]
        found = metric.merge(partials, open_storage(join(made.uri, prefix)) if prefix else made)
        numbers |= {prefix + number: value for number, value in found.items()}
    return [numbers]


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The numbers are its metrics."""
    [numbers] = results
    return {}, numbers


def validate(artifact: Artifact, device: torch.device) -> dict[str, float]:
    """The held-out validation of the stage that made an artifact, once more, with the weights as they were committed.

    Raises ValueError if no training stage made it.
    """
    manifest = read_manifest(artifact.uri)
    assert manifest is not None, "inputs are committed"
    stage = load_stage(manifest.identity["stage"])
    if not is_training(stage):
        raise ValueError(
            f"{artifact.uri}: was made by {manifest.identity['stage']}, which trains nothing; leave it out"
        )
    cfg = stage.Config.model_validate(manifest.config)
    objective = stage.objective(cfg, manifest.inputs, device)
    trained = objective.trainable[artifact.kind]
    trained.load_state_dict(load_weights(fetch(artifact), kind=artifact.kind, device=device).module.state_dict())
    trained.eval()
    batches = sample_batches(
        stage.data(cfg, manifest.inputs).heldout,
        count=cfg.observe.heldout_samples,
        batch_size=cfg.train.validation_batch,
        weights=cfg.train.source_weights,
    )
    with torch.no_grad(), autocast(device, products_of(cfg.train.precision, device)):
        moved = (to_device(batch, device) for batch in batches)
        found: dict[str, float] = objective.validate(moved, seeded(device, cfg.train.seed, "validate")).metrics
    return found


def _metrics(cfg: Config) -> Iterator[tuple[str, Metric]]:
    yield from cfg.metrics.items()


def _prefix(name: str, metric: Metric) -> str:
    """What stands before the numbers and the files of a metric."""
    return "" if name == metric.kind else f"{name}/"


def _taken(metric: Metric, inputs: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Those of the inputs that a metric asks for."""
    return {role: artifact for role, artifact in inputs.items() if role.partition(".")[0] in metric.roles()}


def _evaluation(cfg: Config, metric: Metric, inputs: Mapping[str, Artifact]) -> Evaluation:
    return Evaluation(
        inputs=_taken(metric, inputs),
        part_size=cfg.part_size,
        batch_size=cfg.batch_size,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        validate=validate,
    )
