"""The pipeline as a graph of stage instances, read from a YAML file.

A key under `stages:` is an instance. `kind` names its stage (default: the key), `inputs` maps the stage's roles to
instances, URIs of committed artifacts or registered models, `matrix` makes several instances of one, and all else are
settings of the stage.
"""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from genpipe import config
from genpipe.artifacts import Role
from genpipe.config import Config, ConfigError, Location, Tree
from genpipe.pipeline.curves import KeptCurves, read_kept
from genpipe.pipeline.spec import TrackingConfig, sqlite_uri
from genpipe.stage_config import StageConfig
from genpipe.stages import load_stage
from genpipe.storage import read_file


class RayConfig(Config):
    """Which Ray cluster the jobs go to."""

    address: str = Field("", description="a dashboard URL such as http://head:8265; default: a local Ray for this run")
    runtime_env: dict[str, Any] = Field(default_factory=dict, description="Ray's runtime environment of every job")
    code: Literal["installed", "checkout"] = Field(
        "installed", description="what jobs run: the nodes' genpipe, or this one, which then travels with each job"
    )
    autoscales: bool = Field(
        False, description="nodes come when they are asked for: stages may wait for others than are there"
    )
    retries: int = Field(2, ge=0, description="times a stage is submitted again whose job was lost")


class PipelineConfig(Config):
    """A pipeline: its stages and where they run, store and record."""

    name: str = Field(description="of the pipeline: its MLflow experiment and its deployment")
    store: Location = Field(description="a folder or s3://bucket/prefix for artifacts and unfinished work")
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    curves: Location = Field(
        "", description="a file that `genpipe curves` wrote: trainings are held against its held-out curves, too"
    )
    notify: str = Field("", description="a webhook's URL that is told what came of a run; default: GENPIPE_NOTIFY")
    stages: dict[str, dict[str, Any]] = Field(
        description="by name of the instance: its `kind`, `inputs`, `matrix`, and the settings of its stage"
    )


@dataclass(frozen=True)
class Instance:
    """One stage of a pipeline: its name there, its stage, its settings, and what fills its roles.

    `inputs` maps each filled role to references: names of instances, URIs of artifacts, or `models:/NAME@ALIAS`.
    `cells` are the settings that tell an instance of a matrix from the others.
    """

    name: str
    kind: str
    stage: ModuleType
    cfg: StageConfig
    inputs: dict[str, tuple[str, ...]]
    cells: dict[str, Any] = field(default_factory=dict)

    @property
    def makes(self) -> str:
        """The kind of artifact that it makes."""
        kind: str = self.stage.MAKES
        return kind

    @property
    def roles(self) -> dict[str, Role]:
        """What its stage takes with these settings."""
        roles: dict[str, Role] = self.stage.roles(self.cfg)
        return roles

    @property
    def needs(self) -> list[str]:
        """The instances that must be done before it."""
        return [ref for refs in self.inputs.values() for ref in refs if not is_uri(ref)]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that was read and checked. `instances` are in an order that runs; `curves` are those of its file."""

    cfg: PipelineConfig
    instances: dict[str, Instance]
    source: str
    curves: dict[str, KeptCurves]

    @property
    def tracking_uri(self) -> str:
        """Where MLflow records: the configured server or database, or SQLite in the store."""
        return self.cfg.tracking.uri or sqlite_uri(Path(self.cfg.store, "mlflow.db"))

    @property
    def experiment(self) -> str:
        """The MLflow experiment of the runs."""
        return self.cfg.tracking.experiment or self.cfg.name

    def needed(self, only: Sequence[str]) -> set[str]:
        """The instances named in `only` (all, if none is) and what they need. Raises ConfigError for an unknown one."""
        wanted: set[str] = set()
        queue = list(only or self.instances)
        while queue:
            name = queue.pop()
            if name not in self.instances:
                raise ConfigError(f"{self.source}: stages: {_unknown('instance', name, self.instances)}")
            if name not in wanted:
                wanted.add(name)
                queue += self.instances[name].needs
        return wanted


def is_uri(reference: str) -> bool:
    """Whether a reference is an artifact's URI or a registered model rather than the name of an instance."""
    return "/" in reference


def load_pipeline(path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline: every instance against its stage's Config, and the graph that they make.

    `path` is a file's, or the URI of one without bases in a store, where `genpipe deploy` puts it. Raises ConfigError
    that lists every fault, each with its file, setting and remedy.
    """
    tree = _read_stored(path, overrides) if "://" in path else config.load(path, overrides)
    cfg = config.parse(PipelineConfig, tree)
    if cfg.store.startswith("s3://") and not cfg.tracking.uri:
        raise ConfigError(f"{path}: tracking.uri: required when the store is on S3; name an MLflow server")
    faults: list[str] = []
    blocks = _blocks(cfg, tree, faults)
    instances = {name: made for name, block in blocks.items() if (made := _instance(block, blocks, faults))}
    if not faults:
        for instance in instances.values():
            faults += _misfits(instance, instances, tree)
    if faults:
        raise ConfigError("\n".join(faults))
    curves = read_kept(cfg.curves) if cfg.curves else {}
    return Pipeline(cfg, _in_order(instances, path), str(path), curves)


def _read_stored(uri: str, overrides: Sequence[str]) -> Tree:
    try:
        text = read_file(uri)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{uri}: the configuration cannot be read: {error}") from None
    return config.load_text(text, overrides, source=uri)


@dataclass(frozen=True)
class _Block:
    """An instance as it is written: its settings apart from what places it in the graph."""

    name: str
    base: str
    kind: str
    inputs: Mapping[str, Any]
    cells: dict[str, Any]
    settings: Tree

    @property
    def where(self) -> str:
        return f"{self.settings.source}: stages.{self.base}"


def _blocks(cfg: PipelineConfig, tree: Tree, faults: list[str]) -> dict[str, _Block]:
    """Every instance by name, those of a matrix each for itself."""
    found: dict[str, _Block] = {}
    for base in cfg.stages:
        if not base or set(base) & set("@/.: "):
            faults.append(f"{tree.source}: stages.{base}: a name has none of the characters @ / . : and space")
            continue
        try:
            for name, cells, block in _cells(base, tree.at("stages", base)):
                found[name] = _block(name, base, cells, block)
        except ConfigError as error:
            faults.append(str(error))
    return found


def _cells(base: str, tree: Tree) -> Iterator[tuple[str, dict[str, Any], Tree]]:
    """(name, varied settings, block) of each instance that a block and its `matrix` stand for."""
    matrix = tree.values.get("matrix")
    if matrix is None:
        yield base, {}, tree
        return
    where = f"{tree.origin_of(('matrix',))}: stages.{base}.matrix"
    if not isinstance(matrix, Mapping) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise ConfigError(f"{where}: expected a mapping of settings to lists of values, such as {{train.seed: [0, 1]}}")
    rest = tree.without("matrix")
    axes = [[(path, i, value) for i, value in enumerate(values)] for path, values in matrix.items()]
    for combination in itertools.product(*axes):
        varied = rest
        for path, _, value in combination:
            varied = config.override(varied, path.split("."), value, origin=where)
        name = f"{base}@{'-'.join(str(i) for _, i, _ in combination)}"
        yield name, {path: value for path, _, value in combination}, varied


def _block(name: str, base: str, cells: dict[str, Any], tree: Tree) -> _Block:
    kind, inputs = tree.values.get("kind", base), tree.values.get("inputs") or {}
    if not isinstance(kind, str):
        raise ConfigError(f"{tree.origin_of(('kind',))}: stages.{base}.kind: expected a stage's name, got {kind!r}")
    if not isinstance(inputs, Mapping):
        raise ConfigError(
            f"{tree.origin_of(('inputs',))}: stages.{base}.inputs: expected a mapping of roles to instances or URIs"
        )
    return _Block(name, base, kind, inputs, cells, tree.without("kind", "inputs"))


def _instance(block: _Block, blocks: Mapping[str, _Block], faults: list[str]) -> Instance | None:
    """The instance of a block, or None and what is wrong with it in `faults`."""
    prefix = f"stages.{block.base}"
    try:
        stage = load_stage(block.kind)
    except ValueError as error:
        faults.append(f"{block.settings.source}: {prefix}.kind: {error}")
        return None
    try:
        cfg: StageConfig = config.parse(stage.Config, block.settings, prefix=prefix)
    except ConfigError as error:
        faults += [line for line in str(error).splitlines() if line not in faults]
        return None
    instance = Instance(block.name, block.kind, stage, cfg, {}, block.cells)
    for name in block.inputs:
        if name not in instance.roles:
            faults.append(f"{block.where}.inputs: {_unknown('role', str(name), instance.roles)}")
    for name, role in instance.roles.items():
        try:
            if references := _references(name, role, block, blocks):
                instance.inputs[name] = references
        except ConfigError as error:
            faults.append(str(error))
    return instance


def _references(name: str, role: Role, block: _Block, blocks: Mapping[str, _Block]) -> tuple[str, ...]:
    """What fills a role; empty for an optional one that nothing fills. Raises ConfigError."""
    where = f"{block.where}.inputs.{name}"
    bases = {other.base for other in blocks.values()}
    given = block.inputs.get(name, name if name in bases else None)
    if given is None:
        if role.optional:
            return ()
        kinds = " or ".join(role.kinds)
        raise ConfigError(
            f"{where}: required (an artifact of kind {kinds}), and no instance is called {name!r}; map it"
        )
    listed = given if isinstance(given, list) else [given]
    references: list[str] = []
    for reference in listed:
        if not isinstance(reference, str):
            raise ConfigError(f"{where}: expected an instance's name or an artifact's URI, got {reference!r}")
        members = [other.name for other in blocks.values() if other.base == reference]
        if is_uri(reference) or reference in blocks:
            references.append(reference)
        elif members and (role.several or len(members) == 1):
            references += members
        elif members:
            raise ConfigError(f"{where}: {reference} is a matrix of {', '.join(members)}; name one of them")
        else:
            raise ConfigError(f"{where}: {_unknown('instance', reference, blocks)}")
    if not role.several and len(references) > 1:
        raise ConfigError(f"{where}: takes one artifact, not {len(references)} ({', '.join(references)})")
    return tuple(references)


def _misfits(instance: Instance, instances: Mapping[str, Instance], tree: Tree) -> Iterator[str]:
    """A fault for each reference whose instance makes another kind of artifact than the role takes."""
    for name, references in instance.inputs.items():
        role = instance.roles[name]
        for reference in references:
            if reference in instances and not role.fits(made := instances[reference].makes):
                yield misfit(f"{tree.source}: stages.{instance.name}.inputs.{name}", role, reference, made, instances)


def misfit(where: str, role: Role, given: str, kind: str, instances: Mapping[str, Instance]) -> str:
    """What to say of an artifact whose kind does not fit a role."""
    fitting = [other.name for other in instances.values() if role.fits(other.makes)]
    remedy = f"; {', '.join(fitting)} would fit" if fitting else ""
    return f"{where}: takes an artifact of kind {' or '.join(role.kinds)}, but {given} is of kind {kind}{remedy}"


def _in_order(instances: Mapping[str, Instance], path: str) -> dict[str, Instance]:
    """The instances, each after what it needs, otherwise as written. Raises ConfigError for a cycle."""
    sorter = TopologicalSorter({name: instance.needs for name, instance in instances.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise ConfigError(f"{path}: stages: the inputs run in a cycle: {cycle}; break it") from None
    place = {name: i for i, name in enumerate(instances)}
    ordered: list[str] = []
    ready: list[tuple[int, str]] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, (place[name], name))
        ordered.append(heapq.heappop(ready)[1])
        sorter.done(ordered[-1])
    return {name: instances[name] for name in ordered}


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"no {what} {name!r}; {remedy}"
