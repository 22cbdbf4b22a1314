from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kustomize import build, containers

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra/kubernetes"
OVERLAYS = ["one-gpu", "many-gpus"]
CUSTOM = {path.stem: path for path in (Path(__file__).parent / "schemas").glob("*.json")}


@cache
def manifests(overlay: str) -> list[dict[str, Any]]:
    return build(KUBERNETES / overlay)


def strict(schema: Any) -> Any:
    """A schema that refuses fields that it does not know, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(each) for name, each in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@cache
def custom(kind: str) -> jsonschema.Draft202012Validator:
    schema = strict(json.loads(CUSTOM[kind].read_text()))
    schema["properties"]["metadata"] = {"type": "object"}  # checked by the API server itself
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid(overlay: str) -> None:
    for manifest in manifests(overlay):
        if manifest["kind"] in CUSTOM:
            custom(manifest["kind"]).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, "1.31", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_field_that_does_not_exist_is_refused(overlay: str) -> None:
    ray = next(each for each in manifests(overlay) if each["kind"] == "RayCluster")
    wrong = json.loads(json.dumps(ray))
    wrong["spec"]["workerGroupSpecs"][0]["template"]["spec"]["tolerance"] = []
    with pytest.raises(jsonschema.ValidationError, match="tolerance"):
        custom("RayCluster").validate(wrong)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_resource_stands_once(overlay: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests(overlay)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_never_held(overlay: str) -> None:
    """Every secret that a manifest refers to is in the README's commands, and none is a manifest."""
    assert not [each for each in manifests(overlay) if each["kind"] == "Secret"]
    text = json.dumps(manifests(overlay))
    named = set(re.findall(r'"secretRef": {"name": "([^"]+)"', text))
    named |= set(re.findall(r'"secretKeyRef": {"name": "([^"]+)"', text)) | {"genpipe-ray"}
    readme = (ROOT / "infra/README.md").read_text()
    told = set(re.findall(r"create secret generic (\S+)", readme))
    assert named <= told


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_have_few_rights_and_ask_for_what_they_need(overlay: str) -> None:
    found = containers(manifests(overlay))
    assert found
    for each in found:
        assert each["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= each["resources"]["requests"].keys() and "memory" in each["resources"]["limits"]
        assert ":" in each["image"] and not each["image"].endswith(":latest")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_groups_with_gpus_are_complete(overlay: str) -> None:
    [ray] = [each for each in manifests(overlay) if each["kind"] == "RayCluster"]
    groups = [group for group in ray["spec"]["workerGroupSpecs"] if group["groupName"].startswith("gpu")]
    assert groups
    for group in groups:
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        resources = container["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]
        assert {"nvidia.com/gpu"} <= {each["key"] for each in spec["tolerations"]}
        assert {"/cache", "/dev/shm"} == {each["mountPath"] for each in container["volumeMounts"]}
        assert group["minReplicas"] == 0, "no GPU is paid for while nothing runs"


def test_quotas_hold_what_the_groups_may_grow_to() -> None:
    for overlay in OVERLAYS:
        [ray] = [each for each in manifests(overlay) if each["kind"] == "RayCluster"]
        [queue] = [each for each in manifests(overlay) if each["kind"] == "ClusterQueue"]
        most = sum(
            group["maxReplicas"] * int(container["resources"]["requests"].get("nvidia.com/gpu", 0))
            for group in ray["spec"]["workerGroupSpecs"]
            for container in group["template"]["spec"]["containers"]
        )
        quota = sum(
            int(resource["nominalQuota"])
            for group in queue["spec"]["resourceGroups"]
            for flavor in group["flavors"]
            for resource in flavor["resources"]
            if resource["name"] == "nvidia.com/gpu"
        )
        assert quota == most > 0
