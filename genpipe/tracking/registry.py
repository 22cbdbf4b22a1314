"""What registered models stand for: the artifacts that their runs committed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from genpipe.artifacts import Artifact
from genpipe.pipeline.plan import resolve_uri
from genpipe.tracking import jsonl
from genpipe.tracking.runs import FINGERPRINT
from genpipe.tracking.store import check, client_of, first_line, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
        model_id = version.model_id or version.source.removeprefix("models:/")
        tags = client.get_logged_model(model_id).tags
    except MlflowException as error:
        raise ValueError(
            f"{uri}: not found in MLflow at {redacted(tracking_uri)}: {redacted(first_line(error), of=tracking_uri)}"
        ) from None
    if "genpipe.artifact" not in tags:
        raise ValueError(f"{uri}: not a model that genpipe made (it has no tag genpipe.artifact)")
    return resolve_uri(tags["genpipe.artifact"])


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
            model_id = version.model_id or version.source.removeprefix("models:/")
            if fingerprint := _fingerprint(client, model_id, version.run_id):
                found[fingerprint] = f"{version.name}/{version.version}"
        page = versions.token or ""
    return found


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
