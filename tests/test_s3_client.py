"""The S3 client: shared within a process, and its times are botocore's own."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import boto3
import pytest
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st

from genpipe.s3_client import parse_time, s3_client


@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC)), st.booleans())
def test_times_are_read_as_botocore_reads_them(time: datetime, fraction: bool) -> None:
    if not fraction:
        time = time.replace(microsecond=0)
    iso = time.isoformat().replace("+00:00", "Z")
    assert parse_time(iso) == parse_timestamp(iso) == time
    whole = time.replace(microsecond=0)
    for told in (format_datetime(whole, usegmt=True), int(whole.timestamp()), str(whole.timestamp())):
        assert parse_time(told) == parse_timestamp(told) == whole


def test_what_is_no_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="yesterday"):
        parse_time("yesterday")


def test_a_listing_and_a_header_tell_the_times_that_a_plain_client_sees(s3_server: str, tmp_path: Path) -> None:
    where, client, plain = {"Bucket": "genpipe", "Key": f"{tmp_path.name}/key"}, s3_client(), boto3.client("s3")
    client.put_object(**where, Body=b"x")
    assert client.head_object(**where)["LastModified"] == plain.head_object(**where)["LastModified"]
    listed, seen = (
        each.list_objects_v2(Bucket="genpipe", Prefix=f"{tmp_path.name}/")["Contents"] for each in (client, plain)
    )
    assert listed == seen


def test_a_process_has_one_client_for_its_settings(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3_client()
    assert s3_client() is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert s3_client() is not first
    reader, writer = os.pipe()
    if not (child := os.fork()):  # whose connections are its own
        try:
            os.write(writer, b"own" if s3_client() is not first else b"shared")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 10) == b"own"
