"""Storage where S3 is busy, refuses, breaks off or is away, and where credentials are wrong."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from botocore.config import Config

from genpipe.storage import S3Storage, open_storage


class MoodyS3(BaseHTTPRequestHandler):
    """An S3 server that answers each kind of request with what the name of the object asks for."""

    asked: ClassVar[Counter[str]] = Counter()
    content = bytes(range(256)) * 40

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        MoodyS3.asked[name] += 1
        first, again = MoodyS3.asked[name] == 1, MoodyS3.asked[name] > 2
        if name == "forbidden":
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif name == "missing":
            self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        elif name == "elsewhere":
            self.answer(404, b"<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>")
        elif name in ("down", "busy") and not (name == "busy" and again):
            self.answer(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>")
        elif name == "broken" and first:
            self.answer(200, self.content, sent=1000)
        elif name == "whole":
            self.answer(200, self.content)
        elif wanted := self.headers.get("Range"):
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            self.answer(206, self.content[int(start) : int(stop) + 1])
        else:
            self.answer(200, self.content)

    do_HEAD = do_PUT = do_GET

    def answer(self, status: int, body: bytes, *, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Storage]:
    MoodyS3.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), MoodyS3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    yield S3Storage("s3://bucket/prefix")
    server.shutdown()
    server.server_close()


def test_s3_that_is_busy_is_asked_again(moody: S3Storage) -> None:
    assert moody.read("busy") == MoodyS3.content and MoodyS3.asked["busy"] == 3


def test_a_body_that_breaks_off_is_asked_for_again(moody: S3Storage) -> None:
    assert moody.read("broken") == MoodyS3.content and MoodyS3.asked["broken"] == 2


def test_a_server_that_ignores_ranges_is_an_error(moody: S3Storage) -> None:
    assert moody.read_range("ranged", offset=3, length=4) == MoodyS3.content[3:7]
    with pytest.raises(OSError, match=f"whole: {len(MoodyS3.content)} bytes at offset 3 where 4 were expected"):
        moody.read_range("whole", offset=3, length=4)


def test_refusals_of_s3_name_the_object_and_the_remedy(moody: S3Storage, tmp_path: Path) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "file").write_bytes(b"x")
    for act in (
        lambda: moody.read("forbidden"),
        lambda: moody.stat("forbidden"),
        lambda: moody.write("forbidden", b""),
        lambda: moody.upload("forbidden", tmp_path / "file"),
        lambda: moody.download("forbidden", tmp_path / "copy"),
    ):
        with pytest.raises(PermissionError) as error:
            act()
        assert str(error.value).startswith(f"s3://bucket/prefix/forbidden: {endpoint} refused access (")
        assert str(error.value).endswith(
            "look at the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), what they may do "
            "with bucket bucket, and AWS_ENDPOINT_URL"
        )
    assert not (tmp_path / "copy").exists()
    with pytest.raises(FileNotFoundError) as missing:
        moody.read("missing")
    assert str(missing.value) == f"s3://bucket/prefix/missing: no such object at {endpoint}"
    with pytest.raises(FileNotFoundError) as missing:
        moody.read("elsewhere")
    assert str(missing.value) == (
        f"s3://bucket/prefix/elsewhere: {endpoint} has no bucket bucket; create it, or look at the name and at "
        "AWS_ENDPOINT_URL"
    )


def test_s3_that_stays_down_is_a_lost_connection(moody: S3Storage) -> None:
    moody.client = boto3.client("s3", config=Config(retries={"max_attempts": 1, "mode": "standard"}))
    with pytest.raises(ConnectionError, match=r"prefix/down: .* cannot be reached or keeps failing \(.*SlowDown"):
        moody.read("down")
    moody.client = boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=Config(retries={"max_attempts": 0}))
    with pytest.raises(ConnectionError, match=r"prefix/key: http://127.0.0.1:9 cannot be reached"):
        moody.read("key")
    with pytest.raises(ConnectionError, match=r"prefix: http://127.0.0.1:9 cannot be reached"):
        list(moody.list())


def test_s3_that_hangs_up_is_a_lost_connection(moody: S3Storage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=lambda: listener.accept()[0].close()).start()
        moody.client = boto3.client("s3", endpoint_url=endpoint, config=Config(retries={"max_attempts": 0}))
        with pytest.raises(ConnectionError, match=f"prefix/key: {endpoint} cannot be reached or keeps failing"):
            moody.read("key")


def test_wrong_and_missing_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match=r"s3://genpipe/here/key: .*SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"):
        open_storage("s3://genpipe/here").write("key", b"x")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"Unable to locate credentials.*look at the credentials"):
        list(open_storage("s3://genpipe/here").list())
