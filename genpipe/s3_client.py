"""The one S3 client of a process: the usual AWS settings say where it connects and as whom."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

CONNECTIONS = 128  # of a process at once
_CONNECTING = threading.Lock()  # threads may share clients, but not the session that makes them


def s3_client() -> Any:
    """boto3's client for this process and its present AWS settings, whose connections all storages share."""
    with _CONNECTING:
        return _connected(os.getpid(), tuple(kv for kv in os.environ.items() if kv[0].startswith("AWS_")))


def parse_time(told: Any) -> datetime:
    """A time as a service tells it: ISO 8601, RFC 822, or seconds since 1970.

    A listing has one in ISO 8601 for each object, and botocore's own parser took four fifths of the listing's CPU time.
    """
    from botocore.utils import parse_timestamp

    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(told)
    parsed: datetime = parse_timestamp(told)
    return parsed


@lru_cache(maxsize=4)
def _connected(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    from boto3.session import Session  # a new one, as boto3's own would remember earlier credentials
    from botocore.config import Config
    from botocore.session import Session as Core

    core = Core()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    retries: Any = {"max_attempts": 8, "mode": "adaptive"}
    config = Config(retries=retries, max_pool_connections=CONNECTIONS)
    return Session(botocore_session=core).client("s3", config=config)
