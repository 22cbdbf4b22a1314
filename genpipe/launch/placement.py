"""What each worker of a stage asks a cluster for by name, and whether the nodes that are there can give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from genpipe.stage_config import Resources

Node = Mapping[str, float]
"""What a node has in all, by Ray's names: `CPU`, `GPU`, `memory` (bytes), `accelerator_type:H100`, custom ones."""

GIB = 2**30
ACCELERATOR = "accelerator_type:"
ACCELERATOR_SHARE = 0.001
"""Of a node's accelerator type, as Ray itself asks for it: a mark rather than an amount."""


def needs_of(resources: Resources) -> dict[str, float]:
    """What one worker takes, by Ray's names."""
    needs = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    if resources.memory is not None:
        needs["memory"] = resources.memory * GIB
    if resources.accelerator_type:
        needs[f"{ACCELERATOR}{resources.accelerator_type}"] = ACCELERATOR_SHARE
    return {name: amount for name, amount in needs.items() if amount}


def options_of(resources: Resources) -> dict[str, Any]:
    """What a worker takes, as Ray names it of a task or an actor."""
    needs = needs_of(resources)
    named: dict[str, Any] = {"num_cpus": needs.pop("CPU"), "num_gpus": needs.pop("GPU", None)}
    if "memory" in needs:
        named["memory"] = needs.pop("memory")
    if resources.placement:
        named["scheduling_strategy"] = {"PACK": "DEFAULT", "SPREAD": "SPREAD"}[resources.placement]
    return {**named, **({"resources": needs} if needs else {})}


def places(needs: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """How many workers the nodes take at once, each on one of them, while nobody else is there."""
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()) for node in nodes)


def check_places(stage: str, resources: Resources, nodes: Sequence[Node], *, least: int) -> None:
    """Raise ValueError where the nodes could never run `least` workers, with what each asks for and what there is.

    If `resources` ask for a process that validates beside them, it needs a place as well.
    """
    needs, taken, found = needs_of(resources), "", ""
    there = places(needs, nodes)
    if there < least:
        found = f"{there} of {least} workers fit" if there else "no node has room for one worker"
    elif resources.validator:
        taken = f", the process that validates beside them {_described(needs_of(resources.validator))}"
        if places_beside(resources, nodes) < least:
            found = f"no node has room for it beside {least} worker{'s' if least > 1 else ''}"
    if found:
        raise ValueError(
            f"stages.{stage}.resources: a worker takes {_described(needs)}{taken}, and {found}; there are "
            f"{inventory(nodes)}. Lower them, correct their names, add nodes, or set ray.autoscales if nodes come when "
            "they are asked for"
        )


def places_beside(resources: Resources, nodes: Sequence[Node]) -> int:
    """How many workers the nodes take at once beside the process that validates, on the node that suits it best."""
    assert resources.validator is not None, "there is such a process"
    beside, found = needs_of(resources.validator), 0
    for i, node in enumerate(nodes):
        if places(beside, [node]):
            left = {name: amount - beside.get(name, 0.0) for name, amount in node.items()}
            found = max(found, places(needs_of(resources), [*nodes[:i], left, *nodes[i + 1 :]]))
    return found


def inventory(nodes: Sequence[Node]) -> str:
    """The nodes with what they have, equal ones together: `2 nodes with 96 CPU, 8 GPU (H100), 1,000 GiB`."""
    kinds = Counter(_described(node) for node in nodes)
    said = [f"{count} node{'s' if count > 1 else ''} with {kind or 'nothing'}" for kind, count in kinds.items()]
    return "; ".join(said) or "no nodes"


def _described(amounts: Mapping[str, float]) -> str:
    types = [name.removeprefix(ACCELERATOR) for name in amounts if name.startswith(ACCELERATOR)]
    parts = []
    for name in ("CPU", "GPU"):
        if amounts.get(name):
            kinds = f" ({', '.join(types)})" if name == "GPU" and types else ""
            parts.append(f"{amounts[name]:g} {name}{kinds}")
    if types and not amounts.get("GPU"):
        parts.append(f"accelerator {', '.join(types)}")
    if amounts.get("memory"):
        parts.append(f"{amounts['memory'] / GIB:,.0f} GiB")
    rest = sorted(name for name in amounts if name not in ("CPU", "GPU", "memory", "object_store_memory"))
    return ", ".join(parts + [f"{amounts[name]:g} {name}" for name in rest if ":" not in name])
