"""Files from outside the pipeline that numbers depend on: named by where they are and by what they hold."""

from __future__ import annotations

import hashlib

from pydantic import Field

from genpipe.config import Config
from genpipe.storage import read_file


class PinnedFile(Config):
    """A file from outside the pipeline that numbers depend on."""

    weights: str = Field(description="path or s3:// URI of the file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the file, in hexadecimal; see `sha256sum FILE`")


def read_pinned(file: PinnedFile) -> bytes:
    """The content of a pinned file. Raises FileNotFoundError, or ValueError where it is another content."""
    data = read_file(file.weights)
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{file.weights}: sha256 is {found}, but the configuration asks for {file.sha256}; fetch the file again, "
            "or set sha256 to the former if this is the file you mean"
        )
    return data
