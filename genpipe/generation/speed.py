"""What drawing costs: time, evaluations of networks, memory, and how large a system is."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.generation.systems import System
from genpipe.weights import count_parameters

SPEED = "speed/"
"""Stands before these numbers among the metrics of samples."""

DENOISERS = ("prior", "decoder")
"""Attributes of systems that are networks which are asked once a step or more, beside the upsamplers."""


@dataclass
class Meter:
    """Measures a system while it draws: `seconds`, and for how many `pictures` each network is `evaluated`."""

    system: System
    seconds: float = 0.0
    evaluated: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is drawn inside of the block, which must end with the pictures on the CPU."""
        hooks = [
            network.register_forward_pre_hook(partial(self._count, name), with_kwargs=True)
            for name, network in _denoisers(self.system).items()
        ]
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun
            for hook in hooks:
                hook.remove()

    def _count(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.evaluated[name] += len(first)


def _denoisers(system: System) -> dict[str, nn.Module]:
    own = {name: network for name in DENOISERS if isinstance(network := getattr(system, name, None), nn.Module)}
    return own | {f"upsampler_{i}": step.model for i, step in enumerate(system.cascade.steps)}


def parameters_of(system: Artifact) -> int:
    """Numbers in the weights of all parts of a committed system, those of encoders and autoencoders too."""
    manifest = read_manifest(system.uri, check_files=False)
    assert manifest is not None, "inputs are committed"
    return sum(count_parameters(fetch(part)) for part in manifest.inputs.values())


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors had on a GPU since `torch.cuda.reset_peak_memory_stats`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def speed_metrics(batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`speed/...` of batches, each of which says `pictures`, `seconds`, `evaluated`, `peak_bytes` and `parameters`.

    Pictures a second are those of one worker: the median of its batches, so that the first, which also warms up,
    counts for little where there are several. Evaluations are counted a picture, each of a pair for guidance.
    """
    pictures = sum(batch["pictures"] for batch in batches)
    evaluated: Counter[str] = Counter()
    for batch in batches:
        evaluated.update(batch["evaluated"])
    peak = max(batch["peak_bytes"] for batch in batches)
    return {
        f"{SPEED}pictures_per_second": statistics.median(batch["pictures"] / batch["seconds"] for batch in batches),
        **{f"{SPEED}evaluations_{name}": count / pictures for name, count in evaluated.items()},
        f"{SPEED}parameters": float(batches[0]["parameters"]),
        **({f"{SPEED}peak_gib": peak / 2**30} if peak else {}),
    }
