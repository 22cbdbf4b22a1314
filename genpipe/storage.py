"""Bytes in a local folder or under `s3://bucket/prefix`, behind one interface.

Keys are relative POSIX paths. A write is whole or absent: a reader never sees half of one. Credentials,
region and endpoint of S3 come from the usual AWS settings (AWS_ENDPOINT_URL names another server).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol


class Entry(NamedTuple):
    """One stored object: its key and its size in bytes."""

    key: str
    size: int


class Storage(Protocol):
    """Named bytes. Reading a key that is not there raises FileNotFoundError."""

    uri: str

    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def upload(self, key: str, path: Path) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def list(self, prefix: str = "") -> Iterator[Entry]: ...
    def delete(self, key: str) -> None: ...
    def delete_all(self, prefix: str = "") -> None: ...


def open_storage(uri: str) -> Storage:
    """The storage that a URI names: `s3://bucket/prefix`, or a folder (created at the first write)."""
    if uri.startswith("s3://"):
        return S3Storage(uri)
    if "://" in uri:
        scheme = uri.split("://")[0]
        raise ValueError(f"{uri}: storage of kind {scheme!r} is not supported; use a folder or s3://bucket/prefix")
    return LocalStorage(uri)


def join(uri: str, *parts: str) -> str:
    """`uri` with path components appended."""
    return "/".join([uri.rstrip("/"), *parts])


def local_path(uri: str) -> Path | None:
    """The folder behind a local URI, None for anything remote."""
    return None if "://" in uri else Path(uri)


class LocalStorage:
    """A folder."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with _replacing(self._path(key)) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def upload(self, key: str, path: Path) -> None:
        with _replacing(self._path(key)) as temporary:
            shutil.copyfile(path, temporary)

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path(key), path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        _check_prefix(prefix)
        start = self.root / prefix if not prefix or prefix.endswith("/") else (self.root / prefix).parent
        for folder, subfolders, files in os.walk(start):
            subfolders.sort()
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.endswith(_TEMPORARY):
                    yield Entry(key, path.stat().st_size)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def delete_all(self, prefix: str = "") -> None:
        for entry in list(self.list(prefix)):
            self.delete(entry.key)
        folder = self.root / prefix
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)


class S3Storage:
    """A prefix of an S3 bucket. Large files go up and down in concurrent parts."""

    def __init__(self, uri: str) -> None:
        import boto3
        from botocore.config import Config as BotoConfig

        self.uri = uri.rstrip("/")
        self.bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        self.prefix = prefix + "/" if prefix else ""
        retries: Any = {"max_attempts": 8, "mode": "adaptive"}
        self.client = boto3.client("s3", config=BotoConfig(retries=retries))

    def read(self, key: str) -> bytes:
        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        except self.client.exceptions.NoSuchKey:
            raise FileNotFoundError(f"{self.uri}/{key}") from None
        return body

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        self.client.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        from botocore.exceptions import ClientError

        try:
            with _replacing(path) as temporary:
                self.client.download_file(self.bucket, self._key(key), str(temporary))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
                raise FileNotFoundError(f"{self.uri}/{key}") from None
            raise

    def list(self, prefix: str = "") -> Iterator[Entry]:
        _check_prefix(prefix)
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
            for item in page.get("Contents", []):
                yield Entry(item["Key"].removeprefix(self.prefix), item["Size"])

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def delete_all(self, prefix: str = "") -> None:
        for entry in list(self.list(prefix)):
            self.delete(entry.key)

    def _key(self, key: str) -> str:
        return self.prefix + check_key(key)


def check_key(key: str) -> str:
    """`key` if it stays inside its storage; raises ValueError for absolute paths and `..`."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"unsafe storage key {key!r}: it must be a relative path without '..'")
    return key


def _check_prefix(prefix: str) -> None:
    if prefix:
        check_key(prefix)


_TEMPORARY = ".part"


class _replacing:
    """A temporary file beside `path` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=_TEMPORARY)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.temporary.chmod(0o644)
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
