"""Files from outside the pipeline that numbers depend on: named by where they are and by what they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from genpipe.config import Config, Location
from genpipe.storage import open_storage, read_file


class PinnedFile(Config):
    """A file from outside the pipeline that numbers depend on."""

    weights: Location = Field(description="path or s3:// URI of the file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the file, in hexadecimal; see `sha256sum FILE`")


def read_pinned(file: PinnedFile) -> bytes:
    """The content of a pinned file. Raises FileNotFoundError, or ValueError where it is another content."""
    data = read_file(file.weights)
    _check(hashlib.sha256(data).hexdigest(), sha256=file.sha256, uri=file.weights)
    return data


def copy_pinned(uri: str, path: Path, *, sha256: str) -> None:
    """Copy a file of any size to `path`; raises as `read_pinned` does, and then leaves nothing there."""
    folder, slash, name = uri.rpartition("/")
    open_storage(folder or slash or ".").download(name, path)
    try:
        with path.open("rb") as file:
            _check(hashlib.file_digest(file, "sha256").hexdigest(), sha256=sha256, uri=uri)
    except ValueError:
        path.unlink()
        raise


def _check(found: str, *, sha256: str, uri: str) -> None:
    if found != sha256:
        raise ValueError(
            f"{uri}: sha256 is {found}, but the configuration asks for {sha256}; fetch the file again, or set sha256 "
            "to the former if this is the file you mean"
        )
