"""Bytes in a local folder or under `s3://bucket/prefix`, behind one interface.

Keys are relative POSIX paths. A write is whole or absent: a reader never sees half of one. Credentials,
region and endpoint of S3 come from the usual AWS settings (AWS_ENDPOINT_URL names another server).
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any, NamedTuple, Protocol, TypeVar

from typing_extensions import override

from genpipe.files import TEMPORARY, beside, link, replacing, write_through
from genpipe.s3_client import s3_client

T = TypeVar("T")
R = TypeVar("R")
BODY_ATTEMPTS = 3
REQUESTS = 32  # of one caller at once
PAGE = 1000  # objects that S3 lists or deletes with one request


class Entry(NamedTuple):
    """One stored object: its key, its size in bytes, and what changes with its content.

    `version` is the modification time in nanoseconds in a folder, the ETag under S3; `modified` is when it was written,
    in Unix time by the clock of whoever stores it.
    """

    key: str
    size: int
    version: str
    modified: float = 0.0


class Storage(Protocol):
    """Named bytes.

    A key that is not there raises FileNotFoundError, refused access PermissionError, and a service that cannot be
    reached or keeps failing ConnectionError; each names the key.
    """

    uri: str

    def read(self, key: str) -> bytes:
        """The whole content."""
        ...

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on; raises OSError where there are fewer."""
        ...

    def stat(self, key: str) -> Entry:
        """Size and version, without the content."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put `data` in the place of what is there."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Put `data` where nothing is; of several who do at once, one succeeds. Raises FileExistsError."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Put a local file's content in the place of what is there."""
        ...

    def writing(self, key: str) -> AbstractContextManager[Path]:
        """A local path to write to: what is there when the block ends well is put in the place of what is at `key`."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Write the content to a local file, whose folder is made if need be."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Everything whose key begins with `prefix`, also below it."""
        ...

    def folders(self) -> Iterator[str]:
        """The names of the folders right below, without looking into them."""
        ...

    def delete(self, key: str) -> None:
        """Delete one object, if it is there."""
        ...

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete objects, those that are there; of S3 a thousand with each request."""
        ...

    def delete_all(self, prefix: str = "") -> None:
        """Delete everything whose key begins with `prefix`."""
        ...


def open_storage(uri: str) -> Storage:
    """The storage that a URI names: `s3://bucket/prefix`, or a folder (created at the first write)."""
    if uri.startswith("s3://"):
        return S3Storage(uri)
    if "://" in uri:
        scheme = uri.split("://")[0]
        raise ValueError(f"{uri}: storage of kind {scheme!r} is not supported; use a folder or s3://bucket/prefix")
    return LocalStorage(uri)


def read_file(uri: str) -> bytes:
    """The bytes of a single file. Raises FileNotFoundError."""
    folder, slash, name = uri.rpartition("/")
    return open_storage(folder or slash or ".").read(name)


def join(uri: str, *parts: str) -> str:
    """`uri` with path components appended."""
    return "/".join([uri.rstrip("/"), *parts])


def relative(base: str, uri: str) -> str:
    """`uri` as seen from the folder `base`, where both lie in one store: `../../KIND/NAME`; else unchanged."""
    above = [base.rstrip("/").rsplit("/", depth)[0] for depth in (1, 2)]
    for depth, folder in enumerate(above, 1):
        if uri.startswith(f"{folder}/"):
            return "../" * depth + uri[len(folder) + 1 :]
    return uri


def resolve(base: str, uri: str) -> str:
    """Inverse of `relative`."""
    ups = 0
    while uri.startswith("../"):
        uri, ups = uri[3:], ups + 1
    return join(base.rstrip("/").rsplit("/", ups)[0], uri) if ups else uri


def at_once(action: Callable[[T], R], items: Iterable[T], *, requests: int = REQUESTS) -> list[R]:
    """`action(item)` of all items in order, `requests` of them at a time: a round trip each, which is mostly waiting.

    Raises what the first of them that fails raises; those that have not begun are dropped.
    """
    with ThreadPoolExecutor(requests, "requests") as pool:
        return list(pool.map(action, items))


def local_path(uri: str) -> Path | None:
    """The folder behind a local URI, None for anything remote."""
    return None if "://" in uri else Path(uri)


def open_object(storage: Storage, entry: Entry, *, block: int) -> io.BufferedReader:
    """An object as a seekable binary file that reads `block` bytes at a time."""
    return io.BufferedReader(_RangeFile(storage, entry), block)


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).absolute()
        self.uri = str(self.root)

    @override
    def read(self, key: str) -> bytes:
        with self._open(key) as file:
            return file.read()

    @override
    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        with self._open(key) as file:
            file.seek(offset)
            return _whole(file.read(length) or b"", uri=self.uri, key=key, offset=offset, length=length)

    @override
    def stat(self, key: str) -> Entry:
        path = self._path(key)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder")
        return _entry(key, path.stat())

    @override
    def write(self, key: str, data: bytes) -> None:
        with replacing(self._path(key)) as temporary:
            write_through(temporary, data)

    @override
    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with beside(path) as temporary:
            write_through(temporary, data)
            link(temporary, path)

    @override
    def upload(self, key: str, path: Path) -> None:
        with replacing(self._path(key)) as temporary:
            shutil.copyfile(path, temporary)

    @override
    def writing(self, key: str) -> AbstractContextManager[Path]:
        return replacing(self._path(key))

    @override
    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path(key), path)

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Links are followed, also those to folders, unless they lead back to where the walk came from.

        One that leads nowhere is listed, so that reading it can say so. Raises OSError for what cannot be looked at.
        """
        return self._list(prefix, follow=True)

    @override
    def folders(self) -> Iterator[str]:
        if self.root.is_dir():
            yield from sorted(path.name for path in self.root.iterdir() if path.is_dir())

    @override
    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    @override
    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    @override
    def delete_all(self, prefix: str = "") -> None:
        self.delete_many([entry.key for entry in self._list(prefix, follow=False)])
        folder = self.root / prefix
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)

    def _list(self, prefix: str, *, follow: bool) -> Iterator[Entry]:
        _check_prefix(prefix)
        start = self.root / prefix if not prefix or prefix.endswith("/") else (self.root / prefix).parent
        for folder, subfolders, files in os.walk(start, onerror=_unless_gone, followlinks=follow):
            subfolders[:] = sorted(name for name in subfolders if not _leads_back(Path(folder, name)))
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.endswith(TEMPORARY):
                    with suppress(FileNotFoundError):  # deleted since its folder was read
                        yield _entry(key, path.stat(follow_symlinks=os.path.exists(path)))

    def _open(self, key: str) -> io.FileIO:
        path = self._path(key)
        if not S_ISREG(path.stat().st_mode):
            raise OSError(f"{path} is no ordinary file")  # of a pipe or device the end might never come
        return path.open("rb", buffering=0)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)


class S3Storage(Storage):
    """A prefix of an S3 bucket. Large files go up and down in concurrent parts; failing requests are repeated."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        self.prefix = prefix + "/" if prefix else ""
        self.client = s3_client()

    @override
    def read(self, key: str) -> bytes:
        return self._get(key)

    @override
    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        if not length:
            return b""
        data = self._get(key, Range=f"bytes={offset}-{offset + length - 1}")
        return _whole(data, uri=self.uri, key=key, offset=offset, length=length)

    @override
    def stat(self, key: str) -> Entry:
        head = self._call(key, lambda: self.client.head_object(Bucket=self.bucket, Key=self._key(key)))
        return _object(key, head["ContentLength"], head)

    @override
    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda: self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data))

    @override
    def create(self, key: str, data: bytes) -> None:
        """By If-None-Match, which AWS, SeaweedFS and MinIO heed; a server that ignores it replaces the object."""
        where = {"Bucket": self.bucket, "Key": self._key(key)}
        try:
            self._call(key, lambda: self.client.put_object(**where, Body=data, IfNoneMatch="*"))
        except _Taken:
            if not self._holds(key, data):  # by an earlier try of this very request, whose answer was lost
                raise FileExistsError(f"{self.uri}/{key}: there already") from None

    @override
    def upload(self, key: str, path: Path) -> None:
        self._call(key, lambda: self.client.upload_file(str(path), self.bucket, self._key(key)))

    @override
    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, PurePosixPath(key).name)
            yield path
            self.upload(key, path)

    @override
    def download(self, key: str, path: Path) -> None:
        with replacing(path) as temporary:
            self._call(key, lambda: self.client.download_file(self.bucket, self._key(key), str(temporary)))

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(prefix):
            for item in page:
                if not item["Key"].endswith("/"):  # an empty object with which some tools mark a folder
                    yield _object(item["Key"].removeprefix(self.prefix), item["Size"], item)

    @override
    def folders(self) -> Iterator[str]:
        lister = self.client.get_paginator("list_objects_v2")
        pages = iter(lister.paginate(Bucket=self.bucket, Prefix=self.prefix, Delimiter="/"))
        while page := self._call("", lambda: next(pages, None)):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"].removeprefix(self.prefix).rstrip("/")

    @override
    def delete(self, key: str) -> None:
        self._call(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    @override
    def delete_many(self, keys: Iterable[str]) -> None:
        names = [self._key(key) for key in keys]
        at_once(self._delete, (names[first : first + PAGE] for first in range(0, len(names), PAGE)))

    @override
    def delete_all(self, prefix: str = "") -> None:
        at_once(self._delete, ([item["Key"] for item in page] for page in self._pages(prefix)))

    def _delete(self, names: Sequence[str]) -> None:
        """Delete up to `PAGE` objects, by their keys in the bucket."""
        what: Any = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        answer = self._call("", lambda: self.client.delete_objects(Bucket=self.bucket, Delete=what))
        for error in answer.get("Errors", []):
            raise PermissionError(f"{self.uri}: {error.get('Key')} is not deleted: {error.get('Message')}")

    def _pages(self, prefix: str) -> Iterator[Sequence[Any]]:
        """The objects under a prefix, up to `PAGE` at a time."""
        _check_prefix(prefix)
        lister = self.client.get_paginator("list_objects_v2")
        pages = iter(lister.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix))
        while page := self._call(prefix, lambda: next(pages, None)):
            if items := page.get("Contents"):
                yield items

    def _key(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _get(self, key: str, **options: Any) -> bytes:
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        def get() -> bytes:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key), **options)["Body"].read()
            return body

        def get_whole() -> bytes:  # boto repeats requests, but no body that breaks off
            for _ in range(BODY_ATTEMPTS - 1):
                with suppress(IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    return get()
            return get()

        return self._call(key, get_whole)

    def _holds(self, key: str, data: bytes) -> bool:
        with suppress(FileNotFoundError):
            return self.read(key) == data
        return False

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """The answer to a request, or an OSError that says what is wrong and what to look at."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return request()
        except (ClientError, BotoCoreError, Boto3Error) as error:
            # boto3's uploads wrap the client's error in one of their own that holds only its text.
            cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error
            raise self._explained(key, cause) from None

    def _explained(self, key: str, error: BaseException) -> OSError:
        from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

        where = f"{self.uri}/{key}".rstrip("/")
        endpoint = self.client.meta.endpoint_url
        answer: Any = getattr(error, "response", None) or {}  # None where the connection was cut
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = answer.get("Error", {}).get("Code", "")
        if code == "NoSuchBucket":
            remedy = "create it, or look at the name and at AWS_ENDPOINT_URL"
            return FileNotFoundError(f"{where}: {endpoint} has no bucket {self.bucket}; {remedy}")
        if status == 404:
            return FileNotFoundError(f"{where}: no such object at {endpoint}")
        if status in (401, 403) or isinstance(error, NoCredentialsError | PartialCredentialsError) or "Token" in code:
            return PermissionError(
                f"{where}: {endpoint} refused access ({error}); look at the credentials (AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), what they may do with bucket {self.bucket}, and "
                "AWS_ENDPOINT_URL"
            )
        if status in (409, 412):
            return _Taken(f"{where}: there already, or being written")
        if 0 < status < 500 or isinstance(error, ParamValidationError):
            return OSError(f"{where}: not a request that {endpoint} takes ({error}); look at AWS_DEFAULT_REGION too")
        return ConnectionError(
            f"{where}: {endpoint} cannot be reached or keeps failing ({error}); look at AWS_ENDPOINT_URL and at "
            "the service, then start again: finished parts are kept"
        )


def check_key(key: str) -> str:
    """`key` if it stays inside its storage; raises ValueError for absolute paths and `..`."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"unsafe storage key {key!r}: it must be a relative path without '..'")
    return key


def _check_prefix(prefix: str) -> None:
    if prefix:
        check_key(prefix)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _leads_back(path: Path) -> bool:
    """Whether a folder is a link to one that it was reached through."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(above.resolve() == target for above in path.parents)


def _entry(key: str, stat: os.stat_result) -> Entry:
    return Entry(key, stat.st_size, str(stat.st_mtime_ns), stat.st_mtime)


def _object(key: str, size: int, told: Any) -> Entry:
    """Of an object; a listing may tell parts of a second and the object's own header does not."""
    return Entry(key, size, told["ETag"].strip('"'), float(int(told["LastModified"].timestamp())))


def _whole(data: bytes, *, uri: str, key: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        raise OSError(
            f"{uri}/{key}: {len(data)} bytes at offset {offset} where {length} were expected: has it changed?"
        )
    return data


class _RangeFile(io.RawIOBase):
    """Reads of an object by ranges, for `open_object` to buffer."""

    def __init__(self, storage: Storage, entry: Entry) -> None:
        self.storage, self.entry, self.offset = storage, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.offset, os.SEEK_END: self.entry.size}[whence]
        self.offset = start + offset
        return self.offset

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.entry.size - self.offset))
        buffer[:length] = self.storage.read_range(self.entry.key, offset=self.offset, length=length)
        self.offset += length
        return length


class _Taken(OSError):
    """S3 did not put an object because there is one, or another request is about to put it."""
