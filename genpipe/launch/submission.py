"""What is looked at before any stage of a pipeline is submitted to a cluster: whether it could run there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from genpipe import config
from genpipe.config import ConfigError
from genpipe.launch.jobs import Cluster
from genpipe.launch.placement import check_places
from genpipe.pipeline.graph import Pipeline
from genpipe.pipeline.plan import Planned
from genpipe.stages import is_training
from genpipe.storage import local_path


def check(cluster: Cluster, pipeline: Pipeline, plans: Sequence[Planned]) -> None:
    """Raise ConfigError with a line for each fault that would have a stage of `plans` fail or wait for ever.

    The nodes may lack what its workers ask for, or a folder that is on this machine alone. The local Ray of a run has
    what this machine has. Raises JobLost where the cluster does not answer.
    """
    if cluster.embedded:
        return
    to_run = [planned for planned in plans if planned.status == "run"]
    faults = [
        f"{pipeline.source}: {fault}" for fault in [*_places(cluster, to_run), *_paths(cluster, pipeline, to_run)]
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _places(cluster: Cluster, plans: Sequence[Planned]) -> Iterator[str]:
    if cluster.autoscales:  # and others may come
        return
    nodes = cluster.nodes()
    for planned in plans:
        resources = planned.instance.cfg.resources
        least = resources.min_workers if is_training(planned.instance.stage) else 1  # actors take turns
        try:
            check_places(planned.name, resources, nodes, least=least)
        except ValueError as error:
            yield str(error)


def _paths(cluster: Cluster, pipeline: Pipeline, plans: Sequence[Planned]) -> Iterator[str]:
    settings = {"store": pipeline.cfg.store}
    for planned in plans:
        where = f"stages.{planned.name}."
        settings |= config.locations(planned.instance.cfg, where)
        settings |= {f"{where}inputs.{role}": given.uri for role, given in planned.inputs.items()}
    here = {setting: _existing(place) for setting, place in settings.items() if local_path(place) is not None}
    within = {setting: path for setting, path in here.items() if not path.startswith(f"{here.get('store')}/")}
    absent = cluster.absent(sorted(set(within.values())))
    for setting, path in within.items():
        if path in absent:
            yield (
                f"{setting}: {path} is here and not on the cluster at {pipeline.cfg.ray.address}, where stages run; "
                "put it where every node finds it: under s3://, or in a folder that all of them mount by this path"
            )


def _existing(place: str) -> str:
    """The deepest folder or file of a path that is here: the rest may be a pattern, or be made later."""
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    return place
