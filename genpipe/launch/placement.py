"""What each worker of a stage asks a cluster for by name, and whether the nodes that are there can give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

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


def places(needs: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """How many workers the nodes take at once, each on one of them, while nobody else is there."""
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()) for node in nodes)


def check_places(stage: str, resources: Resources, nodes: Sequence[Node], *, least: int) -> None:
    """Raise ValueError where the nodes could never run `least` workers, with what each asks for and what there is."""
    needs = needs_of(resources)
    if (there := places(needs, nodes)) >= least:
        return
    found = f"{there} of {least} workers fit" if there else "no node has room for one worker"
    raise ValueError(
        f"stages.{stage}.resources: a worker takes {_described(needs)}, and {found}; there are {inventory(nodes)}. "
        "Lower them, correct their names, add nodes, or set ray.autoscales if nodes come when they are asked for"
    )


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
