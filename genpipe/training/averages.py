"""Averages of weights that are made when the training is over (Karras et al. 2024, EDM2, section 3.2).

While it trains, snapshots of a few power-function averages are kept. Each is a mean of the weights of all steps so far
under a known profile, so that a linear combination of them is one under the combination of their profiles: the one that
comes closest to the profile of any other width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from genpipe import artifacts
from genpipe.artifacts import ASIDE, Artifact, Manifest
from genpipe.storage import Storage, join, open_storage
from genpipe.training.ema import WIDEST, gamma_of
from genpipe.weights import WEIGHTS_FILE, save_tensors

FOLDER = f"{ASIDE}averages/"
CLOSE = 0.05
"""Of a profile that is not met more closely, in shares of it, no weights are made."""

OF_THEIR_WEIGHTS = ("autoencoder", "clip")
"""Kinds whose `meta` has statistics of what their weights give, which others were trained on."""


class Average(NamedTuple):
    """A module's average of width `sigma_rel` after so many updates: its weights by name, fp32, on the CPU."""

    module: str
    sigma_rel: float
    updates: int
    weights: Mapping[str, Tensor]


@dataclass
class AverageStore:
    """The averages of one training, as parts of the artifact at `uri`; one safetensors file each.

    `fence` raises if this process may no longer write.
    """

    uri: str
    fence: Callable[[], None] = lambda: None

    def parts(self) -> list[str]:
        """Names of the finished parts, one for each time at which averages were kept, in order."""
        return sorted(artifacts.finished_parts(self.uri))

    def put(self, averages: Sequence[Average], *, samples_seen: int) -> None:
        """Keep averages of now, in the place of any of the same moment. Raises OSError."""
        with tempfile.TemporaryDirectory() as folder:
            below = Path(folder, FOLDER)
            below.mkdir(parents=True)
            for module, sigma_rel, updates, weights in averages:
                told = {"module": module, "sigma_rel": sigma_rel, "updates": updates, "samples_seen": samples_seen}
                file = below / f"{samples_seen:015d}-{module}-{sigma_rel:g}.safetensors"
                save_tensors(weights, file, metadata={"average": json.dumps(told)})
            artifacts.add_part(self.uri, _part(samples_seen), Path(folder), {}, fence=self.fence)

    def rewind(self, samples_seen: int) -> None:
        """Forget what is newer: training goes on from there, and comes by again."""
        for part in self.parts():
            if part > _part(samples_seen):
                artifacts.forget_part(self.uri, part)


def _part(samples_seen: int) -> str:
    return f"averages-{samples_seen:015d}"


def inner_product(t: np.ndarray, gamma: np.ndarray, u: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles, of exponent `gamma` up to `t` and `delta` up to `u`, broadcast.

    A profile up to t is (gamma + 1) s^gamma / t^(gamma + 1) for s < t, then 0 (EDM2, appendix C, algorithms 2 and 3).
    """
    ratio = (t / u) ** np.where(t < u, delta, -gamma)
    product: np.ndarray = (gamma + 1) * (delta + 1) * ratio / ((gamma + delta + 1) * np.maximum(t, u))
    return product


def combination(
    updates: Sequence[float], sigmas_rel: Sequence[float], *, at: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """How much of each average to take for the one of width `sigma_rel` after `at` updates, and how far that is off.

    The shares are those of least squares between profiles (EDM2, appendix C, algorithm 3), fp64, among those that add
    up to one, so that weights that stand still come out as they are: the paper's do so only nearly where snapshots are
    few. The error is the norm of the difference of the profiles by that of the one that is wanted.
    """
    t, gamma = np.array(updates, dtype=float), np.array([gamma_of(sigma) for sigma in sigmas_rel])
    wanted = np.array([float(at)]), np.array([gamma_of(sigma_rel)])
    among = inner_product(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    with_wanted = inner_product(t, gamma, *wanted)
    ones = np.ones((len(t), 1))
    system = np.block([[among, ones], [ones.T, np.zeros((1, 1))]])  # the last unknown is the multiplier of the sum
    shares = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=None)[0][:-1]
    norm = inner_product(*wanted, *wanted)[0]
    left = norm - 2 * shares @ with_wanted + shares @ among @ shares
    return shares, float(np.sqrt(max(left, 0.0) / norm))


def reconstruct(source: str, *, sigma_rel: float) -> tuple[Artifact, float]:
    """Commit a copy of a trained artifact whose weights are the average of width `sigma_rel`; the profile's error.

    It lies beside the source, under a fingerprint of both, and is made once. Buffers are those of the source; pictures
    and metrics, which are of other weights, are left out.

    Raises ValueError where there is nothing to make it from, or not enough to come close to its profile, and for kinds
    whose `meta` depends on their weights.
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"a width is more than 0 and less than {WIDEST:.3f}, that of the average of all steps alike")
    manifest = artifacts.read_manifest(source)
    if manifest is None:
        raise ValueError(f"{source}: is no committed artifact")
    if manifest.artifact.kind in OF_THEIR_WEIGHTS:
        raise ValueError(
            f"{source}: other stages are trained on what the weights of a {manifest.artifact.kind} give; "
            "train it with train.ema_sigma_rel instead"
        )
    storage = open_storage(manifest.artifact.uri)
    kept = _kept(storage, [file.path for file in manifest.files], module=manifest.artifact.kind)
    if not kept:
        raise ValueError(f"{source}: has no averages of its {manifest.artifact.kind}; train with train.ema_snapshots")
    updates, widths = [about["updates"] for about in kept.values()], [about["sigma_rel"] for about in kept.values()]
    shares, error = combination(updates, widths, at=max(updates), sigma_rel=sigma_rel)
    if error > CLOSE:
        raise ValueError(
            f"{source}: its {len(kept)} averages come no closer than {error:.0%} to the width {sigma_rel:g}; choose "
            "one that is closer to theirs, or train with more of them (train.ema_snapshots)"
        )
    averaged = _sum(storage, dict(zip(kept, shares.tolist(), strict=True)))
    return _commit_with(manifest, averaged, sigma_rel=sigma_rel), error


def _kept(storage: Storage, files: Sequence[str], *, module: str) -> dict[str, dict[str, Any]]:
    """By file, what the averages of a module among the files of an artifact say of themselves."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        if file.startswith(FOLDER):
            size = int.from_bytes(storage.read_range(file, offset=0, length=8), "little")
            header = json.loads(storage.read_range(file, offset=8, length=size))
            found[file] = json.loads(header["__metadata__"]["average"])
    return {file: about for file, about in found.items() if about["module"] == module and about["updates"]}


def _sum(storage: Storage, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The combination of averages by their files, one after the other, added up in fp64 and rounded to fp32."""
    total: dict[str, Tensor] = {}
    for file, share in shares.items():
        with tempfile.TemporaryDirectory() as folder:
            storage.download(file, path := Path(folder, "average"))
            for name, tensor in load_file(path).items():
                total[name] = total.get(name, 0.0) + share * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def _commit_with(manifest: Manifest, averaged: Mapping[str, Tensor], *, sigma_rel: float) -> Artifact:
    source = manifest.artifact
    stage, version = manifest.identity["stage"], manifest.identity["version"]
    settings = {"ema_sigma_rel": sigma_rel}
    identity = artifacts.identity(stage, version=version, settings=settings, inputs={"weights": source})
    fingerprint = artifacts.fingerprint(identity)
    uri = join(source.uri.rstrip("/").rpartition("/")[0], fingerprint[:16])
    target = Artifact(kind=source.kind, uri=uri, fingerprint=fingerprint, meta=source.meta)
    if there := artifacts.committed(target):
        return there
    storage = open_storage(source.uri)
    with tempfile.TemporaryDirectory() as folder:
        for file in manifest.files:
            if not file.path.startswith(ASIDE) and not file.path.endswith(".png"):
                storage.download(file.path, Path(folder, file.path))
        state = load_file(Path(folder, WEIGHTS_FILE))
        if unlike := sorted(n for n, t in averaged.items() if n not in state or state[n].shape != t.shape):
            raise ValueError(f"{source.uri}: {WEIGHTS_FILE} has no {unlike[0]} of the shape that its averages have")
        save_tensors({**state, **averaged}, Path(folder, WEIGHTS_FILE))
        return artifacts.commit(
            target,
            folder=Path(folder),
            identity=identity,
            config=manifest.config,
            inputs=manifest.inputs,
            metrics={},
            environment=manifest.environment | {"ema_sigma_rel": f"{sigma_rel:g}, from the averages of {source.uri}"},
        )
