"""Whether artifacts belong together: what each was made from, by name and by content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from genpipe.artifacts import CURVE, Artifact, Manifest, read_manifest
from genpipe.config import canonical_json

SOURCES = ("shard", "autoencoder", "clip", "text_encoder")
"""Roles whose fingerprint a part keeps in its `meta`: what it was trained for."""


def content_digest(artifact: Artifact) -> str:
    """The sha256 (hex) over the content of a committed artifact: every file but its pictures and its held-out curve.

    A fingerprint says how something was made. Training the same again on other hardware gives other weights under
    the same fingerprint, and they do not understand what was cached with the first. Raises ValueError if it is gone.
    """
    manifest = read_manifest(artifact.uri, check_files=False)
    if manifest is None:
        raise ValueError(f"{artifact.uri}: is no committed artifact (any more); make it again with `genpipe run`")
    files = {file.path: file.sha256 for file in manifest.files if not file.path.endswith((".png", CURVE))}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def check_made_from(inputs: Mapping[str, Artifact]) -> None:
    """Raise ValueError if one of `inputs` was made from other content than the inputs beside it hold.

    An artifact says so in `made_from` of its meta: the content digest of each that it was made from, by role.
    """
    digests: dict[str, str] = {}
    for name, artifact in inputs.items():
        for source, made_from in artifact.meta.get("made_from", {}).items():
            if source not in inputs:
                continue
            if source not in digests:
                digests[source] = content_digest(inputs[source])
            if made_from != digests[source]:
                raise ValueError(
                    f"{name}: {artifact.uri} was made from another {source} ({made_from[:12]}) than "
                    f"{inputs[source].uri} holds ({digests[source][:12]}); delete {artifact.uri} to have it made "
                    f"again, or restore the {source} it was made from"
                )


def check_lineage(inputs: Mapping[str, Artifact]) -> None:
    """Raise ValueError, naming the two, unless the artifacts of `inputs` were made for one another.

    A prior and a decoder speak the language of one CLIP, and a decoder draws the latents of one autoencoder: weights
    of another training, even of equal sizes, would give noise without an error.
    """
    for name, artifact in inputs.items():
        for source in SOURCES:
            if source not in inputs or source not in artifact.meta:
                continue
            trained, here = artifact.meta[source], inputs[source].fingerprint
            if trained != here:
                raise ValueError(
                    f"{name} was made with {source} {trained[:12]}, but {source} here is {here[:12]}; "
                    f"use the {source} it was made with, or make {name} again"
                )


def clips_behind(*artifacts: Artifact) -> frozenset[str]:
    """The fingerprints of the CLIPs that artifacts are, or that they were made with.

    From `meta`, so that it is known of what is only planned: `clip` of a part, `clips` of a system and its samples.
    What was committed before these had `clips` says it by its manifest.
    """
    found: set[str] = set()
    for artifact in artifacts:
        if artifact.kind == "clip":
            found.add(artifact.fingerprint)
        elif "clips" in artifact.meta:
            found.update(artifact.meta["clips"])
        elif "clip" in artifact.meta:
            found.add(artifact.meta["clip"])
        elif artifact.kind in ("system", "samples") and (manifest := read_manifest(artifact.uri)) is not None:
            found |= clips_behind(*manifest.inputs.values())
    return frozenset(found)


def clips_content_behind(artifact: Artifact) -> frozenset[str]:
    """The content digests of the CLIPs that a committed system, or its samples, was made with."""
    if (manifest := read_manifest(artifact.uri)) is None:  # samples may outlive their system
        return frozenset()
    made_from = (of.meta["made_from"] for of in manifest.inputs.values() if "made_from" in of.meta)
    behind = (clips_content_behind(of) for of in manifest.inputs.values() if of.kind == "system")
    return frozenset(digests["clip"] for digests in made_from if "clip" in digests).union(*behind)


def manifests_behind(*artifacts: Artifact) -> tuple[list[Manifest], list[Artifact]]:
    """The manifests of artifacts and of all that they were made from, each once, what was made last first.

    Beside them the artifacts whose manifests are gone, of which nothing more is known.
    """
    queue, found, gone = list(artifacts), dict[str, Manifest](), dict[str, Artifact]()
    for artifact in queue:
        if artifact.fingerprint in found or artifact.fingerprint in gone:
            continue
        manifest = read_manifest(artifact.uri, check_files=False)
        if manifest is None:
            gone[artifact.fingerprint] = artifact
        else:
            found[artifact.fingerprint] = manifest
            queue += manifest.inputs.values()
    return list(found.values()), list(gone.values())


def fingerprints_behind(*artifacts: Artifact) -> dict[str, tuple[str, ...]]:
    """The fingerprints of artifacts and of all that they were made from, by kind."""
    manifests, gone = manifests_behind(*artifacts)
    found: dict[str, tuple[str, ...]] = {}
    for artifact in [*(manifest.artifact for manifest in manifests), *gone]:
        found[artifact.kind] = (*found.get(artifact.kind, ()), artifact.fingerprint)
    return found
