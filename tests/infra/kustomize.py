"""What of kustomize infra/kubernetes uses, by libraries of its formats: resources, JSON patches (RFC 6902), images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}


def build(folder: Path) -> list[dict[str, Any]]:
    """The manifests of an overlay, as `kustomize build` would print them."""
    top = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert top.keys() <= KNOWN, f"{folder}: {top.keys() - KNOWN} is not done here"
    found: list[dict[str, Any]] = []
    for name in top["resources"]:
        path = (folder / name).resolve()
        found += build(path) if path.is_dir() else [each for each in yaml.safe_load_all(path.read_text()) if each]
    for patch in top.get("patches", []):
        changes = jsonpatch.JsonPatch(yaml.safe_load((folder / patch["path"]).read_text()))
        chosen = [number for number, each in enumerate(found) if _is(each, patch["target"])]
        assert chosen, f"{folder}: no resource is {patch['target']}"
        for number in chosen:
            found[number] = changes.apply(found[number])
    for image in top.get("images", []):
        for each in containers(found):
            if each["image"].split(":")[0] == image["name"]:
                each["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every container of the manifests, wherever it stands."""
    found: list[dict[str, Any]] = []
    waiting: list[Any] = list(manifests)
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            found += each.get("containers", [])
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else []
    return found


def _is(manifest: dict[str, Any], target: dict[str, str]) -> bool:
    group, _, version = manifest["apiVersion"].rpartition("/")
    there = {"group": group, "version": version, "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    return target.items() <= there.items()
