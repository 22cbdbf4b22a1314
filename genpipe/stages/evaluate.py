"""Measure generated pictures against a reference, with any number of metrics (`genpipe.evaluation.metrics`).

It knows neither how the pictures came to be nor any other stage: it takes what its metrics ask for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field, StringConstraints, field_validator

from genpipe.artifacts import Artifact, Role, fetch, find, read_manifest
from genpipe.data.loader import sample_batches
from genpipe.data.shards import Split
from genpipe.diffusion.process import SamplerConfig, denoiser
from genpipe.diffusion.samplers import Denoise
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.comparison import (
    SCORES,
    baseline_values,
    check_same_pictures,
    interval,
    is_scores,
    judge,
)
from genpipe.evaluation.metrics import MetricConfig
from genpipe.evaluation.metrics.features import FeatureMetric, Features, FeatureSet, FeatureWorker, parts_of_sets
from genpipe.evaluation.metrics.metric import Evaluation, Measure, Metric, PixelModel
from genpipe.evaluation.per_sample import PerSample, values_of
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import bound
from genpipe.generation.systems import load_system
from genpipe.lineage import content_digest
from genpipe.models.precision import autocast, products_of
from genpipe.stage_config import StageConfig
from genpipe.stages import is_training, load_stage
from genpipe.storage import Storage, join, open_storage
from genpipe.training.stream import seeded, to_device
from genpipe.weights import load_weights

VERSION = 5
MAKES = "scores"
HEADLINES = (
    "train/recall_at_10",
    "combinations/recall_at_10",
    "heldout/recall_at_10",
    "train/self_recall_at_10",
    "combinations/self_recall_at_10",
    "heldout/self_recall_at_10",
    "train/nearest_real",
    "combinations/nearest_real",
    "heldout/nearest_real",
    "reconstruction/psnr",
)

SHARED = "features:"
"""Stands before the parts that belong to no single metric; no name of one has a colon."""

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
    _check_baselines(cfg, inputs)
    return {}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """Those of the features that metrics share, then those of every other metric, each after the metric's name."""
    found: list[str] = []
    for name, metric in _metrics(cfg):
        of = _evaluation(cfg, _taken(metric, inputs))
        if isinstance(metric, FeatureMetric):
            metric.check(of)
        else:
            found += [f"{name} {part}" for part in metric.parts(of)]
    return [*(f"{SHARED} {part}" for part in parts_of_sets(_sets(cfg), _evaluation(cfg, inputs))), *found]


class Worker:
    """Measures parts; what a metric takes is loaded at the first part of it.

    Metrics that have parts of their own are called with one at a time.
    """

    parts_at_once = 3

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.measures: dict[str, Measure] = {}
        self.features = FeatureWorker((network for network, _ in _sets(cfg)), _evaluation(cfg, inputs))

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Measure a part: which metric's it is, and what was found."""
        name, _, rest = part.partition(" ")
        if name == SHARED:
            return {"metric": name, "found": self.features(rest, out)}
        metric = self.cfg.metrics[name]
        assert not isinstance(metric, FeatureMetric), "it has no parts of its own"
        folder = out / _prefix(name, metric)
        folder.mkdir(exist_ok=True)
        with self.features.turn:
            if name not in self.measures:
                self.measures[name] = metric.measure(_evaluation(self.cfg, _taken(metric, self.inputs)))
            return {"metric": name, "found": self.measures[name](rest, folder)}


def merge_parts(
    cfg: Config, inputs: Mapping[str, Artifact], made: Storage, results: list[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """The numbers of all metrics, and the protocol of the features, as a single result."""
    numbers: dict[str, float] = {}
    by_name = {name: [r["found"] for r in results if r["metric"] == name] for name in (SHARED, *cfg.metrics)}
    features = Features(made, by_name[SHARED])
    for name, metric in _metrics(cfg):
        prefix = _prefix(name, metric)
        if isinstance(metric, FeatureMetric):
            (out / prefix).mkdir(exist_ok=True)
            found = metric.score(features, _evaluation(cfg, _taken(metric, inputs)), out / prefix)
        else:
            found = metric.merge(by_name[name], open_storage(join(made.uri, prefix)) if prefix else made)
        numbers |= {prefix + number: value for number, value in found.items()}
    (out / SCORES).write_text(json.dumps(_scores(cfg, numbers, made, out), indent=1, sort_keys=True))
    return [{"numbers": numbers, "protocol": _protocol(cfg, inputs, features)}]


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The numbers are its metrics; where networks' features were compared, `protocol` says how."""
    [merged] = results
    return {"protocol": merged["protocol"]} if merged["protocol"] else {}, merged["numbers"]


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


def pixel_model(artifact: Artifact, device: torch.device) -> PixelModel:
    """What a system of pixels draws with, before its upsamplers and without guidance."""
    system = load_system(artifact, device=device)
    asked = system.conditioned_on

    def told(texts: Sequence[str], labels: Sequence[int]) -> Denoise:
        count = len(texts)
        conditions = Conditions(
            count, texts=texts if "text" in asked else None, labels=labels if "label" in asked else None
        )
        given = system.given(conditions, generator=torch.Generator(device))
        unguided = bound(system, given, count=count, sampler=SamplerConfig())
        return denoiser(unguided, system.decoder_diffusion)

    return PixelModel(system.base_size, system.decoder_diffusion, told)


def _scores(cfg: Config, numbers: Mapping[str, float], made: Storage, out: Path) -> dict[str, Any]:
    """What `SCORES` says."""
    own = open_storage(str(out))
    places = {entry.key: storage for storage in (made, own) for entry in storage.list()}
    values = values_of((storage, key) for key, storage in places.items())
    intervals = {name: asdict(interval(of)) for name, of in values.items()}
    judged = judge(values, {name: gate for name, gate in cfg.observe.gates.items() if is_scores(gate.not_worse_than)})
    return {
        "numbers": {name: {"value": value, **intervals.get(name, {})} for name, value in numbers.items()},
        "against": {name: of.as_json(name) for name, of in judged.items()},
    }


def _check_baselines(cfg: Config, inputs: Mapping[str, Artifact]) -> None:
    """Raise ValueError where a number cannot be held against a baseline, or not against this one.

    A baseline that has not been looked up yet, such as a registered model, is not asked for anything.
    """
    kept = _per_sample(cfg)
    for name, gate in cfg.observe.gates.items():
        if not gate.not_worse_than:
            continue
        where = f"observe.gates.{name}.not_worse_than"
        if name not in kept:
            raise ValueError(
                f"{where}: {name} is a number of whole sets, not the mean of a value of each picture, so that pictures "
                f"cannot be compared one by one; use min and max, or a gate on {', '.join(kept) or 'another metric'}"
            )
        if (split := kept[name]) and find(inputs["sample"].uri) and is_scores(gate.not_worse_than):
            of = _evaluation(cfg, inputs)
            if split in of.samples:
                keys = first_captions(of.samples[split], range(len(of.samples[split])))
                try:
                    seeds = frozenset() if of.seed is None else frozenset({of.seed})
                    check_same_pictures(keys, seeds, baseline_values(gate.not_worse_than, name))
                except ValueError as error:
                    raise ValueError(f"{where} ({gate.not_worse_than}): {error}") from None


def _per_sample(cfg: Config) -> dict[str, Split | None]:
    """The numbers that have a value of each picture, and the split of the generated ones; None: of real pictures."""
    return {
        _prefix(name, metric) + number: cast(Split, number.partition("/")[0]) if "sample" in metric.roles() else None
        for name, metric in _metrics(cfg)
        if isinstance(metric, PerSample)
        for number in metric.per_sample()
    }


def _metrics(cfg: Config) -> Iterator[tuple[str, Metric | FeatureMetric]]:
    yield from cfg.metrics.items()


def _sets(cfg: Config) -> list[FeatureSet]:
    """The features that metrics read."""
    return [of for _, metric in _metrics(cfg) if isinstance(metric, FeatureMetric) for of in metric.sets()]


def _protocol(cfg: Config, inputs: Mapping[str, Artifact], features: Features) -> dict[str, Any]:
    """What was held against what, by which networks; empty without any."""
    networks = {of.network for of in _sets(cfg)}
    if not networks:
        return {}
    content = {role: content_digest(inputs[role]) for role in ("sample", "shard") if role in inputs}
    return {"content": content, "networks": features.protocol(networks, inputs)}


def _prefix(name: str, metric: Metric | FeatureMetric) -> str:
    """What stands before the numbers and the files of a metric."""
    return "" if name == metric.kind else f"{name}/"


def _taken(metric: Metric | FeatureMetric, inputs: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Those of the inputs that a metric asks for."""
    return {role: artifact for role, artifact in inputs.items() if role.partition(".")[0] in metric.roles()}


def _evaluation(cfg: Config, inputs: Mapping[str, Artifact]) -> Evaluation:
    return Evaluation(
        inputs=inputs,
        part_size=cfg.part_size,
        batch_size=cfg.batch_size,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        validate=validate,
        pixel_model=pixel_model,
    )
