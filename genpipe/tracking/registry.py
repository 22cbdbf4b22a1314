"""What a registered model stands for: the artifact that its run committed."""

from __future__ import annotations

import re

from genpipe.artifacts import Artifact
from genpipe.pipeline.plan import resolve_uri
from genpipe.tracking.store import check, client_of, first_line, redacted

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
