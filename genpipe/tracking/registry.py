"""What registered models stand for: the artifacts that their runs committed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from genpipe.artifacts import Artifact
from genpipe.pipeline.plan import resolve_uri
from genpipe.tracking import jsonl
from genpipe.tracking.store import check, client_of, first_line, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

FINGERPRINT, ARTIFACT = "genpipe.fingerprint", "genpipe.artifact"
"""Tags of runs, of logged models and of registered versions: what they were made from, and where that is."""

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: of the newest release of a model, and of the one that a person has promoted."""

PAGE = 1000
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND", "ENDPOINT_NOT_FOUND")

MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


def resolve(uri: str, *, tracking_uri: str) -> Artifact:
    """The committed artifact at `uri`; of `models:/NAME@ALIAS` or `models:/NAME/VERSION` the one that it was made from.

    Raises ValueError where there is no such model, where it is none of genpipe's, or where its artifact is gone.
    """
    if not uri.startswith("models:"):
        return resolve_uri(uri)
    named = MODEL.fullmatch(uri)
    if named is None:
        raise ValueError(f"{uri}: write it as models:/NAME@ALIAS or models:/NAME/VERSION")
    check(tracking_uri)
    from mlflow.exceptions import MlflowException

    client = client_of(tracking_uri)
    try:
        if named["alias"]:
            version = client.get_model_version_by_alias(named["name"], named["alias"])
        else:
            version = client.get_model_version(named["name"], named["version"])
        tags = version.tags if ARTIFACT in version.tags else client.get_logged_model(_model_id(version)).tags
    except MlflowException as error:
        raise ValueError(
            f"{uri}: not found in MLflow at {redacted(tracking_uri)}: {redacted(first_line(error), of=tracking_uri)}"
        ) from None
    if ARTIFACT not in tags:
        raise ValueError(f"{uri}: not a model that genpipe made (it has no tag {ARTIFACT})")
    return resolve_uri(tags[ARTIFACT])


def register(client: MlflowClient, name: str, artifact: Artifact, *, model_id: str, run_id: str) -> str:
    """Make an artifact a version of the registered model `name`, once, with the alias CANDIDATE; the version.

    Characters that MLflow does not take in a name become dashes. The version is tagged with the artifact: MLflow's own
    databases forget which logged model it came from.
    """
    name = re.sub(r"[/:'\"`]", "-", name)
    found = [
        v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(FINGERPRINT) == artifact.fingerprint
    ]
    if found:
        return str(found[0].version)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {ARTIFACT: artifact.uri, FINGERPRINT: artifact.fingerprint}
    source = client.get_logged_model(model_id).artifact_location
    version = client.create_model_version(name, source=source, run_id=run_id, tags=tags, model_id=model_id)
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    return str(version.version)


def promote(name: str, version: str, *, tracking_uri: str) -> Artifact:
    """Give a version of a registered model, by its number or alias, the alias CHAMPION; the artifact that it is.

    Raises ValueError as `resolve` does.
    """
    from mlflow.exceptions import MlflowException

    uri = f"models:/{name}/{version}" if version.isdecimal() else f"models:/{name}@{version}"
    artifact, client = resolve(uri, tracking_uri=tracking_uri), client_of(tracking_uri)
    try:
        number = version if version.isdecimal() else client.get_model_version_by_alias(name, version).version
        client.set_registered_model_alias(name, CHAMPION, number)
    except MlflowException as error:
        raise ValueError(f"{uri}: {redacted(first_line(error), of=tracking_uri)}") from None
    return artifact


def registered(tracking_uri: str) -> dict[str, str]:
    """What of genpipe's an MLflow has registered: `NAME/VERSION` of each model, by the fingerprint of its artifact.

    Nothing where runs are kept in files. Raises ValueError where MLflow does not answer.
    """
    if tracking_uri == jsonl.URI:
        return {}
    check(tracking_uri)
    client, found, page = client_of(tracking_uri), {}, None
    while page != "":
        versions = client.search_model_versions(max_results=PAGE, page_token=page)
        for version in versions:
            if fingerprint := version.tags.get(FINGERPRINT) or _fingerprint(client, _model_id(version), version.run_id):
                found[fingerprint] = f"{version.name}/{version.version}"
        page = versions.token or ""
    return found


def _model_id(version: ModelVersion) -> str:
    """The id of the logged model that a version was made from."""
    return str(version.model_id or version.source.removeprefix("models:/"))


def _fingerprint(client: MlflowClient, model_id: str, run_id: str | None) -> str:
    """The fingerprint of what a version was made from: of its logged model, else of its run; empty if not genpipe's."""
    from mlflow.exceptions import MlflowException

    looks = [
        lambda: client.get_logged_model(model_id).tags,
        *([lambda: client.get_run(run_id).data.tags] if run_id else []),
    ]
    for look in looks:
        try:
            if fingerprint := look().get(FINGERPRINT):
                return str(fingerprint)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
    return ""
