"""What the tests of the sources share: small pictures, files in a folder or under S3, and reading it all."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from genpipe.data.samples import Reject, Sample
from genpipe.data.sources import Source, SourceConfig, open_source
from genpipe.storage import open_storage


def png(color: str | int = "red") -> bytes:
    """A picture of 8 pixels: of a named color, or one of many by number."""
    rgb = (color % 256, color // 256 % 256, 77) if isinstance(color, int) else color
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), rgb).save(buffer, "PNG")
    return buffer.getvalue()


def put(uri: object, files: dict[str, bytes | str]) -> None:
    """Write files into a folder, or under `s3://`."""
    storage = open_storage(str(uri))
    for name, content in files.items():
        storage.write(name, content.encode() if isinstance(content, str) else content)


def source(kind: str, path: object, *, part_size: int = 100, **options: Any) -> Source:
    """A source opened as a configuration file would have it."""
    settings = {"kind": kind, "path": str(path)} | options
    return open_source(TypeAdapter(SourceConfig).validate_python(settings), part_size=part_size)


def read_all(opened: Source) -> list[Sample | Reject]:
    return [item for part in opened.parts() for item in opened.read(part)]


def samples(opened: Source) -> dict[str, Sample]:
    return {item.key: item for item in read_all(opened) if isinstance(item, Sample)}


def rejects(opened: Source) -> list[tuple[str, str]]:
    return [(item.reason, item.source) for item in read_all(opened) if isinstance(item, Reject)]
